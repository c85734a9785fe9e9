"""The snapshot document: one line of JSON for the header, one for each entry, one seal; gzip'd.

The seal, the last line, is the SHA-256 of all bytes above it, so the document verifies itself
(``docs/format.md`` shows how to do it by hand). Knows no store. What it decodes is sound
(``entries.check``) or refused.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from agentfuse.errors import AgentfuseError, IntegrityError
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import Entry, Kind, Totals, UnsoundError, check, printable, totals_of

FORMATS = (1, 2)
"""The formats that are read. The second has ``created_by``; only what has one is written in it."""

MAX_DOCUMENT_BYTES = 256 * 1024 * 1024
"""Longest document, unpacked, that is written or read."""

MAX_ENTRIES = 1_000_000
"""Most entries that are written or read: whoever reads them holds some hundreds of bytes for each."""

_KIND: Literal["agentfuse snapshot"] = "agentfuse snapshot"
_MAX = 2**62
_GATHER_BYTES = 64 * 1024  # each call of the compressor gives the interpreter's lock away and wants it back
_GZIP = 31  # zlib's number for the gzip container, with a CRC of its own and no time in it

Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX)]
Hash = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Mode = Annotated[str, msgspec.Meta(pattern=r"\A[0-7]{4}\Z")]
MAX_TIME_NS = 10**21 - 1
"""The latest time, and before 1970 the earliest, that an entry may have: 12 digits of seconds."""

Time = Annotated[str, msgspec.Meta(pattern=r"\A-?[0-9]{1,12}\.[0-9]{9}\Z")]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A region at one moment. ``number`` counts from 1; ``parent`` is the snapshot it was made upon, or 0.

    ``follows``: the *stretch* of snapshots after that one, up to this, is one execution's and nobody else's,
    so what differs between the two is what it changed. ``resumes``: the execution's last snapshot before the
    stretch, 0 if this is its first.
    ``commit`` is unique to the attempt that wrote it; ``entries`` are in tree order, the root first.
    """

    agent: str
    region: str
    number: int
    parent: int
    follows: int
    resumes: int
    execution: str
    commit: str
    reason: str
    time: datetime.datetime
    entries: list[Entry]

    @property
    def totals(self) -> Totals:
        """What the entries amount to."""
        return totals_of(self.entries)


def encode(snapshot: Snapshot) -> bytes:
    """The document, packed. The same snapshot gives the same bytes.

    Raises ``IntegrityError`` for a listing that :func:`decode` would refuse, ``AgentfuseError`` for one
    that is too long.
    """
    encoder = msgspec.json.Encoder()
    header = _Header(
        format=_format_of(snapshot),
        kind=_KIND,
        agent=snapshot.agent,
        region=snapshot.region,
        number=snapshot.number,
        parent=snapshot.parent,
        follows=snapshot.follows,
        resumes=snapshot.resumes,
        execution=snapshot.execution,
        commit=snapshot.commit,
        reason=snapshot.reason,
        time=snapshot.time,
        totals=snapshot.totals,
    )
    name = f"{snapshot.region} {snapshot.number}"
    document = _Packer(name)
    document.add(encoder.encode(header))
    try:
        for entry in check(snapshot.entries):
            document.add(encoder.encode(_to_line(entry)))
    except UnsoundError as error:
        raise IntegrityError(f"snapshot {name} cannot be written: {error}") from error
    return document.sealed()


def decode(data: bytes, name: str) -> Snapshot:
    """Read a document. ``name`` is what errors call it.

    Raises ``IntegrityError`` when it is damaged, unsound, or of a newer format.
    """
    try:
        body = _unpack(data)
        _check_format(body[: body.find(b"\n")], name)
        end = _end_of_sealed(body)
        lines = io.BytesIO(body)
        header = _HEADER.decode(lines.readline())
        follows = _checked_follows(header)
        entries = list(check(_entries(lines, end)))
        _check_totals(entries, header.totals)
    except (ValueError, zlib.error) as error:
        raise IntegrityError(
            f"snapshot {name}: {error}", hint="the document is damaged; earlier snapshots are whole"
        ) from error
    return Snapshot(
        agent=header.agent,
        region=header.region,
        number=header.number,
        parent=header.parent,
        follows=follows,
        resumes=header.resumes,
        execution=header.execution,
        commit=header.commit,
        reason=header.reason,
        time=header.time,
        entries=entries,
    )


# -- the lines as they are written


def _format_of(snapshot: Snapshot) -> int:
    return 2 if any(entry.created_by is not Creator.AGENT for entry in snapshot.entries) else 1


class _Header(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: int
    kind: Literal["agentfuse snapshot"]
    agent: str
    region: str
    number: Annotated[int, msgspec.Meta(ge=1, le=_MAX)]
    parent: Count
    follows: Count | None = None
    resumes: Count = 0
    execution: str
    commit: str
    reason: str
    time: datetime.datetime
    totals: Totals


def _checked_follows(header: _Header) -> int:
    follows = header.parent if header.follows is None else header.follows
    if not header.resumes <= follows <= header.parent < header.number:
        raise ValueError(
            f"{header.number} upon {header.parent} cannot follow {follows} and resume {header.resumes}"
        )
    return follows


class _Format(msgspec.Struct):
    format: int


class _Seal(msgspec.Struct, forbid_unknown_fields=True):
    seal: str


class _Xattr(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    name: str | None = None
    name_b64: bytes | None = None
    value_b64: bytes


class _Line(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Bytes that are UTF-8 stand as text, others in base64 under the name with ``_b64``."""

    path: str | None = None
    path_b64: bytes | None = None
    type: Kind
    mode: Mode
    mtime: Time
    size: Count | None = None
    sha256: Hash | None = None
    object: Hash | None = None
    offset: Count | None = None
    length: Count | None = None
    target: str | None = None
    target_b64: bytes | None = None
    link: Count = 0
    xattrs: list[_Xattr] | None = None
    created_by: Creator = Creator.AGENT


def _to_line(entry: Entry) -> _Line:
    path, path_b64 = _to_text(entry.path)
    line = _Line(
        path=path,
        path_b64=path_b64,
        type=entry.type,
        mode=f"{entry.mode:04o}",
        mtime=_to_time(entry.mtime_ns),
        link=entry.link,
        created_by=entry.created_by,
    )
    if entry.type == "file":
        line.size = entry.size
        line.sha256 = entry.sha256
        if entry.size:
            if not entry.object:
                raise UnsoundError(entry.path, "its content has no place in the store")
            line.object, line.offset, line.length = entry.object, entry.offset, entry.size
    elif entry.type == "symlink":
        line.target, line.target_b64 = _to_text(entry.target)
    if entry.xattrs:
        line.xattrs = [
            _Xattr(name=text, name_b64=raw, value_b64=value)
            for (text, raw), value in ((_to_text(name), value) for name, value in entry.xattrs)
        ]
    return line


def _from_line(line: _Line) -> Entry:
    path = _from_text(line.path, line.path_b64)
    if line.type == "file":
        if line.size is None or line.sha256 is None:
            raise UnsoundError(path, "a file without size or hash")
        if line.length != (line.size or None) or bool(line.object) != bool(line.size):
            raise UnsoundError(path, "its size and the length of its place in the store differ")
    has_target = line.target is not None or line.target_b64 is not None
    return Entry(
        path=path,
        type=line.type,
        mode=int(line.mode, 8),
        mtime_ns=_from_time(line.mtime),
        size=line.size or 0,
        sha256=line.sha256 or "",
        object=line.object or "",
        offset=line.offset or 0,
        target=_from_text(line.target, line.target_b64) if has_target else b"",
        link=line.link,
        xattrs=tuple((_from_text(x.name, x.name_b64), x.value_b64) for x in line.xattrs or ()),
        created_by=line.created_by,
    )


def _entries(lines: io.BytesIO, end: int) -> Iterator[Entry]:
    objects: dict[str, str] = {}  # the entries of one pack share its name, also in memory
    number = 1
    while lines.tell() < end:
        number += 1
        raw = lines.readline()
        try:
            line = _LINE.decode(raw)
            if line.object is not None:
                line.object = objects.setdefault(line.object, line.object)
            yield _from_line(line)
        except ValueError as error:
            raise ValueError(f"line {number} ({printable(raw[:120].rstrip())}): {error}") from error


def _check_totals(entries: list[Entry], claimed: Totals) -> None:
    found = totals_of(entries)
    if found != claimed:
        raise ValueError(f"its totals are {found}, its header says {claimed}")


def _to_text(raw: bytes) -> tuple[str | None, bytes | None]:
    try:
        return raw.decode(), None
    except UnicodeDecodeError:
        return None, raw


def _from_text(text: str | None, raw: bytes | None) -> bytes:
    if (text is None) == (raw is None):
        raise ValueError("a name must be given once, as text or in base64")
    return text.encode() if raw is None and text is not None else raw or b""


def _to_time(ns: int) -> str:
    seconds, fraction = divmod(abs(ns), 10**9)
    return f"{'-' if ns < 0 else ''}{seconds}.{fraction:09d}"


def _from_time(text: str) -> int:
    return int(text.replace(".", ""))


# -- the envelope


class _Packer:
    """A document in the making; only its packed form is held."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._compressor = zlib.compressobj(6, wbits=_GZIP)
        self._packed = bytearray()
        self._gathered = bytearray()
        self._digest = hashlib.sha256()
        self._size = 0
        self._lines = 0

    def add(self, line: bytes) -> None:
        self._put(line + b"\n")
        self._lines += 1
        if self._size > MAX_DOCUMENT_BYTES or self._lines > 1 + MAX_ENTRIES:
            raise AgentfuseError(
                f"snapshot {self._name} would be longer than the limits of {MAX_DOCUMENT_BYTES:,} bytes and "
                f"{MAX_ENTRIES:,} entries",
                hint="keep fewer files, or flatter directories",
            )

    def sealed(self) -> bytes:
        self._put(msgspec.json.encode(_Seal(seal=self._digest.hexdigest())) + b"\n")
        self._pack()
        return bytes(self._packed + self._compressor.flush())

    def _put(self, line: bytes) -> None:
        self._size += len(line)
        self._digest.update(line)
        self._gathered += line
        if len(self._gathered) >= _GATHER_BYTES:
            self._pack()

    def _pack(self) -> None:
        self._packed += self._compressor.compress(self._gathered)
        self._gathered.clear()


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    body = unpacker.decompress(data, MAX_DOCUMENT_BYTES + 1)
    if len(body) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"more than {MAX_DOCUMENT_BYTES:,} bytes long when unpacked")
    if body.count(b"\n") > MAX_ENTRIES + 2:  # the header and the seal
        raise ValueError(f"more than {MAX_ENTRIES:,} entries")
    if not unpacker.eof:
        raise ValueError("truncated")
    if unpacker.unused_data:
        raise ValueError("followed by bytes that are not its own")
    return body


def _check_format(first_line: bytes, name: str) -> None:
    found = _FORMAT.decode(first_line).format
    if found not in FORMATS:
        raise IntegrityError(
            f"snapshot {name}: written in format {found}, this agentfuse knows up to {FORMATS[-1]}",
            hint="install the agentfuse that wrote it, or a newer one",
        )


_SEAL_LINE = re.compile(rb'\{"seal":"[0-9a-f]{64}"\}\n')


def _end_of_sealed(body: bytes) -> int:
    """Where the lines above the seal end, once they are what it says."""
    end = body.rfind(b"\n", 0, -1) + 1
    if not _SEAL_LINE.fullmatch(body, end):
        raise ValueError("without a seal on its last line")
    seal = _SEAL.decode(body[end:]).seal
    if seal != hashlib.sha256(memoryview(body)[:end]).hexdigest():
        raise ValueError("its seal is not the SHA-256 of the lines above it")
    return end


# msgspec learns a type at its first use; two threads at once would crash the process.
_HEADER = msgspec.json.Decoder(_Header)
_FORMAT = msgspec.json.Decoder(_Format)
_SEAL = msgspec.json.Decoder(_Seal)
_LINE = msgspec.json.Decoder(_Line)
