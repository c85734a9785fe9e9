"""Applying what one execution changed onto what others committed meanwhile: a three-way merge by path.

A pure function of three listings; knows no store, no disk and no contents, only their hashes. What both
sides changed differently stays as it was committed, and this side's is kept under ``.conflicts/``, where
no import and no test runner looks. Merging the texts of such conflicts is the caller's to do: each
``Conflict`` holds all three versions, and :func:`rebase` takes what was made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

import msgspec

from agentfuse.snapshots.databases import BESIDE, databases, main_of, matters, state, together
from agentfuse.snapshots.entries import (
    MAX_NAME_BYTES,
    Entry,
    alike,
    names_by_inode,
    parent_of,
    same,
    tree_key,
)
from agentfuse.snapshots.groups import Groups

CONFLICTS = b".conflicts"

Listing = Mapping[bytes, Entry]
Side = Literal["theirs", "mine"]
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Conflict:
    """A path that both sides changed, and all its versions; ``kept_at`` is where ``mine`` is in the result.

    ``theirs`` is None for a file in a directory that the other side made something else. ``is_part``: it
    belongs to other files, so it must not be merged by itself.
    """

    path: bytes
    kept_at: bytes
    base: Entry | None
    theirs: Entry | None
    mine: Entry
    is_part: bool = False


@dataclass(frozen=True, slots=True)
class Rebased:
    """The merged listing, in tree order, and what could not be merged."""

    entries: dict[bytes, Entry]
    conflicts: tuple[Conflict, ...]


def rebase(
    base: Listing,
    theirs: Listing,
    mine: Listing,
    execution: str,
    *,
    merged: Mapping[bytes, tuple[str, int]] | None = None,
) -> Rebased:
    """Merge ``mine`` onto ``theirs``, both having started from ``base``; all are sound listings.

    What only one side changed is taken; a deletion loses against a change; no content that either side
    added or changed is missing from the result; what one side has frozen keeps its name as it is. Entries
    taken from ``mine`` come as they are in it.
    ``merged``: paths that were in conflict, and hash and size of the content made of both versions.
    """
    return _Merge(base, theirs, mine, execution.encode(), merged or {}).run()


def is_changed(before: Listing, after: Listing) -> bool:
    """Whether two listings differ in more than the times of directories, links and pipes."""
    if len(before) != len(after):
        return True
    for path, entry in after.items():
        if not alike(before.get(path), entry):
            return True
    return _partition(before) != _partition(after)


def by_path(entries: Iterable[Entry]) -> dict[bytes, Entry]:
    """The entries by path, in the order they come."""
    return {entry.path: entry for entry in entries}


def in_tree_order(entries: Iterable[Entry]) -> dict[bytes, Entry]:
    """The entries by path, in the order a document has them."""
    return by_path(sorted(entries, key=lambda entry: tree_key(entry.path)))


class _Merge:
    def __init__(
        self,
        base: Listing,
        theirs: Listing,
        mine: Listing,
        execution: bytes,
        contents: Mapping[bytes, tuple[str, int]],
    ) -> None:
        self._base = base
        self._contents = contents
        self._sides: dict[Side, Listing] = {"theirs": theirs, "mine": mine}
        self._execution = execution
        self._merged: dict[bytes, Entry] = {}
        self._from: dict[bytes, Side] = {}
        self._displaced: dict[bytes, Entry] = {}
        self._parts: set[bytes] = set()
        self._conflicts: list[Conflict] = []

    def run(self) -> Rebased:
        theirs, mine = self._sides["theirs"], self._sides["mine"]
        found = databases(self._base, theirs, mine)
        whole = {database for database in found if not self._has_frozen(database)}
        parts = {path for database in whole for path in together(database)}
        for path in sorted((theirs.keys() | mine.keys()) - parts, key=tree_key):
            self._settle(path, self._base.get(path), theirs.get(path), mine.get(path))
        for database in whole:
            self._settle_database(database)
        self._rescue(parts)
        for path in sorted(self._merged, key=tree_key):
            self._give_parents(path)
        kept_at: dict[bytes, bytes] = {}
        for path in sorted(self._displaced, key=tree_key):
            if main_of(path) not in self._displaced:
                kept_at |= self._keep(self._displaced[path])
        self._link(kept_at)
        return Rebased(in_tree_order(self._merged.values()), tuple(self._conflicts))

    # -- path by path

    def _settle(self, path: bytes, base: Entry | None, theirs: Entry | None, mine: Entry | None) -> None:
        if same(theirs, base) or (alike(theirs, base) and not alike(mine, base)):
            self._take(path, mine, "mine")
        elif alike(mine, base) or same(mine, theirs) or mine is None:
            self._take(path, theirs, "theirs")
        elif theirs is None:
            self._take(path, mine, "mine")
        else:
            self._both_changed(path, base, theirs, mine)

    def _take(self, path: bytes, entry: Entry | None, side: Side) -> None:
        if entry is not None:
            self._merged[path] = entry
            self._from[path] = side

    def _both_changed(self, path: bytes, base: Entry | None, theirs: Entry, mine: Entry) -> None:
        if (theirs.is_frozen or mine.is_frozen) and _content(theirs) != _content(mine):
            self._keep_frozen(path, theirs, mine)
            return
        merged = _by_attribute(base, theirs, mine)
        if merged is None and path in self._contents:
            merged = _with_content(base, theirs, mine, *self._contents[path])
        self._take(path, merged or theirs, "theirs")
        if merged is None:
            self._displace(mine)

    def _keep_frozen(self, path: bytes, theirs: Entry, mine: Entry) -> None:
        """A frozen file stays as it is, whatever the other side has made of it, which is kept elsewhere."""
        if theirs.is_frozen:
            self._take(path, theirs, "theirs")
            self._displace(mine)
        else:
            self._take(path, mine, "mine")
            self._displace(theirs)

    def _has_frozen(self, database: bytes) -> bool:
        """Whether a file of a database is frozen, and so goes to no other side with the others."""
        versions = (side.get(path) for side in self._sides.values() for path in together(database))
        return any(entry.is_frozen for entry in versions if entry is not None)

    def _settle_database(self, database: bytes) -> None:
        """Take a database and what lies beside it from one side, whole."""
        base, theirs, mine = self._base, self._sides["theirs"], self._sides["mine"]
        before, committed, made = (state(listing, database) for listing in (base, theirs, mine))
        if committed not in ((), before, made) and made not in ((), before):
            for path in together(database):
                self._parts.add(path)
                self._take(path, theirs.get(path), "theirs")
                if path in mine:
                    self._displace(mine[path])
            return
        is_mine = committed == before or (not committed and made != before)
        for path in together(database):
            if committed == made or (path == database and path in theirs and path in mine):
                self._settle_part(path, database)
            else:
                self._take_part(path, database, "mine" if is_mine else "theirs")

    def _settle_part(self, path: bytes, database: bytes) -> None:
        """As any path, but that nobody misses what SQLite makes again."""
        base, theirs, mine = (each.get(path) for each in (self._base, *self._sides.values()))
        both = [each for each in (theirs, mine) if each is not None and not same(each, base)]
        if len(both) == 2 and not any(matters(each, database) for each in both):
            self._take(path, theirs, "theirs")
        else:
            self._settle(path, base, theirs, mine)

    def _take_part(self, path: bytes, database: bytes, side: Side) -> None:
        other: Side = "theirs" if side == "mine" else "mine"
        found = self._sides[other].get(path)
        is_new = found is not None and not same(found, self._base.get(path))
        if path not in self._sides[side] and found is not None and is_new and not matters(found, database):
            self._take(path, found, other)
        else:
            self._take(path, self._sides[side].get(path), side)

    def _rescue(self, parts: set[bytes]) -> None:
        """Keep what both sides still have, each under a name that the other has removed.

        ``parts``: paths of what belongs to other files, which are complete without.
        """
        kept = {_content(entry) for entry in (*self._merged.values(), *self._displaced.values())}
        contents = [{_content(each) for each in side.values() if each.size} for side in self._sides.values()]
        lost = set.intersection(*contents) - kept
        for path, entry in self._sides["theirs"].items() if lost else ():
            if _content(entry) in lost and path not in self._merged and path not in parts:
                self._take(path, entry, "theirs")
                lost.discard(_content(entry))

    # -- directories

    def _give_parents(self, path: bytes) -> None:
        """Make sure that a path has its directories: the side that it comes from has them all."""
        if path not in self._merged:
            return
        side = self._from[path]
        wanted = []
        above = path
        while above:
            above = parent_of(above)
            found = self._merged.get(above)
            if found is not None and found.type == "dir":
                break
            if found is not None and (self._from[above] == "theirs" or found.is_frozen):
                # A committed file, or a frozen one, stands where a side has a directory: it keeps the name.
                self._displace(self._merged.pop(path))
                return
            wanted.append(above)
        for directory in wanted:
            if directory in self._merged:
                self._displace(self._merged[directory])
            self._take(directory, self._sides[side][directory], side)

    def _displace(self, mine: Entry) -> None:
        if mine.type in ("file", "symlink"):  # directories come with what is in them, pipes hold nothing
            self._displaced[mine.path] = mine

    # -- conflicts

    def _keep(self, mine: Entry) -> dict[bytes, bytes]:
        """Put this side's version of a path, and of what belongs to it, where it is in nobody's way; where
        that is.
        """
        place = self._free_place(mine)
        above = parent_of(place)
        while above not in self._merged:
            mtime_ns = self._sides["mine"][b""].mtime_ns
            self._merged[above] = Entry(path=above, type="dir", mode=0o755, mtime_ns=mtime_ns)
            above = parent_of(above)
        kept_at: dict[bytes, bytes] = {}
        for path, at in zip(together(mine.path), together(place), strict=True):
            entry = self._displaced.get(path)
            if entry is None:
                if at in self._merged and self._merged[at].type != "dir":
                    del self._merged[at]  # it belonged to an earlier version that was kept here
                continue
            self._merged[at] = msgspec.structs.replace(entry, path=at)
            kept_at[path] = at
            versions = (self._base.get(path), self._sides["theirs"].get(path), entry)
            self._conflicts.append(Conflict(path, at, *versions, is_part=path in self._parts))
        return kept_at

    def _free_place(self, mine: Entry) -> bytes:
        place = b""
        names = [CONFLICTS, self._execution, *mine.path.split(b"/")]
        for depth, name in enumerate(names, start=1):
            for candidate in _variants(name):
                path = place + b"/" + candidate if place else candidate
                there = self._merged.get(path)
                is_directory = there is None or there.type == "dir"
                if is_directory if depth < len(names) else self._may_keep(mine.path, path):
                    place = path
                    break
        return place

    def _may_keep(self, path: bytes, place: bytes) -> bool:
        """Whether this side's version of a path, and what belongs to it, may be put there."""
        pairs = zip(together(path), together(place), strict=True)
        return all(self._may_replace(self._merged[at], each) for each, at in pairs if at in self._merged)

    def _may_replace(self, there: Entry, path: bytes) -> bool:
        """Whether what is there is this side's version of a path, or the one that it was made from."""
        mine, before = self._displaced.get(path), self._base.get(path)
        if there.type == "dir":
            return mine is None  # nothing will be put in its place
        return any(
            each is not None and each.type == there.type and _content(each) == _content(there)
            for each in (mine, before)
        )

    # -- hard links

    def _link(self, kept_at: Mapping[bytes, bytes]) -> None:
        """Number the hard-link groups of the result.

        Two names are one inode if a side has them so, unless the other side parted them, and if what
        they hold is the same.
        """
        inodes = Groups()
        theirs, mine = self._sides["theirs"], self._sides["mine"]
        for names in names_by_inode(theirs.values()).values():
            self._join_names(names, {}, mine, inodes)
        for names in names_by_inode(mine.values()).values():
            self._join_names(names, kept_at, theirs, inodes)
        numbers = inodes.numbers(sorted(self._merged, key=tree_key))
        for path, entry in self._merged.items():
            if entry.link != numbers.get(path, 0):
                self._merged[path] = msgspec.structs.replace(entry, link=numbers.get(path, 0))

    def _join_names(
        self, names: list[bytes], moved: Mapping[bytes, bytes], other: Listing, inodes: Groups
    ) -> None:
        anchors: dict[object, bytes] = {}
        for name in names:
            place = moved.get(name, name)
            entry = self._merged.get(place)
            if entry is None or entry.type != "file":
                continue
            content = (name in moved, msgspec.structs.replace(entry, path=b"", link=0, object="", offset=0))
            was = _inode_of(name, self._base)
            together = (content, was) if name in moved else (content, was, _inode_of(name, other))
            # Names that were one and still are on the other side; then names that were not one before.
            inodes.join(anchors.setdefault(together, place), place)
            if anchors.setdefault((content, was, "first"), place) == place:
                inodes.join(anchors.setdefault(content, place), place)


def _variants(name: bytes) -> Iterator[bytes]:
    yield name
    for number in count(2):
        suffix = b"~%d" % number
        # There must be room for what may lie beside it.
        yield name[: MAX_NAME_BYTES - len(suffix) - max(map(len, BESIDE))] + suffix


def _content(entry: Entry) -> tuple[str, bytes]:
    return entry.sha256, entry.target


def _inode_of(path: bytes, listing: Listing) -> object:
    entry = listing.get(path)
    return entry.link if entry is not None and entry.link else path


def _by_attribute(base: Entry | None, theirs: Entry, mine: Entry) -> Entry | None:
    """Both sides changed a path: what each changed of it, together. None if both changed what it holds."""
    if theirs.type != mine.type:
        return None
    if base is None or base.type != theirs.type:
        return theirs if _content(theirs) == _content(mine) else None
    if _content(mine) in (_content(base), _content(theirs)):
        holder = theirs
    elif _content(theirs) == _content(base):
        holder = mine
    else:
        return None
    return msgspec.structs.replace(
        holder,
        mode=_newer(base.mode, theirs.mode, mine.mode),
        mtime_ns=_newer(base.mtime_ns, theirs.mtime_ns, mine.mtime_ns),
        xattrs=_newer_xattrs(base, theirs, mine),
        created_by=_newer(base.created_by, theirs.created_by, mine.created_by),
    )


def _with_content(base: Entry | None, theirs: Entry, mine: Entry, sha256: str, size: int) -> Entry:
    """A file of both sides with a content made of both; without a base the committed attributes stay."""
    before = base if base is not None and base.type == "file" else mine
    holder = next((side for side in (theirs, mine) if side.sha256 == sha256), None)
    return msgspec.structs.replace(
        theirs,
        sha256=sha256,
        size=size,
        object=holder.object if holder else "",
        offset=holder.offset if holder else 0,
        mode=_newer(before.mode, theirs.mode, mine.mode),
        mtime_ns=holder.mtime_ns if holder else max(theirs.mtime_ns, mine.mtime_ns),
        xattrs=_newer_xattrs(before, theirs, mine),
        created_by=_newer(before.created_by, theirs.created_by, mine.created_by),
    )


def _newer_xattrs(base: Entry, theirs: Entry, mine: Entry) -> tuple[tuple[bytes, bytes], ...]:
    """Each attribute as it was changed."""
    sides = [dict(each.xattrs) for each in (base, theirs, mine)]
    found = {name: _newer(*(side.get(name) for side in sides)) for name in sorted(set().union(*sides))}
    return tuple((name, value) for name, value in found.items() if value is not None)


def _newer(base: _V, theirs: _V, mine: _V) -> _V:
    """What was changed; by both, what was committed."""
    return mine if theirs == base else theirs


def _partition(listing: Listing) -> set[tuple[bytes, ...]]:
    groups = names_by_inode(listing.values()).values()
    return {tuple(sorted(names)) for names in groups if len(names) > 1}
