"""Listings for tests: entries, documents, and hypothesis strategies that make them."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import random
from collections.abc import Iterable
from typing import Any

import msgspec
from hypothesis import strategies as st

from agentfuse.regions import Creator
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.rebase import in_tree_order

Listing = dict[bytes, Entry]


def directory(path: bytes, mode: int = 0o755, mtime_ns: int = 0) -> Entry:
    return Entry(path=path, type="dir", mode=mode, mtime_ns=mtime_ns)


def file(path: bytes, content: bytes = b"", **more: Any) -> Entry:
    sha256 = hashlib.sha256(content).hexdigest()
    attributes = {"mode": 0o644, "mtime_ns": 0, "object": sha256 if content else ""} | more
    return Entry(path=path, type="file", size=len(content), sha256=sha256, **attributes)


def symlink(path: bytes, target: bytes) -> Entry:
    return Entry(path=path, type="symlink", mode=0o777, mtime_ns=0, target=target)


def fifo(path: bytes) -> Entry:
    return Entry(path=path, type="fifo", mode=0o644, mtime_ns=0)


def listing(*entries: Entry, root: bool = True) -> Listing:
    return in_tree_order([directory(b""), *entries] if root else entries)


def snapshot(entries: Iterable[Entry], number: int = 1, **more: Any) -> Snapshot:
    fields = {
        "agent": "a",
        "region": "shared",
        "number": number,
        "parent": number - 1,
        "follows": number - 1,
        "resumes": 0,
        "execution": "e1",
        "commit": f"commit-{number}",
        "reason": "end",
        "time": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "entries": list(entries),
    }
    return Snapshot(**(fields | more))


def packed(header: dict[str, object], lines: Iterable[dict[str, object]], seal: str | None = None) -> bytes:
    """A document as a hostile writer makes it: anything, correctly sealed unless told otherwise."""
    body = b"".join(msgspec.json.encode(line) + b"\n" for line in [header, *lines])
    sealed = body + msgspec.json.encode({"seal": seal or hashlib.sha256(body).hexdigest()}) + b"\n"
    return gzip.compress(sealed)


def unpacked(document: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and entries of a document, as JSON has them."""
    first, *lines, _ = gzip.decompress(document).splitlines()
    return msgspec.json.decode(first), [msgspec.json.decode(line) for line in lines]


NAMES = [b"a", b"b", b"a-wal", b"a-journal", b"\xff", b".conflicts"]
CONTENTS = [b"", b"one", b"two", b"three"]


class Forest:
    """Random small listings, and what programs could have made of them. A seed says all of it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def grow(self) -> Listing:
        """A sound listing, hard links and nested directories among it."""
        entries = listing()
        for _ in range(self._random.randrange(2, 9)):
            self._add(entries)
        return in_tree_order((self._linked(entries) if self._random.random() < 0.5 else entries).values())

    def edit(self, start: Listing) -> Listing:
        """The listing after some programs ran: paths added, removed, renamed, rewritten, linked."""
        entries = dict(start)
        for _ in range(self._random.randrange(5)):
            kind = self._random.choice(
                ["add", "add", "remove", "rename", "rewrite", "rewrite", "replace", "link", "part"]
            )
            below = [path for path in entries if path]
            if kind == "add":
                self._add(entries)
            elif kind == "link":
                entries = self._linked(entries)
            elif below:
                getattr(self, "_" + kind)(entries, self._random.choice(below))
        return without_lone_links(in_tree_order(entries.values()))

    def _add(self, entries: Listing) -> None:
        under = self._random.choice([path for path, entry in entries.items() if entry.type == "dir"])
        name = self._random.choice(NAMES)
        path = under + b"/" + name if under else name
        if path not in entries:
            entries[path] = self._leaf(path)

    def _leaf(self, path: bytes) -> Entry:
        kind = self._random.choice(["file", "file", "file", "dir", "dir", "symlink", "fifo"])
        if kind == "dir":
            return directory(
                path, mode=self._random.choice([0o755, 0o700]), mtime_ns=self._random.randrange(3)
            )
        if kind == "symlink":
            return symlink(path, self._random.choice([b"one", b"/etc/passwd"]))
        if kind == "fifo":
            return fifo(path)
        mode, creator = self._random.choice([(0o644, Creator.AGENT), (0o600, Creator.USER)])
        mtime_ns = self._random.randrange(3)
        return file(path, self._random.choice(CONTENTS), mode=mode, mtime_ns=mtime_ns, created_by=creator)

    def _remove(self, entries: Listing, path: bytes) -> None:
        for each in [each for each in entries if each == path or each.startswith(path + b"/")]:
            del entries[each]

    def _rename(self, entries: Listing, path: bytes) -> None:
        to = path[:-1] + self._random.choice(b"abr").to_bytes(1, "big")
        moved = {p: e for p, e in entries.items() if p == path or p.startswith(path + b"/")}
        self._remove(entries, path)
        self._remove(entries, to)
        for old, entry in moved.items():
            new = to + old[len(path) :]
            entries[new] = msgspec.structs.replace(entry, path=new)

    def _replace(self, entries: Listing, path: bytes) -> None:
        self._remove(entries, path)
        entries[path] = self._leaf(path)

    def _rewrite(self, entries: Listing, path: bytes) -> None:
        if entries[path].type == "file":
            link = entries[path].link
            content = self._random.choice([content for content in CONTENTS if content])
            names = [p for p, e in entries.items() if link and e.link == link] or [path]
            for each in names:
                entries[each] = file(each, content, mtime_ns=self._random.randrange(1) + 3, link=link)

    def _part(self, entries: Listing, path: bytes) -> None:
        """As ``cp -p`` and ``mv`` over it do: the same file in an inode of its own."""
        entries[path] = msgspec.structs.replace(entries[path], link=0)

    def _linked(self, entries: Listing) -> Listing:
        """Make some files names of one inode, as ``ln -f`` does: all are like the first then."""
        files = [entry for entry in entries.values() if entry.type == "file"]
        if len(files) < 2:
            return entries
        first, *others = self._random.sample(files, self._random.randrange(2, min(len(files), 3) + 1))
        number = first.link or 1 + max(entry.link for entry in entries.values())
        linked = {e.path: msgspec.structs.replace(first, path=e.path, link=number) for e in (first, *others)}
        return without_lone_links(entries | linked)


def without_lone_links(entries: Listing) -> Listing:
    """The listing with every link number that only one path has taken away."""
    links = [entry.link for entry in entries.values()]
    return {
        path: msgspec.structs.replace(entry, link=entry.link if links.count(entry.link) > 1 else 0)
        for path, entry in entries.items()
    }


forests = st.builds(Forest, st.integers(0, 2**64))
