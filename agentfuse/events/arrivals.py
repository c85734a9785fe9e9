"""What makes an event: from what happened to files, and what was told of them before, to what to tell.

A pure state machine. Its memory is a ``Known``: every path that was told of, with what it then was.
What is still being written, or has a temporary's name, is not told of; so each file is told of once,
when it is complete under its final name. Knows no filesystem and no database.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple, Protocol

from agentfuse.regions import Creator

Kind = Literal["arrived", "modified", "moved", "deleted", "refused"]


class Seen(NamedTuple):
    """What tells whether a file is still the one that was told of."""

    ino: int
    size: int
    mtime_ns: int


Listing = Collection[tuple[bytes, Seen | None]]
"""The regular files at a path; None: still being written, so nothing is told of it yet."""


class Completed(NamedTuple):
    """A file was written and closed, or made complete in another way.

    ``is_shared``: it has other names, whose content has changed as well.
    """

    path: bytes
    seen: Seen
    how: str
    is_shared: bool = False


class Touched(NamedTuple):
    """Times of a file were set: what it is known by, not what it is."""

    path: bytes
    seen: Seen
    is_shared: bool = False


class Replaced(NamedTuple):
    """At ``path`` and below it there are now these files and no others. At start, of a whole region."""

    path: bytes
    files: Listing
    came: str
    went: str


class Moved(NamedTuple):
    """A file or directory has another name, and neither name is a temporary's.

    ``seen``: of a file that is complete; None of a directory, or of a file that is being written.
    """

    old: bytes
    new: bytes
    seen: Seen | None


class Refused(NamedTuple):
    """A file that was to come from outside could not; there may be another one at its path."""

    path: bytes
    seen: Seen
    created_by: Creator


Operation = Completed | Touched | Replaced | Moved | Refused


class Known(Protocol):
    """The files of one region that were told of."""

    def get(self, path: bytes) -> Seen | None:
        """What was told of this path; None: nothing, or that it is gone."""

    def put(self, path: bytes, seen: Seen) -> None:
        """This was told of the path."""

    def remove(self, path: bytes) -> None:
        """That it is gone was told of the path."""

    def at(self, path: bytes) -> list[tuple[bytes, Seen]]:
        """The path itself and all below it, in order; the region's own is empty."""

    def names_of(self, ino: int) -> list[tuple[bytes, Seen]]:
        """The paths that were told of as this inode's, in order."""


class Judgement(NamedTuple):
    """One event without its number.

    ``old_path``: where a moved file was. ``created_by`` holds where neither the file nor the log says it.
    """

    kind: Kind
    how: str
    path: bytes
    seen: Seen
    old_path: bytes | None = None
    created_by: Creator = Creator.AGENT


def judge(operation: Operation, known: Known) -> Iterator[Judgement]:
    """The events that an operation makes; ``known`` is brought up to date with them."""
    match operation:
        case Completed(path, seen, how, is_shared):
            # The filesystem tells of each name that it knows: others may have been told of before it started.
            if not is_temporary(path) and not (is_shared and known.get(path) == seen):
                yield _came(path, seen, how, known)
            if is_shared:
                for other, before in known.names_of(seen.ino):
                    if before != seen:
                        yield _came(other, seen, how, known)
        case Touched(path, seen, is_shared):
            if known.get(path) is not None:
                known.put(path, seen)
            if is_shared:
                for other, _ in known.names_of(seen.ino):
                    known.put(other, seen)
        case Replaced():
            yield from _replaced(operation, known)
        case Moved(old, new, seen):
            yield from _moved(old, new, seen, known)
        case Refused(path, seen, created_by):
            yield Judgement("refused", "", path, seen, None, created_by)


def _came(path: bytes, seen: Seen, how: str, known: Known) -> Judgement:
    kind: Kind = "arrived" if known.get(path) is None else "modified"
    known.put(path, seen)
    return Judgement(kind, how, path, seen)


def _moved(old: bytes, new: bytes, seen: Seen | None, known: Known) -> Iterator[Judgement]:
    below = known.at(old)
    for path, _ in below:
        known.remove(path)
    for path, before in below:
        target = new + path[len(old) :]
        now = seen if seen is not None and path == old else before
        known.put(target, now)
        yield Judgement("moved", "IN_MOVED_TO", target, now, path)
    if not below and seen is not None:
        yield _came(new, seen, "IN_MOVED_TO", known)


def _replaced(operation: Replaced, known: Known) -> Iterator[Judgement]:
    before = dict(known.at(operation.path))
    now = {path: seen for path, seen in operation.files if not is_temporary(path)}
    gone = {path: seen for path, seen in before.items() if path not in now}
    # Only what a crash kept from being told is both gone and come: a file that was only renamed.
    was = {seen: path for path, seen in gone.items()}
    for path, seen in now.items():
        old = was.pop(seen, None) if seen is not None and path not in before else None
        if old is not None and seen is not None:
            del gone[old]
            known.remove(old)
            known.put(path, seen)
            yield Judgement("moved", "IN_MOVED_TO", path, seen, old)
    for path, seen in gone.items():
        known.remove(path)
        yield Judgement("deleted", operation.went, path, seen)
    for path, seen in now.items():
        if seen is not None and known.get(path) != seen:
            yield _came(path, seen, operation.came, known)


DOWNLOAD_SUFFIXES = (b".crdownload", b".download", b".opdownload", b".part", b".partial", b".tmp")
_TEMPORARY = re.compile(
    rb"~\$.*"  # an office program's lock
    rb"|\.~lock\..*#"
    rb"|\.goutputstream-.*"
    rb"|\.(nfs|fuse_hidden)[0-9a-f]+"
    rb"|\..*\.sw[a-z]"  # an editor's journal
    rb"|\..*\.[A-Za-z0-9]{6}",  # mkstemp: rsync, curl, Chromium
    re.DOTALL,
)


def is_temporary(path: bytes) -> bool:
    """Whether nothing is told of a file at this path: it, or a directory that it is in, is a temporary.

    What is in a directory whose name begins with a dot is some program's own (``.git``).
    """
    directory, _, name = path.rpartition(b"/")
    return _is_temporary_name(name) or is_hidden(directory)


def is_hidden(directory: bytes) -> bool:
    """Whether nothing is told of what is in this directory."""
    return any(name.startswith(b".") or _is_temporary_name(name) for name in directory.split(b"/"))


def _is_temporary_name(name: bytes) -> bool:
    return name.lower().endswith(DOWNLOAD_SUFFIXES) or _TEMPORARY.fullmatch(name) is not None
