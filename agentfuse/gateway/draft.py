"""A listing that operations change in memory, each wholly or not at all, within a quota. Pure: knows no
store, no contents and no waiting, so that a reference model can stand beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import TypeVar

import msgspec

from agentfuse.admission import Quota
from agentfuse.door.doors import OnCollision
from agentfuse.door.worker import numbered
from agentfuse.errors import (
    AgentfuseError,
    ChangedError,
    ExistsError,
    FrozenError,
    NotEmptyError,
    NotFoundError,
    QuotaExceededError,
    UsageError,
    WrongTypeError,
)
from agentfuse.home.marks import LABELS
from agentfuse.home.walk import join
from agentfuse.regions import FROZEN, Creator
from agentfuse.snapshots.entries import Entry, names_by_inode, parent_of, printable
from agentfuse.snapshots.rebase import in_tree_order

_T = TypeVar("_T")


class Draft:
    """A listing in the making; ``now_ns`` is the time of what is made. It charges ``bytes`` and ``files``."""

    def __init__(self, entries: Mapping[bytes, Entry], quota: Quota, now_ns: int) -> None:
        self.entries = dict(entries)
        self.bytes = self.files = 0
        self.is_changed = False
        self._quota = quota
        self._now_ns = now_ns
        self._creator = Creator.AGENT
        self._held: Counter[bytes] = Counter()
        self._links: Counter[int] = Counter()
        self._undo: list[tuple[bytes, Entry | None]] = []
        for entry in entries.values():
            self._count(entry)

    def attempt(self, operation: Callable[[Draft], _T], creator: Creator) -> _T:
        """Do an operation of somebody's, or leave everything as it was and raise what it raised.

        Raises ``QuotaExceededError`` where it ends beyond the quota and had not begun there, or farther.
        """
        self._undo = []
        self._creator = creator
        before = (self.bytes, self.files)
        try:
            result = operation(self)
            self._require_room(*before)
        except AgentfuseError:
            for path, entry in reversed(self._undo):
                self._set(path, entry)
            raise
        self.is_changed = self.is_changed or bool(self._undo)
        return result

    def listing(self) -> dict[bytes, Entry]:
        """The entries in tree order; names that are alone are linked no more."""
        lone = {names[0] for names in names_by_inode(self.entries.values()).values() if len(names) == 1}
        for path in lone:
            self.entries[path] = msgspec.structs.replace(self.entries[path], link=0)
        return in_tree_order(self.entries.values())

    # -- operations; paths are clean

    def put(
        self,
        path: bytes,
        size: int,
        sha256: str,
        mode: int,
        on_collision: OnCollision,
        *,
        if_match: str = "",
    ) -> Entry:
        """A file, and its parents. See ``FileTree.put``."""
        if not path:
            raise WrongTypeError("the root is a directory")
        there = self.entries.get(path)
        if if_match and (there is None or there.sha256 != if_match):
            raise ChangedError(f"{printable(path)!r} is not what it was when it was read")
        self._make_parents(path)
        if there is not None and on_collision == "number":
            path = self._free(path)
        elif there is not None and there.type == "dir":
            raise WrongTypeError(f"{printable(path)!r} is a directory")
        elif there is not None and on_collision == "refuse":
            raise ExistsError(f"{printable(path)!r} exists already")
        replaced = self.entries.get(path)
        self._require_thawed(replaced)
        made = Entry(
            path=path,
            type="file",
            mode=mode,
            mtime_ns=self._now_ns,
            size=size,
            sha256=sha256,
            created_by=self._creator,
            xattrs=() if replaced is None else tuple(each for each in replaced.xattrs if each[0] == LABELS),
        )
        self._change(path, made)
        return made

    def delete(self, path: bytes, *, recursive: bool) -> None:
        """See ``FileTree.delete``."""
        found = self.find(path)
        if not path:
            raise UsageError("the root cannot be removed")
        if found.type == "dir" and self._held[path] and not recursive:
            raise NotEmptyError(f"directory {printable(path)!r} is not empty")
        self._require_all_thawed(path)
        if found.type == "dir":
            for each in self._below(path):
                self._change(each, None)
        self._change(path, None)

    def delete_unchanged(self, path: bytes, known: Mapping[bytes, str]) -> None:
        """Remove a path with all that is in it, if that is what is ``known``: paths with their hashes."""
        there = {
            each: self.entries[each].sha256 for each in (path, *self._below(path)) if each in self.entries
        }
        if there != known:
            raise ChangedError(f"{printable(path)!r} is not what it was when it was read")
        self.delete(path, recursive=True)

    def move(self, source: bytes, target: bytes, *, overwrite: bool) -> None:
        """See ``FileTree.move``."""
        found = self._transferable(source, target)
        if source == target:
            return
        self._require_all_thawed(source)
        self._clear(target, overwrite)
        moved = [found, *map(self.entries.__getitem__, self._below(source))]
        for entry in reversed(moved):
            self._change(entry.path, None)
        self._make_parents(target)
        for entry in moved:
            path = target + entry.path[len(source) :]
            self._change(path, msgspec.structs.replace(entry, path=path))

    def copy(self, source: bytes, target: bytes, *, overwrite: bool) -> None:
        """See ``FileTree.copy``."""
        found = self._transferable(source, target)
        if source == target:
            raise ExistsError(f"{printable(target)!r} exists already")
        self._clear(target, overwrite)
        self._make_parents(target)
        for entry in [found, *map(self.entries.__getitem__, self._below(source))]:
            path = target + entry.path[len(source) :]
            made = msgspec.structs.replace(entry, path=path, link=0, mtime_ns=self._now_ns)
            if made.type in ("file", "dir"):  # nothing else says whose it is
                kept = tuple(each for each in made.xattrs if each[0] != FROZEN)
                made = msgspec.structs.replace(made, created_by=self._creator, xattrs=kept)
            self._change(path, made)

    def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        """See ``FileTree.mkdir``."""
        there = self.entries.get(path)
        if there is not None:
            if there.type == "dir" and exist_ok:
                return
            raise ExistsError(f"{printable(path)!r} exists already")
        if parents:
            self._make_parents(path)
        elif missing := self._missing_parents(path):
            raise NotFoundError(f"{printable(missing[0])!r} does not exist")
        self._make_directory(path)

    def annotate(self, path: bytes, *, mode: int | None, labels: bytes | None) -> Entry:
        """See ``FileTree.annotate``."""
        found = self.find(path)
        if found.type not in ("file", "dir"):
            raise WrongTypeError(f"{printable(path)!r} is a {found.type}")
        if mode is not None:
            self._require_thawed(found)
            found = msgspec.structs.replace(found, mode=mode)
        if labels is not None:
            found = _with_xattr(found, LABELS, labels)
        return self._set_inode(path, found)

    def set_frozen(self, path: bytes, *, frozen: bool) -> Entry:
        """See ``FileTree.set_frozen``."""
        found = self.find(path)
        if found.type != "file":
            raise WrongTypeError(f"{printable(path)!r} is a {found.type}, and only files can be frozen")
        return self._set_inode(path, _with_xattr(found, FROZEN, b"1" if frozen else b""))

    def find(self, path: bytes) -> Entry:
        """The entry of a path. Raises ``NotFoundError``."""
        found = self.entries.get(path)
        if found is None:
            raise NotFoundError(f"{printable(path)!r} does not exist")
        return found

    # -- steps

    def _set_inode(self, path: bytes, made: Entry) -> Entry:
        """Change what is at a path, under all the names that it has."""
        linked = [each.path for each in self.entries.values() if each.link == made.link]
        for name in linked if made.link else [path]:
            self._change(name, msgspec.structs.replace(made, path=name))
        return made

    def _require_thawed(self, entry: Entry | None) -> None:
        if entry is not None and entry.is_frozen:
            raise FrozenError(f"{printable(entry.path)!r} is frozen", hint="have it thawed first")

    def _require_all_thawed(self, path: bytes) -> None:
        """Of a path and everything below it."""
        for each in [path, *self._below(path)]:
            self._require_thawed(self.entries[each])

    def _transferable(self, source: bytes, target: bytes) -> Entry:
        found = self.find(source)
        if not source or not target:
            raise UsageError("the root cannot be moved, copied or replaced")
        if target.startswith(source + b"/"):
            raise UsageError(f"{printable(source)!r} cannot be put into itself")
        return found

    def _clear(self, target: bytes, overwrite: bool) -> None:
        there = self.entries.get(target)
        if there is None:
            return
        if not overwrite or there.type == "dir":
            raise ExistsError(f"{printable(target)!r} exists already")
        self._require_thawed(there)
        self._change(target, None)

    def _make_parents(self, path: bytes) -> None:
        for each in reversed(self._missing_parents(path)):
            self._make_directory(each)

    def _missing_parents(self, path: bytes) -> list[bytes]:
        """The directories above a path that are not there, from below. Raises ``WrongTypeError``."""
        missing = []
        above = parent_of(path)
        while above not in self.entries:
            missing.append(above)
            above = parent_of(above)
        if self.entries[above].type != "dir":
            raise WrongTypeError(f"{printable(above)!r} is no directory")
        return missing

    def _free(self, path: bytes) -> bytes:
        """The first name like this, as the doors of live homes number them, that nothing has."""
        directory, _, name = path.rpartition(b"/")
        candidates = (join(directory, numbered(name, number)) for number in count(1))
        return next(candidate for candidate in candidates if candidate not in self.entries)

    def _make_directory(self, path: bytes) -> None:
        made = Entry(path=path, type="dir", mode=0o755, mtime_ns=self._now_ns, created_by=self._creator)
        self._change(path, made)

    def _below(self, path: bytes) -> list[bytes]:
        """Everything in a directory, at any depth, a directory before what it holds."""
        if not self._held[path]:
            return []
        prefix = path + b"/"
        return sorted((each for each in self.entries if each.startswith(prefix)), key=lambda p: p.count(b"/"))

    def _change(self, path: bytes, entry: Entry | None) -> None:
        self._undo.append((path, self.entries.get(path)))
        self._set(path, entry)

    def _set(self, path: bytes, entry: Entry | None) -> None:
        old = self.entries.pop(path, None)
        if old is not None:
            self._held[parent_of(path)] -= 1
            if old.link:
                self._links[old.link] -= 1
            if not old.link or not self._links[old.link]:
                self.files -= 1
                self.bytes -= old.size
        if entry is not None:
            self.entries[path] = entry
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        if not entry.path:
            return
        self._held[parent_of(entry.path)] += 1
        if not entry.link or not self._links[entry.link]:
            self.files += 1
            self.bytes += entry.size
        if entry.link:
            self._links[entry.link] += 1

    def _require_room(self, bytes_before: int, files_before: int) -> None:
        if self.bytes > max(bytes_before, self._quota.bytes):
            raise QuotaExceededError(
                f"this needs {self.bytes - bytes_before:,} bytes more, and of {self._quota.bytes:,} there "
                f"are {max(self._quota.bytes - bytes_before, 0):,} left",
                hint="delete something first",
            )
        if self.files > max(files_before, self._quota.files):
            raise QuotaExceededError(
                f"there would be {self.files:,} files, and {self._quota.files:,} may be",
                hint="delete something first",
            )


def _with_xattr(entry: Entry, name: bytes, value: bytes) -> Entry:
    """With an extended attribute, or without it when it is empty."""
    others = [each for each in entry.xattrs if each[0] != name]
    return msgspec.structs.replace(entry, xattrs=tuple(sorted([*others, (name, value)] if value else others)))


def children(entries: Iterable[Entry]) -> dict[bytes, list[Entry]]:
    """By directory, what it holds, in the order given."""
    found: dict[bytes, list[Entry]] = {}
    for entry in entries:
        if entry.type == "dir":
            found.setdefault(entry.path, [])
        if entry.path:
            found.setdefault(parent_of(entry.path), []).append(entry)
    return found
