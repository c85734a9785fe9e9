"""What is different between two listings, path by path, and what that amounts to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from agentfuse.snapshots.entries import Entry, alike, tree_key

Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One path that is not the same in both; ``before`` or ``after`` is None where it is absent."""

    path: bytes
    before: Entry | None
    after: Entry | None

    @property
    def kind(self) -> Kind:
        """What happened to the path."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    @property
    def new_bytes(self) -> int:
        """Size of the content, if it is another one than before."""
        if self.after is None or self.after.type != "file":
            return 0
        return 0 if self.before and self.before.sha256 == self.after.sha256 else self.after.size

    @property
    def attributes(self) -> list[str]:
        """What is different beside the content, where nothing else is: ``mode 0644 -> 0755``."""
        before, after = self.before, self.after
        if before is None or after is None or self.new_bytes or before.type != after.type:
            return []
        told = []
        if before.mode != after.mode:
            told.append(f"mode {before.mode:04o} -> {after.mode:04o}")
        if before.mtime_ns != after.mtime_ns and before.type == "file":
            told.append("time")
        if before.xattrs != after.xattrs:
            told.append("attributes")
        return told


@dataclass(frozen=True, slots=True)
class Summary:
    """How many files came, went and changed, and how many bytes the new contents have. Symlinks and pipes
    count as files, directories do not."""

    added: int = 0
    removed: int = 0
    changed: int = 0
    bytes: int = 0


def changes(before: Mapping[bytes, Entry], after: Mapping[bytes, Entry]) -> Iterator[Change]:
    """The paths that differ, in tree order; times of directories, links and pipes do not count."""
    for path in sorted(before.keys() | after.keys(), key=tree_key):
        was, is_now = before.get(path), after.get(path)
        if not alike(was, is_now):
            yield Change(path, was, is_now)


def summarise(before: Mapping[bytes, Entry], after: Mapping[bytes, Entry]) -> Summary:
    """The changes in numbers."""
    counts = {"added": 0, "removed": 0, "changed": 0}
    size = 0
    for change in changes(before, after):
        if any(entry and entry.type != "dir" for entry in (change.before, change.after)):
            counts[change.kind] += 1
        size += change.new_bytes
    return Summary(**counts, bytes=size)
