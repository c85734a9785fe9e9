"""A file's content within a JSON document: made in the spool and sent from there, so it is known to be whole,
and text to be text, before anything of the answer is sent.
"""

from __future__ import annotations

import binascii
import codecs
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio
from starlette.responses import Response

from agentfuse.errors import UsageError
from agentfuse.gateway.downloads import Streamed
from agentfuse.gateway.filetree import OpenedFile
from agentfuse.gateway.shinzo.paths import absolute
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.home.mime import HEAD_BYTES, type_of

_PIECE = 256 * 1024


class _Encoder:
    """The text of a JSON string, in pieces, of a content."""

    def __init__(self, encoding: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")() if encoding == "utf-8" else None
        self._left = b""

    def encode(self, piece: bytes, *, final: bool = False) -> bytes:
        """Raises ``UsageError`` for what is no text."""
        if self._decoder is not None:
            try:
                return json.dumps(self._decoder.decode(piece, final))[1:-1].encode()
            except UnicodeDecodeError:
                raise UsageError("the file is not UTF-8 text", hint="read it with encoding=base64") from None
        data = self._left + piece
        whole = len(data) if final else len(data) // 3 * 3
        self._left = data[whole:]
        return binascii.b2a_base64(data[:whole], newline=False)


async def content_answer(
    opened: OpenedFile, path: bytes, encoding: str, spool: Path, limiter: trio.CapacityLimiter
) -> Response:
    """``{path, content, encoding, size, mime_type}`` of a file, which it closes. Raises ``UsageError`` for
    one that is not UTF-8 and asked for as such."""
    document = Spool(spool)
    try:
        try:
            body = await _document(opened, path, encoding, document, limiter)
        finally:
            await opened.aclose()
        rest = _pieces(body, limiter)
        first = await anext(rest)
    except BaseException:
        document.close()
        raise
    headers = {"Content-Length": str(body.size), "Content-Type": "application/json"}
    return Streamed(200, headers, _Closing(document), first, rest)


async def type_at(opened: OpenedFile) -> str:
    """The type of a file by its name and how it begins. Closes the file."""
    try:
        head = b"".join([piece async for piece in opened.stream(0, HEAD_BYTES)])
    finally:
        await opened.aclose()
    return type_of(opened.node.path, head)


async def _document(
    opened: OpenedFile, path: bytes, encoding: str, spool: Spool, limiter: trio.CapacityLimiter
) -> Spooled:
    encoder, size, head = _Encoder(encoding), 0, b""
    body = await trio.to_thread.run_sync(spool.begin, limiter=limiter)
    start = f'{{"path":{json.dumps(absolute(path))},"content":"'.encode()

    def write(piece: bytes, before: bytes, *, final: bool = False) -> None:
        body.write(before + encoder.encode(piece, final=final))

    async for piece in opened.stream():
        size += len(piece)
        head = head or piece[:HEAD_BYTES]
        await trio.to_thread.run_sync(write, piece, start, limiter=limiter)
        start = b""
    rest = {"encoding": encoding, "size": size, "mime_type": type_of(path, head)}
    end = f'",{json.dumps(rest)[1:]}'.encode()
    await trio.to_thread.run_sync(partial(write, b"", start, final=True), limiter=limiter)
    await trio.to_thread.run_sync(body.write, end, limiter=limiter)
    return body


class _Closing:
    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def aclose(self) -> None:
        self._spool.close()


async def _pieces(body: Spooled, limiter: trio.CapacityLimiter) -> AsyncIterator[bytes]:
    source = body.open()
    while piece := await trio.to_thread.run_sync(source.read, _PIECE, limiter=limiter):
        yield piece
