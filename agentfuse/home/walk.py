"""Walking a region on disk by directory descriptors, whatever an agent left in it.

Never follows a symlink, never needs a path longer than one name, keeps few descriptors however deep the
tree, and gets into what its owner locked (mode 0) when this process is that owner and not root. Nobody
else may change the tree meanwhile. Knows no snapshots.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from agentfuse.errors import BusyError, EnvironmentProblem, UsageError

MAX_OPEN = 64
"""Descriptors that one walk keeps at most."""

SETTLED_NS = 20_000_000
"""A file whose ctime is younger than this could change again within the same tick of the kernel's clock, so
nothing that tells by its times that it did not is trusted."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_UNLOCKED = 0o700
_READABLE = 0o500


@dataclass(slots=True)
class _Level:
    name: bytes
    fd: int  # -1: closed for now, to be opened again from below
    identity: tuple[int, int]
    locked_mode: int | None  # what to give back when the walk leaves


class Cursor:
    """A place in a tree that moves from directory to directory, cheaply when they are near each other.

    Use it as a context manager. Its descriptors stay its own and are good until the next :meth:`enter`.
    """

    def __init__(self, root: int | Path, *, unlocks: bool = True, only_looks: bool = False) -> None:
        """``root``: a directory's path, or a descriptor of it, which stays the caller's.

        ``unlocks``: whether it may change modes for a moment to get into what its owner locked;
        ``only_looks``: nothing is made or removed, so what may be read and searched is left as it is.
        """
        self._unlocks = unlocks
        self._needs = (_READABLE if only_looks else _UNLOCKED) if unlocks else 0
        name, fd = (b".", root) if isinstance(root, int) else (os.fsencode(root), None)
        self._levels = [_open_level(name, fd, self._needs)]
        self._path = b""
        self._closed = 0  # levels 1 to this have no descriptor

    def __enter__(self) -> Cursor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problem: Exception | None = None
        while self._levels:
            try:
                if self._levels[-1].fd >= 0:
                    self._leave()  # gives each its mode back
                else:
                    self._levels.pop()
            except (OSError, BusyError) as failed:
                problem = problem or failed
        if problem is not None and error is None and self._unlocks:
            raise problem

    def enter(self, path: bytes) -> int:
        """The descriptor of a directory; the root's path is empty."""
        if path != self._path:
            names = path.split(b"/") if path else []
            shared = 1
            for level, name in zip(self._levels[1:], names, strict=False):
                if level.name != name:
                    break
                shared += 1
            while len(self._levels) > shared:
                self._leave()
            for name in names[shared - 1 :]:
                self._descend(name)
            self._path = path
        return self._levels[-1].fd

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """The descriptor of the directory that holds ``path``, and the name in it."""
        directory, _, name = path.rpartition(b"/")
        return self.enter(directory), name

    def open_file(self, path: bytes) -> int:
        """Open a regular file for reading, even one that its owner may not read."""
        directory_fd, name = self.parent(path)
        try:
            fd = os.open(name, _FILE, dir_fd=directory_fd)
        except PermissionError:
            if not self._unlocks:
                raise
            with _unlocked(name, directory_fd, 0o400):
                fd = os.open(name, _FILE, dir_fd=directory_fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise changed_meanwhile(path)
        return fd

    def _descend(self, name: bytes) -> None:
        self._path = b"\0"  # nowhere, until enter() is through: an error must not leave a wrong place
        self._levels.append(_open_level(name, self._levels[-1].fd, self._needs))
        if len(self._levels) - self._closed > MAX_OPEN:
            self._closed += 1
            level = self._levels[self._closed]
            os.close(level.fd)
            level.fd = -1

    def _leave(self) -> None:
        self._path = b"\0"
        level = self._levels.pop()
        try:
            if self._closed and self._closed == len(self._levels) - 1:
                self._reopen(level.fd)
            if level.locked_mode is not None:
                _lock_again(level.fd, level.locked_mode, self._needs)
        finally:
            os.close(level.fd)

    def _reopen(self, below: int) -> None:
        level = self._levels[-1]
        try:
            level.fd = os.open(b"..", _DIRECTORY, dir_fd=below)
            if _identity(os.fstat(level.fd)) != level.identity:
                os.close(level.fd)
                raise changed_meanwhile(level.name)
        except (FileNotFoundError, BusyError):
            del self._levels[1:]  # there is no way back to those; the next enter() goes from the root
            self._closed = 0
            raise changed_meanwhile(level.name) from None
        self._closed -= 1


def clear_tree(root: Path) -> None:
    """Remove everything below ``root``, which stays. Gets through locked and endlessly deep directories."""
    with local_disk(root), Cursor(root) as cursor:
        pending = [(b"", False)]
        while pending:
            path, is_emptied = pending.pop()
            if is_emptied:
                directory_fd, name = cursor.parent(path)
                os.rmdir(name, dir_fd=directory_fd)
                continue
            directory_fd = cursor.enter(path)
            if path:
                pending.append((path, True))
            for name, found in read_directory(directory_fd):
                if stat.S_ISDIR(found.st_mode):
                    pending.append((join(path, name), False))
                else:
                    os.unlink(name, dir_fd=directory_fd)


def read_directory(directory_fd: int) -> list[tuple[bytes, os.stat_result]]:
    """What a directory holds, in order of name, with each one's own attributes."""
    return [
        (name, os.stat(name, dir_fd=directory_fd, follow_symlinks=False))
        for name in sorted(map(os.fsencode, os.listdir(directory_fd)))
    ]


def require_names(path: bytes) -> None:
    """Raise ``UsageError`` unless it is a path in a region, however long; empty is the region's root."""
    names = path.split(b"/") if path else []
    if b"\0" in path or any(name in {b"", b".", b".."} for name in names):
        raise UsageError(
            f"{os.fsdecode(path)!a} is not a path in a region",
            hint="write it like reports/a.csv: no '.', '..', '//', and no slash at its ends",
        )


def join(directory: bytes, name: bytes) -> bytes:
    """The path of ``name`` in ``directory``, whose path may be empty."""
    return directory + b"/" + name if directory else name


def changed_meanwhile(path: bytes) -> BusyError:
    """The error for a tree that is not as still as it must be."""
    return BusyError(
        f"{os.fsdecode(path)!r} changed while it was being read",
        hint="stop what writes to the home beside its mount, then try again",
    )


@contextmanager
def local_disk(root: Path) -> Iterator[None]:
    """Turn what the operating system says of the tree below ``root`` into an ``EnvironmentProblem``."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, (str, bytes)) else b""
        where = f"{root}: {os.fsdecode(name)!r}: " if name else f"{root}: "
        raise EnvironmentProblem(
            where + (os.strerror(error.errno) if error.errno else str(error)),
            hint="look at the local disk: its free space, its permissions, the kernel's log",
        ) from error


def open_directory(name: bytes, directory_fd: int | None) -> int:
    """Open a directory for reading, even one that its owner may not read; never through a symlink."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=directory_fd)
    except PermissionError:
        with _unlocked(name, directory_fd, _UNLOCKED):
            return os.open(name, _DIRECTORY, dir_fd=directory_fd)


def open_to_fill(name: bytes, directory_fd: int) -> int:
    """Open a regular file to read and write it, even one that its owner may not."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=directory_fd)
    except PermissionError:
        with _unlocked(name, directory_fd, 0o600):
            return os.open(name, flags, dir_fd=directory_fd)


def _open_level(name: bytes, directory_fd: int | None, needs: int) -> _Level:
    fd = open_directory(name, directory_fd) if needs else os.open(name, _DIRECTORY, dir_fd=directory_fd)
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode)
    is_locked = mode & needs != needs and _is_owner(found)
    if is_locked:  # open is not enough: names in it are looked up, and maybe removed, as well
        os.fchmod(fd, mode | needs)
    return _Level(name, fd, _identity(found), mode if is_locked else None)


def _is_owner(found: os.stat_result) -> bool:
    """Whether modes keep us out, and we may change them; they keep root out of nothing."""
    return found.st_uid == os.geteuid() != 0


def _lock_again(fd: int, mode: int, bits: int) -> None:
    """Give back the mode that was widened by ``bits``, unless somebody has set another one meanwhile."""
    if stat.S_IMODE(os.fstat(fd).st_mode) == mode | bits:
        os.chmod(f"/proc/self/fd/{fd}", mode)


@contextmanager
def _unlocked(name: bytes, directory_fd: int | None, bits: int) -> Iterator[None]:
    """Let the owner in for a moment. Only the owner and root may; others get their PermissionError."""
    fd = os.open(name, _PATH, dir_fd=directory_fd)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        # Neither fchmod nor chmod without following works on such a descriptor; its name in /proc does.
        link = f"/proc/self/fd/{fd}"
        os.chmod(link, mode | bits)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                _lock_again(fd, mode, bits)
    finally:
        os.close(fd)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
