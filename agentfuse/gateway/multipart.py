"""multipart/form-data as it arrives: files to the spool, never held in memory; everything is bounded.

Knows nothing of what the parts are for. Names of files come as they were sent, as bytes, without directories.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import trio
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from agentfuse.errors import UsageError
from agentfuse.gateway.bodies import pieces
from agentfuse.gateway.spool import Spool, Spooled

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks
    from starlette.requests import Request

_GATHER_BYTES = 256 * 1024  # worth a thread
_MAX_FIELD_BYTES = 64 * 1024
_PARAMETER = re.compile(rb';\s*(filename\*|filename|name)\s*=\s*(?:"((?:\\"|[^"])*)"|([^;]*))', re.I)


@dataclass(slots=True)
class Part:
    """A file: ``name`` without directories, empty if none was given; ``type`` as it was sent, or empty.

    ``is_too_large``: longer than a file may be; nothing of it was kept.
    """

    name: bytes
    type: str
    body: Spooled
    is_too_large: bool = False


@dataclass(slots=True)
class Form:
    """What was sent: the files of the field that was asked for, in order, and the texts by field."""

    files: list[Part] = field(default_factory=list)
    fields: dict[str, bytes] = field(default_factory=dict)


async def read_form(
    request: Request,
    spool: Spool,
    limiter: trio.CapacityLimiter,
    *,
    files: str,
    max_file_bytes: int,
    max_bytes: int,
    max_parts: int = 1024,
) -> Form:
    """Read a form to its end. ``files`` is the field whose parts are files, whether they are named or not.

    Raises ``UsageError`` for what is no whole multipart body, or has more than ``max_parts`` parts, and
    what ``bodies.pieces`` raises beyond ``max_bytes``. A file beyond ``max_file_bytes`` is marked, and the
    rest is read.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise UsageError("the body is no multipart/form-data with a boundary")
    reader = _Reader(spool, files.encode(), max_file_bytes, max_parts)
    parser = MultipartParser(boundary, reader.callbacks(), max_header_size=8192)
    gathered = bytearray()
    async for piece in pieces(request, max_bytes):
        gathered += piece
        if len(gathered) >= _GATHER_BYTES:
            await trio.to_thread.run_sync(_feed, parser, bytes(gathered), limiter=limiter)
            gathered.clear()
    await trio.to_thread.run_sync(_feed, parser, bytes(gathered), limiter=limiter)
    if not reader.is_complete:
        raise UsageError("the multipart body ends before its last boundary")
    return reader.form


def _feed(parser: MultipartParser, data: bytes) -> None:
    try:
        parser.write(data)
    except MultipartParseError as error:
        raise UsageError(f"the body is no valid multipart/form-data: {error}") from error


class _Reader:
    """What the parser's callbacks lead to."""

    def __init__(self, spool: Spool, files: bytes, max_file_bytes: int, max_parts: int) -> None:
        self.form = Form()
        self.is_complete = False
        self._spool = spool
        self._files = files
        self._max_file_bytes = max_file_bytes
        self._parts_left = max_parts
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._part: Part | None = None
        self._field = ""
        self._text: bytearray | None = None

    def callbacks(self) -> MultipartCallbacks:
        """For ``MultipartParser``."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def _begin(self) -> None:
        self._parts_left -= 1
        if self._parts_left < 0:
            raise UsageError("the body has too many parts", hint="send the files in several requests")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        parameters = _parameters(self._headers.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"")
        if name == self._files:
            filename = parameters.get(b"filename", b"").rpartition(b"/")[2]
            kind = self._headers.get(b"content-type", b"").decode("latin-1")
            self._part = Part(filename, kind, self._spool.begin())
        else:
            self._field, self._text = name.decode(errors="surrogateescape"), bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part is None:
            assert self._text is not None
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                raise UsageError(f"a field of the form is longer than {_MAX_FIELD_BYTES} bytes")
        elif part.is_too_large:
            pass
        elif part.body.size + end - start > self._max_file_bytes:
            part.is_too_large = True
            part.body.forget()
        else:
            part.body.write(data[start:end])

    def _end(self) -> None:
        if self._part is not None:
            self.form.files.append(self._part)
        elif self._text is not None:
            self.form.fields[self._field] = bytes(self._text)
        self._part = self._text = None

    def _complete(self) -> None:
        self.is_complete = True


def _parameters(disposition: bytes) -> dict[bytes, bytes]:
    """The parameters of a Content-Disposition as browsers and libraries send them: raw UTF-8 in quotes."""
    found: dict[bytes, bytes] = {}
    for name, quoted, bare in _PARAMETER.findall(disposition):
        value = quoted.replace(b'\\"', b'"') or bare.strip()
        if name.lower() == b"filename*":  # RFC 5987: charset'language'percent-encoded
            found[b"filename"] = unquote_to_bytes(value.rpartition(b"'")[2])
        else:
            found.setdefault(name.lower(), value)
    return found
