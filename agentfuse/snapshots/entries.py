"""What a region holds, path by path, and when such a listing is sound. Knows no JSON and no store.

Paths are bytes relative to the region's root, whose own path is empty. Listings are in *tree order*:
a directory, then all below it, siblings by their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from agentfuse.regions import FROZEN, Creator

MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

Kind = Literal["dir", "file", "symlink", "fifo"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One path. ``mode`` is 12 bits, ``mtime_ns`` nanoseconds since the epoch (may be negative).

    Of files: ``size`` in bytes, ``sha256`` of the content, and where the store has it: ``object`` (the
    hash that names the object) and ``offset`` in it; ``object`` is empty for an empty file, and for a
    content whose place is not known yet. ``link``: names of one inode share a number, 0 is none.
    ``target``: of symlinks. ``xattrs``: (name, value) pairs in order of name, of files and directories.
    ``created_by``: of files and directories that others than the agent made.
    """

    path: bytes
    type: Kind
    mode: int
    mtime_ns: int
    size: int = 0
    sha256: str = ""
    object: str = ""
    offset: int = 0
    target: bytes = b""
    link: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    created_by: Creator = Creator.AGENT

    @property
    def is_frozen(self) -> bool:
        """Whether it is a file that nobody may change."""
        return self.type == "file" and any(name == FROZEN for name, _ in self.xattrs)


class Totals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a listing amounts to: paths below the root, files among them, and bytes (each inode once)."""

    entries: int
    files: int
    bytes: int


class UnsoundError(ValueError):
    """A listing breaks a rule. ``path`` says where; whoever knows the document turns this into its error."""

    def __init__(self, path: bytes, problem: str) -> None:
        super().__init__(f"entry {printable(path)!r}: {problem}")


def printable(path: bytes) -> str:
    """A path for people: what is not UTF-8 is shown as escapes."""
    return path.decode(errors="backslashreplace")


def is_kept_xattr(name: bytes) -> bool:
    """Whether an extended attribute belongs to a region: the user's are, the daemon's own marks are not."""
    return name.startswith(b"user.") and not name.startswith(b"user.agentfuse.")


def tree_key(path: bytes) -> bytes:
    """What tree order sorts by: NUL cannot be in a name, and sorts before everything that can."""
    return path.replace(b"/", b"\0")


def parent_of(path: bytes) -> bytes:
    """The path of the directory that holds ``path``, which is not the root."""
    return path.rpartition(b"/")[0]


def totals_of(entries: Iterable[Entry]) -> Totals:
    """Count a listing; the names of one inode weigh as much as one of them."""
    count = files = size = 0
    linked: set[int] = set()
    for entry in entries:
        count += 1
        if entry.type == "file":
            files += 1
            if entry.link not in linked:
                size += entry.size
            if entry.link:
                linked.add(entry.link)
    return Totals(entries=max(count - 1, 0), files=files, bytes=size)


def same(one: Entry | None, other: Entry | None) -> bool:
    """Whether two entries say the same of a path, wherever its content lies, whoever made or links to it."""
    if one is None or other is None:
        return one is other
    return (
        one.type == other.type
        and one.mode == other.mode
        and one.mtime_ns == other.mtime_ns
        and one.sha256 == other.sha256
        and one.target == other.target
        and one.xattrs == other.xattrs
    )


def alike(one: Entry | None, other: Entry | None) -> bool:
    """As :func:`same`, but the times of what is no file do not count: they change when nothing did."""
    if one is None or other is None or one.type == "file" or one.type != other.type:
        return same(one, other)
    return one.mode == other.mode and one.target == other.target and one.xattrs == other.xattrs


def names_by_inode(entries: Iterable[Entry]) -> dict[int, list[bytes]]:
    """The hard-link groups of a listing: link number to paths."""
    groups: dict[int, list[bytes]] = {}
    for entry in entries:
        if entry.link:
            groups.setdefault(entry.link, []).append(entry.path)
    return groups


def check(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Pass sound entries on, one by one; raise :class:`UnsoundError` at the first that breaks a rule.

    What came through can be written below a root by name: every path has its directories before it,
    none of them is a symlink, and no path occurs twice.
    """
    directories: set[bytes] = set()
    inodes: dict[int, Entry] = {}
    before: bytes | None = None
    for entry in entries:
        key = tree_key(entry.path)
        if before is None:
            if entry.path or entry.type != "dir":
                raise UnsoundError(
                    entry.path, "the first entry must be the root, a directory with an empty path"
                )
        else:
            _check_path(entry.path, directories)
            if key <= before:
                raise UnsoundError(entry.path, "duplicate, or not in tree order")
        before = key
        _check_fields(entry)
        if entry.type == "dir":
            directories.add(entry.path)
        if entry.link:
            _check_link(entry, inodes.setdefault(entry.link, entry))
        yield entry
    if before is None:
        raise UnsoundError(b"", "there is no root")


def _check_path(path: bytes, directories: set[bytes]) -> None:
    parent, _, name = path.rpartition(b"/")
    if path.startswith(b"/"):
        raise UnsoundError(path, "absolute path")
    if b"\0" in path:
        raise UnsoundError(path, "NUL in the path")
    if name in (b"", b".", b"..") or parent.endswith((b"/", b"/.", b"/..")) or parent in (b".", b".."):
        raise UnsoundError(path, "empty, '.' or '..' component")
    if len(name) > MAX_NAME_BYTES:
        raise UnsoundError(path, f"component of more than {MAX_NAME_BYTES} bytes")
    if parent not in directories:  # which came through here themselves
        raise UnsoundError(path, "its parent is not a directory of this listing")


def _check_fields(entry: Entry) -> None:
    if not 0 <= entry.mode <= 0o7777:
        raise UnsoundError(entry.path, "mode of more than 12 bits")
    if entry.type == "file":
        if len(entry.sha256) != 64 or entry.size < 0 or entry.offset < 0:
            raise UnsoundError(entry.path, "a file needs a hash, a size and an offset that are not negative")
        if entry.size == 0 and (entry.object or entry.sha256 != EMPTY_SHA256):
            raise UnsoundError(entry.path, "an empty file has no object and the hash of nothing")
    elif entry.size or entry.sha256 or entry.object or entry.offset or entry.link:
        raise UnsoundError(entry.path, f"a {entry.type} has no content")
    if (entry.type == "symlink") != bool(entry.target):
        raise UnsoundError(entry.path, "a symlink, and nothing else, needs a target")
    if b"\0" in entry.target or len(entry.target) > MAX_TARGET_BYTES:
        raise UnsoundError(entry.path, "a target with NUL or too long")
    if entry.created_by is not Creator.AGENT and entry.type not in ("file", "dir"):
        raise UnsoundError(entry.path, f"nobody but the agent makes a {entry.type}")
    if entry.xattrs:
        _check_xattrs(entry)


def _check_xattrs(entry: Entry) -> None:
    if entry.type not in ("file", "dir"):
        raise UnsoundError(entry.path, f"a {entry.type} has no extended attributes")
    names = [name for name, _ in entry.xattrs]
    if names != sorted(set(names)):
        raise UnsoundError(entry.path, "extended attributes twice, or not in order of name")
    for name, value in entry.xattrs:
        if not is_kept_xattr(name) or b"\0" in name or len(name) > 255 or len(value) > 65536:
            raise UnsoundError(entry.path, f"extended attribute {printable(name)!r} is not one that is kept")


def _check_link(entry: Entry, first: Entry) -> None:
    place, first_place = ((each.object, each.offset, each.created_by) for each in (entry, first))
    if not same(entry, first) or place != first_place:
        raise UnsoundError(entry.path, f"differs from {printable(first.path)!r}, which is the same inode")
