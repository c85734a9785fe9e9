"""What becomes of names and their charges: removing one, moving one, exchanging two.

The books of unlink, rmdir and rename, and renameat2(2), which Python has no function for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from agentfuse.fuse.inodes import Inode, InodeTable, path_in_region
from agentfuse.home.observer import Found
from agentfuse.home.quota import Account
from agentfuse.home.tree import Weight, regular_files, weigh
from agentfuse.home.walk import join

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2); raises ``OSError``."""
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def name_is_gone(
    inodes: InodeTable, account: Account, parent: Inode, name: bytes, before: os.stat_result
) -> None:
    """Book that ``parent/name``, described by ``before``, is no more.

    The charge goes with the last name, or, while the file is open, with its last close.
    """
    inode = inodes.find(before.st_ino)
    was_last = stat.S_ISDIR(before.st_mode) or before.st_nlink == 1
    account.changed(before.st_ino, 0 if was_last else None)
    if was_last and (inode is None or inode.file is None):
        account.add(-before.st_size if stat.S_ISREG(before.st_mode) else 0, -1)
    if inode is not None:
        inode.answer = None
        inodes.remove_name(inode, parent, name)
        if was_last:
            inodes.bury(inode, _nameless(before))


def _nameless(st: os.stat_result) -> os.stat_result:
    fields = list(st[:10])
    fields[stat.ST_NLINK] = 0
    extra = {name: getattr(st, name) for name in dir(st) if name.startswith("st_")}
    extra["st_nlink"] = 0
    return os.stat_result(fields, extra)


def complete_files(inodes: InodeTable, files: Iterable[tuple[bytes, os.stat_result]]) -> Found:
    """These regular files; those being written without attributes."""
    found: Found = []
    for path, st in files:
        inode = inodes.find(st.st_ino)
        is_whole = inode is None or inode.file is None or not inode.file.is_being_written
        found.append((path, st if is_whole else None))
    return found


class Side(NamedTuple):
    """One of the two names of a rename. ``st`` is None when nothing has that name."""

    parent: Inode
    name: bytes
    directory_fd: int
    st: os.stat_result | None
    account: Account


class Rename:
    """One rename: ask ``require_room`` before it is done, tell ``book`` after."""

    def __init__(self, inodes: InodeTable, old: Side, new: Side, *, exchange: bool) -> None:
        self._inodes = inodes
        self._old = old
        self._new = new
        self._exchange = exchange
        self._crosses = old.account is not new.account
        self._there = Weight()
        self._back = Weight()
        self._came: list[tuple[bytes, os.stat_result]] | None = None

    def require_room(self) -> None:
        """Raise ``QuotaExceededError`` when a region has no room for what comes.

        ``OSError(EXDEV)`` when hard links would then cross regions, as ``mv`` knows how to handle.
        """
        if not self._crosses:
            return
        if self._new.account.observer is not None:
            self._came = []
        weigh(self._old.directory_fd, self._old.name, self._there, self._came)
        if self._exchange:
            weigh(self._new.directory_fd, self._new.name, self._back)
        if self._there.links_leave or self._back.links_leave:
            raise OSError(errno.EXDEV, "hard links do not cross regions")
        freed_bytes, freed_files = self._freed()
        self._new.account.require(
            self._there.bytes_used - self._back.bytes_used - freed_bytes,
            self._there.files_used - self._back.files_used - freed_files,
        )
        self._old.account.require(
            self._back.bytes_used - self._there.bytes_used, self._back.files_used - self._there.files_used
        )

    def _freed(self) -> tuple[int, int]:
        """(bytes, files) that replacing the target gives back at once."""
        st = self._new.st
        if self._exchange or st is None:
            return 0, 0
        if stat.S_ISDIR(st.st_mode):
            return 0, 1
        inode = self._inodes.find(st.st_ino)
        if st.st_nlink > 1 or (inode is not None and inode.file is not None):
            return 0, 0
        return (st.st_size if stat.S_ISREG(st.st_mode) else 0), 1

    def book(self) -> None:
        """The rename has happened."""
        old, new = self._old, self._new
        source, target = self._known(old), self._known(new)
        assert old.st is not None
        old.account.changed(old.st.st_ino)
        new.account.changed(old.st.st_ino, self._there.bytes_used if self._crosses else None)
        if new.st is not None and not self._exchange:
            name_is_gone(self._inodes, new.account, new.parent, new.name, new.st)
        if self._crosses:
            for weight, giver, taker in (
                (self._there, old.account, new.account),
                (self._back, new.account, old.account),
            ):
                giver.add(-weight.bytes_used, -weight.files_used)
                taker.add(weight.bytes_used, weight.files_used)
        if source is not None:
            self._moved(source, old, new)
        if target is not None and self._exchange:
            self._moved(target, new, old)
        if old.account.observer is not None or new.account.observer is not None:
            self._tell(old.st)

    def _tell(self, st: os.stat_result) -> None:
        """Tell the regions' observers; ``st`` describes what was moved."""
        old, new = path_in_region(*self._old[:2]), path_in_region(*self._new[:2])
        giver, taker = self._old.account.observer, self._new.account.observer
        if giver is not None and taker is giver and not self._exchange:
            giver.moved(old, new, st, partial(self._found, self._new))
            return
        if giver is not None:
            found = self._found(self._old) if self._exchange else []
            giver.replaced(old, found, came="IN_MOVED_TO", went="IN_MOVED_FROM")
        if taker is not None:
            went = "IN_MOVED_FROM" if self._exchange else "IN_DELETE"
            taker.replaced(new, self._found(self._new), came="IN_MOVED_TO", went=went)

    def _found(self, side: Side) -> Found:
        """The regular files that are at a side's name now."""
        above = path_in_region(*side[:2]).rpartition(b"/")[0]
        if side is self._new and self._came is not None:  # a walk of a large tree keeps everybody waiting
            skipped = len(self._old.name)
            files = [(side.name + path[skipped:], st) for path, st in self._came]
        else:
            files = regular_files(self._inodes.directory_fd(side.parent), side.name)
        return [(join(above, path), st) for path, st in complete_files(self._inodes, files)]

    def _known(self, side: Side) -> Inode | None:
        return self._inodes.find(side.st.st_ino) if side.st is not None else None

    def _moved(self, inode: Inode, old: Side, new: Side) -> None:
        inode.answer = None
        self._inodes.move_name(inode, (old.parent, old.name), (new.parent, new.name))
        if self._crosses:
            self._inodes.move_charge(inode, new.account)
