"""Reading strangers' archives: every entry is checked, and its content kept aside, before any of it is used.

What could be a trap is refused: names that lead elsewhere, links that leave, devices, sparse files, names
twice, more than there is room for. Blocking: for threads. Knows no trees.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, BinaryIO, cast

from agentfuse.errors import QuotaExceededError, UsageError
from agentfuse.gateway.filetree import NewFile, clean
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.regions import MiB
from agentfuse.snapshots.entries import parent_of, printable

MAX_ENTRIES = 100_000
_MAX_DIRECTORY_BYTES = 16 * MiB
"""So long may all names together be, which are held in memory; and the directory of a zip file."""
_MAX_HEADER_BYTES = MiB  # so is each header of a tar file
_OVERHEAD_BYTES = 64 * MiB
_PIECE = 1024 * 1024
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_ABSOLUTE = re.compile(rb"[/\\]|[A-Za-z]:[/\\]")
_UTF8_NAME = 0x800
_ENCRYPTED = 0x1
_DAMAGES = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(slots=True)
class Contents:
    """What is in an archive, by paths in it. ``skipped``: symbolic links that stay within it."""

    files: dict[bytes, NewFile] = field(default_factory=dict)
    directories: set[bytes] = field(default_factory=set)
    skipped: set[bytes] = field(default_factory=set)
    bytes: int = 0


def unpack(archive: Spooled, spool: Spool, *, max_bytes: int, max_files: int) -> Contents:
    """What is in an archive of any kind that is known, its contents in the spool.

    Raises ``UsageError`` for what is no archive, is damaged, or has an entry that is refused, and
    ``QuotaExceededError`` as soon as it is clear that there is more in it than may be.
    """
    reader = _Reader(spool, max_bytes, min(max_files, MAX_ENTRIES))
    source = cast(BinaryIO, io.BufferedReader(_Raw(archive), _PIECE))
    head = source.read(4)
    source.seek(0)
    with _understood():
        if head in (b"PK\x03\x04", b"PK\x05\x06"):
            reader.read_zip(source)
        elif head.startswith(b"\x1f\x8b"):
            reader.read_tar(cast(BinaryIO, gzip.GzipFile(fileobj=source)))
        elif head.startswith(b"BZh"):
            reader.read_tar(cast(BinaryIO, bz2.BZ2File(source)))
        else:
            reader.read_tar(source)
    reader.check_whole()
    return reader.found


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except _DAMAGES as error:
        raise UsageError(
            f"this is no archive that can be read: {error or 'it ends early'}",
            hint="zip, tar, tar.gz and tar.bz2 can",
        ) from error


class _Reader:
    def __init__(self, spool: Spool, max_bytes: int, max_files: int) -> None:
        self.found = Contents()
        self._spool = spool
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._names_bytes = 0

    # -- kinds

    def read_zip(self, source: BinaryIO) -> None:
        _require_small_directory(source)
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                path = self._path(_name_of(info))
                mode = info.external_attr >> 16
                if info.flag_bits & _ENCRYPTED:
                    raise UsageError(f"{printable(path)!r} is encrypted")
                if info.compress_type not in _ZIP_METHODS:
                    raise UsageError(f"{printable(path)!r} is compressed in a way that is not understood")
                if info.is_dir():
                    self._directory(path)
                elif stat.S_ISLNK(mode):
                    if info.file_size > _MAX_HEADER_BYTES:
                        raise UsageError(f"{printable(path)!r} is a link to a name that is too long")
                    self._link(path, archive.read(info))
                elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise _no_file(path)
                else:
                    self._require_room(info.file_size)
                    with archive.open(info) as content:
                        self._file(path, content, info.file_size, mode)

    def read_tar(self, source: BinaryIO) -> None:
        bounded = cast(BinaryIO, _Bounded(source, 2 * self._max_bytes + _OVERHEAD_BYTES))
        with tarfile.open(
            fileobj=bounded, mode="r|", tarinfo=_Member, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            for member in archive:
                path = self._path(os.fsencode(member.name))
                if member.sparse is not None:
                    raise _sparse()
                if member.isdir():
                    self._directory(path)
                elif member.issym():
                    self._link(path, os.fsencode(member.linkname))
                elif member.islnk():
                    self._same(path, self._path(os.fsencode(member.linkname)))
                elif not member.isreg():
                    raise _no_file(path)
                else:
                    self._require_room(member.size)
                    content = archive.extractfile(member)
                    assert content is not None
                    self._file(path, content, member.size, member.mode)
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all

    # -- entries

    def _path(self, raw: bytes) -> bytes:
        if _ABSOLUTE.match(raw):
            raise UsageError(f"{printable(raw)!r} is absolute")
        if b".." in re.split(rb"[/\\]", raw):
            raise UsageError(f"{printable(raw)!r} leaves the directory")
        return clean(raw)

    def _directory(self, path: bytes) -> None:
        if path:
            self._require_new(path, may_be_directory=True)
            self.found.directories.add(path)

    def _link(self, path: bytes, target: bytes) -> None:
        where = posixpath.normpath(posixpath.join(parent_of(path), target))
        if _ABSOLUTE.match(target) or where == b".." or where.startswith((b"../", b"/")) or not target:
            raise UsageError(f"{printable(path)!r} is a link that leaves the directory")
        self._require_new(path)
        self.found.skipped.add(path)

    def _same(self, path: bytes, other: bytes) -> None:
        """A hard link: the same content once more."""
        first = self.found.files.get(other)
        if first is None:
            raise UsageError(f"{printable(path)!r} is a link to what is not in the archive before it")
        self._require_new(path)
        self._require_room(first.body.size)
        self.found.files[path] = NewFile(path, first.body, first.mode)
        self.found.bytes += first.body.size

    def _file(self, path: bytes, content: IO[bytes], size: int, mode: int) -> None:
        if not path:
            raise UsageError("an entry has no name")
        self._require_new(path)
        body = self._spool.begin()
        while piece := content.read(_PIECE):
            body.write(piece)
            if body.size > size:
                break
        if body.size != size:
            raise UsageError(f"{printable(path)!r} is not as long as it says")
        self.found.files[path] = NewFile(path, body, mode & 0o777 or 0o644)
        self.found.bytes += size

    def _require_new(self, path: bytes, *, may_be_directory: bool = False) -> None:
        found = self.found
        taken = path in found.files or path in found.skipped
        if taken or (path in found.directories and not may_be_directory):
            raise UsageError(f"{printable(path)!r} is in the archive twice")
        if len(found.files) + len(found.directories) + len(found.skipped) >= self._max_files:
            raise QuotaExceededError(f"there are more than {self._max_files:,} files in the archive")
        self._names_bytes += len(path)
        if self._names_bytes > _MAX_DIRECTORY_BYTES:
            raise QuotaExceededError("the names in the archive are longer than they may be together")

    def _require_room(self, size: int) -> None:
        if self.found.bytes + size > self._max_bytes:
            raise QuotaExceededError(
                f"more is in the archive than the {self._max_bytes:,} bytes that there may be"
            )

    def check_whole(self) -> None:
        """Raise ``UsageError`` where something is in what is no directory."""
        found = self.found
        no_directories = found.files.keys() | found.skipped
        for path in [*found.files, *found.directories, *found.skipped]:
            above = parent_of(path)
            while above:
                if above in no_directories:
                    raise UsageError(f"{printable(path)!r} is in {printable(above)!r}, which is no directory")
                above = parent_of(above)
        if found.directories & no_directories:
            raise UsageError("a name is a directory and something else in the archive")


class _Member(tarfile.TarInfo):
    """A header, which is refused where tarfile would hold as much in memory as it says, or take what is
    damaged for the end."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type in headers + names and self.size > _MAX_HEADER_BYTES:
            raise UsageError("a header in the archive is too long")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse()
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise _sparse()

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        """The next header."""
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise UsageError(f"the archive is damaged, or none: {error}") from error


class _Bounded:
    """A stream that gives up when too much came of it."""

    def __init__(self, source: BinaryIO, max_bytes: int) -> None:
        self._source = source
        self._left = max_bytes

    def read(self, size: int) -> bytes:
        piece = self._source.read(size)
        self._left -= len(piece)
        if self._left < 0:
            raise QuotaExceededError("more comes of the archive than there may be")
        return piece


class _Raw(io.RawIOBase):
    """A content in a spool as a file."""

    def __init__(self, body: Spooled) -> None:
        self._body = body
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._body.part(self._at, max(0, self._body.size - self._at)).read(len(buffer))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._body.size}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at


def _require_small_directory(source: BinaryIO) -> None:
    """Before ``zipfile`` reads it as a whole."""
    end = zipfile._EndRecData(source)  # type: ignore[attr-defined]  # it tells this of no other way
    if end is None:
        raise zipfile.BadZipFile("it has no end")
    if end[5] > _MAX_DIRECTORY_BYTES:
        raise QuotaExceededError("there are more files in the archive than there may be")


def _name_of(info: zipfile.ZipInfo) -> bytes:
    """A name as bytes: what is UTF-8, declared or not, as it is; else by the zip format's own table."""
    if info.flag_bits & _UTF8_NAME:
        return info.orig_filename.encode()
    raw = info.orig_filename.encode("cp437")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return info.orig_filename.encode()
    return raw


def _no_file(path: bytes) -> UsageError:
    return UsageError(f"{printable(path)!r} is neither a file nor a directory")


def _sparse() -> UsageError:
    return UsageError("there are sparse files in the archive", hint="make it without --sparse")
