"""Bytes of open files: open, read, write, truncate, close, each charged before it happens.

Plain functions that check, act and book on the trio thread without a checkpoint in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from agentfuse.fuse.handles import Handle, OpenFile
from agentfuse.fuse.inodes import Inode, InodeTable, path_in_region
from agentfuse.killpoints import passing
from agentfuse.sync.absent import Absent

MAX_FILE_BYTES = (1 << 44) - (1 << 12)
"""The largest file that ext4 holds; what is beyond is EFBIG rather than a matter of quotas."""

_SET_ID = stat.S_ISUID | stat.S_ISGID


class Content:
    """The open files of a home, by the number of the handle that the kernel was given."""

    def __init__(self, inodes: InodeTable, absent: Absent, *, max_files: int) -> None:
        self._inodes = inodes
        self._absent = absent
        self._handles: dict[int, Handle] = {}
        self._next = 1
        self._files = 0
        self._max_files = max_files

    def require_descriptor(self) -> None:
        """Raise ``OSError(ENFILE)`` when agents may open no more files: the daemon needs descriptors, too."""
        if self._files >= self._max_files:
            raise OSError(errno.ENFILE, "too many files are open in the home")

    def open(self, inode: Inode, flags: int, opener: int = 0) -> int:
        """One more opener of a regular file, a thread by its number; the number of its handle.

        Raises ``OSError``, ESTALE for a file that is gone.
        """
        file = inode.file
        access = flags & os.O_ACCMODE
        if file is None:
            self.require_descriptor()
            file = OpenFile(inode)
            directory_fd, name = self._inodes.locate(inode)
            file.open(directory_fd, name, access)
            file.size = os.fstat(file.fd).st_size
        elif not file.allows(access):
            self._widen(file, access)
        if flags & os.O_TRUNC:
            try:
                self._truncate(file, 0)
            except OSError:
                if file.openers == 0:
                    file.close()
                raise
        return self._opened(file, flags, opener)

    def adopt(self, inode: Inode, fd: int, flags: int) -> int:
        """The handle of the first opener of a file that was just created as ``fd``, empty."""
        file = OpenFile(inode)
        file.adopt(fd)
        self._note_change(file)
        return self._opened(file, flags)

    def _opened(self, file: OpenFile, flags: int, opener: int = 0) -> int:
        file.inode.file = file
        self._files += file.openers == 0
        file.openers += 1
        number = self._next
        self._next += 1
        handle = self._handles[number] = Handle(file, flags, opener)
        file.writers += handle.writes
        return number

    def release(self, number: int) -> None:
        """An opener has closed. With the last one a nameless file's charge is given back."""
        handle = self.handle(number)
        file = handle.file
        del self._handles[number]
        file.openers -= 1
        file.writers -= handle.writes
        if file.is_changed:
            if file.inode.account.changes is not None:
                file.inode.account.changes.note_complete()
            if file.writers == 0:
                self._complete(file, "IN_CLOSE_WRITE")
        if file.openers > 0:
            return
        passing("close.last")
        self._files -= 1
        inode = file.inode
        inode.file = None
        if inode.last_stat is not None:
            inode.account.add(-file.size, -1)
        file.close()
        self._inodes.drop_if_unused(inode)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        file = self.handle(number).file
        inode = file.inode
        inode.answer = None  # reading moves the access time
        data = os.pread(file.reading_fd, size, offset)
        inode.account.bytes_read += len(data)
        return data

    def write(self, number: int, offset: int, data: bytes) -> int:
        """Write what the quota has room for and return how many bytes that was.

        Raises ``QuotaExceededError`` when there is room for none, or, with O_DIRECT, not for all: the
        kernel would make EIO of a direct write that fell short. ``OSError`` as the disk answers.
        """
        handle = self.handle(number)
        file = handle.file
        inode = file.inode
        inode.answer = None
        end = offset + len(data)
        if end > file.size:
            if end > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, "beyond the largest file")
            data = _what_fits(handle, offset, data)
        passing("write.begun")
        written = os.pwrite(file.writing_fd, data, offset)
        inode.account.bytes_written += written
        passing("write.written")
        end = offset + written
        if end > file.size:
            inode.account.bytes_used += end - file.size
            file.size = end
        self._note_change(file)
        passing("write.booked")
        if inode.mode & _SET_ID:
            drop_set_id(file.writing_fd, inode)
        return written

    def truncate(self, inode: Inode, size: int) -> None:
        """Set a regular file's size, open or not. Raises as ``write`` does, and EFBIG."""
        if inode.file is not None and inode.file.allows(os.O_WRONLY):
            self._truncate(inode.file, size)
            if inode.file.writers == 0:
                self._complete(inode.file, "IN_MODIFY")
            return
        file = inode.file or OpenFile(inode)
        self._widen(file, os.O_WRONLY)
        try:
            file.size = os.fstat(file.fd).st_size
            self._truncate(file, size)
            self._complete(file, "IN_MODIFY")
        finally:
            if file.openers == 0:
                file.close()

    def _widen(self, file: OpenFile, access: int) -> None:
        """Open the backing file for more; through the descriptor it has when it has no name any more."""
        if file.inode.parent is None and file.fd >= 0:
            file.reopen(access)
        else:
            directory_fd, name = self._inodes.locate(file.inode)
            file.open(directory_fd, name, access)

    @staticmethod
    def _note_change(file: OpenFile) -> None:
        file.is_changed = True
        changes = file.inode.account.changes
        if changes is not None:
            changes.note(file.inode.ino, file.size)

    @staticmethod
    def _complete(file: OpenFile, how: str) -> None:
        """Nobody who could write has the file open: its content is whole under each of its names."""
        file.is_changed = False
        observer = file.inode.account.observer
        if observer is not None:
            st = os.fstat(file.fd)
            for parent, name in file.inode.names():
                observer.completed(path_in_region(parent, name), st, how)

    def _truncate(self, file: OpenFile, size: int) -> None:
        if size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, "beyond the largest file")
        file.inode.answer = None
        account = file.inode.account
        account.require(size - file.size, 0)
        os.ftruncate(file.writing_fd, size)
        passing("truncate.cut")
        account.bytes_used += size - file.size
        file.size = size
        self._note_change(file)
        if file.inode.ino in self._absent.by_ino:
            assert size == 0
            self._absent.emptied(file.inode.ino, file.writing_fd)
        if file.inode.mode & _SET_ID:
            drop_set_id(file.writing_fd, file.inode)

    def fd_to_sync(self, number: int) -> int:
        """A descriptor for fsync: it stays open as long as the handle does."""
        return self.handle(number).file.fd

    def handle(self, number: int) -> Handle:
        """What is open by this number. Raises ``OSError(EBADF)``."""
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, "unknown handle") from None

    def written(self) -> list[bytes]:
        """Paths of the files that are open for writing, as far as they have a name; a mapping counts."""
        files = {handle.file for handle in self._handles.values() if handle.file.allows(os.O_WRONLY)}
        return [path for file in files if (path := file.inode.path()) is not None]

    def unfinished(self) -> set[int]:
        """The inodes of the files whose content is not complete."""
        return {handle.file.inode.ino for handle in self._handles.values() if handle.file.is_being_written}

    def nameless(self) -> list[OpenFile]:
        """The files that have no name any more, and are charged until they are closed."""
        files = {handle.file for handle in self._handles.values()}
        return [file for file in files if file.inode.last_stat is not None]

    def open_count(self) -> int:
        """How many handles are open."""
        return len(self._handles)

    def close(self) -> None:
        """Close every backing file."""
        for handle in self._handles.values():
            handle.file.close()
        self._handles.clear()


def _what_fits(handle: Handle, offset: int, data: bytes) -> bytes:
    file = handle.file
    account = file.inode.account
    last = file.size + account.room()
    if offset + len(data) <= last:
        return data
    refusal = account.refuse(f"{offset + len(data) - file.size} more bytes")
    if offset >= last or handle.direct:
        raise refusal
    return data[: last - offset]


def drop_set_id(fd: int, inode: Inode) -> None:
    """A write takes the set-id bits away, as write(2) does for all but the privileged.

    The kernel leaves it to us (FUSE_HANDLE_KILLPRIV) without saying who writes, so it is done for all.
    """
    mode = inode.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    if mode != inode.mode:
        with contextlib.suppress(PermissionError):
            os.fchmod(fd, stat.S_IMODE(mode))
            inode.mode = mode
