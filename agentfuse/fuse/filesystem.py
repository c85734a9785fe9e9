"""What a home does when the kernel asks: pass the operation to the local tree, and keep the books.

Plain functions throughout: each checks, acts and books on the trio thread without a checkpoint in
between, so that there are no locks. Inodes come in by number and go out as ``(Inode, stat_result)``;
errors are ``OSError`` and ``QuotaExceededError``. Knows neither pyfuse3 nor what becomes of the files
later; content of open files is ``content.py``'s.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from agentfuse.fuse.content import Content
from agentfuse.fuse.handles import Listing
from agentfuse.fuse.inodes import Inode, InodeTable, path_in_region
from agentfuse.fuse.names import RENAME_EXCHANGE, RENAME_NOREPLACE, Rename, Side, name_is_gone, renameat2
from agentfuse.home.creators import Caller, Creators
from agentfuse.home.frozen import Frozen
from agentfuse.home.quota import Account, Ledger
from agentfuse.home.tree import inodes_below
from agentfuse.home.walk import open_directory, open_to_fill
from agentfuse.killpoints import passing
from agentfuse.sync.absent import Absent, Item

NAME_MAX = 255

_Make = Callable[[int], None]

Entry = tuple[Inode, os.stat_result]
Name = tuple[int, bytes]
"""A name in a directory, given by its number."""


@dataclass(frozen=True, slots=True)
class Change:
    """Attributes to set; None leaves one as it is. ``mode`` has permission bits only."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Filesystem:
    """The tree of one home. ``gives_away``: whether we may make files somebody else's (we are root).

    ``allow_devices``: whether device nodes may be made (the mount has ``dev``). ``absent``: the files
    whose contents are not here yet; whoever opens or truncates one sees to it before. ``creators`` tells
    who makes them. What is ``frozen`` stays as it is. ``max_files``: so many may be open.
    """

    def __init__(
        self,
        inodes: InodeTable,
        ledger: Ledger,
        absent: Absent | None = None,
        creators: Creators | None = None,
        frozen: Frozen | None = None,
        *,
        gives_away: bool,
        allow_devices: bool,
        max_files: int = 1 << 30,
    ) -> None:
        self.inodes = inodes
        self.ledger = ledger
        self.absent = absent or Absent()
        self.content = Content(inodes, self.absent, max_files=max_files)
        self._creators = creators or Creators()
        self._frozen = frozen or Frozen()
        self._gives_away = gives_away
        self._allow_devices = allow_devices

    def is_platforms(self, nodeid: int, name: bytes | None = None) -> bool:
        """Whether an inode, or what a directory has or will have under a name, is the platform's own."""
        inode = self.inodes.get(nodeid)
        account = inode.account if name is None else self._account_of(inode, name)
        return account.is_platforms

    def make_anew(self, inode: Inode, content: bytes) -> None:
        """Give a file of the platform's own, which is about to be opened, this content."""
        directory_fd, name = self.inodes.locate(inode)
        fd = os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
        with open(fd, "wb") as file:
            file.write(content)
        inode.answer = None

    def require_changeable(self, nodeid: int) -> None:
        """Raise ``FrozenError`` for a file that is frozen."""
        if self._frozen.files:
            self._frozen.require_changeable(self.inodes.get(nodeid).ino)

    # Looking ---------------------------------------------------------------------------------------

    def lookup(self, parent_id: int, name: bytes) -> Entry | None:
        """The entry of this name, now referred to by the kernel; None when there is none."""
        _check_name(name)
        parent = self.inodes.get(parent_id)
        try:
            st = os.stat(name, dir_fd=self._directory(parent), follow_symlinks=False)
        except FileNotFoundError:
            return None
        if st.st_ino in self.absent.by_ino:
            st = self.absent.told(st)
        return self._referred(parent, name, st)

    def getattr(self, nodeid: int) -> Entry:
        """The attributes of an inode, a nameless one included."""
        inode = self.inodes.get(nodeid)
        st = self._stat(inode)
        inode.mode = st.st_mode
        return inode, st

    def readlink(self, nodeid: int) -> bytes:
        """A symlink's target."""
        directory_fd, name = self.inodes.locate(self.inodes.get(nodeid))
        return os.readlink(name, dir_fd=directory_fd)

    def rewind(self, listing: Listing) -> None:
        """Read the directory's names afresh: at the start, and as rewinddir() promises."""
        if listing.inode.last_stat is not None:
            listing.names = []
            return
        fd = open_directory(b".", self._directory(listing.inode))
        try:
            listing.names = list(map(os.fsencode, os.listdir(fd)))
        finally:
            os.close(fd)

    def open_to_sync(self, listing: Listing) -> int:
        """A descriptor of the directory for fsync; the caller closes it."""
        return open_directory(b".", self._directory(listing.inode))

    def peek(self, listing: Listing, name: bytes) -> Entry | None:
        """The entry a listing is about to report, None when it is gone. Not yet referred to."""
        parent = listing.inode
        try:
            st = os.stat(name, dir_fd=self._directory(parent), follow_symlinks=False)
        except FileNotFoundError:
            return None
        if st.st_ino in self.absent.by_ino:
            st = self.absent.told(st)
        return self.inodes.learn(parent, name, st, self._account_of(parent, name)), st

    # Changing attributes ---------------------------------------------------------------------------

    def setattr(self, nodeid: int, change: Change) -> Entry:
        """Apply a change of attributes; what is refused leaves the size, which is tried first, as it was."""
        inode = self.inodes.get(nodeid)
        self._frozen.require_changeable(inode.ino)
        inode.answer = None
        if change.size is not None:
            self.content.truncate(inode, change.size)
        inode.account.changed(inode.ino)
        fd, name = self._reach(inode)
        if change.uid is not None or change.gid is not None:
            self._chown(fd, name, change)
        if change.mode is not None:
            if name is None:
                os.chmod(fd, change.mode)
            else:
                os.chmod(name, change.mode, dir_fd=fd)
        if change.atime_ns is not None or change.mtime_ns is not None:
            st = self._stat(inode)
            times = (
                st.st_atime_ns if change.atime_ns is None else change.atime_ns,
                st.st_mtime_ns if change.mtime_ns is None else change.mtime_ns,
            )
            if name is None:
                os.utime(fd, ns=times)
            else:
                os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False)
            if inode.account.observer is not None and _is_whole(inode):
                st = self._stat(inode)
                for parent, each in inode.names():
                    inode.account.observer.touched(path_in_region(parent, each), st)
        if inode.ino in self.absent.by_ino:
            self.absent.attributes_set(inode.ino, self._set_mode(fd, name, change), change.mtime_ns)
        return self.getattr(nodeid)

    @staticmethod
    def _set_mode(fd: int, name: bytes | None, change: Change) -> int | None:
        """The mode that a change leads to, if it does; a change of owner takes the set-id bits away."""
        if change.mode is None and change.uid is None and change.gid is None:
            return None
        st = os.fstat(fd) if name is None else os.stat(name, dir_fd=fd, follow_symlinks=False)
        return stat.S_IMODE(st.st_mode)

    def open_to_fill(self, inode: Inode) -> int:
        """A descriptor of a file that is to get its content."""
        directory_fd, name = self.inodes.locate(inode)
        return open_to_fill(name, directory_fd)

    def _reach(self, inode: Inode) -> tuple[int, bytes | None]:
        """(descriptor of the directory, name) of an inode, or (its own descriptor, None) when nameless."""
        if inode.parent is None and inode.file is not None:
            return inode.file.fd, None
        return self.inodes.locate(inode)

    def _chown(self, fd: int, name: bytes | None, change: Change) -> None:
        uid = -1 if change.uid is None else change.uid
        gid = -1 if change.gid is None else change.gid
        if name is None:
            os.chown(fd, uid, gid)
        else:
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)

    # Making ----------------------------------------------------------------------------------------

    def create(
        self, parent_id: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Inode, os.stat_result, int]:
        """Make a regular file and open it; an existing one is opened unless O_EXCL forbids it.

        The third value is the number of the handle.
        """
        parent = self.inodes.get(parent_id)
        account = self._room_for_entry(parent, name)
        self.content.require_descriptor()
        directory_fd = self._directory(parent)
        wanted = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, wanted, stat.S_IMODE(mode), dir_fd=directory_fd)
        except FileExistsError:
            entry = self.lookup(parent_id, name)
            if flags & os.O_EXCL or entry is None or not stat.S_ISREG(entry[1].st_mode):
                raise
            if entry[0].ino in self.absent.by_ino:
                # Nobody gets here whose kernel knows the name: it looks again, and opens.
                self.inodes.forget(entry[0].nodeid, 1)
                raise OSError(errno.ESTALE, "the file is there already") from None
            if flags & (os.O_ACCMODE | os.O_TRUNC):
                self._frozen.require_changeable(entry[0].ino)
            handle = self.content.open(entry[0], flags)
            return entry[0], self._stat(entry[0]), handle
        passing("create.made")
        account.add(0, 1)
        try:
            self._give(parent, fd, None, mode, caller)
            self._creators.attribute(fd, None, caller, account.creator)
            st = os.fstat(fd)
        except OSError:
            os.close(fd)
            self._unmake(directory_fd, name, account)
            raise
        inode, st = self._referred(parent, name, st)
        return inode, st, self.content.adopt(inode, fd, flags)

    def mknod(self, parent_id: int, name: bytes, mode: int, device: int, caller: Caller) -> Entry:
        """Make a file, FIFO or socket; a device only where the mount allows it."""
        if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and not self._allow_devices:
            raise OSError(errno.EPERM, "devices are not allowed on this mount")
        return self._make(parent_id, name, mode, caller, lambda fd: os.mknod(name, mode, device, dir_fd=fd))

    def mkdir(self, parent_id: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory."""
        return self._make(parent_id, name, mode, caller, lambda fd: os.mkdir(name, mode, dir_fd=fd))

    def symlink(self, parent_id: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symlink."""
        return self._make(parent_id, name, None, caller, lambda fd: os.symlink(target, name, dir_fd=fd))

    def _make(self, parent_id: int, name: bytes, mode: int | None, caller: Caller, make: _Make) -> Entry:
        parent = self.inodes.get(parent_id)
        account = self._room_for_entry(parent, name)
        directory_fd = self._directory(parent)
        make(directory_fd)
        account.add(0, 1)
        try:
            self._give(parent, directory_fd, name, mode, caller)
            self._creators.attribute(directory_fd, name, caller, account.creator)
            st = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except OSError:
            self._unmake(directory_fd, name, account)
            raise
        account.changed(st.st_ino)
        if account.observer is not None and stat.S_ISREG(st.st_mode):
            account.observer.completed(path_in_region(parent, name), st, "IN_CREATE")
        return self._referred(parent, name, st)

    def _give(self, parent: Inode, fd: int, name: bytes | None, mode: int | None, caller: Caller) -> None:
        """Make a new file its caller's. ``fd`` is the file, or its directory when ``name`` is given.

        The backing filesystem has already inherited the group of a setgid directory. A change of
        owner clears the set-id bits, so they are set again.
        """
        setgid = bool(parent.mode & stat.S_ISGID)
        uid, gid = caller.uid, -1 if setgid else caller.gid
        if self._gives_away and (uid != 0 or gid > 0):
            if name is None:
                os.chown(fd, uid, gid)
            else:
                os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
            if mode is not None and mode & (stat.S_ISUID | stat.S_ISGID):
                if stat.S_ISDIR(mode) and setgid:
                    mode |= stat.S_ISGID
                os.chmod(
                    fd if name is None else name, stat.S_IMODE(mode), dir_fd=None if name is None else fd
                )

    @staticmethod
    def _unmake(directory_fd: int, name: bytes, account: Account) -> None:
        try:
            os.unlink(name, dir_fd=directory_fd)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=directory_fd)
        account.add(0, -1)

    def link(self, nodeid: int, parent_id: int, name: bytes) -> Entry:
        """Give a file one more name in its region."""
        inode, parent = self.inodes.get(nodeid), self.inodes.get(parent_id)
        _check_name(name)
        if self._account_of(parent, name) is not inode.account:
            raise OSError(errno.EXDEV, "hard links do not cross regions")
        if inode.parent is None:
            raise OSError(errno.ENOENT, "the file has no name left")
        self._frozen.require_changeable(inode.ino)
        inode.answer = None
        source_fd, directory_fd = self.inodes.two_directory_fds(inode.parent, parent)
        os.link(inode.name, name, src_dir_fd=source_fd, dst_dir_fd=directory_fd, follow_symlinks=False)
        inode.account.changed(inode.ino)
        st = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        if inode.account.observer is not None and _is_whole(inode):
            inode.account.observer.completed(path_in_region(parent, name), st, "IN_CREATE")
        return self._referred(parent, name, self.absent.told(st))

    # Removing --------------------------------------------------------------------------------------

    def unlink(self, parent_id: int, name: bytes) -> None:
        """Remove a name; the inode goes with its last one, its charge with its last close."""
        parent = self.inodes.get(parent_id)
        self._refuse_region_root(parent, name)
        directory_fd = self._directory(parent)
        st = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        self._frozen.require_changeable(st.st_ino)
        inode = self.inodes.find(st.st_ino)
        if inode is not None and st.st_nlink > 1 and not inode.more_names and inode.dir_fd < 0:
            self.inodes.anchor(inode)
            directory_fd = self._directory(parent)
        os.unlink(name, dir_fd=directory_fd)
        passing("unlink.gone")
        if st.st_nlink == 1:
            self.absent.forget(st.st_ino)
        account = self._account_of(parent, name)
        if account.observer is not None and stat.S_ISREG(st.st_mode):
            account.observer.replaced(path_in_region(parent, name), [], came="", went="IN_DELETE")
        name_is_gone(self.inodes, account, parent, name, st)

    def rmdir(self, parent_id: int, name: bytes) -> None:
        """Remove an empty directory."""
        parent = self.inodes.get(parent_id)
        self._refuse_region_root(parent, name)
        directory_fd = self._directory(parent)
        st = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        os.rmdir(name, dir_fd=directory_fd)
        name_is_gone(self.inodes, self._account_of(parent, name), parent, name, st)

    # Renaming --------------------------------------------------------------------------------------

    def rename(self, old_parent_id: int, old: bytes, new_parent_id: int, new: bytes, flags: int) -> None:
        """Move a name, atomically, the charge with it; over an existing target, or exchanging the two."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "unknown rename flags")
        _check_name(new)
        old_parent, new_parent = self.inodes.get(old_parent_id), self.inodes.get(new_parent_id)
        self._refuse_region_root(old_parent, old)
        self._refuse_region_root(new_parent, new)
        old_fd, new_fd = self.inodes.two_directory_fds(old_parent, new_parent)
        source = os.stat(old, dir_fd=old_fd, follow_symlinks=False)
        try:
            target = os.stat(new, dir_fd=new_fd, follow_symlinks=False)
        except FileNotFoundError:
            target = None
        exchange = bool(flags & RENAME_EXCHANGE)
        if target is None and exchange:
            raise OSError(errno.ENOENT, "nothing to exchange with")
        if target is not None and flags & RENAME_NOREPLACE:
            raise OSError(errno.EEXIST, "the target exists")
        if target is not None and target.st_ino == source.st_ino:
            return  # two names of one file: rename() does nothing
        self._frozen.require_movable(source.st_ino)
        if target is not None:
            self._frozen.require_movable(target.st_ino)
        rename = Rename(
            self.inodes,
            Side(old_parent, old, old_fd, source, self._account_of(old_parent, old)),
            Side(new_parent, new, new_fd, target, self._account_of(new_parent, new)),
            exchange=exchange,
        )
        rename.require_room()
        if exchange:
            renameat2(old_fd, old, new_fd, new, RENAME_EXCHANGE)
        else:
            os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            if target is not None and target.st_nlink == 1:
                self.absent.forget(target.st_ino)
        passing("rename.moved")
        rename.book()
        passing("rename.booked")

    def leaving(self, old: Name, new: Name) -> list[Item]:
        """The absent files that a rename would take to another region, where no mark belongs."""
        parent, new_parent = self.inodes.get(old[0]), self.inodes.get(new[0])
        if self._account_of(parent, old[1]) is self._account_of(new_parent, new[1]):
            return []
        try:
            found = inodes_below(self._directory(parent), old[1])
        except FileNotFoundError:
            return []
        return [self.absent.by_ino[ino] for ino in found if ino in self.absent.by_ino]

    def open_item(self, item: Item) -> int:
        """A descriptor of an absent file, wherever it is, as far as that is known."""
        inode = self.inodes.find(item.ino)
        return item.part.open_to_fill(item) if inode is None else self.open_to_fill(inode)

    # Common ----------------------------------------------------------------------------------------

    def _directory(self, inode: Inode) -> int:
        if inode.last_stat is not None:
            raise OSError(errno.ENOENT, "the directory was removed")
        return self.inodes.directory_fd(inode)

    def _stat(self, inode: Inode) -> os.stat_result:
        if inode.file is not None:
            return os.fstat(inode.file.fd)
        if inode.last_stat is not None:
            return inode.last_stat
        if inode.dir_fd >= 0:
            return self.absent.told(os.fstat(inode.dir_fd))
        directory_fd, name = self.inodes.locate(inode)
        return self.absent.told(os.stat(name, dir_fd=directory_fd, follow_symlinks=False))

    def _account_of(self, parent: Inode, name: bytes) -> Account:
        return self.ledger.of_root_entry(name) if parent is self.inodes.root else parent.account

    def _room_for_entry(self, parent: Inode, name: bytes) -> Account:
        _check_name(name)
        account = self._account_of(parent, name)
        account.require(0, 1)
        return account

    def _referred(self, parent: Inode, name: bytes, st: os.stat_result) -> Entry:
        inode = self.inodes.learn(parent, name, st, self._account_of(parent, name))
        inode.lookups += 1
        return inode, st

    def _refuse_region_root(self, parent: Inode, name: bytes) -> None:
        if parent is self.inodes.root and self.ledger.is_root(name):
            raise OSError(errno.EBUSY, "a region's root stays where it is")


def _is_whole(inode: Inode) -> bool:
    """Whether it is a regular file that is not being written."""
    return stat.S_ISREG(inode.mode) and (inode.file is None or not inode.file.is_being_written)


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "names have at most 255 bytes")
