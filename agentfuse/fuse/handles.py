"""What is open: one ``OpenFile`` per open inode, a ``Handle`` per opener, and listings of directories.

Many opens of one file share one backing descriptor (two at most: one to read, one to write), since
descriptors are few and opens are many. Knows no inode table and no quota rules beyond its account.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentfuse.fuse.inodes import Inode

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class OpenFile:
    """The backing file of one open inode. ``size`` is its logical size in bytes, kept true by us.

    ``openers`` counts the kernel's open file descriptions, ``writers`` those that can write;
    ``is_changed`` tells that the content has changed since there last was no writer.
    """

    __slots__ = ("_reading_fd", "_writing_fd", "inode", "is_changed", "openers", "size", "writers")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.openers = 0
        self.writers = 0
        self.size = 0
        self.is_changed = False
        self._reading_fd = -1
        self._writing_fd = -1

    @property
    def is_being_written(self) -> bool:
        """Whether the content has changed and may change more: it is not complete."""
        return self.is_changed and self.writers > 0

    @property
    def fd(self) -> int:
        """A descriptor for what needs no particular access (fstat)."""
        return self._reading_fd if self._reading_fd >= 0 else self._writing_fd

    @property
    def reading_fd(self) -> int:
        """A descriptor to read from. Raises ``OSError(EBADF)`` when nobody opened it to read."""
        if self._reading_fd < 0:
            raise OSError(errno.EBADF, "not open for reading")
        return self._reading_fd

    @property
    def writing_fd(self) -> int:
        """A descriptor to write to. Raises ``OSError(EBADF)`` when nobody opened it to write."""
        if self._writing_fd < 0:
            raise OSError(errno.EBADF, "not open for writing")
        return self._writing_fd

    def allows(self, access: int) -> bool:
        """Whether what is open already serves ``access`` (O_RDONLY, O_WRONLY or O_RDWR)."""
        return (self._reading_fd if access == os.O_RDONLY else self._writing_fd) >= 0

    def adopt(self, fd: int) -> None:
        """Take over a descriptor that reads and writes a file that was just created."""
        self._reading_fd = self._writing_fd = fd

    def open(self, directory_fd: int, name: bytes, access: int) -> None:
        """Make sure of a descriptor that allows ``access`` (O_RDONLY, O_WRONLY or O_RDWR)."""
        if self.allows(access):
            return
        if access == os.O_RDONLY:
            self._reading_fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=directory_fd)
            return
        try:
            self._writing_fd = os.open(name, os.O_RDWR | _FLAGS, dir_fd=directory_fd)
        except PermissionError:
            # An ordinary user's daemon may not read what its user may only write.
            if access != os.O_WRONLY:
                raise
            self._writing_fd = os.open(name, os.O_WRONLY | _FLAGS, dir_fd=directory_fd)
        else:
            if self._reading_fd < 0:
                self._reading_fd = self._writing_fd

    def reopen(self, access: int) -> None:
        """Make sure of a descriptor that allows ``access`` to a file that is open and has no name."""
        if self.allows(access):
            return
        fd = os.open(f"/proc/self/fd/{self.fd}", (access and os.O_RDWR) | os.O_CLOEXEC)
        if access == os.O_RDONLY:
            self._reading_fd = fd
        else:
            self._writing_fd = fd

    def close(self) -> None:
        """Close the backing descriptors."""
        for fd in {self._reading_fd, self._writing_fd} - {-1}:
            # Whatever close could report was reported by the write that caused it.
            with contextlib.suppress(OSError):
                os.close(fd)
        self._reading_fd = self._writing_fd = -1


class Handle:
    """One open file description of the kernel's, opened with ``flags``. ``direct``: with O_DIRECT.

    ``opener`` is the thread that opened it, by its number: reads and writes do not say whose they are.
    """

    __slots__ = ("direct", "file", "opener", "writes")

    def __init__(self, file: OpenFile, flags: int, opener: int) -> None:
        self.file = file
        self.opener = opener
        self.direct = bool(flags & os.O_DIRECT)
        self.writes = flags & os.O_ACCMODE != os.O_RDONLY


class Listing:
    """An open directory: its names as of when reading it (last) began, so that offsets stay stable.

    ``opener`` is the thread that opened it, by its number.
    """

    __slots__ = ("inode", "names", "opener")

    def __init__(self, inode: Inode, opener: int = 0) -> None:
        self.inode = inode
        self.opener = opener
        self.names: list[bytes] = []
