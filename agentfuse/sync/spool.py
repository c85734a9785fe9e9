"""Copies of contents, taken while a region stands still, to be hashed and sent when it moves again.

One nameless file on the disk of the home: nothing of it is left after a crash. Where the filesystem can
share blocks (XFS, btrfs) a copy takes no space.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

READ_BYTES = 1024 * 1024
_COPY_BYTES = 64 * 1024 * 1024


class Copy(NamedTuple):
    """A content in the spool, in bytes from its beginning."""

    offset: int
    size: int


class Spool:
    """Copies below ``directory``. Use it as a context manager; not safe for concurrent calls of ``add``.

    Every method raises ``OSError``, ENOSPC when the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self._fd = nameless_file(directory)
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def add(self, fd: int) -> Copy:
        """Copy what an open file holds, from its beginning to its end."""
        found = os.fstat(fd)
        self._require_room(min(found.st_size, found.st_blocks * 512))
        size = found.st_size
        for start, end in _extents(fd, size):
            at = start
            while at < end:
                copied = self._copy(fd, at, end - at)
                if not copied:
                    size = at  # it is shorter now
                    break
                at += copied
        os.ftruncate(self._fd, self._end + size)
        copy = Copy(self._end, size)
        self._end += size
        return copy

    def _require_room(self, size: int) -> None:
        """A copy takes no more than half of what is left of the disk: agents need it more."""
        disk = os.fstatvfs(self._fd)
        if size > disk.f_bavail * disk.f_frsize // 2:
            raise OSError(errno.ENOSPC, "too little room on the disk of the state directory for a copy")

    def _copy(self, fd: int, offset: int, length: int) -> int:
        try:
            return os.copy_file_range(fd, self._fd, min(length, _COPY_BYTES), offset, self._end + offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        piece = os.pread(fd, min(length, READ_BYTES), offset)
        return os.pwrite(self._fd, piece, self._end + offset) if piece else 0

    def hash(self, copy: Copy) -> str:
        """SHA-256 of a copy, in hexadecimal."""
        digest = hashlib.sha256()
        content = self.open(copy)
        while piece := content.read(READ_BYTES):
            digest.update(piece)
        return digest.hexdigest()

    def open(self, copy: Copy) -> SpooledContent:
        """A copy to read from; good until the spool is closed. Safe from any thread."""
        return SpooledContent(self._fd, copy)


class SpooledContent:
    """A copy as what an upload reads from."""

    def __init__(self, fd: int, copy: Copy) -> None:
        self._fd = fd
        self._at, size = copy
        self._end = self._at + size

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; empty at the end."""
        piece = os.pread(self._fd, min(size, self._end - self._at), self._at)
        self._at += len(piece)
        return piece

    def close(self) -> None:
        """Nothing is held that needs it."""


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data, as (start, end): a hole is as long as it says, and takes no room."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        if start < end:
            yield start, end


def nameless_file(directory: Path) -> int:
    """A descriptor of a new file that no directory has: it is gone when it is closed, or with its process."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return fd
