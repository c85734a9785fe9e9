"""agentfuse for Python programs: a mounted home, from outside of it.

    from agentfuse.client import Home

    home = Home("/home/agent")
    home.put(b"a,b", "uploads/a.csv")
    for event in home.events(follow=True):
        print(event.kind, event.region, event.path)

``AsyncHome`` is the same, awaited, under trio or asyncio. Paths begin with a region: ``uploads/a.csv``; the
region of what is loose in the home is ``home``. Bytes of a path that are no UTF-8 are lone surrogates, as
``os.fsdecode`` makes them. Both talk to the mount's daemon on this host, as root or as the daemon's user;
every error is an ``agentfuse.errors.AgentfuseError``.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing, closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import anyio
import anyio.to_thread
import msgspec

from agentfuse.control import asks
from agentfuse.control.asks import Content
from agentfuse.control.client import AsyncControlClient, ControlClient
from agentfuse.control.feeds import encode
from agentfuse.control.messages import (
    Checkpoint,
    Event,
    FileInfo,
    Level,
    Listing,
    OnCollision,
    Placed,
    Put,
    PutPart,
    RegionInfo,
    RegionUse,
    Status,
)
from agentfuse.control.registry import NoDaemonError, PublishedMount, open_registry
from agentfuse.errors import AgentfuseError, BusyError, NotFoundError, UsageError
from agentfuse.regions import Creator

__all__ = [
    "AsyncHome",
    "Checkpoint",
    "Content",
    "Creator",
    "Event",
    "FileInfo",
    "Home",
    "OnCollision",
    "Part",
    "Placed",
    "Put",
    "PutPart",
    "RegionInfo",
    "RegionUse",
    "Status",
]

RESUME_S = 30.0
_POLL_S = 0.1
_PIECE = 256 * 1024
_PORTION, _PORTION_BYTES = 128, 48 * 1024  # a body has 64 KiB at most

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO
"""What is put: bytes, the path of a file, or a file that is open for reading bytes."""


class Part(NamedTuple):
    """A file to be made of ``size`` bytes of an open one: its path in the region, and its mode."""

    path: str
    offset: int
    size: int
    mode: int = 0o644


class _Patience:
    """How long one waits for a daemon to come back, from when it was heard last."""

    def __init__(self, resume_s: float) -> None:
        self._resume_s = resume_s
        self._deadline: float | None = None

    def heard(self) -> None:
        """It is there."""
        self._deadline = None

    def is_left(self) -> bool:
        """Whether to wait any longer."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._resume_s
        return now < self._deadline


class _Found:
    """Where the daemon of a mountpoint is."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        self.mountpoint = os.fspath(mountpoint)

    def socket(self) -> Path:
        """The control socket. Raises ``NotFoundError`` where nothing is mounted."""
        return self.entry().socket

    def entry(self) -> PublishedMount:
        return open_registry(os.environ).find_live(self.mountpoint)

    def is_back(self, execution: str) -> bool:
        """Whether the execution is mounted here now."""
        try:
            return self.entry().record.execution == execution
        except NotFoundError:
            return False


class Home:
    """A mounted home. Holds no connection: each call finds the daemon that serves the mountpoint then."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        self._found = _Found(mountpoint)

    @property
    def _client(self) -> ControlClient:
        return ControlClient(self._found.socket())

    def status(self) -> Status:
        """What the daemon knows of itself."""
        return self._client.ask(asks.status())

    def regions(self) -> list[RegionInfo]:
        """The regions, their settings and what they hold."""
        return self._client.ask(asks.regions()).regions

    def set_quota(
        self, region: str, *, bytes_quota: int | None = None, files_quota: int | None = None
    ) -> RegionInfo:
        """Change a region's quotas, for this execution."""
        return self._client.ask(asks.set_quota(region, bytes_quota=bytes_quota, files_quota=files_quota))

    def set_log_level(self, level: Level) -> None:
        """Have the daemon log from this level on."""
        self._client.ask(asks.set_log_level(level))

    def checkpoint(self) -> Checkpoint:
        """Begin to commit what is changed, and wait for nothing."""
        return self._client.ask(asks.checkpoint())

    def sync(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return when everything closed so far is in a snapshot, with each region's account.

        Raises ``UnflushedError`` when that takes longer than ``timeout_s`` (60 s).
        """
        done: dict[str, Any] = {}
        for line in self._client.sync(timeout_s=timeout_s):
            done = line.get("done", done)
        return done

    def events(
        self,
        *,
        since: int | None = None,
        follow: bool = False,
        region: str | None = None,
        resume_s: float = RESUME_S,
    ) -> Generator[Event, None, None]:
        """Events numbered higher than ``since``, or all that are kept; with ``follow`` those to come.

        Ends with the mount. When the daemon was killed instead, and the same execution is mounted again
        within ``resume_s``, it goes on where it was: each event comes once. If it is not, it raises
        ``NotFoundError`` or ``UnflushedError``.
        """
        execution = self._found.entry().record.execution
        patience = _Patience(resume_s)
        while True:
            try:
                with closing(self._client.events(since=since, region=region, follow=follow)) as lines:
                    for line in lines:
                        patience.heard()
                        if line:
                            yield msgspec.convert(line, Event)
                            since = line["seq"]
            except (NoDaemonError, asks.CutOffError) as error:
                problem: AgentfuseError = error
            else:
                return
            while follow and patience.is_left():
                time.sleep(_POLL_S)
                if self._found.is_back(execution):
                    break
            else:
                raise problem

    def put(
        self,
        source: Source,
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "replace",
        mode: int = 0o644,
        if_match: str | None = None,
    ) -> Put:
        """Make a file in a region: whole, under its name, or not at all; and say where it is.

        A ``target`` that ends in a slash takes the name of the source. The directories on the way are made.
        ``if_match``: only in place of the file whose ``etag`` is still this one.
        Raises ``QuotaExceededError``, ``ExistsError`` (with ``refuse``), ``BusyError`` when the source
        changes meanwhile, ``ChangedError`` when the target has, ``NotFoundError`` when there is no source.
        """
        ask = asks.put(
            _place(source, target),
            creator=str(creator),
            on_collision=on_collision,
            mode=mode,
            if_match=if_match,
        )
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)  # sent as one piece, httpx would copy what is left again and again
        if isinstance(source, str | os.PathLike):
            with _opened(source) as file:
                return self._client.put(ask, _pieces(file), _size_of(file))
        return self._client.put(ask, _pieces(source), _size_of(source))

    def open(
        self, path: str, *, offset: int = 0, length: int | None = None, etag: str | None = None
    ) -> AbstractContextManager[Content[Iterator[bytes]]]:
        """A file's content, or a part of it, in pieces. ``etag``: a part of this one only, else the whole.

        Raises ``UsageError`` for a part that begins at the end or behind it, and ``BusyError`` when it is
        cut off: the file became shorter meanwhile, or the daemon ended.
        """
        return self._client.content(asks.get(path, offset=offset, length=length, etag=etag))

    def get(self, path: str) -> bytes:
        """The content of a file."""
        with self.open(path) as content:
            return b"".join(content.pieces)

    def get_into(self, path: str, file: BinaryIO) -> int:
        """Write the content of a file into an open one; how many bytes that are. Raises as ``open`` does."""
        size = 0
        with self.open(path) as content:
            for piece in content.pieces:
                file.write(piece)
                size += len(piece)
        return size

    def list(self, path: str, *, recursive: bool = False, brief: bool = False) -> Iterator[FileInfo]:
        """What a region, or a directory in it, holds, in order of names.

        ``brief``: faster, no content is looked at, and types are by the name alone.
        """
        cursor: str | None = None
        while True:
            page: Listing = self._client.ask(asks.page(path, recursive=recursive, brief=brief, cursor=cursor))
            yield from page.entries
            cursor = page.cursor
            if cursor is None:
                return

    def stat(self, path: str) -> FileInfo:
        """The facts of one name, a symlink's own."""
        return self._client.ask(asks.stat(path))

    def delete(self, path: str, *, recursive: bool = False, creator: Creator | str = Creator.USER) -> None:
        """Remove a file, or a directory, which is empty unless ``recursive``."""
        self._client.ask(asks.delete(path, creator=str(creator), recursive=recursive))

    def move(
        self,
        source: str,
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "refuse",
    ) -> Placed:
        """Give a file or directory another name, in another region if need be, in one step."""
        return self._client.ask(asks.move(source, target, creator=str(creator), on_collision=on_collision))

    def copy(
        self,
        source: str,
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "refuse",
    ) -> Placed:
        """Copy a file, or a directory with all that is in it: whole, or not at all.

        Raises ``BusyError`` when a file changes meanwhile.
        """
        return self._client.ask(asks.copy(source, target, creator=str(creator), on_collision=on_collision))

    def mkdir(
        self,
        path: str,
        *,
        creator: Creator | str = Creator.USER,
        parents: bool = False,
        exist_ok: bool = False,
    ) -> None:
        """Make a directory; ``parents``: those that it is in as well."""
        self._client.ask(asks.mkdir(path, creator=str(creator), parents=parents, exist_ok=exist_ok))

    def annotate(
        self,
        path: str,
        *,
        mode: int | None = None,
        labels: bytes | None = None,
        creator: Creator | str = Creator.USER,
    ) -> FileInfo:
        """Change the permissions of a file or directory, or what is kept in its attribute ``user.labels``."""
        return self._client.ask(asks.annotate(path, mode=mode, labels=labels, creator=str(creator)))

    def set_frozen(self, path: str, *, frozen: bool = True) -> FileInfo:
        """Freeze a file: until that is undone nobody can change it, or take it away. Its facts then.

        Raises ``BusyError`` while somebody has it open for writing, ``WrongTypeError`` for what is no file.
        """
        return self._client.ask(asks.set_frozen(path, frozen=frozen))


class AsyncHome:
    """As ``Home``, awaited, under trio or asyncio."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        self._found = _Found(mountpoint)

    @property
    def _client(self) -> AsyncControlClient:
        return AsyncControlClient(self._found.socket())

    async def status(self) -> Status:
        """See ``Home.status``."""
        return await self._client.ask(asks.status())

    async def regions(self) -> list[RegionInfo]:
        """See ``Home.regions``."""
        return (await self._client.ask(asks.regions())).regions

    async def set_quota(
        self, region: str, *, bytes_quota: int | None = None, files_quota: int | None = None
    ) -> RegionInfo:
        """See ``Home.set_quota``."""
        return await self._client.ask(
            asks.set_quota(region, bytes_quota=bytes_quota, files_quota=files_quota)
        )

    async def set_log_level(self, level: Level) -> None:
        """See ``Home.set_log_level``."""
        await self._client.ask(asks.set_log_level(level))

    async def checkpoint(self) -> Checkpoint:
        """See ``Home.checkpoint``."""
        return await self._client.ask(asks.checkpoint())

    async def sync(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """See ``Home.sync``."""
        async with aclosing(self._client.lines(asks.sync(timeout_s))) as lines:
            async for line in lines:
                if "done" in line:
                    return dict(line["done"])
        raise asks.ended_early()

    async def events(
        self,
        *,
        since: int | None = None,
        follow: bool = False,
        region: str | None = None,
        resume_s: float = RESUME_S,
    ) -> AsyncGenerator[Event, None]:
        """See ``Home.events``. To stop early, leave the iteration within ``contextlib.aclosing``."""
        execution = self._found.entry().record.execution
        patience = _Patience(resume_s)
        while True:
            try:
                ask = asks.events(since=since, region=region, follow=follow)
                async with aclosing(self._client.lines(ask)) as lines:
                    async for line in lines:
                        patience.heard()
                        if line:
                            yield msgspec.convert(line, Event)
                            since = line["seq"]
            except (NoDaemonError, asks.CutOffError) as error:
                problem: AgentfuseError = error
            else:
                return
            while follow and patience.is_left():
                await anyio.sleep(_POLL_S)
                if self._found.is_back(execution):
                    break
            else:
                raise problem

    async def put(
        self,
        source: Source | AsyncIterable[bytes],
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "replace",
        mode: int = 0o644,
        if_match: str | None = None,
        size: int | None = None,
    ) -> Put:
        """See ``Home.put``. ``source`` may also be asynchronous pieces, ``size`` bytes if that is known."""
        ask = asks.put(
            _place(source, target),
            creator=str(creator),
            on_collision=on_collision,
            mode=mode,
            if_match=if_match,
        )
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        if isinstance(source, AsyncIterable):
            return await self._client.put(ask, source, size)
        if isinstance(source, str | os.PathLike):
            with _opened(source) as file:
                return await self._client.put(ask, _in_threads(_pieces(file)), _size_of(file))
        return await self._client.put(ask, _in_threads(_pieces(source)), _size_of(source))

    async def put_parts(
        self,
        fd: int,
        region: str,
        parts: Sequence[Part],
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "replace",
    ) -> list[PutPart]:
        """Make many files of a region, one after the other, of parts of one file that is open for reading.

        The daemon reads it itself, which is faster than ``put``; its bytes must stay until then. Each appears
        whole or not at all; what fails leaves those before it. Raises as ``Home.put`` does.
        """
        made: list[PutPart] = []
        for some in _portions(parts):
            ask = asks.put_parts(region, some, creator=str(creator), on_collision=on_collision)
            made += (await self._client.ask_with(fd, ask)).files
        return made

    async def takes_parts(self, region: str) -> bool:
        """Whether the daemon knows ``put_parts``: one that runs since before an update may not."""
        try:
            await self._client.ask(asks.put_parts(region, [], creator="user", on_collision="replace"))
        except NoDaemonError:
            raise
        except NotFoundError:
            return False
        return True

    def open(
        self, path: str, *, offset: int = 0, length: int | None = None, etag: str | None = None
    ) -> AbstractAsyncContextManager[Content[AsyncIterator[bytes]]]:
        """See ``Home.open``."""
        return self._client.content(asks.get(path, offset=offset, length=length, etag=etag))

    async def get(self, path: str) -> bytes:
        """See ``Home.get``."""
        async with self.open(path) as content:
            return b"".join([piece async for piece in content.pieces])

    async def get_into(self, path: str, file: BinaryIO) -> int:
        """See ``Home.get_into``."""
        size = 0
        async with self.open(path) as content:
            async for piece in content.pieces:
                await anyio.to_thread.run_sync(file.write, piece)
                size += len(piece)
        return size

    async def list(
        self, path: str, *, recursive: bool = False, brief: bool = False
    ) -> AsyncGenerator[FileInfo, None]:
        """See ``Home.list``."""
        cursor: str | None = None
        while True:
            page: Listing = await self._client.ask(
                asks.page(path, recursive=recursive, brief=brief, cursor=cursor)
            )
            for entry in page.entries:
                yield entry
            cursor = page.cursor
            if cursor is None:
                return

    async def stat(self, path: str) -> FileInfo:
        """See ``Home.stat``."""
        return await self._client.ask(asks.stat(path))

    async def delete(
        self, path: str, *, recursive: bool = False, creator: Creator | str = Creator.USER
    ) -> None:
        """See ``Home.delete``."""
        await self._client.ask(asks.delete(path, creator=str(creator), recursive=recursive))

    async def move(
        self,
        source: str,
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "refuse",
    ) -> Placed:
        """See ``Home.move``."""
        return await self._client.ask(
            asks.move(source, target, creator=str(creator), on_collision=on_collision)
        )

    async def copy(
        self,
        source: str,
        target: str,
        *,
        creator: Creator | str = Creator.USER,
        on_collision: OnCollision = "refuse",
    ) -> Placed:
        """See ``Home.copy``."""
        return await self._client.ask(
            asks.copy(source, target, creator=str(creator), on_collision=on_collision)
        )

    async def mkdir(
        self,
        path: str,
        *,
        creator: Creator | str = Creator.USER,
        parents: bool = False,
        exist_ok: bool = False,
    ) -> None:
        """See ``Home.mkdir``."""
        await self._client.ask(asks.mkdir(path, creator=str(creator), parents=parents, exist_ok=exist_ok))

    async def annotate(
        self,
        path: str,
        *,
        mode: int | None = None,
        labels: bytes | None = None,
        creator: Creator | str = Creator.USER,
    ) -> FileInfo:
        """See ``Home.annotate``."""
        return await self._client.ask(asks.annotate(path, mode=mode, labels=labels, creator=str(creator)))

    async def set_frozen(self, path: str, *, frozen: bool = True) -> FileInfo:
        """See ``Home.set_frozen``."""
        return await self._client.ask(asks.set_frozen(path, frozen=frozen))


def _place(source: object, target: str) -> str:
    """Where a source is put."""
    if hasattr(source, "encoding"):
        raise UsageError("the file was opened for text", hint='open it with mode "rb"')
    if not target.endswith("/"):
        return target
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"{target!a} is a directory", hint="end it with the file's name")
    return target + os.path.basename(os.fspath(source))


def _opened(source: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(source, "rb")
    except OSError as error:
        kind = NotFoundError if isinstance(error, FileNotFoundError) else UsageError
        raise kind(
            f"{os.fspath(source)!a} cannot be read: {error.strerror}", hint="name a file that is there"
        ) from error


def _size_of(file: BinaryIO) -> int | None:
    """What is left of a file that has an end; None of a pipe."""
    try:
        here = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(here)
    except (OSError, AttributeError):
        return None
    return max(0, end - here)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """What is in a file now, no more. Raises ``BusyError`` if it becomes shorter."""
    left = _size_of(file)
    while left is None or left > 0:
        piece = file.read(_PIECE if left is None else min(_PIECE, left))
        if not piece:
            if left is not None:
                raise BusyError("the file became shorter while it was being put", hint="put it again")
            return
        if left is not None:
            left -= len(piece)
        yield piece


async def _in_threads(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await anyio.to_thread.run_sync(next, pieces, b""):
        yield piece


def _portions(parts: Iterable[Part]) -> Iterator[list[dict[str, object]]]:
    """Parts, as many together as one request may name."""
    portion: list[dict[str, object]] = []
    length = 0
    for part in parts:
        item = part._asdict() | {"mode": f"{part.mode:03o}"}
        size = len(encode(item)) + 1
        if portion and (len(portion) == _PORTION or length + size > _PORTION_BYTES):
            yield portion
            portion, length = [], 0
        portion.append(item)
        length += size
    if portion:
        yield portion
