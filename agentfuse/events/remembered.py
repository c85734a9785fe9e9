"""What is known of an inbox's files, by their paths; what a next mount must know is in the home's log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import trio

from agentfuse.errors import AgentfuseError
from agentfuse.events import dropped
from agentfuse.events.bookmarks import Bookmarks, Drop
from agentfuse.events.dropped import NotReady


class Left(NamedTuple):
    """A file that could not be taken. ``retry_at``: not before, by trio's clock, nor without room for it."""

    identity: str
    size_bytes: int
    retry_at: float


class Remembered:
    """The files of one inbox. ``left``: those that could not be taken; ``refused``: those of which that was
    told; ``kept``: those that were put, but could not be removed. ``tree``: the region's directory.
    """

    def __init__(self, name: str, tree: Path, bookmarks: Bookmarks, limiter: trio.CapacityLimiter) -> None:
        self.left: dict[bytes, Left] = {}
        self.refused: dict[bytes, str] = {}
        self.kept: dict[bytes, str] = {}
        self._name = name
        self._tree = tree
        self._bookmarks = bookmarks
        self._limiter = limiter
        self._drops: dict[bytes, Drop] = {}

    def settle(self, root: int) -> None:
        """Finish what a run that died had begun: remove what is in the region already. Blocking.

        Before the mount, when nobody can have changed what it made.
        """
        self._drops = self._bookmarks.drops(self._name)
        for path, drop in list(self._drops.items()):
            if drop.since_ns:
                self._settle(root, path, drop)
            else:
                self.refused[path] = drop.identity

    def _settle(self, root: int, path: bytes, drop: Drop) -> None:
        try:
            fd = dropped.open_any(root, path)
        except (OSError, NotReady, AgentfuseError):
            pass  # it is not there any more
        else:
            try:
                st = os.fstat(fd)
                was_put = dropped.identity(st) == drop.identity and dropped.is_in(
                    self._tree, path, fd, drop.since_ns
                )
                if was_put and not dropped.remove(root, path, fd, st):
                    self.kept[path] = drop.identity  # somebody has it open
            except OSError:
                self.kept[path] = drop.identity
            finally:
                os.close(fd)
            if path in self.kept:
                return
        self._bookmarks.set_drop(self._name, path, None)
        del self._drops[path]

    async def was_put(self, path: bytes, fd: int, st: os.stat_result) -> bool:
        """Whether it was put before, and only not removed."""
        if self.kept.get(path) == dropped.identity(st):
            return True
        drop = self._drops.get(path)
        if drop is None or not drop.since_ns or drop.identity != dropped.identity(st):
            return False
        return await trio.to_thread.run_sync(
            dropped.is_in, self._tree, path, fd, drop.since_ns, limiter=self._limiter
        )

    async def note(self, path: bytes, drop: Drop | None) -> None:
        """Note what becomes of a file now, for a next mount as well; None: nothing any more."""
        await trio.to_thread.run_sync(self._bookmarks.set_drop, self._name, path, drop, limiter=self._limiter)
        if drop is None:
            self._drops.pop(path, None)
        else:
            self._drops[path] = drop

    async def forget_gone(self, there: set[bytes]) -> None:
        """Forget all files but those that are there."""
        for path in [path for path, drop in self._drops.items() if not drop.since_ns and path not in there]:
            await self.note(path, None)
        for known in (self.left, self.refused, self.kept):
            for path in [path for path in known if path not in there]:
                del known[path]
