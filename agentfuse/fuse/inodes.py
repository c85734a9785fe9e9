"""The inodes that the kernel knows, by the number it knows them by, and how to reach each on disk.

An inode is reached through (descriptor of its parent directory, name). Only we change the tree, so
names stay true; only directories get a descriptor, O_PATH, from a bounded cache. The number the
kernel sees is the backing inode's number, unless the kernel still knows that number for a file that
is gone: then it is an alias, so that a number is never reused while known.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes

    from agentfuse.fuse.handles import OpenFile
    from agentfuse.home.quota import Account

ROOT_NODEID = 1
_FIRST_ALIAS = 1 << 62  # no local filesystem numbers its inodes up here
_OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Inode:
    """One file, directory, symlink or special file that the kernel holds a reference to.

    ``parent`` and ``name`` are one name it has (None when it has none that we know), ``more_names``
    the other known ones of a hard-linked file. ``lookups`` is the kernel's reference count,
    ``children`` are the known names in this directory, ``dir_fd`` is its descriptor or -1.
    ``last_stat`` is set once the last name is gone; ``file`` while it is open. ``answer`` is what the
    kernel was last told of a file's attributes, None as soon as anything may have changed them.
    """

    __slots__ = (
        "account",
        "answer",
        "children",
        "dir_fd",
        "file",
        "ino",
        "last_stat",
        "lookups",
        "mode",
        "more_names",
        "name",
        "nodeid",
        "parent",
    )

    def __init__(self, nodeid: int, ino: int, mode: int, account: Account) -> None:
        self.nodeid = nodeid
        self.ino = ino
        self.mode = mode
        self.account = account
        self.parent: Inode | None = None
        self.name: bytes = b""
        self.more_names: set[tuple[Inode, bytes]] | None = None
        self.lookups = 0
        self.children: dict[bytes, Inode] | None = None
        self.dir_fd = -1
        self.file: OpenFile | None = None
        self.last_stat: os.stat_result | None = None
        self.answer: EntryAttributes | None = None

    def path(self) -> bytes | None:
        """One path of this inode, from the home's root; None when it has no name that we know."""
        names: list[bytes] = []
        node = self
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return b"/".join(reversed(names)) if node.nodeid == ROOT_NODEID else None

    def names(self) -> list[tuple[Inode, bytes]]:
        """Every name that we know it has."""
        return [] if self.parent is None else [(self.parent, self.name), *(self.more_names or ())]


def path_in_region(parent: Inode, name: bytes) -> bytes:
    """The path of ``parent/name`` below the top directory of the home that it is in."""
    names = [name]
    node = parent
    while node.parent is not None and node.parent.parent is not None:
        names.append(node.name)
        node = node.parent
    return b"/".join(reversed(names))


class InodeTable:
    """All known inodes of one home. Not thread-safe: the trio thread's alone.

    ``root_fd`` is the home's backing root, taken over. ``max_directory_fds`` bounds the cache.
    Every method that gets a number raises ``OSError(ESTALE)`` for one it does not know.
    """

    def __init__(self, root_fd: int, loose: Account, *, max_directory_fds: int) -> None:
        st = os.fstat(root_fd)
        self.root = Inode(ROOT_NODEID, st.st_ino, st.st_mode, loose)
        self.root.lookups = 1
        self.root.dir_fd = root_fd
        self._by_nodeid: dict[int, Inode] = {ROOT_NODEID: self.root}
        self._aliases: dict[int, Inode] = {st.st_ino: self.root}
        self._next_alias = _FIRST_ALIAS
        self._directory_fds: OrderedDict[Inode, None] = OrderedDict()
        self._max_directory_fds = max_directory_fds

    def __len__(self) -> int:
        return len(self._by_nodeid)

    def get(self, nodeid: int) -> Inode:
        """The inode of this number."""
        try:
            return self._by_nodeid[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "unknown inode") from None

    def find(self, ino: int) -> Inode | None:
        """The known inode that the backing inode ``ino`` is now, if any."""
        inode = self._by_nodeid.get(ino)
        if inode is None or inode.ino != ino or inode.last_stat is not None:
            return self._aliases.get(ino)
        return inode

    def known(self) -> list[Inode]:
        """All known inodes."""
        return list(self._by_nodeid.values())

    def learn(self, parent: Inode, name: bytes, st: os.stat_result, account: Account) -> Inode:
        """The inode that ``parent/name`` is, made known when it was not, with this name among its names."""
        ino = st.st_ino
        inode = self.find(ino)
        if inode is None:
            nodeid = ino
            if ino <= ROOT_NODEID or ino in self._by_nodeid:
                nodeid = self._next_alias
                self._next_alias += 1
            inode = Inode(nodeid, ino, st.st_mode, account)
            self._by_nodeid[nodeid] = inode
            if nodeid != ino:
                self._aliases[ino] = inode
        else:
            inode.mode = st.st_mode
        if inode.parent is not parent or inode.name != name:
            self._add_name(inode, parent, name)
        return inode

    def _add_name(self, inode: Inode, parent: Inode, name: bytes) -> None:
        if inode.parent is None:
            inode.parent, inode.name = parent, name
        else:
            if inode.more_names is None:
                inode.more_names = set()
            if (parent, name) in inode.more_names:
                return
            inode.more_names.add((parent, name))
        if parent.children is None:
            parent.children = {}
        parent.children[name] = inode

    def remove_name(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """``parent/name`` is no name of this inode any more."""
        if inode.parent is parent and inode.name == name:
            if inode.more_names:
                inode.parent, inode.name = inode.more_names.pop()
            else:
                inode.parent, inode.name = None, b""
        elif inode.more_names and (parent, name) in inode.more_names:
            inode.more_names.discard((parent, name))
        else:
            return
        self._leave(parent, name, inode)

    def _leave(self, parent: Inode, name: bytes, inode: Inode) -> None:
        # While two names are exchanged, each is the other's already when it is left.
        if parent.children is not None and parent.children.get(name) is inode:
            del parent.children[name]
        self.drop_if_unused(parent)

    def move_name(self, inode: Inode, old: tuple[Inode, bytes], new: tuple[Inode, bytes]) -> None:
        """The name ``old`` of this inode has become ``new``."""
        self._add_name(inode, *new)
        self.remove_name(inode, *old)

    def bury(self, inode: Inode, last_stat: os.stat_result) -> None:
        """The backing inode has lost its last name; answer for it with ``last_stat`` until forgotten."""
        if self._aliases.get(inode.ino) is inode:
            del self._aliases[inode.ino]
        inode.last_stat = last_stat
        self._close_directory(inode)

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel gives up ``count`` of its references."""
        inode = self._by_nodeid.get(nodeid)
        if inode is not None:
            inode.lookups -= count
            self.drop_if_unused(inode)

    def drop_if_unused(self, inode: Inode) -> None:
        """Let go of an inode that nobody refers to any more."""
        if inode.lookups > 0 or inode.children or inode.file is not None or inode is self.root:
            return
        if self._by_nodeid.pop(inode.nodeid, None) is None:
            return
        if self._aliases.get(inode.ino) is inode:
            del self._aliases[inode.ino]
        self._close_directory(inode)
        names = inode.names()
        inode.parent = inode.more_names = None
        for parent, name in names:
            self._leave(parent, name, inode)

    def locate(self, inode: Inode) -> tuple[int, bytes]:
        """(descriptor of the parent directory, name) of a name this inode has.

        Raises ``OSError(ESTALE)`` when it has none that we know.
        """
        if inode.parent is None:
            if inode is self.root:
                return inode.dir_fd, b"."
            raise OSError(errno.ESTALE, "the inode has no name")
        return self.directory_fd(inode.parent), inode.name

    def directory_fd(self, inode: Inode) -> int:
        """An O_PATH descriptor of a directory: good until the next call, and never to be closed."""
        fd = inode.dir_fd
        if fd >= 0:
            if inode is not self.root:
                self._directory_fds.move_to_end(inode)
            return fd
        fd = self._open_directory(inode)
        inode.dir_fd = fd
        self._directory_fds[inode] = None
        if len(self._directory_fds) > self._max_directory_fds:
            oldest, _ = self._directory_fds.popitem(last=False)
            os.close(oldest.dir_fd)
            oldest.dir_fd = -1
        return fd

    def _open_directory(self, inode: Inode) -> int:
        # Walks down from the nearest ancestor that is open: however long the path is, each step is one
        # name. What is opened on the way is not kept, so that a call evicts at most one descriptor.
        closed = []
        node = inode
        while node.dir_fd < 0:
            closed.append(node)
            if node.parent is None:
                raise OSError(errno.ESTALE, "the directory has no name")
            node = node.parent
        fd = node.dir_fd
        for step, node in enumerate(reversed(closed)):
            try:
                below = os.open(node.name, _OPEN_DIRECTORY, dir_fd=fd)
            finally:
                if step:
                    os.close(fd)
            fd = below
        return fd

    def anchor(self, inode: Inode) -> None:
        """Keep a file within reach that is about to lose the only name we know, not its last one."""
        directory_fd, name = self.locate(inode)
        inode.dir_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)

    def two_directory_fds(self, one: Inode, two: Inode) -> tuple[int, int]:
        """Descriptors of two directories, both good until the next call."""
        self.directory_fd(one)
        second = self.directory_fd(two)
        return self.directory_fd(one), second

    def _close_directory(self, inode: Inode) -> None:
        if inode.dir_fd >= 0 and inode is not self.root:
            os.close(inode.dir_fd)
            inode.dir_fd = -1
            self._directory_fds.pop(inode, None)

    def move_charge(self, top: Inode, account: Account) -> None:
        """A subtree went to another region: all known inodes in it belong to ``account`` now."""
        top.account = account
        if stat.S_ISDIR(top.mode):
            for inode in self._by_nodeid.values():
                node = inode.parent
                while node is not None and node is not top:
                    node = node.parent
                if node is top:
                    inode.account = account

    def close(self) -> None:
        """Close all descriptors."""
        for inode in list(self._directory_fds):
            self._close_directory(inode)
        os.close(self.root.dir_fd)
