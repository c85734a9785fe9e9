"""Writing archives, piece by piece, to what only takes bytes. Blocking: for threads. Knows no trees."""

from __future__ import annotations

import bz2
import gzip
import os
import stat
import tarfile
import time
import zipfile
from typing import BinaryIO, Literal, Protocol, cast

from agentfuse.errors import UsageError
from agentfuse.gateway.filetree import Node
from agentfuse.snapshots.entries import printable

Format = Literal["zip", "tar", "tar.gz", "tar.bz2"]
FORMATS: tuple[Format, ...] = ("zip", "tar", "tar.gz", "tar.bz2")
_SUFFIXES: dict[bytes, Format] = {
    b".zip": "zip",
    b".tar": "tar",
    b".tar.gz": "tar.gz",
    b".tgz": "tar.gz",
    b".tar.bz2": "tar.bz2",
    b".tbz2": "tar.bz2",
}
_OLDEST_OF_ZIP = (1980, 1, 1, 0, 0, 0)


class Sink(Protocol):
    """Where an archive goes."""

    def write(self, piece: bytes) -> None:
        """More of it."""


class Packer(Protocol):
    """An archive in the making: directories, and files each in pieces, in any order."""

    def directory(self, name: bytes, node: Node) -> None:
        """A directory."""

    def begin(self, name: bytes, node: Node) -> None:
        """A file, of which ``node.size`` bytes follow."""

    def write(self, piece: bytes) -> None:
        """More of the file."""

    def end(self) -> None:
        """The file is whole."""

    def close(self) -> None:
        """The archive is whole."""


def format_of(path: bytes) -> Format:
    """What the name of an archive says that it is."""
    name = path.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), "tar.gz")


def packer(kind: Format, sink: Sink, level: int) -> Packer:
    """A new archive. ``level``: 0, fastest, to 9, smallest."""
    if kind == "zip":
        return _Zip(sink, level)
    return _Tar(sink, kind, level)


class _Out:
    """A sink as what compressors write to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, piece: bytes) -> int:
        self._sink.write(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        """Nothing is held."""


class _Tar:
    def __init__(self, sink: Sink, kind: Format, level: int) -> None:
        out = cast(BinaryIO, _Out(sink))
        self._out: BinaryIO = out
        if kind == "tar.gz":
            self._out = cast(BinaryIO, gzip.GzipFile("", "wb", level, out, mtime=0))
        elif kind == "tar.bz2":
            self._out = cast(BinaryIO, bz2.BZ2File(out, "wb", compresslevel=max(1, level)))
        self._is_plain = kind == "tar"
        self._written = 0

    def directory(self, name: bytes, node: Node) -> None:
        info = _info(name, node)
        info.type = tarfile.DIRTYPE
        self._header(info)

    def begin(self, name: bytes, node: Node) -> None:
        info = _info(name, node)
        info.size = node.size
        self._header(info)

    def write(self, piece: bytes) -> None:
        self._out.write(piece)
        self._written += len(piece)

    def end(self) -> None:
        self.write(bytes(-self._written % tarfile.BLOCKSIZE))

    def close(self) -> None:
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self._written % tarfile.RECORDSIZE))
        if not self._is_plain:
            self._out.close()

    def _header(self, info: tarfile.TarInfo) -> None:
        self.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


def _info(name: bytes, node: Node) -> tarfile.TarInfo:
    info = tarfile.TarInfo(os.fsdecode(name))
    info.mode = stat.S_IMODE(node.mode)
    info.mtime = max(0, node.mtime_ns // 10**9)
    return info


class _Zip:
    def __init__(self, sink: Sink, level: int) -> None:
        self._level = level
        self._method = zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED
        self._zip = zipfile.ZipFile(cast(BinaryIO, _Out(sink)), "w", self._method, compresslevel=level)

    def directory(self, name: bytes, node: Node) -> None:
        info = self._info(name + b"/", node, stat.S_IFDIR)
        info.external_attr |= 0x10  # DOS's own word for a directory
        self._zip.writestr(info, b"", zipfile.ZIP_STORED)

    def begin(self, name: bytes, node: Node) -> None:
        info = self._info(name, node, stat.S_IFREG)
        info.file_size = node.size
        self._member = self._zip.open(info, "w")

    def write(self, piece: bytes) -> None:
        self._member.write(piece)

    def end(self) -> None:
        self._member.close()

    def close(self) -> None:
        self._zip.close()

    def _info(self, name: bytes, node: Node, kind: int) -> zipfile.ZipInfo:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise UsageError(
                f"{printable(name)!r} is not UTF-8, so it cannot be in a zip file", hint="make a tar file"
            ) from None
        when = time.gmtime(max(0, node.mtime_ns // 10**9))[:6]
        info = zipfile.ZipInfo(text, max(_OLDEST_OF_ZIP, when))
        info.external_attr = (kind | stat.S_IMODE(node.mode)) << 16
        info.compress_type = self._method
        info._compresslevel = self._level  # type: ignore[attr-defined]  # there is no other way before 3.13
        return info
