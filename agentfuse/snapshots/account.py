"""The account of a region's history, newest first: who committed what, when, and what it changed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Set
from dataclasses import dataclass

from agentfuse.errors import IntegrityError
from agentfuse.snapshots.changes import Summary, summarise
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, Totals, alike
from agentfuse.snapshots.history import History
from agentfuse.snapshots.rebase import by_path


@dataclass(frozen=True, slots=True)
class Committed:
    """A snapshot. ``changed`` is against the snapshot ``compared_with`` (None: an empty region), or None
    where that cannot be told. ``parent`` and ``follows`` as ``Snapshot`` has them."""

    number: int
    time: datetime.datetime
    execution: str
    reason: str
    parent: int
    follows: int
    compared_with: int | None
    changed: Summary | None
    totals: Totals
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Damaged:
    """A snapshot that cannot be read."""

    number: int
    error: IntegrityError
    is_pinned: bool


def account(
    history: History, pinned: Set[int], *, by_run: bool = False, up_to: int | None = None
) -> Iterator[Committed | Damaged]:
    """Newest first, from the number ``up_to`` on; ``by_run``: one row for all that an execution did without
    another one in between.

    Two snapshots are held at a time: each is compared with the next older one there is (of another stretch,
    for ``by_run``), which is its parent (what it follows) unless that was collected.
    """
    newer: Snapshot | None = None
    for number, found in history.newest_first(ends_only=by_run, up_to=up_to):
        older = found if isinstance(found, Snapshot) else None
        if newer:
            yield _committed(newer, older, pinned)
        if isinstance(found, IntegrityError):
            yield Damaged(number, found, number in pinned)
        newer = older
    if newer:
        yield _committed(newer, None, pinned)


@dataclass(frozen=True, slots=True)
class Version:
    """What a path was from a snapshot on; ``entry`` is None: not there. ``before``: the snapshot that is
    compared with, 0 for none."""

    number: int
    before: int
    time: datetime.datetime
    execution: str
    entry: Entry | None


def versions(history: History, path: bytes) -> Iterator[Version]:
    """How a path changed, newest first, run by run. Damaged snapshots are passed over."""
    newer: Snapshot | None = None
    is_now: Entry | None = None
    for _, found in history.newest_first(ends_only=True):
        if isinstance(found, IntegrityError):
            continue
        was = next((entry for entry in found.entries if entry.path == path), None)
        if newer and not alike(was, is_now):
            yield Version(newer.number, found.number, newer.time, newer.execution, is_now)
        newer, is_now = found, was
    if newer and is_now:
        yield Version(newer.number, 0, newer.time, newer.execution, is_now)


def _committed(snapshot: Snapshot, older: Snapshot | None, pinned: Set[int]) -> Committed:
    changed = None
    if older or snapshot.parent == 0:
        changed = summarise(by_path(older.entries) if older else {}, by_path(snapshot.entries))
    return Committed(
        snapshot.number,
        snapshot.time,
        snapshot.execution,
        snapshot.reason,
        snapshot.parent,
        snapshot.follows,
        older.number if older else None,
        changed,
        snapshot.totals,
        snapshot.number in pinned,
    )
