"""The FUSE handlers: decode what the kernel sends, call the filesystem, encode what it answers.

Names, attributes (negative entries too) and pages are cached by the kernel for good, because the mount
is the only door to the tree. FLUSH is answered ENOSYS once, so that the kernel never sends it: writes
are write-through, so close(2) has nothing left to report (the kernel itself still writes back what was
changed through mmap at close), locks are the kernel's own, and RELEASE tells us of the last close.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, StatvfsData

from agentfuse.fuse.boundary import Gate, changing_handler, handler, slow_handler
from agentfuse.fuse.filesystem import NAME_MAX, Change, Filesystem, Name
from agentfuse.fuse.handles import Listing
from agentfuse.fuse.inodes import Inode
from agentfuse.fuse.names import RENAME_EXCHANGE
from agentfuse.fuse.tally import Tally
from agentfuse.home.creators import Caller, Creator
from agentfuse.sync.absent import State

if TYPE_CHECKING:
    from agentfuse.fuse.xattrs import Xattrs
    from agentfuse.sync.hydration import Hydration

FOREVER_S = 10 * 365 * 86400.0
_DIRECTORY_BLKSIZE = 1 << 20
_FILE_BLKSIZE = 1 << 16
_BLOCK = 4096


class Operations(pyfuse3.Operations):
    """Handlers of one mount. ``on_init`` is called once when the kernel has said hello.

    ``free_bytes`` tells what the local disk has left, for statfs; ``creator_of`` for whom a process writes,
    by its number, if it is a door of ours; ``content_of`` what a file of the platform's own, by its name,
    is to hold when it is opened, or None.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        filesystem: Filesystem,
        xattrs: Xattrs,
        hydration: Hydration,
        *,
        on_init: Callable[[], None],
        free_bytes: Callable[[], int],
        creator_of: Callable[[int], Creator | None],
        content_of: Callable[[bytes], bytes | None],
    ) -> None:
        super().__init__()
        self.tally = Tally()
        self.gate = Gate()
        self._fs = filesystem
        self.filesystem = filesystem
        self._content = filesystem.content
        self._inodes = filesystem.inodes
        self._xattrs = xattrs
        self._hydration = hydration
        self._absent = filesystem.absent.by_ino
        self._on_init = on_init
        self._free_bytes = free_bytes
        self._creator_of = creator_of
        self._content_of = content_of
        self._listings: dict[int, Listing] = {}
        self._next_listing = 1
        self._fsync_limiter = trio.CapacityLimiter(8)

    def listing(self, fh: int) -> Listing:
        """An open directory, by the number of its handle."""
        return self._listings[fh]

    def init(self) -> None:
        """The kernel has said hello: from now on it sends requests."""
        self._on_init()

    def _admit(self, ctx: pyfuse3.RequestContext, nodeid: int, name: bytes | None = None) -> None:
        """Refuse whoever wants to change what is the platform's own, unless it is a door of ours.

        Permissions would not do: an agent may well be root, or the same user as the daemon.
        """
        if self._fs.is_platforms(nodeid, name) and self._creator_of(ctx.pid) is None:
            raise OSError(errno.EPERM, "the platform's own")

    # Names -----------------------------------------------------------------------------------------

    @handler
    def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        entry = self._fs.lookup(parent_inode, name)
        return _NEGATIVE if entry is None else attributes(*entry)

    @handler
    def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for nodeid, count in inode_list:
            self._inodes.forget(nodeid, count)

    @changing_handler
    def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._admit(ctx, parent_inode, name)
        return attributes(*self._fs.symlink(parent_inode, name, target, _caller(ctx)))

    @handler
    def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._fs.readlink(inode)

    @changing_handler
    def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._admit(ctx, new_parent_inode, new_name)
        return attributes(*self._fs.link(inode, new_parent_inode, new_name))

    @changing_handler
    def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._admit(ctx, parent_inode, name)
        return attributes(*self._fs.mknod(parent_inode, name, mode, rdev, _caller(ctx)))

    @changing_handler
    def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._admit(ctx, parent_inode, name)
        return attributes(*self._fs.mkdir(parent_inode, name, stat.S_IMODE(mode), _caller(ctx)))

    @changing_handler
    def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._admit(ctx, parent_inode, name)
        self._fs.unlink(parent_inode, name)

    @changing_handler
    def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._admit(ctx, parent_inode, name)
        self._fs.rmdir(parent_inode, name)

    @slow_handler
    async def rename(  # noqa: PLR0917  # pyfuse3 calls it so
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._admit(ctx, parent_inode_old, name_old)
        self._admit(ctx, parent_inode_new, name_new)
        if self.gate.is_closed or self._absent:
            names = ((parent_inode_old, name_old), (parent_inode_new, name_new))
            await self._ready_to_leave(*names, exchange=bool(flags & RENAME_EXCHANGE))
        self._fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # Attributes ------------------------------------------------------------------------------------

    @handler
    def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return attributes(*self._fs.getattr(inode))

    @slow_handler
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        change = Change(
            size=attr.st_size if fields.update_size else None,
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        self._admit(ctx, inode)
        self._fs.require_changeable(inode)
        node = self._inodes.get(inode)
        if change.size is not None and node.ino in self._absent:
            await self._ready(node, writing=True, emptying=change.size == 0)
        elif self.gate.is_closed:
            await self.gate.passed()
        return attributes(*self._fs.setattr(inode, change))

    @handler
    def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._xattrs.get(inode, name)

    @changing_handler
    def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._admit(ctx, inode)
        self._fs.require_changeable(inode)
        self._xattrs.set(inode, name, value)

    @handler
    def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self._xattrs.list(inode)

    @changing_handler
    def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._admit(ctx, inode)
        self._fs.require_changeable(inode)
        self._xattrs.remove(inode, name)

    @handler
    def statfs(self, ctx: pyfuse3.RequestContext) -> StatvfsData:
        accounts = self._fs.ledger.accounts()
        total = sum(account.bytes_quota for account in accounts)
        free = min(sum(account.room() for account in accounts), self._free_bytes())
        files = sum(account.files_quota for account in accounts)
        files_free = sum(max(0, account.files_quota - account.files_used) for account in accounts)
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = total // _BLOCK
        data.f_bfree = data.f_bavail = free // _BLOCK
        data.f_files = files
        data.f_ffree = data.f_favail = files_free
        data.f_namemax = NAME_MAX
        return data

    # Files -----------------------------------------------------------------------------------------

    @changing_handler
    def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self._admit(ctx, parent_inode, name)
        inode, st, handle = self._fs.create(parent_inode, name, mode, flags, _caller(ctx))
        self._content.handle(handle).opener = ctx.pid
        return FileInfo(fh=handle), attributes(inode, st)

    @slow_handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        node = self._inodes.get(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        changing = writing or bool(flags & os.O_TRUNC)
        if changing:
            self._admit(ctx, inode)
            self._fs.require_changeable(inode)
        if self.gate.is_closed or node.ino in self._absent:
            await self._ready(node, writing=writing, emptying=bool(flags & os.O_TRUNC))
            if changing:
                self._fs.require_changeable(inode)
        if node.account.is_platforms and (content := self._content_of(node.name)) is not None:
            self._fs.make_anew(node, content)
        return FileInfo(fh=self._content.open(node, flags, ctx.pid))

    async def _ready(self, inode: Inode, *, writing: bool, emptying: bool) -> None:
        """Wait until the home may change, and this file may be opened, or emptied, if it is to be.

        Nothing else happens between that and what the caller does next.
        """
        while True:
            await self.gate.passed()
            item = self._absent.get(inode.ino)
            if item is None or (emptying and item.state is not State.FILLING):
                return
            if emptying:
                await self._hydration.stopped(item)
                continue
            if not writing:
                item.check_refusal()
            if item.allows(writing=writing):
                return
            try:
                await self._hydration.need(item, partial(self._fs.open_to_fill, inode), writing=writing)
            except OSError as error:
                if writing:
                    item.refuse(error.errno or errno.EIO)
                raise

    async def _ready_to_leave(self, old: Name, new: Name, *, exchange: bool) -> None:
        """Wait until the home may change, and what would go to another region has its contents."""
        while True:
            await self.gate.passed()
            leaving = self._fs.leaving(old, new) or (self._fs.leaving(new, old) if exchange else [])
            if not leaving:
                return
            try:
                await self._hydration.need(leaving[0], partial(self._fs.open_item, leaving[0]), writing=True)
            except OSError as error:
                # Moving is copying then, for who knows how to, and that may still fail.
                raise OSError(errno.EXDEV, "contents are still arriving") from error

    @handler
    def read(self, fh: int, off: int, size: int) -> bytes:
        return self._content.read(fh, off, size)

    @changing_handler
    def write(self, fh: int, off: int, buf: bytes) -> int:
        return self._content.write(fh, off, buf)

    @handler
    def flush(self, fh: int) -> None:
        raise OSError(errno.ENOSYS, "writes are write-through")

    @handler
    def release(self, fh: int) -> None:
        self._content.release(fh)

    @slow_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        sync = os.fdatasync if datasync else os.fsync
        await trio.to_thread.run_sync(sync, self._content.fd_to_sync(fh), limiter=self._fsync_limiter)

    # Directories -----------------------------------------------------------------------------------

    @handler
    def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = Listing(self._inodes.get(inode), ctx.pid)
        return handle

    @handler
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0:
            self._fs.rewind(listing)
        position = start_id
        for name in (b".", b"..")[start_id:]:
            position += 1
            if not pyfuse3.readdir_reply(token, name, self._dot(listing.inode, name), position):
                return
        for name in listing.names[position - 2 :]:
            position += 1
            child = (listing.inode.children or {}).get(name)
            answer = child.answer if child is not None else None
            if child is None or answer is None:
                entry = self._fs.peek(listing, name)
                if entry is None:
                    continue
                child, answer = entry[0], attributes(*entry)
            if not pyfuse3.readdir_reply(token, name, answer, position):
                self._inodes.drop_if_unused(child)
                return
            child.lookups += 1

    def _dot(self, inode: Inode, name: bytes) -> EntryAttributes:
        if name == b".." and inode.parent is not None:
            inode = inode.parent
        entry = EntryAttributes()
        entry.st_ino = inode.nodeid
        entry.st_mode = inode.mode
        return entry

    @handler
    def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    @slow_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        fd = self._fs.open_to_sync(self._listings[fh])
        try:
            await trio.to_thread.run_sync(os.fsync, fd, limiter=self._fsync_limiter)
        finally:
            os.close(fd)


def attributes(inode: Inode, st: os.stat_result) -> EntryAttributes:
    """What the kernel is told of an inode. Kept with it, unless it is a directory or nameless."""
    entry = EntryAttributes()
    entry.st_ino = inode.nodeid
    entry.entry_timeout = FOREVER_S
    entry.attr_timeout = (
        0.0 if inode.account.is_platforms else FOREVER_S
    )  # those change behind the kernel's back
    mode = st.st_mode
    entry.st_mode = mode
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blocks = st.st_blocks
    # opendir(3) and buffered files size their buffers by this: fewer, larger requests.
    entry.st_blksize = _DIRECTORY_BLKSIZE if stat.S_ISDIR(mode) else _FILE_BLKSIZE
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    if not stat.S_ISDIR(mode) and inode.last_stat is None:
        inode.answer = entry
    return entry


def _negative() -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = FOREVER_S
    return entry


_NEGATIVE = _negative()


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)
