"""System calls that Python has no function for, and running a function as another user."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2) with paths."""
    _check(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself, without the C library's emulation."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """utimensat(2); the nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags))


class Directory:
    """opendir(3) and its seek: what os.scandir does not offer."""

    def __init__(self, path: Path) -> None:
        _libc.opendir.restype = ctypes.c_void_p
        _libc.readdir.restype = ctypes.c_void_p
        self._dir = ctypes.c_void_p(_libc.opendir(os.fsencode(path)))
        assert self._dir

    def read(self) -> bytes | None:
        """The next name, or None at the end."""
        entry = _libc.readdir(self._dir)
        # struct dirent: 8 ino, 8 off, 2 reclen, 1 type, then the name
        return ctypes.string_at(entry + 19) if entry else None

    def tell(self) -> int:
        """A position to come back to."""
        _libc.telldir.restype = ctypes.c_long
        return int(_libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        """Back to a position."""
        _libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        """To the beginning, seeing what came meanwhile."""
        _libc.rewinddir(self._dir)

    def close(self) -> None:
        """Close it."""
        _libc.closedir(self._dir)


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must fail with one of these errnos."""
    with pytest.raises(OSError) as caught:
        yield
    expected = [errno.errorcode[code] for code in codes]
    assert caught.value.errno in codes, f"{errno.errorcode[caught.value.errno or 0]}, expected {expected}"


def in_child(function: Callable[[], Any], *, uid: int | None = None, groups: tuple[int, ...] = ()) -> Any:
    """Run a function in a forked child, as another user if ``uid`` is given; its result or its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None:
                os.setgroups(groups)
                os.setgid(uid)
                os.setuid(uid)
            answer: tuple[bool, Any] = (True, function())
        except BaseException as error:  # noqa: BLE001  # everything is told to the parent
            code = error.errno if isinstance(error, OSError) else None
            answer = (False, (code, repr(error)))
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    succeeded, value = pickle.loads(data)
    if succeeded:
        return value
    code, text = value
    raise OSError(code, text) if code else AssertionError(text)
