"""A region of an execution as a file tree: of the mounted home while there is one, of its snapshots after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from agentfuse.door.doors import OnCollision
from agentfuse.gateway.filetree import FileTree, NewFile, Node, OpenedFile, Usage
from agentfuse.regions import Creator

Whereabouts = Callable[[bool], Awaitable[FileTree]]
"""The tree as it can be used now, to change it or only to read it; waits while it is on its way."""


class ExecutionTree:
    """A ``FileTree`` that asks for each call where the region is."""

    def __init__(self, now: Whereabouts) -> None:
        self._now = now

    async def stat(self, path: bytes) -> Node:
        return await (await self._now(False)).stat(path)

    async def list(self, path: bytes, *, recursive: bool = False) -> Sequence[Node]:
        return await (await self._now(False)).list(path, recursive=recursive)

    async def open(self, path: bytes) -> OpenedFile:
        return await (await self._now(False)).open(path)

    async def put(
        self,
        files: Sequence[NewFile],
        *,
        creator: Creator,
        on_collision: OnCollision = "replace",
        directories: Sequence[bytes] = (),
        if_match: str = "",
    ) -> Sequence[Node]:
        tree = await self._now(True)
        return await tree.put(
            files, creator=creator, on_collision=on_collision, directories=directories, if_match=if_match
        )

    async def delete(self, path: bytes, *, creator: Creator, recursive: bool = False) -> None:
        await (await self._now(True)).delete(path, creator=creator, recursive=recursive)

    async def move(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        await (await self._now(True)).move(source, target, creator=creator, overwrite=overwrite)

    async def copy(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        await (await self._now(True)).copy(source, target, creator=creator, overwrite=overwrite)

    async def mkdir(
        self, path: bytes, *, creator: Creator, parents: bool = False, exist_ok: bool = False
    ) -> None:
        await (await self._now(True)).mkdir(path, creator=creator, parents=parents, exist_ok=exist_ok)

    async def annotate(
        self, path: bytes, *, creator: Creator, mode: int | None = None, labels: bytes | None = None
    ) -> Node:
        return await (await self._now(True)).annotate(path, creator=creator, mode=mode, labels=labels)

    async def set_frozen(self, path: bytes, frozen: bool, *, creator: Creator) -> Node:
        return await (await self._now(True)).set_frozen(path, frozen, creator=creator)

    async def usage(self) -> Usage:
        return await (await self._now(False)).usage()
