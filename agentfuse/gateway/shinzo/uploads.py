"""Bodies that bring a content in JSON: it goes to the spool as it comes, and is decoded from there, so that
none of it is held in memory, however long it is.
"""

from __future__ import annotations

import binascii
import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from starlette.requests import Request

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import TooLargeError, pieces
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.sync.upload import Readable

ENCODINGS = ("utf-8", "base64")

_GATHER_BYTES = 256 * 1024
_MAX_REST_BYTES = 1024 * 1024
_OUTSIDE = re.compile(rb'["{}\[\]:,]')
_INSIDE = re.compile(rb'["\\]')
_HEX = "[0-9a-fA-F]"
# Whole characters and escapes; an escape that may be the first half of one character only with what follows.
_WHOLE = re.compile(
    r'(?:[^\\]+|\\(?:["\\/bfnrt]'
    rf"|u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"
    rf"|u(?![dD][89abAB]){_HEX}{{4}}|u[dD][89abAB]{_HEX}{{2}}(?=.{{6}})))*",
    re.S,
)
_MOST_LEFT = 12  # the two halves of a character
_SPACES = re.compile(r"[ \t\r\n]+")


@dataclass(frozen=True, slots=True)
class Upload:
    """A body: what it says, and the content that it brings, None if it brings none."""

    fields: dict[str, Any]
    body: Spooled | None


async def read_upload(
    request: Request, spool: Spool, limiter: trio.CapacityLimiter, max_bytes: int
) -> Upload:
    """A JSON object whose ``content`` is in ``encoding``, which is checked. Raises ``UsageError``."""
    raw = await trio.to_thread.run_sync(spool.begin, limiter=limiter)
    gathered = bytearray()
    async for piece in pieces(request, max_bytes):
        gathered += piece
        if len(gathered) >= _GATHER_BYTES:
            await trio.to_thread.run_sync(raw.write, bytes(gathered), limiter=limiter)
            gathered.clear()
    return await trio.to_thread.run_sync(partial(_understood, spool, raw, bytes(gathered)), limiter=limiter)


def encoding_of(fields: dict[str, Any]) -> str:
    """The encoding that is asked for. Raises ``UsageError`` for one that there is not."""
    encoding = fields.get("encoding")
    if encoding is None:
        return ENCODINGS[0]
    if encoding not in ENCODINGS:
        raise UsageError("encoding must be utf-8 or base64")
    return str(encoding)


def decode(texts: Iterator[str], encoding: str) -> Iterator[bytes]:
    """What the pieces of a text stand for. Raises ``UsageError``."""
    if encoding == "utf-8":
        for text in texts:
            try:
                yield text.encode()
            except UnicodeEncodeError:
                raise UsageError("content is not valid Unicode", hint="send it as base64") from None
        return
    left = ""
    try:
        for text in texts:
            left += _SPACES.sub("", text)
            whole = len(left) // 4 * 4 - 4  # the last four may be padded, and then end it
            if "=" in left[: max(0, whole)]:
                break  # what follows padding is wrong, and so will be this
            if whole > 0:
                yield binascii.a2b_base64(left[:whole], strict_mode=True)
                left = left[whole:]
        yield binascii.a2b_base64(left, strict_mode=True)
    except ValueError:
        raise UsageError("content is not valid base64") from None


def _understood(spool: Spool, raw: Spooled, last: bytes) -> Upload:
    raw.write(last)
    scanner = _Scanner()
    source = raw.open()
    while piece := source.read(_GATHER_BYTES):
        scanner.feed(piece)
    try:
        fields = json.loads(bytes(scanner.rest))
    except (ValueError, RecursionError):
        raise _no_json() from None
    if not isinstance(fields, dict):
        raise UsageError("the body must be a JSON object")
    encoding = encoding_of(fields)
    if not isinstance(fields.get("content", ""), str):
        raise UsageError("content must be a string")
    if scanner.content is None:
        return Upload(fields, None)
    start, end = scanner.content
    body = spool.begin()
    for decoded in decode(_texts(raw.part(start, end - start)), encoding):
        body.write(decoded)
    return Upload(fields, body)


class _Scanner:
    """Finds where the text of a top-level ``content`` is; all the rest it keeps, so that it can be parsed."""

    def __init__(self) -> None:
        self.rest = bytearray()
        self.content: tuple[int, int] | None = None
        self._at = 0
        self._depth = 0
        self._begins: int | None = None  # of the string that it is in
        self._is_escaped = self._is_key = self._is_content = False
        self._key = b""

    def feed(self, piece: bytes) -> None:
        """More of the document."""
        at = 0
        while at < len(piece):
            at = self._string(piece, at) if self._begins is not None else self._outside(piece, at)
        self._at += len(piece)
        if len(self.rest) > _MAX_REST_BYTES:
            raise TooLargeError(f"all but content may have {_MAX_REST_BYTES:,} bytes")

    def _outside(self, piece: bytes, at: int) -> int:
        match = _OUTSIDE.search(piece, at)
        end = len(piece) if match is None else match.end()
        self.rest += piece[at:end]
        if match is None:
            return end
        match match[0]:
            case b'"':
                self._begins = self._at + end
                self._is_content = self._depth == 1 and not self._is_key and self._key == b'"content"'
                if self._is_key:
                    self._key = b'"'
            case b"{" | b"[":
                self._depth += 1
                self._is_key = self._depth == 1 and match[0] == b"{"
            case b"}" | b"]":
                self._depth -= 1
            case b",":
                self._is_key = self._depth == 1
            case _:
                self._is_key = self._is_key and self._depth != 1
        return end

    def _string(self, piece: bytes, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            self._keep(piece[at : at + 1])
            return at + 1
        match = _INSIDE.search(piece, at)
        end = len(piece) if match is None else match.end()
        if match is not None and match[0] == b'"':
            self._keep(piece[at : end - 1])
            if self._is_content:
                assert self._begins is not None
                self.content = (self._begins, self._at + end - 1)
            self.rest += b'"'
            if self._is_key and self._depth == 1:
                self._key += b'"'
            self._begins, self._is_content = None, False
            return end
        self._keep(piece[at:end])
        self._is_escaped = match is not None
        return end

    def _keep(self, data: bytes) -> None:
        if self._is_content:
            return
        self.rest += data
        if self._is_key and self._depth == 1 and len(self._key) < 32:
            self._key += data


def _texts(source: Readable) -> Iterator[str]:
    """What a JSON string stands for, of its bytes between the quotes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = ""
    try:
        while piece := source.read(_GATHER_BYTES):
            left += decoder.decode(piece)
            match = _WHOLE.match(left)
            assert match is not None
            if len(left) - match.end() > _MOST_LEFT:
                raise _no_json()
            yield json.loads(f'"{match[0]}"')
            left = left[match.end() :]
        left += decoder.decode(b"", final=True)
        yield json.loads(f'"{left}"')
    except ValueError:
        raise _no_json() from None


def _no_json() -> UsageError:
    return UsageError("the body is not valid JSON")
