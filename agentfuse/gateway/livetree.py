"""A file tree that is a region of a mounted home, reached through its daemon."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import trio

from agentfuse.client import AsyncHome, Content, FileInfo, Part
from agentfuse.control.asks import SilentError
from agentfuse.control.registry import NoDaemonError, open_registry
from agentfuse.door.doors import OnCollision
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    ExistsError,
    NotFoundError,
    UnflushedError,
    UsageError,
    WrongTypeError,
)
from agentfuse.gateway.filetree import Body, NewFile, Node, Usage
from agentfuse.gateway.spool import Spooled
from agentfuse.home.tree import Home
from agentfuse.livefiles import OpenFile, open_content, where_of
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import Kind, printable

_PIECE = 256 * 1024


class LiveTree:
    """One region of the home at a mountpoint; a ``FileTree``.

    ``limiter``: of what reads contents to be put; ``readers``: of what reads those of the home.
    Also raises ``UnflushedError`` while no daemon answers: the home is being unmounted, or recovered.
    """

    def __init__(
        self,
        mountpoint: str | os.PathLike[str],
        region: str,
        limiter: trio.CapacityLimiter,
        readers: trio.CapacityLimiter,
    ) -> None:
        self._mountpoint = os.fspath(mountpoint)
        self._home = AsyncHome(mountpoint)
        self._region = region
        self._limiter = limiter
        self._readers = readers

    # -- the interface: see FileTree

    async def stat(self, path: bytes) -> Node:
        with _asking():
            return _node(await self._home.stat(self._at(path)))

    async def list(self, path: bytes, *, recursive: bool = False) -> Sequence[Node]:
        with _asking():
            found = self._home.list(self._at(path), recursive=recursive, brief=True)
            # A socket or a device is nothing that a tree has.
            return [
                _node(info) async for info in found if info.region == self._region and info.type in _KINDS
            ]

    async def open(self, path: bytes) -> LocalFile | LiveFile:
        with _asking():
            info = await self._home.stat(self._at(path))
        node = _node(info)
        if node.type != "file":
            raise WrongTypeError(f"{printable(path)!r} is no file")
        if not info.is_absent:
            local = await trio.to_thread.run_sync(self._open_local, path, node.etag, limiter=self._readers)
            if local is not None:
                return LocalFile(local, node)
        return await LiveFile.open(self._home, self._at(path), node)

    async def put(
        self,
        files: Sequence[NewFile],
        *,
        creator: Creator,
        on_collision: OnCollision = "replace",
        directories: Sequence[bytes] = (),
        if_match: str = "",
    ) -> Sequence[Node]:
        for path in directories:
            await self.mkdir(path, creator=creator, parents=True, exist_ok=True)
        bodies = [file.body for file in files if isinstance(file.body, Spooled)]
        if not if_match and len(bodies) == len(files) and len({body.place[0] for body in bodies}) == 1:
            return await self._put_spooled(files, bodies, creator, on_collision)
        return [await self._put(file, creator, on_collision, if_match) for file in files]

    async def delete(self, path: bytes, *, creator: Creator, recursive: bool = False) -> None:
        if not path:
            raise UsageError("the root cannot be removed")
        with _asking():
            await self._home.delete(self._at(path), recursive=recursive, creator=creator)

    async def move(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        if source == target:
            await self.stat(source)
            return
        replacing = await self._replacing(source, target, overwrite=overwrite)
        with _asking():
            await self._home.move(self._at(source), self._at(target), creator=creator, on_collision=replacing)

    async def copy(self, source: bytes, target: bytes, *, creator: Creator, overwrite: bool = False) -> None:
        if source == target:
            await self.stat(source)
            raise ExistsError(f"{printable(target)!r} exists already")
        replacing = await self._replacing(source, target, overwrite=overwrite)
        with _asking():
            await self._home.copy(self._at(source), self._at(target), creator=creator, on_collision=replacing)

    async def mkdir(
        self, path: bytes, *, creator: Creator, parents: bool = False, exist_ok: bool = False
    ) -> None:
        if not path:
            if not exist_ok:
                raise ExistsError("the root exists already")
            return
        with _asking():
            await self._home.mkdir(self._at(path), creator=creator, parents=parents, exist_ok=exist_ok)

    async def annotate(
        self, path: bytes, *, creator: Creator, mode: int | None = None, labels: bytes | None = None
    ) -> Node:
        if not path:
            raise UsageError("the root is as it is")
        with _asking():
            return _node(await self._home.annotate(self._at(path), mode=mode, labels=labels, creator=creator))

    async def set_frozen(self, path: bytes, frozen: bool, *, creator: Creator) -> Node:
        if not path:
            raise WrongTypeError("the root is a directory")
        with _asking():
            return _node(await self._home.set_frozen(self._at(path), frozen=frozen))

    async def usage(self) -> Usage:
        with _asking():
            regions = await self._home.regions()
        use = next((region for region in regions if region.name == self._region), None)
        if use is None:
            raise NotFoundError(f"there is no region {self._region!r}")
        return Usage(use.bytes_used, use.files_used, use.bytes_quota, use.files_quota)

    # -- steps

    def _at(self, path: bytes) -> str:
        return f"{self._region}/{os.fsdecode(path)}" if path else self._region

    def _open_local(self, path: bytes, etag: str) -> OpenFile | None:
        """The content that has this etag, from the home's backing tree.

        None if that is not seen from here, or has changed, or is made by the daemon: it is asked then.
        """
        try:
            record = open_registry(os.environ).find_live(self._mountpoint).record
            tree = Home(Path(record.state), record.execution).tree
            fd = open_content(tree, where_of(self._region, path), unlocks=False)
        except (OSError, AgentfuseError):
            return None
        file = OpenFile(fd, "", self._readers)
        if file.etag == etag:
            return file
        os.close(fd)
        return None

    async def _put_spooled(
        self, files: Sequence[NewFile], bodies: Sequence[Spooled], creator: Creator, on_collision: OnCollision
    ) -> Sequence[Node]:
        """Contents of one spool: the daemon reads them from its file, so they do not travel."""
        parts = [
            Part(os.fsdecode(file.path), body.place[1], body.size, file.mode)
            for file, body in zip(files, bodies, strict=True)
        ]
        if not all(file.path for file in files):
            raise WrongTypeError("the root is a directory")
        try:
            with _asking():
                made = await self._home.put_parts(
                    bodies[0].place[0], self._region, parts, creator=creator, on_collision=on_collision
                )
        except ExistsError:
            for file in files:
                await self._require_no_directory(file.path)
            raise
        except NotFoundError:
            with _asking():
                if await self._home.takes_parts(self._region):
                    raise
            return [await self._put(file, creator, on_collision, "") for file in files]
        return [
            Node(os.fsencode(put.path), "file", put.size, part.mode, time.time_ns(), creator)
            if put.facts is None  # somebody was fast
            else _node(put.facts)
            for part, put in zip(parts, made, strict=True)
        ]

    async def _require_no_directory(self, path: bytes) -> None:
        with suppress(NotFoundError):
            if (await self.stat(path)).is_dir:
                raise WrongTypeError(f"{printable(path)!r} is a directory")

    async def _put(self, file: NewFile, creator: Creator, on_collision: OnCollision, if_match: str) -> Node:
        if not file.path:
            raise WrongTypeError("the root is a directory")
        try:
            with _asking():
                put = await self._home.put(
                    _pieces(file.body, self._limiter),
                    self._at(file.path),
                    creator=creator,
                    on_collision=on_collision,
                    mode=file.mode,
                    if_match=if_match or None,
                    size=file.body.size,
                )
        except ExistsError:
            await self._require_no_directory(file.path)
            raise
        path = os.fsencode(put.path)
        try:
            return await self.stat(path)
        except NotFoundError:  # somebody was fast
            return Node(path, "file", file.body.size, file.mode, time.time_ns(), creator)

    async def _replacing(self, source: bytes, target: bytes, *, overwrite: bool) -> OnCollision:
        """What becomes of the target: a directory is never replaced."""
        if not source or not target:
            raise UsageError("the root cannot be moved, copied or replaced")
        if not overwrite:
            return "refuse"
        await self.stat(source)
        try:
            found = await self.stat(target)
        except NotFoundError:
            return "replace"
        if found.is_dir and not target.startswith(source + b"/"):
            raise ExistsError(f"{printable(target)!r} exists already")
        return "replace"


class LocalFile:
    """A file of a live home, open on the disk of this host: many times as fast as its daemon sends it."""

    def __init__(self, file: OpenFile, node: Node) -> None:
        self.node = node
        self._file = file

    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """As ``LiveFile.stream``."""
        end = self.node.size if length is None else min(offset + length, self.node.size)
        while offset < end:
            piece = await self._file.read(offset, min(_PIECE, end - offset))
            if not piece:
                raise BusyError("a file became shorter while it was being read", hint="read it again")
            offset += len(piece)
            yield piece

    async def aclose(self) -> None:
        """Let go of it; again is no mistake."""
        await self._file.aclose()


class LiveFile:
    """A file of a live home, open by its daemon; one that replaces it meanwhile is not seen."""

    def __init__(self, home: AsyncHome, at: str, node: Node) -> None:
        self.node = node
        self._home = home
        self._at = at
        self._opened = AsyncExitStack()
        self._content: Content[AsyncIterator[bytes]] | None = None

    @classmethod
    async def open(cls, home: AsyncHome, at: str, node: Node) -> LiveFile:
        """Begin to read what ``node`` describes, or whatever has its place by now."""
        file = cls(home, at, node)
        with _asking():
            content = await file._opened.enter_async_context(home.open(at))
        file._content = content
        file.node = replace(node, size=content.size, etag=content.etag)
        return file

    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """See ``OpenedFile.stream``; also raises ``BusyError``: the file became shorter meanwhile."""
        left = max(0, self.node.size - offset) if length is None else min(length, self.node.size - offset)
        if left <= 0:
            return
        with _asking():
            async with AsyncExitStack() as part:
                skipped, pieces = await self._from(offset, left, part)
                async for piece in pieces:
                    wanted = piece[skipped : skipped + left]
                    skipped -= min(skipped, len(piece))
                    left -= len(wanted)
                    if wanted:
                        yield wanted
                    if not left:
                        return

    async def _from(self, offset: int, length: int, part: AsyncExitStack) -> tuple[int, AsyncIterator[bytes]]:
        """The content, and how much of it comes before ``offset``."""
        if offset:
            asked = self._home.open(self._at, offset=offset, length=length, etag=self.node.etag)
            content = await part.enter_async_context(asked)
            if content.offset == offset:
                return 0, content.pieces
            # It has changed, or just now, so that nothing tells: what was opened first is the same still.
        if self._content is None:
            raise BusyError("a file changed while it was being read", hint="read it again")
        pieces, self._content = self._content.pieces, None
        return offset, pieces

    async def aclose(self) -> None:
        """Let go of it; again is no mistake."""
        await self._opened.aclose()


_KINDS = frozenset(("dir", "file", "symlink", "fifo"))


@contextmanager
def _asking() -> Iterator[None]:
    """A daemon that is not there says nothing about files."""
    try:
        yield
    except (NoDaemonError, SilentError) as error:
        raise UnflushedError(error.message, hint="ask again a little later") from error


async def _pieces(body: Body, limiter: trio.CapacityLimiter) -> AsyncIterator[bytes]:
    content = await trio.to_thread.run_sync(body.open, limiter=limiter)
    try:
        while piece := await trio.to_thread.run_sync(content.read, _PIECE, limiter=limiter):
            yield piece
    finally:
        content.close()


def _node(info: FileInfo) -> Node:
    created_at = info.modified_at if info.created_at is None else info.created_at
    return Node(
        os.fsencode(info.path),
        cast(Kind, info.type),
        info.size,
        int(info.mode, 8),
        int(info.modified_at * 1e9),
        info.created_by,
        info.etag,
        info.labels,
        int(created_at * 1e9),
        info.is_frozen,
    )
