"""Bringing a snapshot back to disk, every byte verified, nothing outside the root whatever it says.

Either with all contents, or with marks where they belong, to be filled later (``sync.absent``). One
thread writes; others fetch. Knows how to read a listing, not where listings come from.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from io import FileIO
from pathlib import Path

from agentfuse.errors import EnvironmentProblem
from agentfuse.home import marks
from agentfuse.home.walk import Cursor, local_disk
from agentfuse.killpoints import passing
from agentfuse.objectstore.base import ObjectStore
from agentfuse.regions import Creator
from agentfuse.snapshots.entries import EMPTY_SHA256, Entry, printable, totals_of, tree_key
from agentfuse.snapshots.layout import object_key
from agentfuse.sync.fetch import Run, content_of, copy_all, plan, read_run, stream_into, write_all
from agentfuse.sync.reports import Meter
from agentfuse.sync.upload import SMALL_BYTES
from agentfuse.sync.workers import Workers

_log = logging.getLogger(__name__)

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def hydrate(
    store: ObjectStore,
    agent: str,
    entries: Mapping[bytes, Entry],
    root: Path,
    *,
    owner: tuple[int, int] | None,
    meter: Meter,
) -> tuple[int, list[bytes]]:
    """Write a sound listing into ``root``, an empty directory, and make it durable.

    The number of reads, and the files without their contents: none, see :func:`lay_out`.

    Modes, times, links, attributes and, unless ``owner`` is None, uid and gid are set. After an error
    the root is half full and worthless. Raises ``IntegrityError`` for contents that are not what their
    hash says, ``ObjectNotFoundError`` for missing ones, ``EnvironmentProblem`` when the
    disk fails or lacks room.
    """
    return _write(store, agent, entries, root, owner=owner, meter=meter, lazily=False)


def lay_out(
    store: ObjectStore,
    agent: str,
    entries: Mapping[bytes, Entry],
    root: Path,
    *,
    owner: tuple[int, int] | None,
    meter: Meter,
) -> tuple[int, list[bytes]]:
    """As :func:`hydrate`, but leave the contents to come later; the second value has the files marked so.

    What cannot be marked (``home.marks``) is complete. Of the names of one inode the first is given.
    """
    return _write(store, agent, entries, root, owner=owner, meter=meter, lazily=True)


def _write(
    store: ObjectStore,
    agent: str,
    entries: Mapping[bytes, Entry],
    root: Path,
    *,
    owner: tuple[int, int] | None,
    meter: Meter,
    lazily: bool,
) -> tuple[int, list[bytes]]:
    with local_disk(root), Cursor(root) as cursor:
        root_fd = cursor.enter(b"")
        if os.listdir(root_fd):
            raise EnvironmentProblem(f"cannot restore into {root}: it is not empty")
        _check_room(root, entries.values())
        writer = _Writer(cursor, entries, owner, meter)
        writer.begin()
        passing("restore.begun")
        marked = writer.mark() if lazily and marks.are_kept(root_fd) else []
        runs = plan(writer.contents())
        if runs:
            _fetch(store, agent, runs, writer)
        writer.finish()
        sync_filesystem(cursor.enter(b""))
        passing("restore.complete")
    return len(runs), marked


def _fetch(store: ObjectStore, agent: str, runs: list[Run], writer: _Writer) -> None:
    with Workers() as workers:
        for run in runs:
            key = object_key(agent, run.object)
            workers.make_room()
            if run.end - run.offset >= SMALL_BYTES and len(run.contents) == 1:
                entry = run.contents[0]
                file = writer.create(entry)
                workers.submit(partial(_fill, file, store, key, entry), partial(writer.filled, entry))
            else:
                workers.submit(partial(_get, store, key, run), writer.write)
        workers.finish()


def _get(store: ObjectStore, key: str, run: Run) -> list[tuple[Entry, memoryview]]:
    data = read_run(store, key, run)
    return [(entry, content_of(store, key, run, data, entry)) for entry in run.contents]


def _fill(file: FileIO, store: ObjectStore, key: str, entry: Entry) -> FileIO:
    try:
        stream_into(file, store, key, entry, lambda: False)
    except BaseException:
        file.close()
        raise
    return file


class _Writer:
    """Makes what a listing says, in an order that no step undoes what an earlier one did."""

    def __init__(
        self, cursor: Cursor, entries: Mapping[bytes, Entry], owner: tuple[int, int] | None, meter: Meter
    ) -> None:
        self._cursor = cursor
        self._entries = entries
        self._owner = owner
        self._meter = meter
        self._inodes: dict[str, list[Entry]] = {}  # by content: one entry for each inode that has it
        self._links: dict[int, list[Entry]] = {}
        for entry in entries.values():
            if entry.type != "file":
                continue
            names = self._links.setdefault(entry.link, []) if entry.link else []
            names.append(entry)
            if names[0] is entry:
                self._inodes.setdefault(entry.sha256, []).append(entry)

    def contents(self) -> list[Entry]:
        """One entry for each content that must come from the store."""
        return [inodes[0] for sha256, inodes in self._inodes.items() if inodes and sha256 != EMPTY_SHA256]

    def begin(self) -> None:
        """Make the directories, open to us until the end, and the files without a content."""
        for entry in self._entries.values():
            if entry.type == "dir" and entry.path:
                directory_fd, name = self._cursor.parent(entry.path)
                os.mkdir(name, 0o700, dir_fd=directory_fd)
        for entry in self._inodes.get(EMPTY_SHA256, ()):
            self._complete(entry, self.create(entry))

    def mark(self) -> list[bytes]:
        """Make the files with contents as far as marks can be set, without the contents; their paths."""
        marked = []
        for sha256, inodes in self._inodes.items():
            if sha256 == EMPTY_SHA256:
                continue
            rest = []
            for entry in inodes:
                passing("restore.content")
                if self._mark(entry):
                    marked.append(entry.path)
                else:
                    rest.append(entry)
            self._inodes[sha256] = rest
        return marked

    def _mark(self, entry: Entry) -> bool:
        file = self.create(entry)
        try:
            marks.write(file.fileno(), marks.Mark(entry.sha256))
            file.truncate(entry.size)
            self._complete(entry, file)
        except OSError:
            # Whatever it is, the attempt with the content will succeed or say it.
            with file:
                directory_fd, name = self._cursor.parent(entry.path)
                os.unlink(name, dir_fd=directory_fd)
            return False
        return True

    def create(self, entry: Entry) -> FileIO:
        """A new, empty file; its attributes come with its content."""
        directory_fd, name = self._cursor.parent(entry.path)
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=directory_fd)
        return open(fd, "wb", buffering=0)

    def write(self, contents: list[tuple[Entry, memoryview]]) -> None:
        """Write verified contents to every inode that has them."""
        for first, content in contents:
            passing("restore.content")
            for entry in self._inodes[first.sha256]:
                file = self.create(entry)
                write_all(file, content)
                self._complete(entry, file)

    def filled(self, first: Entry, file: FileIO) -> None:
        """A large content is in its first file: copy it to the other inodes that have it."""
        self._complete(first, file)
        for entry in self._inodes[first.sha256][1:]:
            with open(self._cursor.open_file(first.path), "rb", buffering=0) as source:
                copy = self.create(entry)
                copy_all(source, copy)
                self._complete(entry, copy)

    def finish(self) -> None:
        """Make what refers to files, then give the directories their attributes, the innermost first."""
        for first, *others in self._links.values():
            self._link(first, others)
        for entry in self._entries.values():
            if entry.type in ("symlink", "fifo"):
                self._special(entry)
        for entry in sorted(self._entries.values(), key=lambda each: tree_key(each.path), reverse=True):
            if entry.type == "dir":
                fd = os.dup(self._cursor.enter(entry.path))
                # The cursor leaves first: it would otherwise hold the directory open, or lock it again.
                try:
                    self._attributes(entry, fd)
                finally:
                    os.close(fd)

    def _link(self, first: Entry, others: list[Entry]) -> None:
        directory_fd, name = self._cursor.parent(first.path)
        source_fd = os.dup(directory_fd)
        try:
            for entry in others:
                target_fd, target = self._cursor.parent(entry.path)
                os.link(name, target, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)
                self._meter.add(files=1)
        finally:
            os.close(source_fd)

    def _special(self, entry: Entry) -> None:
        directory_fd, name = self._cursor.parent(entry.path)
        if entry.type == "symlink":
            os.symlink(entry.target, name, dir_fd=directory_fd)
        else:
            os.mkfifo(name, 0o600, dir_fd=directory_fd)
        if self._owner:
            os.chown(name, *self._owner, dir_fd=directory_fd, follow_symlinks=False)
        if entry.type == "fifo":
            os.chmod(name, entry.mode, dir_fd=directory_fd)
        os.utime(name, ns=(entry.mtime_ns,) * 2, dir_fd=directory_fd, follow_symlinks=False)

    def _complete(self, entry: Entry, file: FileIO) -> None:
        with file:
            self._attributes(entry, file.fileno())
        self._meter.add(files=1, size=entry.size)

    def _attributes(self, entry: Entry, fd: int) -> None:
        for name, value in entry.xattrs:
            _set_xattr(fd, name, value, entry)
        if entry.created_by is not Creator.AGENT:
            _set_xattr(fd, marks.CREATOR, entry.created_by.value.encode(), entry)
        if self._owner:
            os.fchown(fd, *self._owner)
        os.fchmod(fd, entry.mode)  # after chown, which clears setuid
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _set_xattr(fd: int, name: bytes, value: bytes, entry: Entry) -> None:
    try:
        os.setxattr(fd, name, value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        _log.warning(
            "%s: this filesystem keeps no extended attribute %s", printable(entry.path), printable(name)
        )


def _check_room(root: Path, entries: Iterable[Entry]) -> None:
    totals = totals_of(entries)
    room = os.statvfs(root)
    lacks_inodes = room.f_files and room.f_favail < totals.entries
    if room.f_bavail * room.f_frsize < totals.bytes or lacks_inodes:
        raise EnvironmentProblem(
            f"cannot restore {totals.entries:,} files of {totals.bytes:,} bytes into {root}: "
            f"its disk has room for {room.f_favail:,} files and {room.f_bavail * room.f_frsize:,} bytes",
            hint="free some space, or choose another --state",
        )


def sync_filesystem(fd: int) -> None:
    """Make all that was written durable with one call, where fsync would take one for each file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
