"""The facts of files: what a home holds, path by path, for whoever asks while others go on writing.

Reads the backing tree, by descriptors, never through a symlink; changes nothing. Blocking: for threads.
Knows no snapshots: the content of a file need not be here for its facts.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import heapq
import os
import stat
import struct
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from agentfuse.errors import BusyError, EnvironmentProblem, NotFoundError, UsageError, WrongTypeError
from agentfuse.home import marks
from agentfuse.home.mime import HEAD_BYTES, type_of
from agentfuse.home.walk import SETTLED_NS, Cursor, changed_meanwhile, join, require_names
from agentfuse.regions import LOOSE, PLATFORM, Creator, Region, Scope

FileType = Literal["file", "dir", "symlink", "fifo", "socket", "device"]

_NAMESPACE = uuid.UUID("5e0f2c1e-9d0f-5b43-8f5e-2d3c6a1b7c90")
_VARIANTS = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
_TYPES: dict[int, FileType] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE, errno.ENAMETOOLONG)
_LOOKS = 5
_NAMES = 10_001  # of one directory that a listing keeps at most: the longest page and whether there is more
_LEVELS = 40  # whose names it keeps at most
_KNOWN = 20_000  # names of which is kept what takes long to find out
_CHECKED = 64  # names that are read of a directory between two checks
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One name. ``path`` is relative to the region, empty for its root; times are seconds since the epoch.

    ``size`` is in bytes, of files only, and what it will be for one whose content ``is_absent``. ``mime``:
    of files, by the name alone if it is absent. ``created_at``: when it came to this disk, None where the
    filesystem does not say. ``etag``: of files, a strong validator of the content. ``labels``: what an API
    keeps with it. Nobody may change what ``is_frozen``.
    """

    id: str
    region: str
    path: bytes
    type: FileType
    size: int
    mode: int
    mime: str | None
    created_by: Creator
    created_at: float | None
    modified_at: float
    is_absent: bool
    etag: str = ""
    labels: bytes = b""
    is_frozen: bool = False

    @property
    def name(self) -> bytes:
        """What a listing of its directory calls it."""
        return self.path.rpartition(b"/")[2] or self.region.encode()

    def as_dict(self) -> dict[str, object]:
        """The facts as JSON values; bytes of a path that are not UTF-8 are lone surrogates."""
        return {
            "id": self.id,
            "region": self.region,
            "path": os.fsdecode(self.path),
            "type": self.type,
            "size": self.size,
            "mode": f"{self.mode:04o}",
            "mime": self.mime,
            "created_by": self.created_by.value,
            "created_at": self.created_at,
            "modified_at": self.modified_at,
            "is_absent": self.is_absent,
            "etag": self.etag,
            "labels": base64.b64encode(self.labels).decode() if self.labels else "",
            "is_frozen": self.is_frozen,
        }


class Files:
    """The files of one home, by region and path.

    A region's root has the empty path. The loose region's is the home's own root, and lists the other
    regions' roots beside what is loose; what is in those is found in their own region only.
    """

    def __init__(self, tree: Path, regions: Iterable[Region], *, agent: str, execution: str) -> None:
        self._tree = tree
        self._regions = {region.name: region for region in regions}
        self._roots = {name.encode(): name for name in self._regions if name != LOOSE}
        self._digests = {}
        self._known: dict[int, _Known] = {}  # by inode
        for region in self._regions.values():
            owner = f"agents/{agent}" if region.scope is Scope.AGENT else f"executions/{execution}"
            begun = hashlib.sha1(_NAMESPACE.bytes, usedforsecurity=False)
            begun.update(f"{owner}/{region.name}/".encode())
            self._digests[region.name] = begun

    def stat(self, region: str, path: bytes) -> FileFacts:
        """The facts of one name, a symlink's own.

        Raises ``NotFoundError``, ``UsageError`` for a path that can name nothing, ``EnvironmentProblem``
        when the disk fails, and ``BusyError`` when it was changed too often meanwhile.
        """
        where = self._place(region, path)
        with told(region, path), Cursor(self._tree, only_looks=True) as cursor:
            return self._facts(cursor, region, path, where)

    def require(self, region: str, path: bytes) -> None:
        """Raise as :meth:`stat` does unless there is such a region, and the path can name something in it."""
        self._place(region, path)

    def list(
        self,
        region: str,
        path: bytes,
        *,
        recursive: bool = False,
        brief: bool = False,
        after: bytes = b"",
        check: Callable[[], None] = lambda: None,
    ) -> Generator[FileFacts, None, None]:
        """The facts of what a directory holds, in order of name; what vanishes meanwhile is left out.

        ``recursive``: what is in its directories too, each of them before what it holds. ``brief``: no
        content is looked at, and types are by the name alone. ``after``: only what comes behind this path
        below the directory. ``check`` is called for every name that is read, and may
        raise to end it. Keeps few names and descriptors, however deep and wide the tree.

        Raises as :meth:`stat` does, ``UsageError`` also for what is no directory; before the first of them.
        """
        where = self._place(region, path)
        if self.stat(region, path).type != "dir":
            raise WrongTypeError(
                f"{shown(region, path)} is not a directory", hint="ask for its facts instead"
            )
        levels = self._levels(region, path, recursive=recursive, after=after)
        at = path  # where it is, as ``where``
        if len(levels) > 1:
            at, where = join(at, after), join(where, after)
        with told(region, path), Cursor(self._tree, only_looks=True) as cursor:
            while levels:
                check()
                if (name := _next_name(cursor, where, levels, check)) is None:
                    levels.pop()
                    at, where = at.rpartition(b"/")[0], where.rpartition(b"/")[0]
                    continue
                found = self._if_there(cursor, region, at, where, name, brief=brief)
                if found is None:
                    continue
                yield found
                if recursive and found.type == "dir" and found.region == region:
                    at, where = join(at, name), join(where, name)
                    levels.append(_Level())
                    if len(levels) > _LEVELS:
                        levels[-1 - _LEVELS].forget()
            _enter(cursor, b"")  # the cursor's own way back fails if a directory of it was moved

    def label(self, region: str, path: bytes, labels: bytes) -> int:
        """Set the labels of a file or directory; its inode. Raises as :meth:`stat` does, and
        ``WrongTypeError`` for what is neither.
        """
        where = self._place(region, path)
        with told(region, path), Cursor(self._tree, only_looks=True) as cursor:
            parent_fd, name = cursor.parent(where)
            fd = os.open(name, _PATH, dir_fd=parent_fd)
            try:
                found = os.fstat(fd)
                if stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                    raise WrongTypeError(f"{shown(region, path)} is neither a file nor a directory")
                marks.write_labels(f"/proc/self/fd/{fd}", labels)
                return found.st_ino
            finally:
                os.close(fd)

    def id_of(self, region: str, path: bytes) -> str:
        """The name's id, a UUIDv5: the same for as long as the file keeps its path.

        A file of an agent's region has the same one in every execution.
        """
        digest = self._digests[region].copy()
        digest.update(path)
        found = digest.hexdigest()
        variant = _VARIANTS[found[16]]  # as uuid.UUID(version=5), in a tenth of its time
        return f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{variant}{found[17:20]}-{found[20:32]}"

    def _place(self, region: str, path: bytes) -> bytes:
        """Where it is, from the tree's root."""
        if region not in self._regions:
            raise NotFoundError(
                f"there is no region {region[:80]!r}", hint=f"there are {', '.join(self._regions)}"
            )
        require_names(path)
        if region != LOOSE:
            return join(region.encode(), path) if path else region.encode()
        first = path.partition(b"/")[0]
        if first in self._roots:
            own = self._roots[first]
            raise NotFoundError(f"{shown(region, path)} is not loose", hint=f"it belongs to the region {own}")
        return path

    def _levels(self, region: str, path: bytes, *, recursive: bool, after: bytes) -> _Levels:
        """The directories that a listing is in, from its top to where ``after`` is, which may be gone."""
        first, *rest = after.split(b"/")
        levels = [_Level(first)]
        if recursive and after:
            # What is in another region, or has a name like "..", is never entered.
            with suppress(NotFoundError, UsageError):
                self._place(region, join(path, after))
                levels += [_Level(name) for name in [*rest, b""]]
        return levels

    def _if_there(
        self, cursor: Cursor, region: str, path: bytes, where: bytes, name: bytes, *, brief: bool
    ) -> FileFacts | None:
        """The facts of a name in a directory that the cursor is in, unless it has vanished."""
        is_root = not where and name in self._roots
        owner, below = (self._roots[name], b"") if is_root else (region, join(path, name))
        try:
            return self._facts(cursor, owner, below, join(where, name), brief=brief)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return None

    def _facts(
        self, cursor: Cursor, region: str, path: bytes, where: bytes, *, brief: bool = False
    ) -> FileFacts:
        for _ in range(_LOOKS - 1):
            with suppress(BusyError):  # something else has the name since a moment ago
                return self._look(cursor, region, path, where, brief=brief)
        return self._look(cursor, region, path, where, brief=brief)

    def _look(self, cursor: Cursor, region: str, path: bytes, where: bytes, *, brief: bool) -> FileFacts:
        parent_fd, name = cursor.parent(where) if where else (cursor.enter(b""), b".")
        found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        known = self._known.get(found.st_ino)
        if known is None or known.ctime_ns != found.st_ctime_ns:
            found, known = self._read(parent_fd, name)
        marked = known.marked
        kind = _TYPES.get(stat.S_IFMT(found.st_mode), "device")
        mime = None
        if kind == "file":
            mime = type_of(path, None if brief or marked.absent else _head(cursor, where, found))
        mark = marked.absent
        modified_ns, mode = (mark and mark.filling) or (found.st_mtime_ns, stat.S_IMODE(found.st_mode))
        return FileFacts(
            id=self.id_of(region, path),
            region=region,
            path=path,
            type=kind,
            size=found.st_size if kind == "file" else 0,
            mode=mode,
            mime=mime,
            created_by=Creator.SYSTEM if not path or where == PLATFORM.name.encode() else marked.creator,
            created_at=known.born_at,
            modified_at=modified_ns / 1e9,
            is_absent=mark is not None,
            etag=etag_of(found) if kind == "file" else "",
            labels=marked.labels,
            is_frozen=marked.is_frozen,
        )

    def _read(self, parent_fd: int, name: bytes) -> tuple[os.stat_result, _Known]:
        """The attributes of a name and what else is known of it, kept for as long as its ctime tells that
        nothing of it has changed.
        """
        fd = os.open(name, _PATH, dir_fd=parent_fd)
        try:
            found, marked = os.fstat(fd), _NOTHING
            ctime_ns, is_settled = found.st_ctime_ns, found.st_ctime_ns < time.time_ns() - SETTLED_NS
            if stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR):
                found, marked = _still(fd, f"/proc/self/fd/{fd}")
            known = _Known(ctime_ns, marked, _birth_time(fd))
        finally:
            os.close(fd)
        if is_settled and not marked.absent:
            if len(self._known) >= _KNOWN:
                self._known = {}
            self._known[found.st_ino] = known
        return found, known


@dataclass(slots=True)
class _Level:
    """A directory of a listing: the name that it has come to, and the next ones, the first of them last."""

    after: bytes = b""
    names: list[bytes] = field(default_factory=list)
    has_more: bool = True

    def forget(self) -> None:
        """Keep no names: they are read again when the listing comes back."""
        if self.names:
            self.names, self.has_more = [], True


_Levels = list[_Level]


def _next_name(cursor: Cursor, where: bytes, levels: _Levels, check: Callable[[], None]) -> bytes | None:
    """The next name in a directory, with the cursor in it; None if that was all, or it is gone."""
    level = levels[-1]
    if not level.names and not level.has_more:
        return None
    try:
        directory_fd = _enter(cursor, where)
        if not level.names:
            level.names = _names_behind(directory_fd, level.after, check)
            level.has_more = len(level.names) == _NAMES
    except OSError as error:
        if error.errno not in _GONE or len(levels) == 1:
            raise
        return None
    if not level.names:
        return None
    level.after = level.names.pop()
    return level.after


def _enter(cursor: Cursor, where: bytes) -> int:
    for _ in range(_LOOKS - 1):
        with suppress(BusyError):  # where it was has been moved or removed: from the root, then
            return cursor.enter(where)
    return cursor.enter(where)


def _names_behind(directory_fd: int, after: bytes, check: Callable[[], None]) -> list[bytes]:
    def behind() -> Iterator[bytes]:
        with os.scandir(directory_fd) as entries:
            for number, entry in enumerate(entries):
                if not number % _CHECKED:
                    check()
                name = entry.name.encode("utf-8", "surrogateescape")
                if name > after:
                    yield name

    return heapq.nsmallest(_NAMES, behind())[::-1]


class _Marked(NamedTuple):
    """What is marked on a file or directory."""

    absent: marks.Mark | None = None
    creator: Creator = Creator.AGENT
    labels: bytes = b""
    is_frozen: bool = False


_NOTHING = _Marked()


class _Known(NamedTuple):
    """What takes long to find out of a name: true while its inode has this ctime."""

    ctime_ns: int
    marked: _Marked
    born_at: float | None


def _head(cursor: Cursor, where: bytes, found: os.stat_result) -> bytes:
    """How a file begins. Raises ``BusyError`` if it is another one by now."""
    fd = cursor.open_file(where)
    try:
        if os.fstat(fd).st_ino != found.st_ino:
            raise changed_meanwhile(where)
        return os.pread(fd, HEAD_BYTES, 0)
    finally:
        os.close(fd)


def _still(fd: int, at: marks.File) -> tuple[os.stat_result, _Marked]:
    """The attributes of a file and its marks, of one moment: filling it sets and restores both.

    ``at``: the name of ``fd`` in /proc, as that reads nothing itself.
    """
    names = marks.names_on(at)
    mark = marks.read(at, names)
    found = os.fstat(fd)
    while mark is not None and mark != (now := marks.read(at)):
        mark, found = now, os.fstat(fd)
    if not names:
        return found, _NOTHING
    absent = mark if found.st_size else None
    creator, labels = marks.read_creator(at, names), marks.read_labels(at, names)
    return found, _Marked(absent, creator, labels, marks.is_frozen(at, names))


def etag_of(found: os.stat_result) -> str:
    """A strong validator of a file's content, without quotes."""
    etag = f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"
    now = time.time_ns()
    if found.st_ctime_ns > now - SETTLED_NS:
        # It may change again within the same tick of the disk's clock: nobody shall find it unchanged.
        etag += f"-{now:x}"
    return etag


@contextmanager
def told(region: str, path: bytes) -> Iterator[None]:
    """Turn what the operating system says of a path into errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise NotFoundError(
                f"there is no {shown(region, path)}", hint="agentfuse ls shows what there is"
            ) from None
        if error.errno == errno.EOPNOTSUPP:
            raise UsageError(
                f"{shown(region, path)}: its filesystem keeps no extended attributes",
                hint="have the home's state directory on another one: ext4, XFS, Btrfs",
            ) from error
        raise EnvironmentProblem(
            f"{shown(region, path)} cannot be read: {error.strerror}", hint="look at the local disk"
        ) from error


def shown(region: str, path: bytes) -> str:
    """A path for messages: quoted, ASCII only."""
    return ascii(os.fsdecode(join(region.encode(), path)))


# statx(2), which Python has no function for: the only way to a birth time.

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800


_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_ANSWER = struct.Struct("=I76xqI")  # what is there, and the time
_of_thread = threading.local()


def _birth_time(fd: int) -> float | None:
    try:
        answer, address = _of_thread.answer
    except AttributeError:
        answer = ctypes.create_string_buffer(256)
        address = ctypes.addressof(answer)
        _of_thread.answer = answer, address
    if _statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, address) != 0:
        return None
    mask, seconds, nanoseconds = _ANSWER.unpack_from(answer)
    return float(seconds + nanoseconds / 1e9) if mask & _STATX_BTIME else None
