"""A snapshot, or a part of it, written to a directory of the operator's: no home, no index."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agentfuse.home.walk import local_disk
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Reporter
from agentfuse.regions import Creator
from agentfuse.snapshots.databases import whole
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, Totals, totals_of
from agentfuse.snapshots.rebase import by_path, in_tree_order
from agentfuse.snapshots.references import below, find
from agentfuse.sync.hydrate import hydrate
from agentfuse.sync.reports import Meter


def export(store: ObjectStore, snapshot: Snapshot, path: bytes, to: Path, reporter: Reporter) -> Totals:
    """Write ``path`` of a snapshot into ``to``, which is made if it is missing and must be empty; what came.

    A directory's content goes right into ``to``, anything else gets its own name there (a database, and
    what lies beside it). The files belong to this process's user, and nothing on them tells who made them.
    Raises ``NotFoundError``, and what ``hydrate`` raises.
    """
    found = _rooted(by_path(snapshot.entries), find(snapshot, path)).values()
    entries = by_path(msgspec.structs.replace(entry, created_by=Creator.AGENT) for entry in found)
    totals = totals_of(entries.values())
    with local_disk(to):
        to.mkdir(exist_ok=True)
    meter = Meter(reporter, "restore", total_files=totals.files, total_bytes=totals.bytes)
    hydrate(store, snapshot.agent, entries, to, owner=None, meter=meter)
    meter.tell()
    return totals


def _rooted(entries: dict[bytes, Entry], top: Entry) -> dict[bytes, Entry]:
    if top.type != "dir":
        root = Entry(path=b"", type="dir", mode=0o755, mtime_ns=top.mtime_ns)
        parts = (entries[path] for path in whole(top.path, entries) if path in entries)
        lone = (msgspec.structs.replace(each, path=each.path.rpartition(b"/")[2], link=0) for each in parts)
        return in_tree_order([root, *lone])
    skipped = len(top.path) + 1 if top.path else 0
    found = below(entries, top.path).values()
    return by_path(msgspec.structs.replace(entry, path=entry.path[skipped:]) for entry in found)
