"""Paths in groups that can be joined: which names are one inode."""

from __future__ import annotations

from collections.abc import Iterable


class Groups:
    """Paths in groups that can be joined."""

    def __init__(self) -> None:
        self._above: dict[bytes, bytes] = {}

    def join(self, one: bytes, other: bytes) -> None:
        self._above[self._top(one)] = self._top(other)

    def numbers(self, order: Iterable[bytes]) -> dict[bytes, int]:
        """The number of each path's group, from 1 in the order given; lone paths have none."""
        members: dict[bytes, list[bytes]] = {}
        for path in order:
            if path in self._above:
                members.setdefault(self._top(path), []).append(path)
        groups = [paths for paths in members.values() if len(paths) > 1]
        return {path: number for number, paths in enumerate(groups, start=1) for path in paths}

    def _top(self, path: bytes) -> bytes:
        while (above := self._above.setdefault(path, path)) != path:
            self._above[path] = self._above[above]
            path = above
        return path
