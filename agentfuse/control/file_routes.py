"""The routes of files: list, facts, contents, put, delete, move. Paths are percent-encoded bytes."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import AsyncGenerator
from email.utils import formatdate

import trio

from agentfuse.control import paths
from agentfuse.control.contract import Content, MountControl, Page
from agentfuse.control.feeds import encode
from agentfuse.control.messages import (
    AnyQuery,
    Deleted,
    DeleteQuery,
    FileInfo,
    Listing,
    ListQuery,
    MoveRequest,
    Nothing,
    Placed,
    Put,
    PutQuery,
)
from agentfuse.control.route import Answer, AnyRoute, Call, Media, Reply, Route, Streamed
from agentfuse.control.transport import RequestError
from agentfuse.errors import EnvironmentProblem, UsageError

_PIECE = 256 * 1024
_encoders = trio.CapacityLimiter(2)
_RANGE = re.compile(rb"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_ANY = Media(("application/octet-stream",))


async def _list(control: MountControl, call: Call[ListQuery, Nothing]) -> Reply:
    """What a directory holds. Ask again with the answer's ``cursor`` until that is null."""
    asked = call.query
    page = await control.files.list(
        call.region,
        call.path,
        recursive=asked.recursive,
        limit=asked.limit,
        after=None if asked.cursor is None else _position(asked.cursor),
    )
    return Answer(await trio.to_thread.run_sync(_encoded, page, limiter=_encoders))


def _encoded(page: Page) -> bytes:
    """A page as JSON, entry by entry: at once, thousands of them would keep the mount for that long."""
    cursor = None if page.after is None else base64.urlsafe_b64encode(page.after).decode()
    entries = b",".join([encode(each.as_dict()) for each in page.entries])
    return b'{"entries":[%s],"cursor":%s}' % (entries, encode(cursor))


async def _stat(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """The facts of one name, a symlink's own."""
    return Answer((await control.files.stat(call.region, call.path)).as_dict())


async def _get(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """The content of a file, or of one ``Range`` of it. ``If-None-Match`` and ``If-Range`` take the ETag.

    An answer that ends before its Content-Length was cut off: the file became shorter meanwhile.
    """
    content = await control.files.open(call.region, call.path)
    try:
        return _content(content, call)
    except BaseException:
        await content.aclose()
        raise


def _content(content: Content, call: Call[AnyQuery, Nothing]) -> Reply:
    headers = [
        ("ETag", content.etag),
        ("Last-Modified", formatdate(content.modified_at, usegmt=True)),
        ("Accept-Ranges", "bytes"),
    ]
    if content.etag.encode() in re.split(rb"\s*,\s*", call.headers.get(b"if-none-match", b"")):
        return Streamed(content.mime, _pieces(content, 0, 0), 304, headers)
    begin, end, is_part = 0, content.size, False
    if call.headers.get(b"if-range", content.etag.encode()) == content.etag.encode():
        found = _range(call.headers.get(b"range", b""), content.size)
        if found is not None:
            begin, end, is_part = *found, True
            headers.append(("Content-Range", f"bytes {begin}-{end - 1}/{content.size}"))
    headers.append(("Content-Length", str(end - begin)))
    return Streamed(content.mime, _pieces(content, begin, end), 206 if is_part else 200, headers)


def _range(header: bytes, size: int) -> tuple[int, int] | None:
    """Begin and end of the one range asked for; None where the whole is the answer, as HTTP has it."""
    match = _RANGE.fullmatch(header)
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        begin, end = int(match[1]), min(int(match[2] or size), size - 1) + 1
        if match[2] and int(match[2]) < begin:
            return None
    else:
        begin, end = max(0, size - int(match[2])), size
    if begin >= size or begin >= end:
        raise RequestError(
            416,
            f"the file has {size} bytes",
            code="range_not_satisfiable",
            headers=[("Content-Range", f"bytes */{size}")],
        )
    return begin, end


async def _pieces(content: Content, begin: int, end: int) -> AsyncGenerator[bytes, None]:
    try:
        while begin < end:
            piece = await content.read(begin, min(_PIECE, end - begin))
            if not piece:
                raise EnvironmentProblem(
                    "a file became shorter while it was being read", hint="read it again"
                )
            begin += len(piece)
            yield piece
    finally:
        await content.aclose()


async def _put(control: MountControl, call: Call[PutQuery, Nothing]) -> Reply:
    """Make a file of the body. It appears whole, under its name, or not at all; it is on the disk then.

    The directories on the way are made. ``as``: whose it is. Without a Content-Length send it chunked.
    """
    assert call.content is not None
    asked = call.query
    path, size = await control.files.put(
        call.region,
        call.path,
        call.content,
        creator=asked.creator,
        size=call.size,
        on_collision=asked.on_collision,
    )
    return Answer(Put(call.region, os.fsdecode(path), size), status=201)


async def _delete(control: MountControl, call: Call[DeleteQuery, Nothing]) -> Reply:
    """Remove a file, or a directory."""
    asked = call.query
    await control.files.remove(call.region, call.path, creator=asked.creator, recursive=asked.recursive)
    return Answer(Deleted(call.region, os.fsdecode(call.path)))


async def _move(control: MountControl, call: Call[AnyQuery, MoveRequest]) -> Reply:
    """Give a file or a directory another name, in another region if need be, in one step."""
    asked = call.body
    old, new = paths.split(asked.source), paths.split(asked.target)
    if not old[1] or not new[1]:
        raise UsageError("a region itself cannot be moved", hint="name what is in it, like uploads/a.csv")
    path = await control.files.move(old, new, creator=asked.creator, on_collision=asked.on_collision)
    return Answer(Placed(new[0], os.fsdecode(path)))


def _position(cursor: str) -> bytes:
    try:
        return base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the cursor is none of ours", hint="pass on the one of the answer before") from None


ROUTES: tuple[AnyRoute, ...] = (
    Route("GET", "/v1/files/{region}", _list, Listing, query=ListQuery),
    Route("GET", "/v1/files/{region}/{path}", _list, Listing, query=ListQuery),
    Route("DELETE", "/v1/files/{region}/{path}", _delete, Deleted, query=DeleteQuery),
    Route("GET", "/v1/stat/{region}", _stat, FileInfo),
    Route("GET", "/v1/stat/{region}/{path}", _stat, FileInfo),
    Route("GET", "/v1/content/{region}/{path}", _get, _ANY),
    Route("PUT", "/v1/content/{region}/{path}", _put, Put, query=PutQuery, status=201, takes_content=True),
    Route("POST", "/v1/move", _move, Placed, body=MoveRequest),
)
