"""An agent's files as one tree: its regions side by side, live ones or what is stored of an idle agent.

A path's first name is its region's. While an execution of the agent runs, all regions are those of its home,
and what is in none of them is loose in it. Of an idle agent there is what outlives executions: ``shared``,
and what else the configuration gives the agent's scope.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentfuse.admission import Quota
from agentfuse.errors import BusyError
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.filetree import FileTree, Node
from agentfuse.home.walk import join
from agentfuse.regions import LOOSE, PLATFORM, Creator, Region, Scope
from agentfuse.snapshots.entries import printable

USER = Creator.USER
"""Whose everything is that comes through this API."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path is: ``path`` in the ``tree`` of a region, whose paths begin with ``prefix``."""

    tree: FileTree
    region: str
    prefix: bytes
    path: bytes

    @property
    def is_region(self) -> bool:
        """Whether it is the region itself."""
        return not self.path

    def whole(self, node: Node) -> Node:
        """A node of this place's tree with its path from the root."""
        return replace(node, path=join(self.prefix, node.path) if node.path else self.prefix)


class Filesystem:
    """The files of one agent, for one request. ``trees``: by region, in order; ``absent``: the regions that
    there are only while an execution runs. ``home``: where the live home is mounted, None of an idle agent.
    """

    def __init__(
        self, trees: Mapping[str, FileTree], *, absent: Sequence[str] = (), home: Path | None = None
    ) -> None:
        self.home = home
        self._trees = trees
        self._absent = absent

    def place(self, path: bytes) -> Place:
        """Where a path is. Raises ``BusyError`` for a region that is not there now.

        The root is in none: ``DeniedError``, as nothing can be done to it."""
        first, _, rest = path.partition(b"/")
        name = os.fsdecode(first)
        if not path:
            raise DeniedError("the root cannot be changed", 403)
        if name in self._trees and name != LOOSE:
            return Place(self._trees[name], name, first, rest)
        if LOOSE in self._trees and name not in self._absent:
            return Place(self._trees[LOOSE], LOOSE, b"", path)
        there = ", ".join(sorted(self._trees))
        raise BusyError(
            f"{printable(first)!r} is there only while an execution of the agent runs; now there is {there}",
            hint='give the region scope = "agent" in the configuration if it shall outlive executions',
        )

    async def stat(self, path: bytes) -> Node:
        """The facts of a path, the root's too. Raises ``NotFoundError``."""
        if not path:
            return Node(b"", "dir", 0, 0o755, 0, Creator.SYSTEM)
        place = self.place(path)
        return place.whole(await place.tree.stat(place.path))

    async def list(self, path: bytes, *, recursive: bool = False) -> list[Node]:
        """What a directory holds, in order of path, paths from the root. See ``FileTree.list``."""
        if path:
            return await _list(self.place(path), recursive=recursive)
        found: list[Node] = []
        for name, tree in self._trees.items():
            prefix = b"" if name == LOOSE else os.fsencode(name)
            place = Place(tree, name, prefix, b"")
            if name != LOOSE:
                found.append(place.whole(await tree.stat(b"")))
            if name == LOOSE or recursive:
                listed = await _list(place, recursive=recursive)
                found += [node for node in listed if name != LOOSE or self._is_loose(node.path)]
        return sorted(found, key=lambda node: node.path.split(b"/"))

    def _is_loose(self, path: bytes) -> bool:
        """Of what the home's own root holds: no other region, and not what the platform has there."""
        first = os.fsdecode(path.partition(b"/")[0])
        return first not in self._trees and first != PLATFORM.name


async def _list(place: Place, *, recursive: bool) -> list[Node]:
    return [place.whole(node) for node in await place.tree.list(place.path, recursive=recursive)]


Live = Callable[[str, str], Awaitable[Filesystem | None]]
"""The files of the live home of an organization's agent, None if there is none."""


class Filesystems:
    """Finds the files of an agent. ``tree_of``: the stored tree of a region of an agent."""

    def __init__(
        self, regions: Sequence[Region], tree_of: Callable[[str, str, Quota], FileTree], live: Live
    ) -> None:
        self._kept = {r.name: Quota(r.bytes_quota, r.files_quota) for r in regions if r.scope is Scope.AGENT}
        self._absent = [r.name for r in regions if r.scope is not Scope.AGENT]
        self._tree_of = tree_of
        self._live = live

    async def of(self, organization: str, agent: str) -> Filesystem:
        """The files of an agent that is known to be the organization's."""
        live = await self._live(organization, agent)
        return live or self.idle(agent)

    def idle(self, agent: str) -> Filesystem:
        """What is stored of an agent."""
        trees = {name: self._tree_of(agent, name, quota) for name, quota in self._kept.items()}
        return Filesystem(trees, absent=self._absent)
