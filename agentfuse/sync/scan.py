"""What a region on disk is now, as a listing; reads only the files that changed since the last sync.

Of a region that moves, a *capture* is made: what changed is copied into a spool, and hashed later.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import msgspec

from agentfuse.errors import AgentfuseError
from agentfuse.home import marks
from agentfuse.home.walk import SETTLED_NS, Cursor, changed_meanwhile, join, local_disk, read_directory
from agentfuse.killpoints import passing
from agentfuse.regions import Creator
from agentfuse.snapshots.document import MAX_DOCUMENT_BYTES, MAX_TIME_NS
from agentfuse.snapshots.entries import Entry, Kind, is_kept_xattr
from agentfuse.sync.reports import Meter
from agentfuse.sync.spool import Copy, Spool
from agentfuse.sync.upload import Readable

READ_BYTES = 1024 * 1024


class Print(NamedTuple):
    """What tells, together with size and mtime, that a path is untouched. No program can set a ctime."""

    ino: int
    ctime_ns: int


UNTRUSTED = Print(0, 0)

_LOOKS = 5
"""A file that is being filled is looked at again when that has just begun, or ended."""


@dataclass(slots=True)
class Scan:
    """A region at one moment: entries in tree order (their contents without a place), and their prints.

    ``skipped``: paths of sockets and device nodes, which mean nothing to another execution.
    ``copies``: files that are in the spool and have no hash yet. ``opens``: what opens the contents that
    are in the spool, by hash.
    """

    entries: dict[bytes, Entry] = field(default_factory=dict)
    prints: dict[bytes, Print] = field(default_factory=dict)
    skipped: list[bytes] = field(default_factory=list)
    copies: dict[bytes, Copy] = field(default_factory=dict)
    opens: Mapping[str, Callable[[], Readable]] = field(default_factory=dict)


def scan(root: Path, known: Mapping[bytes, Entry], prints: Mapping[bytes, Print], meter: Meter) -> Scan:
    """List what is below ``root``, which nobody changes meanwhile.

    ``known`` and ``prints``: the last sync; a file that is still the one it was is taken from there.
    Raises ``BusyError`` when something changes nevertheless, ``EnvironmentProblem`` when the disk fails.
    """
    with local_disk(root), Cursor(root, only_looks=True) as cursor:
        scanner = _Scanner(cursor, known, prints, meter)
        scanner.walk()
        scanner.number_links()
        return scanner.result


class Capture:
    """One moment of a region that others write to: :meth:`look` until it stood still, then :meth:`finish`.

    ``known`` and ``prints`` as for :func:`scan`.
    """

    def __init__(
        self, root: Path, known: Mapping[bytes, Entry], prints: Mapping[bytes, Print], spool: Spool
    ) -> None:
        self._root = root
        self._known = known
        self._prints = prints
        self._spool = spool
        self._copied: dict[Print, Copy] = {}

    def look(self, meter: Meter) -> Scan:
        """List the region and copy what changed since the last sync and was not copied by an earlier look.

        If something changed meanwhile the result is worthless, or the region seems impossible: then
        raises ``BusyError`` or ``EnvironmentProblem``.
        """
        with local_disk(self._root), Cursor(self._root, only_looks=True) as cursor:
            scanner = _Scanner(cursor, self._known, self._prints, meter, self)
            scanner.walk()
            scanner.number_links()
            return scanner.result

    def take(self, fd: int, print_: Print) -> Copy:
        """The copy of an open file; one made before serves if nothing can have happened to the file since."""
        copy = self._copied.get(print_)
        if copy is None:
            is_settled = print_.ctime_ns < time.time_ns() - SETTLED_NS
            copy = self._spool.add(fd)
            if is_settled:
                self._copied[print_] = copy
        return copy

    def finish(self, found: Scan) -> Scan:
        """What a look found, with all hashes. Raises ``EnvironmentProblem`` when the disk fails."""
        with local_disk(self._root):
            hashes = {copy: self._spool.hash(copy) for copy in set(found.copies.values())}
        passing("capture.hashed")
        entries = dict(found.entries)
        for path, copy in found.copies.items():
            entries[path] = msgspec.structs.replace(entries[path], sha256=hashes[copy])
        opens = {sha256: partial(self._spool.open, copy) for copy, sha256 in hashes.items()}
        return replace(found, entries=entries, copies={}, opens=opens)


def observe(root: Path, entries: Mapping[bytes, Entry]) -> Scan:
    """What a listing that was just written below ``root`` has become on this disk, without reading contents.

    Modes and times are those that the filesystem keeps, which may be coarser than what it was given.
    """
    result = Scan()
    with local_disk(root), Cursor(root, only_looks=True) as cursor:
        for path, entry in entries.items():
            if path:
                parent_fd, name = cursor.parent(path)
                found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            else:
                found = os.fstat(cursor.enter(path))
            mode = stat.S_IMODE(found.st_mode)
            result.entries[path] = msgspec.structs.replace(entry, mode=mode, mtime_ns=found.st_mtime_ns)
            result.prints[path] = _print(found)
    return result


class _Scanner:
    def __init__(
        self,
        cursor: Cursor,
        known: Mapping[bytes, Entry],
        prints: Mapping[bytes, Print],
        meter: Meter,
        capture: Capture | None = None,
    ) -> None:
        self.result = Scan()
        self._capture = capture
        self._cursor = cursor
        self._known = known
        self._prints = prints
        self._meter = meter
        self._names: dict[tuple[int, int], list[bytes]] = {}
        self._settled_before_ns = time.time_ns() - SETTLED_NS
        self._path_bytes = 0

    def walk(self) -> None:
        pending = [(b"", os.fstat(self._cursor.enter(b"")))]
        while pending:
            path, found = pending.pop()
            self._limit(path)
            if stat.S_ISDIR(found.st_mode):
                directory_fd = self._cursor.enter(path)
                self._add(path, found, self._directory(path, found, directory_fd))
                below = read_directory(directory_fd)
                pending.extend((join(path, name), each) for name, each in reversed(below))
            elif stat.S_ISREG(found.st_mode):
                self._file(path, found)
            elif stat.S_ISLNK(found.st_mode):
                parent_fd, name = self._cursor.parent(path)
                target = os.readlink(name, dir_fd=parent_fd)
                self._add(path, found, make_entry(path, "symlink", found, target=target))
            elif stat.S_ISFIFO(found.st_mode):
                self._add(path, found, make_entry(path, "fifo", found))
            else:
                self.result.skipped.append(path)

    def number_links(self) -> None:
        """Give the names of one inode a common number, counting in tree order."""
        entries = self.result.entries
        groups = [names for names in self._names.values() if len(names) > 1]
        for number, names in enumerate(groups, start=1):
            for path in names:
                entries[path] = msgspec.structs.replace(entries[path], link=number)

    def _directory(self, path: bytes, found: os.stat_result, directory_fd: int) -> Entry:
        untouched = self._is_untouched(path, found)
        if untouched:
            known = self._known[path]
            return make_entry(path, "dir", found, xattrs=known.xattrs, created_by=known.created_by)
        creator = marks.read_creator(directory_fd)
        return make_entry(path, "dir", found, xattrs=read_xattrs(directory_fd), created_by=creator)

    def _file(self, path: bytes, found: os.stat_result) -> None:
        names = self._names.setdefault((found.st_dev, found.st_ino), []) if found.st_nlink > 1 else []
        known = self._known.get(path)
        if names:
            entry = msgspec.structs.replace(self.result.entries[names[0]], path=path)
            print_ = self.result.prints[names[0]]
            if names[0] in self.result.copies:
                self.result.copies[path] = self.result.copies[names[0]]
        elif known is not None and self._is_untouched(path, found):
            entry, print_ = msgspec.structs.replace(known, link=0, object="", offset=0), _print(found)
        else:
            entry, print_ = self._read(path, found)
        names.append(path)
        self.result.entries[path] = entry
        self._note_print(path, print_)
        self._meter.add(files=1, size=entry.size)

    def _read(self, path: bytes, found: os.stat_result) -> tuple[Entry, Print]:
        fd = self._cursor.open_file(path)
        with open(fd, "rb", buffering=0) as file:
            if found.st_size and marks.read(fd) is not None:
                return _absent_entry(path, fd)
            creator = marks.read_creator(fd)  # which may change the ctime of a file that may not be read
            before = os.fstat(fd)
            if self._capture is None:
                sha256, size = hash_file(file)
            else:
                self.result.copies[path] = copy = self._capture.take(fd, _print(before))
                sha256, size = "", copy.size
            xattrs = read_xattrs(fd)
            after = os.fstat(fd)
        if size != found.st_size or before.st_ino != found.st_ino or _state(before) != _state(after):
            raise changed_meanwhile(path)
        entry = make_entry(path, "file", before, size=size, sha256=sha256, xattrs=xattrs, created_by=creator)
        return entry, _print(after)

    def _is_untouched(self, path: bytes, found: os.stat_result) -> bool:
        known = self._known.get(path)
        return (
            known is not None
            and self._prints.get(path) == _print(found)
            and known.mtime_ns == found.st_mtime_ns
            and (known.type == "dir" or known.size == found.st_size)
            and known.mode == stat.S_IMODE(found.st_mode)
        )

    def _add(self, path: bytes, found: os.stat_result, entry: Entry) -> None:
        self.result.entries[path] = entry
        self._note_print(path, _print(found))

    def _note_print(self, path: bytes, print_: Print) -> None:
        self.result.prints[path] = print_ if print_.ctime_ns < self._settled_before_ns else UNTRUSTED

    def _limit(self, path: bytes) -> None:
        # A listing names every path in full, which for absurd depth grows with its square.
        self._path_bytes += len(path)
        if self._path_bytes > MAX_DOCUMENT_BYTES:
            raise AgentfuseError(
                f"the names in this region take more than {MAX_DOCUMENT_BYTES:,} bytes",
                hint="keep fewer files, or flatter directories",
            )


def hash_file(file: FileIO) -> tuple[str, int]:
    """SHA-256 (hexadecimal) and length in bytes of what a file holds from where it stands."""
    digest = hashlib.sha256()
    size = 0
    while piece := file.read(READ_BYTES):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def read_xattrs(fd: int) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes of an open file or directory that are kept, in order of name."""
    try:
        names = sorted(map(os.fsencode, os.listxattr(fd)))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    return tuple((name, os.getxattr(fd, name)) for name in names if is_kept_xattr(name))


def make_entry(
    path: bytes,
    kind: Kind,
    found: os.stat_result,
    *,
    size: int = 0,
    sha256: str = "",
    target: bytes = b"",
    xattrs: tuple[tuple[bytes, bytes], ...] = (),
    created_by: Creator = Creator.AGENT,
) -> Entry:
    """The entry of what was found at a path."""
    return Entry(
        path=path,
        type=kind,
        mode=stat.S_IMODE(found.st_mode),
        mtime_ns=_kept_time(found.st_mtime_ns),
        size=size,
        sha256=sha256,
        target=target,
        xattrs=xattrs,
        created_by=created_by,
    )


def _absent_entry(path: bytes, fd: int) -> tuple[Entry, Print]:
    """A file whose content is not here, by its mark; while it is being filled that knows mtime and mode."""
    creator = marks.read_creator(fd)
    for _ in range(_LOOKS):
        before = os.fstat(fd)
        mark = marks.read(fd)
        after = os.fstat(fd)
        if mark is None:
            break
        entry = make_entry(
            path,
            "file",
            after,
            size=after.st_size,
            sha256=mark.sha256,
            xattrs=read_xattrs(fd),
            created_by=creator,
        )
        if mark.filling is not None:
            mtime_ns, mode = mark.filling
            return msgspec.structs.replace(entry, mtime_ns=_kept_time(mtime_ns), mode=mode), UNTRUSTED
        if (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns):
            # Looking at the mark of a file that its owner may not read has changed the ctime.
            return entry, _print(after) if _state(before) == _state(after) else UNTRUSTED
    raise changed_meanwhile(path)


def _kept_time(ns: int) -> int:
    """A time as a document can hold it: some filesystems keep times of 13 and more digits of seconds."""
    return max(-MAX_TIME_NS, min(MAX_TIME_NS, ns))


def _print(found: os.stat_result) -> Print:
    return Print(found.st_ino, found.st_ctime_ns)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
