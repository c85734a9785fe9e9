"""Bodies of requests on this host's disk while they are needed: one nameless file for each request."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentfuse.errors import EnvironmentProblem
from agentfuse.sync.spool import Copy, SpooledContent, nameless_file

_HASH_BYTES = 1024 * 1024
_RESERVE_BYTES = 256 * 1024 * 1024
"""So much of the disk is left to others."""


class Spooled:
    """A content in a spool; a ``filetree.Body``, good until the spool is closed."""

    def __init__(self, spool: Spool, offset: int) -> None:
        self.size = 0
        self._spool = spool
        self._offset = offset
        self._hashed: tuple[int, str] | None = None

    @property
    def sha256(self) -> str:
        """Of what has been written so far. The first time that reads it, and belongs in a thread."""
        if self._hashed is None or self._hashed[0] != self.size:
            digest, content = hashlib.sha256(), self.open()
            while piece := content.read(_HASH_BYTES):
                digest.update(piece)
            self._hashed = (self.size, digest.hexdigest())
        return self._hashed[1]

    @property
    def place(self) -> tuple[int, int]:
        """The descriptor of the file that it is in, which is the spool's, and where in it, in bytes."""
        return self._spool.fd, self._offset

    def write(self, piece: bytes) -> None:
        """More of it; only of the content that was begun last."""
        self._spool.write(piece)
        self.size += len(piece)

    def forget(self) -> None:
        """Give the room back; only of the content that was begun last."""
        self._spool.truncate(self._offset)
        self.size, self._hashed = 0, None

    def open(self) -> SpooledContent:
        """From its beginning."""
        return self.part(0, self.size)

    def part(self, offset: int, length: int) -> SpooledContent:
        """A part of it."""
        return self._spool.open(Copy(self._offset + offset, length))


class Spool:
    """Contents one after the other. Use it as a context manager; writing blocks, and belongs in a thread.

    Raises ``EnvironmentProblem`` when the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        with on_disk(directory):
            self.fd = nameless_file(directory)
        self._directory = directory
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all of it."""
        os.close(self.fd)

    def begin(self) -> Spooled:
        """The next content."""
        with on_disk(self._directory):
            disk = os.fstatvfs(self.fd)
            if disk.f_bavail * disk.f_frsize < _RESERVE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Spooled(self, self._end)

    def write(self, piece: bytes) -> None:
        """At the end."""
        with on_disk(self._directory):
            left = memoryview(piece)
            while left:
                written = os.pwrite(self.fd, left, self._end)
                self._end += written
                left = left[written:]

    def truncate(self, end: int) -> None:
        """Forget what is beyond ``end``."""
        with on_disk(self._directory):
            os.ftruncate(self.fd, end)
        self._end = end

    def open(self, copy: Copy) -> SpooledContent:
        """A content to be read, in any thread."""
        return SpooledContent(self.fd, copy)


class _NoRoomError(EnvironmentProblem):
    http_status = 503


@contextmanager
def on_disk(directory: Path) -> Iterator[None]:
    """Turns what a disk refuses to a request into an error that says so."""
    try:
        yield
    except OSError as error:
        raise _NoRoomError(
            "the gateway has no room for this request now",
            hint=f"{directory}: {os.strerror(error.errno or 0)}; its host needs free disk space",
        ) from error
