"""The directory of an inbox on disk: which files in it are complete, and taking them away.

Whoever writes there may be hostile: nothing is followed, nothing but regular files is opened to be read, and
a file leaves only as what was read of it. Blocking: for threads. Knows no mount.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agentfuse.door.worker import numbered
from agentfuse.errors import BusyError
from agentfuse.events.arrivals import is_hidden, is_temporary
from agentfuse.events.placeholders import under_way
from agentfuse.home.walk import Cursor, join, read_directory

SETTLED_S = 0.05
"""So long after its last change a file is looked at: clocks of filesystems tick slowly."""
QUIET_S = 5.0
"""... where the filesystem does not tell whether somebody has it open for writing."""
EMPTY_S = 1.0
"""... when it is empty: a browser may have only reserved the name."""

_CLOCK_NS = 20_000_000
_PIECE = 1024 * 1024

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Found(NamedTuple):
    """What a look found: regular files with final names, the oldest first, and what is left where it is."""

    files: list[tuple[bytes, os.stat_result]]
    strange: list[tuple[bytes, str]]
    may_ripen: bool
    """Whether there is a file that only waits for time to pass."""
    directories: int


class NotReady(Exception):  # noqa: N818  # nothing is wrong
    """A file that is not complete yet. ``soon``: time alone can make it so."""

    def __init__(self, *, soon: bool) -> None:
        super().__init__(soon)
        self.soon = soon


def find(path: Path, mount: int) -> int:
    """A descriptor, to stat and to open from, of the directory at a path that was resolved when we started.

    Its names lead over no symlink, nor into the mount with the device ``mount``: that is ours to answer, so
    it is not even asked. Raises ``OSError``.
    """
    others = _mounts_but(mount)
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in path.parts[1:]:
        try:
            below = _enter(fd, name, others)
        finally:
            os.close(fd)
        fd = below
    return fd


def _enter(directory_fd: int, name: str, mounts: set[int]) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=directory_fd)
    if _mount_of(fd) not in mounts:
        os.close(fd)
        raise OSError(errno.EXDEV, "it leads into the mount itself")
    return fd


def _mounts_but(device: int) -> set[int]:
    """The ids of all mounts but a device's: who asks a file for its device asks its filesystem."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        if line:
            mount_id, _parent, number = line.split(b" ", 3)[:3]
            major, _, minor = number.partition(b":")
            if os.makedev(int(major), int(minor)) != device:
                found.add(int(mount_id))
    return found


def _mount_of(fd: int) -> int:
    facts = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    return int(facts["mnt_id"])


def open_inbox(path: Path, mount: int = 0) -> int:
    """Open an inbox's directory and lock it; ``mount``: the device of our mount, once there is one.

    Raises ``ValueError`` with the fix, or ``BusyError``.
    """
    try:
        there = find(path, mount)
        try:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=there)
        finally:
            os.close(there)
    except FileNotFoundError:
        raise ValueError("there is no such directory; make it, for whoever drops files there") from None
    except OSError as error:
        raise ValueError(f"{error.strerror}; give a directory that can be read") from None
    if not os.access(".", os.R_OK | os.W_OK | os.X_OK, dir_fd=fd):
        os.close(fd)
        raise ValueError("files cannot be removed from it; change its permissions")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise BusyError(
            f"the inbox {path} belongs to another mount",
            hint="give each its own: {agent} and {execution} may stand in its path",
        ) from None
    return fd


def identity(st: os.stat_result) -> str:
    """What tells a file from another one, over restarts."""
    return f"{st.st_ino} {st.st_size} {st.st_mtime_ns}"


def look(root: int) -> Found:
    """What is in the directory and below it. Names of temporaries, and what is hidden, are left out."""
    here = os.fstat(root)
    files: list[tuple[bytes, os.stat_result]] = []
    strange: list[tuple[bytes, str]] = []
    awaited: dict[bytes, set[bytes]] = {}
    may_ripen = False
    directories = 0
    for path, st in _walk(root, here.st_dev):
        if stat.S_ISDIR(st.st_mode):
            directories += 1
        elif is_temporary(path):
            continue
        elif not stat.S_ISREG(st.st_mode):
            strange.append((path, _KINDS.get(stat.S_IFMT(st.st_mode), "no regular file")))
        elif st.st_nlink > 1 and not _is_our_writers(st, here):
            strange.append((path, "a hard link that somebody else may have made, to any file"))
        elif st.st_size == 0 and not _is_empty_for_good(root, path, st, awaited):
            may_ripen = True
        else:
            files.append((path, st))
    files.sort(key=lambda item: item[1].st_mtime_ns)
    return Found(files, strange, may_ripen, directories)


def _walk(root: int, device: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below that is not hidden, as far as it can be reached."""
    with Cursor(root, unlocks=False) as cursor:
        pending = [b""]
        while pending:
            directory = pending.pop()
            try:
                entries = _read(cursor.enter(directory))
            except (OSError, BusyError):  # it lives
                continue
            for name, st in entries:
                path = join(directory, name)
                if not stat.S_ISDIR(st.st_mode):
                    yield path, st
                elif st.st_dev == device and not is_hidden(path):
                    yield path, st
                    pending.append(path)


def _read(directory_fd: int) -> list[tuple[bytes, os.stat_result]]:
    try:
        return read_directory(directory_fd)
    except FileNotFoundError:  # a name went while we read: one by one, then
        entries = []
        for name in map(os.fsencode, os.listdir(directory_fd)):
            with suppress(FileNotFoundError):
                entries.append((name, os.stat(name, dir_fd=directory_fd, follow_symlinks=False)))
        return entries


def _is_our_writers(st: os.stat_result, root: os.stat_result) -> bool:
    """Whether only the file's owner can have linked it here.

    Who may write to the directory may (without fs.protected_hardlinks) link any file of the filesystem
    into it, one that he cannot read included: we, who can, must not hand that on.
    """
    return st.st_uid == root.st_uid and not root.st_mode & 0o022


def _is_empty_for_good(root: int, path: bytes, st: os.stat_result, awaited: dict[bytes, set[bytes]]) -> bool:
    if time.time() - st.st_ctime < EMPTY_S:
        return False
    directory, _, name = path.rpartition(b"/")
    if directory not in awaited:
        awaited[directory] = under_way(root, directory)
    return os.path.splitext(name)[1].lower() not in awaited[directory]


def open_complete(root: int, path: bytes) -> int:
    """A descriptor of a complete file, for reading. Raises ``NotReady``, or ``OSError`` when it has gone."""
    fd = open_any(root, path)
    try:
        _require_complete(fd, os.fstat(fd), os.fstat(root))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_any(root: int, path: bytes) -> int:
    """A descriptor of a regular file, for reading; otherwise as :func:`open_complete`."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with Cursor(root, unlocks=False) as cursor:
        directory_fd, name = cursor.parent(path)
        try:
            fd = os.open(name, flags, dir_fd=directory_fd)
        except BlockingIOError:  # somebody's lease
            raise NotReady(soon=False) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotReady(soon=False)
    return fd


def _require_complete(fd: int, st: os.stat_result, root: os.stat_result) -> None:
    if st.st_nlink > 1 and not _is_our_writers(st, root):
        raise NotReady(soon=False)
    age_s = time.time() - st.st_ctime
    if age_s < SETTLED_S:
        raise NotReady(soon=True)
    is_written = _has_writers(fd)
    if is_written:
        raise NotReady(soon=False)
    if is_written is None and age_s < QUIET_S:
        raise NotReady(soon=True)


def _has_writers(fd: int) -> bool | None:
    """Whether somebody has the file open for writing; None: the filesystem does not tell.

    The kernel gives a read lease to nobody while there is a writer.
    """
    try:
        # Should a writer come in this very moment, it waits, and the signal about it must not end us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    return False


def remove(root: int, path: bytes, fd: int, was: os.stat_result) -> bool:
    """Remove the file that was read through ``fd``; False when it is not any more what it ``was`` then.

    Raises ``OSError`` when that is not allowed.
    """
    with Cursor(root, unlocks=False) as cursor:
        directory_fd, name = cursor.parent(path)
        try:
            there = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if _version(there) != _version(was) or _version(os.fstat(fd)) != _version(was) or _has_writers(fd):
            return False
        os.unlink(name, dir_fd=directory_fd)
    return True


def remove_directory(root: int, path: bytes) -> bool:
    """Remove a directory if nothing is in it."""
    try:
        with Cursor(root, unlocks=False) as cursor:
            directory_fd, name = cursor.parent(path)
            os.rmdir(name, dir_fd=directory_fd)
    except (OSError, BusyError):
        return False
    return True


def _version(st: os.stat_result) -> tuple[int, ...]:
    # The last tells of who wrote in place and then set the mtime back.
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns


def is_in(region: Path, path: bytes, fd: int, since_ns: int) -> bool:
    """Whether a region has got the file ``fd`` at ``path``, or with a number in its name, since then."""
    size_bytes = os.fstat(fd).st_size
    try:
        with Cursor(region) as cursor:
            directory, _, wanted = path.rpartition(b"/")
            for name, st in _read(cursor.enter(directory)):
                if (
                    _is_numbered(name, wanted)
                    and stat.S_ISREG(st.st_mode)
                    and st.st_size == size_bytes
                    and st.st_ctime_ns >= since_ns - _CLOCK_NS
                ):
                    there = cursor.open_file(join(directory, name))
                    try:
                        if _digest(there) == _digest(fd):
                            return True
                    finally:
                        os.close(there)
    except (OSError, BusyError):
        return False
    return False


def _is_numbered(name: bytes, wanted: bytes) -> bool:
    """Whether a file that was to get this name may have got that one."""
    numbers = (int(each) for each in re.findall(rb" \((\d{1,5})\)", name))
    return name == wanted or any(numbered(wanted, number) == name for number in numbers)


def _digest(fd: int) -> bytes:
    digest = hashlib.sha256()
    offset = 0
    while piece := os.pread(fd, _PIECE, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.digest()


class Doorbell:
    """Watches a directory in threads of watchdog's, and rings for whatever may make a file complete.

    It only says that it is time to look. So an overflow of the kernel's queue does no harm: what it
    swallowed happened before the rest of the queue is read, and therefore before the look that follows.
    """

    def __init__(self, root: int, ring: Callable[[], None], *, recursive: bool) -> None:
        """``root``: a descriptor of the directory, open for longer than this watches."""
        from watchdog import events  # noqa: PLC0415  # for those who have an inbox
        from watchdog.observers import Observer  # noqa: PLC0415

        class Handler(events.FileSystemEventHandler):
            def on_any_event(self, event: events.FileSystemEvent) -> None:
                ring()

        self.recursive = recursive
        self._observer = Observer()
        self._observer.schedule(
            Handler(),
            f"/proc/self/fd/{root}/.",  # its path may lead elsewhere by now
            recursive=recursive,
            event_filter=[  # not those of our own reading and removing
                events.FileClosedEvent,
                events.FileCreatedEvent,
                events.FileMovedEvent,
                events.DirCreatedEvent,
                events.DirMovedEvent,
            ],
        )
        self._observer.start()

    def stop(self) -> None:
        """Stop watching."""
        self._observer.stop()
        self._observer.join()
