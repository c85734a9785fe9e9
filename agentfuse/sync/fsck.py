"""Checking what the store holds of an agent: every document, every content, by reading all of it.

A content is read once, however many snapshots name it, in pieces that fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from agentfuse.errors import IntegrityError, ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Reporter
from agentfuse.snapshots.entries import Entry, tree_key
from agentfuse.snapshots.history import History, kept_regions
from agentfuse.snapshots.layout import object_key
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.references import main_region, require_newest
from agentfuse.sync.contents import stream_content, verify
from agentfuse.sync.fetch import Run, plan
from agentfuse.sync.reports import Meter
from agentfuse.sync.workers import Workers


@dataclass(frozen=True, slots=True)
class Loss:
    """What is lost: a path of a snapshot, or, without a path, the snapshot itself. ``problem``: how.

    ``region``: which one the snapshot is of, by its place in keys.
    """

    region: str
    snapshot: int
    path: bytes | None
    problem: str


@dataclass(slots=True)
class FsckReport:
    """What was checked (``contents`` and ``bytes`` count each content once), and what is lost."""

    snapshots: int = 0
    contents: int = 0
    bytes: int = 0
    lost: list[Loss] = field(default_factory=list)


class Checker:
    """Checks one agent, its memory and what its executions kept of other regions, or one tenant.

    A store that cannot be asked is no loss but a ``StoreError``.
    """

    def __init__(self, store: ObjectStore, agent: str, reporter: Reporter) -> None:
        self._store = store
        self._agent = agent
        self._meter = Meter(reporter, "verify")
        self._report = FsckReport()
        self._seen: set[bytes] = set()
        self._bad: dict[bytes, str] = {}

    def run(self, *, all_snapshots: bool) -> FsckReport:
        """Check the newest snapshot of every region, or all. Raises ``NotFoundError`` when there is none."""
        kept = kept_regions(self._store, self._agent)
        region = main_region(self._agent)
        memory = History(self._store, self._agent, region)
        numbers = set(memory.numbers())
        if not numbers and not kept:
            require_newest(memory, self._agent)
        self._check_region(memory, region, numbers, all_snapshots)
        if all_snapshots:
            self._check_pins(memory, numbers)
        for region, times in sorted(kept.items()):
            history = History(self._store, self._agent, region)
            self._check_region(history, region, times, all_snapshots)
        self._meter.tell()
        return self._report

    def _check_region(
        self, history: History, region: str, numbers: Iterable[int], all_snapshots: bool
    ) -> None:
        newest_first = sorted(numbers, reverse=True)
        for number in newest_first if all_snapshots else newest_first[:1]:
            self._check_snapshot(history, region, number)

    def _check_snapshot(self, history: History, region: str, number: int) -> None:
        try:
            entries = history.read(number).entries
        except ObjectNotFoundError:
            return  # collected since
        except IntegrityError as error:
            self._report.snapshots += 1
            self._report.lost.append(Loss(region, number, None, error.message))
            return
        self._check_contents(entries)
        lost = [
            Loss(region, number, entry.path, self._bad[_id(entry)])
            for entry in entries
            if _id(entry) in self._bad
        ]
        if lost and not _is_there(history, number):
            return  # collected while we looked, and its objects with it
        self._report.snapshots += 1
        self._report.lost += sorted(lost, key=lambda loss: tree_key(loss.path or b""))

    def _check_contents(self, entries: Iterable[Entry]) -> None:
        with Workers() as workers:
            for run in plan(self._unseen(entries)):
                workers.submit(partial(self._check_run, run), partial(self._note, run))
            workers.finish()

    def _unseen(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if entry.size and (name := _id(entry)) not in self._seen:
                self._seen.add(name)
                yield entry

    def _check_run(self, run: Run) -> list[str]:
        """What is wrong with each content of a run; empty for nothing."""
        if len(run.contents) == 1:
            return [self._problem(run.contents[0])]
        key = object_key(self._agent, run.object)
        try:
            data = memoryview(self._store.get(key, offset=run.offset, length=run.end - run.offset))
        except ObjectNotFoundError as error:
            return [error.message] * len(run.contents)
        problems = []
        for entry in run.contents:
            content = data[entry.offset - run.offset :][: entry.size]
            try:
                verify(self._store, key, entry, len(content), hashlib.sha256(content).hexdigest())
                problems.append("")
            except IntegrityError as error:
                problems.append(error.message)
        return problems

    def _problem(self, entry: Entry) -> str:
        try:
            for _ in stream_content(self._store, self._agent, entry):
                pass
        except (ObjectNotFoundError, IntegrityError) as error:
            return error.message
        return ""

    def _note(self, run: Run, problems: list[str]) -> None:
        for entry, problem in zip(run.contents, problems, strict=True):
            self._report.contents += 1
            self._report.bytes += entry.size
            self._meter.add(files=1, size=entry.size)
            if problem:
                self._bad[_id(entry)] = problem

    def _check_pins(self, history: History, numbers: set[int]) -> None:
        region = main_region(self._agent)
        for number in Pins(self._store, self._agent, region).numbers():
            if number not in numbers and not _is_there(history, number):
                self._report.lost.append(Loss(region, number, None, "pinned, but the store has it no longer"))


def _is_there(history: History, number: int) -> bool:
    try:
        history.read(number)
    except ObjectNotFoundError:
        return False
    return True


def _id(entry: Entry) -> bytes:
    """What a content and its place are known by, in few bytes."""
    text = f"{entry.object} {entry.offset} {entry.size} {entry.sha256}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
