"""Files, one at a time: read, create, update, patch, delete."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NoReturn
from weakref import WeakValueDictionary

import trio
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import (
    BusyError,
    ChangedError,
    ExistsError,
    NotFoundError,
    UsageError,
    WrongTypeError,
)
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import JsonAnswer, query_of
from agentfuse.gateway.downloads import send_file
from agentfuse.gateway.filetree import NewFile, Node, OpenedFile
from agentfuse.gateway.shinzo.desk import Desk, flag, now, number, permissions_of, query_flag, written
from agentfuse.gateway.shinzo.filesystem import USER, Place
from agentfuse.gateway.shinzo.paths import absolute, agent_of, path_of
from agentfuse.gateway.shinzo.reading import content_answer, type_at
from agentfuse.gateway.shinzo.uploads import Upload, encoding_of, read_upload
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.snapshots.entries import printable

_OPERATIONS = ("append", "prepend", "insert", "replace")
_TRIES = 200
_AGAIN_S = 0.02
"""A live file that was changed a moment ago is not trusted to be the same until its time is older."""


class Files:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._patching: WeakValueDictionary[tuple[str, str, bytes], trio.Lock] = WeakValueDictionary()

    async def read(self, request: Request) -> Response:
        """Read a file: its content as text, or in base64, within JSON; or, with `download=true`, as it is."""
        path, encoding = path_of(request), encoding_of({"encoding": query_of(request, "encoding") or None})
        is_download = query_flag(request, "download")
        files = await self._desk.open(request)
        place = files.place(path) if path else _refuse_directory(path)
        if is_download:
            media_type = await type_at(await place.tree.open(place.path))
            return await send_file(request, await place.tree.open(place.path), media_type)
        opened = await place.tree.open(place.path)
        return await content_answer(opened, path, encoding, self._desk.spool, self._desk.limits.spool)

    async def create(self, request: Request) -> Response:
        """Create a file and the directories it is in. The agent begins to exist if need be."""
        path = path_of(request)
        with Spool(self._desk.spool) as spool:
            upload = await self._upload(request, spool)
            overwrite, mode = flag(upload.fields, "overwrite"), permissions_of(upload.fields)
            place = (await self._desk.open_to_create(request, path)).place(path)
            await _refuse_to_be_directory(place, path)
            file = NewFile(place.path, _content_of(upload), 0o644 if mode is None else mode)
            (node,) = await place.tree.put(
                [file], creator=USER, on_collision="replace" if overwrite else "refuse"
            )
        return JsonAnswer(written(place.whole(node), "created_at"), 201)

    async def update(self, request: Request) -> Response:
        """Replace what a file holds. Its permissions and tags stay."""
        path = path_of(request)
        with Spool(self._desk.spool) as spool:
            upload = await self._upload(request, spool)
            content = _content_of(upload)
            place = (await self._desk.open(request)).place(path)
            there = await _file_at(place)
            (node,) = await place.tree.put([NewFile(place.path, content, there.mode)], creator=USER)
        return JsonAnswer(written(place.whole(node), "updated_at"))

    async def patch(self, request: Request) -> Response:
        """Change a part of a file. Positions are bytes. What others do to the file meanwhile is not lost."""
        path = path_of(request)
        with Spool(self._desk.spool) as spool:
            change = _Change.of(await self._upload(request, spool))
            files = await self._desk.open(request)
            place = files.place(path)
            key = (key_of(request).organization, agent_of(request), path)
            lock = self._patching.setdefault(key, trio.Lock())
            async with lock:
                node = await self._patched(place, change, is_live=files.home is not None)
        return JsonAnswer(written(place.whole(node), "updated_at"))

    async def delete(self, request: Request) -> Response:
        """Delete a file."""
        path = path_of(request)
        place = (await self._desk.open(request)).place(path)
        if (await place.tree.stat(place.path)).is_dir:
            _refuse_directory(path)
        await place.tree.delete(place.path, creator=USER)
        return JsonAnswer({"message": "File deleted.", "path": absolute(path), "deleted_at": now()})

    async def _upload(self, request: Request, spool: Spool) -> Upload:
        return await read_upload(request, spool, self._desk.limits.spool, self._desk.max_request_bytes)

    async def _patched(self, place: Place, change: _Change, *, is_live: bool) -> Node:
        for _ in range(_TRIES):
            with Spool(self._desk.spool) as spool:
                opened = await place.tree.open(place.path)
                there = opened.node
                try:
                    if is_live and abs(time.time_ns() - there.mtime_ns) < _AGAIN_S * 1e9:
                        await trio.sleep(_AGAIN_S)
                        continue
                    body = await self._applied(opened, change, spool)
                    (node,) = await place.tree.put(
                        [NewFile(place.path, body, there.mode)], creator=USER, if_match=there.etag
                    )
                except (ChangedError, BusyError):  # also while it was being read
                    await trio.sleep(_AGAIN_S)
                else:
                    return node
                finally:
                    await opened.aclose()
        raise BusyError("the file is being changed all the time", hint="try again")

    async def _applied(self, opened: OpenedFile, change: _Change, spool: Spool) -> Spooled:
        start, end = change.range_in(opened.node.size)
        limiter = self._desk.limits.spool
        body = await trio.to_thread.run_sync(spool.begin, limiter=limiter)
        await _copy(opened.stream(0, start), body, limiter)
        source = change.content.open()
        while piece := await trio.to_thread.run_sync(source.read, 1024 * 1024, limiter=limiter):
            await trio.to_thread.run_sync(body.write, piece, limiter=limiter)
        await _copy(opened.stream(end, opened.node.size - end), body, limiter)
        return body


@dataclass(frozen=True, slots=True)
class _Change:
    """A patch: ``content`` instead of ``length`` bytes at ``position``."""

    operation: str
    content: Spooled
    position: int | None
    length: int

    @classmethod
    def of(cls, upload: Upload) -> _Change:
        operation = upload.fields.get("operation")
        if operation not in _OPERATIONS:
            raise UsageError(f"operation must be one of {', '.join(_OPERATIONS)}")
        content = _content_of(upload)
        position, length = number(upload.fields, "position"), number(upload.fields, "length")
        if operation in ("insert", "replace") and position is None:
            raise UsageError(f"position is missing: {operation} needs one")
        return cls(operation, content, position, content.size if length is None else length)

    def range_in(self, size: int) -> tuple[int, int]:
        """What of a file of this size the content stands for."""
        match self.operation:
            case "append":
                return size, size
            case "prepend":
                return 0, 0
        assert self.position is not None
        if self.operation == "insert":
            if self.position > size:
                raise UsageError(f"position {self.position:,} is behind the end: the file has {size:,} bytes")
            return self.position, self.position
        if self.position >= size:
            raise UsageError(f"there is nothing at position {self.position:,}: the file has {size:,} bytes")
        return self.position, min(size, self.position + self.length)


async def _copy(stream: AsyncIterator[bytes], body: Spooled, limiter: trio.CapacityLimiter) -> None:
    async for piece in stream:
        await trio.to_thread.run_sync(body.write, piece, limiter=limiter)


def _content_of(upload: Upload) -> Spooled:
    if upload.body is None:
        raise UsageError("content is missing")
    return upload.body


async def _file_at(place: Place) -> Node:
    node = await place.tree.stat(place.path)
    if node.type != "file":
        raise WrongTypeError(f"{printable(place.whole(node).path)!r} is a {node.type}")
    return node


async def _refuse_to_be_directory(place: Place, path: bytes) -> None:
    """A directory of that name is there already; one on the way that is a file is another mistake."""
    try:
        node = await place.tree.stat(place.path)
    except (NotFoundError, UsageError):
        return
    if node.is_dir:
        raise ExistsError(f"{printable(path)!r} is a directory")


def _refuse_directory(path: bytes) -> NoReturn:
    raise WrongTypeError(f"{printable(path) or '/'!r} is a directory", hint="list it")
