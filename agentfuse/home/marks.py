"""What is marked on backing files, in extended attributes that agents neither see nor set.

That a content is not here yet: the file has its name, size and attributes, and a hole or worthless bytes for
a content; the mark says which content belongs into it. A file without this mark is what it seems to be.

Who made a file or directory: without this mark the agent did. So what agents do costs nothing, and the mark
goes wherever the inode does. That a file is frozen: ``regions.FROZEN``. Knows no store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from agentfuse.regions import FROZEN, Creator

_T = TypeVar("_T")

NAME = b"user.agentfuse.absent"
CREATOR = b"user.agentfuse.creator"
LABELS = b"user.labels"
"""What an API keeps with a file or directory: some bytes of its own. Agents may see it, and snapshots do."""

File = int | str
"""An open file, or a path that nobody else can make lead elsewhere: ``/proc/self/fd/N``."""

_SHA256_BYTES = 32
# Seconds, nanoseconds, mode. All of a mark fits into ext4's inode (up to 56 bytes do): no block for it.
_FILLING = struct.Struct("<qIH")
_TEXTS = {name: os.fsdecode(name) for name in (NAME, CREATOR, LABELS, FROZEN)}
_CREATORS = {creator.value.encode(): creator for creator in Creator}
_NO_MARK = (errno.ENODATA, errno.EOPNOTSUPP)


class Mark(NamedTuple):
    """``sha256`` in hexadecimal. ``filling``: None, or the mtime in nanoseconds and the mode that the file
    has while its content is being written, which changes what the filesystem says of both.
    """

    sha256: str
    filling: tuple[int, int] | None = None


def are_kept(directory_fd: int) -> bool:
    """Whether the filesystem of a directory of ours can hold marks."""
    try:
        os.setxattr(directory_fd, NAME, b"")
        os.removexattr(directory_fd, NAME)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    return True


def names_on(file: File) -> Sequence[str]:
    """The names of all attributes of a file or directory, some of which may be marks; needs no permission.

    Who reads several marks gives them to each reading, so that they are asked for once.
    """
    try:
        return os.listxattr(file)
    except OSError as error:
        if error.errno in _NO_MARK:
            return ()
        raise


def write(fd: int, mark: Mark) -> None:
    """Mark an open file of ours, or change its mark. Raises ``OSError``, ENOSPC if it has no room."""
    value = bytes.fromhex(mark.sha256)
    if mark.filling is not None:
        mtime_ns, mode = mark.filling
        value += _FILLING.pack(*divmod(mtime_ns, 10**9), mode)
    _permitted(fd, lambda: os.setxattr(fd, NAME, value))


def is_sound(name: bytes, value: bytes) -> bool:
    """Whether an attribute is a mark, and says what one can say."""
    if name == NAME:
        return len(value) in (_SHA256_BYTES, _SHA256_BYTES + _FILLING.size)
    return name == CREATOR and value.decode("ascii", "replace") in set(Creator)


def remove(fd: int) -> None:
    """Remove the mark; a file that has none is no error."""
    try:
        _permitted(fd, lambda: os.removexattr(fd, NAME))
    except OSError as error:
        if error.errno not in _NO_MARK:
            raise


def read(file: File, names: Sequence[str] | None = None) -> Mark | None:
    """The mark of a file; None when it has none, so its content is its own."""
    value = _value(file, NAME, names)
    if value is None:
        return None
    sha256 = value[:_SHA256_BYTES].hex()
    if len(value) <= _SHA256_BYTES:
        return Mark(sha256)
    seconds, nanoseconds, mode = _FILLING.unpack(value[_SHA256_BYTES:])
    return Mark(sha256, (seconds * 10**9 + nanoseconds, mode))


def restore(fd: int, mark: Mark) -> None:
    """Give a file back its mode and mtime, which writing its content has changed, and say so in the mark."""
    if mark.filling is None:
        return
    mtime_ns, mode = mark.filling
    found = os.fstat(fd)
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(fd, mode)  # set-id bits go when somebody who is not root writes
    os.utime(fd, ns=(found.st_atime_ns, mtime_ns))
    write(fd, Mark(mark.sha256))


def write_creator(file: File, creator: Creator) -> None:
    """Mark who made a file or directory. Raises ``OSError``."""
    _permitted(file, lambda: os.setxattr(file, CREATOR, creator.value.encode()))


def read_creator(file: File, names: Sequence[str] | None = None) -> Creator:
    """Who made a file or directory; a mark that says nothing we know is none."""
    value = _value(file, CREATOR, names)
    return Creator.AGENT if value is None else _CREATORS.get(value, Creator.AGENT)


def write_frozen(fd: int, *, frozen: bool) -> None:
    """Mark an open file as frozen, or take the mark away. Raises ``OSError``."""
    if frozen:
        _permitted(fd, lambda: os.setxattr(fd, FROZEN, b"1"))
    elif is_frozen(fd):
        _permitted(fd, lambda: os.removexattr(fd, FROZEN))


def is_frozen(file: File, names: Sequence[str] | None = None) -> bool:
    """Whether a file is marked as frozen."""
    return _TEXTS[FROZEN] in (os.listxattr(file) if names is None else names)


def write_labels(file: File, labels: bytes) -> None:
    """Set the labels of a file or directory; empty ones are removed. Raises ``OSError``."""
    if labels:
        _permitted(file, lambda: os.setxattr(file, LABELS, labels))
    elif _TEXTS[LABELS] in os.listxattr(file):
        _permitted(file, lambda: os.removexattr(file, LABELS))


def read_labels(file: File, names: Sequence[str] | None = None) -> bytes:
    """The labels of a file or directory; empty when it has none."""
    return _value(file, LABELS, names) or b""


def _value(file: File, name: bytes, names: Sequence[str] | None) -> bytes | None:
    """An attribute; None when there is none."""
    if _TEXTS[name] not in (names_on(file) if names is None else names):
        return None
    try:
        return _permitted(file, lambda: os.getxattr(file, name))
    except OSError as error:
        if error.errno in _NO_MARK:
            return None
        raise


def _permitted(file: File, work: Callable[[], _T]) -> _T:
    """An owner that is not root needs the file's permission bits even with a descriptor."""
    try:
        return work()
    except PermissionError:
        mode = stat.S_IMODE(os.stat(file).st_mode)
        os.chmod(file, mode | 0o600)
        try:
            return work()
        finally:
            with contextlib.suppress(OSError):
                os.chmod(file, mode)
