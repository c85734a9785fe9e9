"""Sending a file's content: exact Content-Length, one Range, ETag, never an encoding."""

from __future__ import annotations

import datetime
import re
from collections.abc import AsyncIterator
from email.utils import formatdate
from functools import lru_cache
from typing import Protocol
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agentfuse.gateway.filetree import Node, OpenedFile

_FIRST_S, _LAST_S = -62135596800, 253402300799  # of the years 1 and 9999
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


async def send_file(request: Request, file: OpenedFile, media_type: str) -> Response:
    """The answer to a GET or HEAD of a file. Takes the file over.

    The first piece is here before the answer begins, so that a store that fails is an error, not a file
    that breaks off.
    """
    node = file.node
    etag = f'"{node.etag}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Last-Modified": formatdate(calendar_seconds(node.mtime_ns / 1e9), usegmt=True),
        "Content-Disposition": _disposition(node),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }
    if _matches(request.headers.get("if-none-match", ""), etag):
        await file.aclose()
        return Response(status_code=304, headers=headers)
    start, end, status = 0, node.size, 200
    wanted = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if wanted and any(wanted.groups()) and request.headers.get("if-range", etag) == etag:
        start, end = _bounds(wanted[1], wanted[2], node.size)
        if start >= end:
            await file.aclose()
            headers = {"Content-Range": f"bytes */{node.size}", "Accept-Ranges": "bytes"}
            return Response(status_code=416, headers=headers)
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{node.size}"
    headers |= {"Content-Length": str(end - start), "Content-Type": media_type}
    if request.method == "HEAD":
        await file.aclose()
        return Streamed(status, headers, None, b"", None)
    stream = file.stream(start, end - start)
    try:
        first = await anext(stream, b"")
    except BaseException:
        await file.aclose()
        raise
    return Streamed(status, headers, file, first, stream)


class Closable(Protocol):
    """What a body is read from."""

    async def aclose(self) -> None:
        """Let go of what it holds."""


class Streamed(Response):
    """A body in pieces, and no task beside it: who went away is noticed by the connection."""

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        file: Closable | None,
        first: bytes,
        rest: AsyncIterator[bytes] | None,
    ) -> None:
        self.status_code = status
        self.background = None
        self.init_headers(headers)
        self._file = file
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            piece = self._first
            while piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = b"" if self._rest is None else await anext(self._rest, b"")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._file is not None:
                await self._file.aclose()


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """Start and end of a range; empty if it cannot be satisfied."""
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return 0, size  # not a valid range: as if there was none
    return int(first), min(int(last) + 1, size) if last else size


def _matches(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in (each.strip().removeprefix("W/") for each in header.split(","))


def _disposition(node: Node) -> str:
    return f"attachment; filename*=UTF-8''{quote(node.name, safe='')}"


def timestamp(ns: int) -> str:
    """``2025-01-15T10:30:00Z``."""
    return _timestamp(int(calendar_seconds(ns // 10**9)))


def calendar_seconds(seconds: float) -> float:
    """A time that is in the calendar: anybody may give a file any other."""
    return min(max(seconds, _FIRST_S), _LAST_S)


@lru_cache(maxsize=4096)  # most of a large listing's formatting; its files were often made together
def _timestamp(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
