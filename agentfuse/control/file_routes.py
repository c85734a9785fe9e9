"""The routes of files: list, facts, contents, put, mkdir, delete, move, copy, attributes.

Paths are percent-encoded bytes.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import AsyncGenerator, Mapping
from email.utils import formatdate
from typing import Any

import msgspec
import trio

from agentfuse.control import paths
from agentfuse.control.contract import Content, MountControl, Page
from agentfuse.control.feeds import encode
from agentfuse.control.messages import (
    AnyQuery,
    AttributesChange,
    Deleted,
    DeleteQuery,
    FileInfo,
    Listing,
    ListQuery,
    Made,
    MkdirQuery,
    MoveRequest,
    Nothing,
    Placed,
    Put,
    PutParts,
    PutPartsRequest,
    PutQuery,
)
from agentfuse.control.route import Answer, AnyRoute, Call, Media, Reply, Route, Streamed
from agentfuse.control.transport import RequestError
from agentfuse.door.doors import Part
from agentfuse.errors import EnvironmentProblem, UsageError

_PIECE = 256 * 1024
_encoders = trio.CapacityLimiter(2)
_lookers = trio.CapacityLimiter(2)
_RANGE = re.compile(rb"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_ETAG = re.compile(rb'"([\x21\x23-\x7e]*)"')
_fast = msgspec.json.Encoder()
_ANY = Media(("application/octet-stream",))


async def _list(control: MountControl, call: Call[ListQuery, Nothing]) -> Reply:
    """What a directory holds. Ask again with the answer's ``cursor`` until that is null."""
    asked = call.query
    page = await control.files.list(
        call.region,
        call.path,
        recursive=asked.recursive,
        brief=asked.brief,
        limit=asked.limit,
        after=None if asked.cursor is None else _position(asked.cursor),
    )
    return Answer(await trio.to_thread.run_sync(_encoded, page, limiter=_encoders))


def _encoded(page: Page) -> bytes:
    """A page as JSON, entry by entry: at once, thousands of them would keep the mount for that long."""
    cursor = None if page.after is None else base64.urlsafe_b64encode(page.after).decode()
    entries = b",".join([_encoded_entry(each.as_dict()) for each in page.entries])
    return b'{"entries":[%s],"cursor":%s}' % (entries, encode(cursor))


def _encoded_entry(facts: dict[str, object]) -> bytes:
    try:
        return _fast.encode(facts)
    except UnicodeEncodeError:  # it refuses the lone surrogates of names that are no UTF-8
        return encode(facts)


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
    etag = f'"{content.etag}"'
    headers = [
        ("ETag", etag),
        ("Last-Modified", formatdate(content.modified_at, usegmt=True)),
        ("Accept-Ranges", "bytes"),
    ]
    if etag.encode() in re.split(rb"\s*,\s*", call.headers.get(b"if-none-match", b"")):
        return Streamed(content.mime, _pieces(content, 0, 0), 304, headers)
    begin, end, is_part = 0, content.size, False
    if call.headers.get(b"if-range", etag.encode()) == etag.encode():
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
    With ``If-Match`` it only replaces what has this one ETag still; else the answer is 412.
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
        mode=int(asked.mode, 8),
        if_match=_if_match(call.headers),
    )
    return Answer(Put(call.region, os.fsdecode(path), size), status=201)


async def _put_parts(control: MountControl, call: Call[AnyQuery, PutPartsRequest]) -> Reply:
    """Make files of parts of a descriptor.

    It is one of a regular file, open for reading, and comes along with the first bytes of the request
    (SCM_RIGHTS); its bytes must stay as they are. Each file appears whole or not at all, in this order, and
    is on the disk then; what fails leaves those before it. The directories on the way are made.
    """
    asked = call.body
    if not asked.files:
        return Answer({"files": []}, status=201)
    fd, size_bytes = await _sent_file(call)
    parts = [
        Part(paths.checked(os.fsencode(each.path)), each.offset, each.size, int(each.mode, 8))
        for each in asked.files
    ]
    if any(part.offset + part.size_bytes > size_bytes for part in parts):
        raise UsageError("the file that came along has fewer bytes", hint="name parts that it has")
    made = await control.files.put_parts(
        call.region, fd, parts, creator=asked.creator, on_collision=asked.on_collision
    )
    return Answer(
        {
            "files": [
                {
                    "region": call.region,
                    "path": os.fsdecode(path),
                    "size": size,
                    "facts": None if facts is None else facts.as_dict(),
                }
                for path, size, facts in made
            ]
        },
        status=201,
    )


async def _sent_file(call: Call[Any, Any]) -> tuple[int, int]:
    """The descriptor that came along and the size of its file. Raises ``UsageError`` if it is of no file."""
    if call.fd is not None:
        # In a thread: of a file in this very mount the kernel may ask us.
        st = await trio.to_thread.run_sync(os.fstat, call.fd, abandon_on_cancel=True, limiter=_lookers)
        if stat.S_ISREG(st.st_mode):
            return call.fd, st.st_size
    raise UsageError("no file came along", hint="send its descriptor with the request, by SCM_RIGHTS")


def _if_match(headers: Mapping[bytes, bytes]) -> str | None:
    header = headers.get(b"if-match")
    if header is None:
        return None
    match = _ETAG.fullmatch(header)
    if match is None:
        raise UsageError("If-Match takes one ETag", hint='write it as it was given, like "1f-5-18a"')
    return match[1].decode("ascii")


async def _mkdir(control: MountControl, call: Call[MkdirQuery, Nothing]) -> Reply:
    """Make a directory."""
    asked = call.query
    await control.files.mkdir(
        call.region, call.path, creator=asked.creator, parents=asked.parents, exist_ok=asked.exist_ok
    )
    return Answer(Made(call.region, os.fsdecode(call.path)), status=201)


async def _set_attributes(control: MountControl, call: Call[AnyQuery, AttributesChange]) -> Reply:
    """Change the permissions and labels of a file or directory, or whether a file is frozen."""
    asked = call.body
    if asked.is_frozen is False:
        await control.files.set_frozen(call.region, call.path, frozen=False)
    mode = None if asked.mode is None else int(asked.mode, 8)
    await control.files.annotate(
        call.region, call.path, creator=asked.creator, mode=mode, labels=asked.labels
    )
    if asked.is_frozen:
        await control.files.set_frozen(call.region, call.path, frozen=True)
    return Answer((await control.files.stat(call.region, call.path)).as_dict())


async def _delete(control: MountControl, call: Call[DeleteQuery, Nothing]) -> Reply:
    """Remove a file, or a directory."""
    asked = call.query
    await control.files.remove(call.region, call.path, creator=asked.creator, recursive=asked.recursive)
    return Answer(Deleted(call.region, os.fsdecode(call.path)))


async def _move(control: MountControl, call: Call[AnyQuery, MoveRequest]) -> Reply:
    """Give a file or a directory another name, in another region if need be, in one step."""
    asked = call.body
    old, new = _ends(asked)
    path = await control.files.move(old, new, creator=asked.creator, on_collision=asked.on_collision)
    return Answer(Placed(new[0], os.fsdecode(path)))


async def _copy(control: MountControl, call: Call[AnyQuery, MoveRequest]) -> Reply:
    """Copy a file, or a directory with all that is in it. It appears whole, or not at all.

    ``as``: whose the copy is. A file that changes meanwhile is not copied, and the answer is 409.
    """
    asked = call.body
    old, new = _ends(asked)
    path = await control.files.copy(old, new, creator=asked.creator, on_collision=asked.on_collision)
    return Answer(Placed(new[0], os.fsdecode(path)))


def _ends(asked: MoveRequest) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    old, new = paths.split(asked.source), paths.split(asked.target)
    if not old[1] or not new[1]:
        raise UsageError(
            "a region itself cannot be moved or copied", hint="name what is in it, like uploads/a.csv"
        )
    return old, new


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
    Route("POST", "/v1/parts/{region}", _put_parts, PutParts, body=PutPartsRequest, status=201),
    Route("POST", "/v1/directories/{region}/{path}", _mkdir, Made, query=MkdirQuery, status=201),
    Route("PATCH", "/v1/stat/{region}/{path}", _set_attributes, FileInfo, body=AttributesChange),
    Route("POST", "/v1/move", _move, Placed, body=MoveRequest),
    Route("POST", "/v1/copy", _copy, Placed, body=MoveRequest),
)
