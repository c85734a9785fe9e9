"""What a live mount shows of a region while its agent writes to it: as readers see it, nothing is changed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from agentfuse.errors import BusyError
from agentfuse.home.walk import Cursor, join, local_disk
from agentfuse.snapshots.entries import Entry
from agentfuse.sync.scan import hash_file, make_entry

_MOVED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE)
"""What looking at a name says that is something else by now, or nothing."""


def glance(root: Path, known: Mapping[bytes, Entry]) -> dict[bytes, Entry]:
    """A listing of what is below ``root``, in tree order; others may change all of it meanwhile.

    A file whose size, time and mode are those of ``known`` is taken for that one and not read (the quick
    check of rsync). What vanishes is left out; of what is being written there is what was read. A file that
    this user may not read has no hash. Extended attributes are those of ``known``, nobody looks at them.
    Raises ``EnvironmentProblem`` for a directory that this user may not read, and when the mount fails.
    """
    entries: dict[bytes, Entry] = {}
    pending = [b""]
    again: set[bytes] = set()
    with local_disk(root):
        while pending:
            # A cursor that lost its way is good for nothing more: the next one begins at the root.
            with Cursor(root, unlocks=False) as cursor:
                while pending:
                    path = pending.pop()
                    try:
                        entry, names = _look(cursor, path, known.get(path))
                    except (OSError, BusyError) as error:
                        if isinstance(error, OSError) and error.errno not in _MOVED:
                            raise
                        if path not in again:  # it may be another's move that led the cursor astray
                            again.add(path)
                            pending.append(path)
                        break
                    if entry is not None:
                        entries[path] = entry
                    pending.extend(join(path, name) for name in reversed(names))
    return entries


def _look(cursor: Cursor, path: bytes, known: Entry | None) -> tuple[Entry | None, list[bytes]]:
    """What is at a path, and the names in it if it is a directory. None for what no snapshot keeps."""
    parent_fd, name = cursor.parent(path) if path else (cursor.enter(b""), b".")
    found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    mode = stat.S_IFMT(found.st_mode)
    if mode == stat.S_IFDIR:
        names = sorted(map(os.fsencode, os.listdir(cursor.enter(path))))
        return _with_xattrs(make_entry(path, "dir", found), known), names
    if mode == stat.S_IFREG:
        return _with_xattrs(_file(cursor, path, found, known), known), []
    if mode == stat.S_IFLNK:
        target = os.readlink(name, dir_fd=parent_fd)
        return make_entry(path, "symlink", found, target=target), []
    return (make_entry(path, "fifo", found) if mode == stat.S_IFIFO else None), []


def _file(cursor: Cursor, path: bytes, found: os.stat_result, known: Entry | None) -> Entry:
    entry = make_entry(path, "file", found, size=found.st_size)
    if known is not None and known.type == "file":
        taken = msgspec.structs.replace(entry, sha256=known.sha256)
        if (known.size, known.mtime_ns, known.mode) == (taken.size, taken.mtime_ns, taken.mode):
            return taken
    try:
        with open(cursor.open_file(path), "rb", buffering=0) as file:
            sha256, size = hash_file(file)
    except PermissionError:
        return entry
    return msgspec.structs.replace(entry, sha256=sha256, size=size)


def _with_xattrs(entry: Entry, known: Entry | None) -> Entry:
    return msgspec.structs.replace(entry, xattrs=known.xattrs) if known is not None else entry
