"""Extended attributes, when a home has them: user.* only, passed to the local tree.

Off by default, and then answered ENOSYS, so that the kernel stops asking: it would otherwise ask for
security.capability before every write.
"""

from __future__ import annotations

import errno
import os

from agentfuse.fuse.inodes import InodeTable
from agentfuse.regions import FROZEN

_USER = b"user."
_OURS = b"user.agentfuse."


class Xattrs:
    """The extended attributes of a home's inodes. ``enabled`` False answers ENOSYS to everything."""

    def __init__(self, inodes: InodeTable, *, enabled: bool) -> None:
        self._inodes = inodes
        self._enabled = enabled

    def get(self, nodeid: int, name: bytes) -> bytes:
        """A value. Raises ``OSError``: ENODATA when there is none."""
        path = self._path(nodeid)
        if not _is_visible(name):
            raise OSError(errno.ENODATA, "no such attribute")
        return os.getxattr(path, name, follow_symlinks=False)

    def set(self, nodeid: int, name: bytes, value: bytes) -> None:
        """Set a value. Raises ``OSError``: EOPNOTSUPP outside of user.*."""
        path = self._path(nodeid)
        self._require_visible(name)
        os.setxattr(path, name, value, follow_symlinks=False)
        self._changed(nodeid)

    def remove(self, nodeid: int, name: bytes) -> None:
        """Remove a value."""
        path = self._path(nodeid)
        self._require_visible(name)
        os.removexattr(path, name, follow_symlinks=False)
        self._changed(nodeid)

    def list(self, nodeid: int) -> list[bytes]:
        """The names there are."""
        names = map(os.fsencode, os.listxattr(self._path(nodeid), follow_symlinks=False))
        return [name for name in names if _is_visible(name)]

    def _changed(self, nodeid: int) -> None:
        inode = self._inodes.get(nodeid)
        inode.account.changed(inode.ino)

    def _path(self, nodeid: int) -> bytes:
        # The xattr calls take neither a directory descriptor nor an O_PATH one; /proc bridges that.
        if not self._enabled:
            raise OSError(errno.ENOSYS, "extended attributes are off")
        inode = self._inodes.get(nodeid)
        inode.answer = None
        directory_fd, name = self._inodes.locate(inode)
        return b"/proc/self/fd/%d/%s" % (directory_fd, name)

    @staticmethod
    def _require_visible(name: bytes) -> None:
        if not _is_visible(name):
            raise OSError(errno.EOPNOTSUPP, "only user.* attributes are kept")


def _is_visible(name: bytes) -> bool:
    return name.startswith(_USER) and not name.startswith(_OURS) and name != FROZEN
