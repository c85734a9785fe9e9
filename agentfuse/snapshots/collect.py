"""Collecting garbage: old snapshots that nobody asked to keep, then the objects that no snapshot names.

Safe beside running mounts and commits, on any host, and when killed at any point. Why:

*Readers.* A mount may read the objects of the snapshot that it was restored from until all its contents have
come, and that snapshot was the newest when it began. So a snapshot is deleted only if a newer one has been
there for longer than the grace period; restoring and reading take less.

*Numbers.* Put-if-absent on number n + 1 fences a commit only while n + 1 stays taken. A commit that found n
the newest began before n + 1 was there; if that is deleted, a newer one has been there for longer than the
grace period, and so has n + 1: a commit under way takes less. The newest snapshot is never deleted, so
numbers only grow. Both hold whatever else the policy says, and for every region by itself: of one that an
execution kept, only the newest stays, and what was it within the grace period.

*Objects.* Deleted is what is older than the grace period and named by no snapshot that was there when this
looked, *after* it had deleted snapshots. Say a commit that this look did not see names such an object. It got
the name (1) from its parent: the newest snapshot then, which the look saw, or which was itself made after the
look, of which the same holds. Or (2) it sent the object or found it, less than ``TRUSTED_FOR_S`` (1 h) before
the upload that it was part of; see ``sync.upload``: then the object was young when it was found, or it was
*absent* when it was put, or its name was new. A young one is not older than the grace period. An absent one
that this saw as old was deleted by somebody in between; that can only be this collection (there is one at a
time), and it deletes nothing twice. All snapshots below ``agents/<agent>/`` count, of every region and
execution; one that cannot be read stops the collection of objects, for nobody knows what it names.

*One at a time.* A collection takes a number by put-if-absent, as a commit does. It stops by itself after
``MAX_RUN_S``; one whose record is older than ``DEAD_AFTER_S`` is dead, and the next number may be taken.

*Clocks.* Ages are differences of times that the store itself gave: "now" is when it received our record.
Uploaders compare the store's times with their own clock, for an hour; the grace period is at least three.

*Killed.* Snapshots go first: what is left is objects that nothing names, which the next collection finds.

What remains: an SDK that repeats a DELETE whose answer got lost could hit an object that was put in those
seconds; and who suspends a machine in the middle of a commit, or copies a store without its times, for longer
than the grace period, must choose a longer one.
"""

from __future__ import annotations

import datetime
import socket
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import msgspec

from agentfuse.errors import BusyError, IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.objectstore.base import ObjectStat, ObjectStore
from agentfuse.snapshots.document import Snapshot, decode
from agentfuse.snapshots.history import History, kept_regions
from agentfuse.snapshots.layout import (
    TENANTS_PREFIX,
    agent_prefix,
    check_owner,
    check_region,
    collection_key,
    collection_number,
    collections_prefix,
    objects_prefix,
    snapshot_key,
    snapshot_number,
    snapshots_prefix,
    tenant_owner,
)
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.retention import End, Policy

MAX_RUN_S = 50 * 60.0
DEAD_AFTER_S = 2 * 3600.0


@dataclass(slots=True)
class CollectReport:
    """What a collection did, or, of a dry run, would do. ``young_*``: unnamed, but within the grace period.

    ``*_of_executions``: snapshots of what executions kept. ``stopped``: it ran out of time; the next goes on.
    """

    deleted_snapshots: list[int] = field(default_factory=list)
    kept_snapshots: list[int] = field(default_factory=list)
    deleted_of_executions: int = 0
    kept_of_executions: int = 0
    deleted_objects: int = 0
    deleted_bytes: int = 0
    kept_objects: int = 0
    kept_bytes: int = 0
    young_objects: int = 0
    young_bytes: int = 0
    stopped: bool = False


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    host: str
    time: datetime.datetime
    done: bool = False


class Collector:
    """Collects the garbage of one agent; ``region`` is the one whose snapshots the policy is for, and below
    which the record of the collection is. Regions that executions kept are collected along.

    Raises ``StoreError`` and its kinds; what was deleted by then stays deleted and was garbage.
    """

    def __init__(self, store: ObjectStore, agent: str, region: str) -> None:
        self._store = store
        self._agent = check_owner(agent)
        self._region = check_region(region)
        self._pins = Pins(store, agent, region)

    def run(self, policy: Policy, *, dry_run: bool = False) -> CollectReport:
        """Collect. Raises ``BusyError`` when another collection of this agent is under way.

        A dry run only looks, by this host's clock.
        """
        if dry_run:
            return self._collect(policy, time.time(), None)
        stops_at = _uptime() + MAX_RUN_S
        number, record = self._begin()
        try:
            now = self._store.stat(collection_key(self._agent, self._region, number)).modified_at
            report = self._collect(policy, now, stops_at)
        except BaseException:
            with suppress(StoreError):
                self._end(number, record)
            raise
        self._end(number, record)
        return report

    def _collect(self, policy: Policy, now: float, stops_at: float | None) -> CollectReport:
        report = CollectReport()
        times = self._times()
        kept = policy.kept(times, now, self._ends(), self._pins.numbers())
        gone = list(self._delete(report, self._region, sorted(times.keys() - kept), stops_at))
        report.deleted_snapshots = gone
        report.kept_snapshots = sorted(times.keys() - set(gone))
        deleted = {self._key_of(self._region, number) for number in gone}
        newest_only = replace(policy, keep_daily=0)
        for region, times in kept_regions(self._store, self._agent).items():
            old = sorted(times.keys() - newest_only.kept(times, now))
            gone = list(self._delete(report, region, old, stops_at))
            report.deleted_of_executions += len(gone)
            report.kept_of_executions += len(times) - len(gone)
            deleted |= {self._key_of(region, number) for number in gone}
        if not report.stopped:
            self._collect_objects(report, deleted, now - policy.grace_s, stops_at)
        return report

    def _delete(
        self, report: CollectReport, region: str, numbers: Iterable[int], stops_at: float | None
    ) -> Iterator[int]:
        """Delete snapshots, and say which, until the time is over."""
        for number in numbers:
            if stops_at is not None:
                if _uptime() > stops_at:
                    report.stopped = True
                    return
                if region == self._region and self._pins.is_pinned(number):  # since we looked
                    continue
                self._store.delete(self._key_of(region, number))
            yield number

    def _ends(self) -> Iterator[End]:
        """The stretches of what the policy is for."""
        history = History(self._store, self._agent, self._region)
        for number, found in history.newest_first(ends_only=True):
            if isinstance(found, Snapshot):
                yield End(number, found.execution, found.follows)
            else:
                yield End(number, None, 0)

    def _collect_objects(
        self, report: CollectReport, deleted: Collection[str], limit: float, stops_at: float | None
    ) -> None:
        objects, documents = self._look(deleted)
        named = self._named(documents)
        for found in objects:
            if found.key.rpartition("/")[2] in named:
                report.kept_objects += 1
                report.kept_bytes += found.size_bytes
            elif found.modified_at > limit:
                report.young_objects += 1
                report.young_bytes += found.size_bytes
            elif stops_at is not None and _uptime() > stops_at:
                report.stopped = True
                return
            else:
                if stops_at is not None:
                    self._store.delete(found.key)
                report.deleted_objects += 1
                report.deleted_bytes += found.size_bytes

    def _look(self, deleted: Collection[str]) -> tuple[list[ObjectStat], list[str]]:
        """All objects of the agent, and the keys of all its snapshots but those that are (to be) deleted."""
        objects: list[ObjectStat] = []
        documents: list[str] = []
        prefix = agent_prefix(self._agent)
        for found in self._store.list(prefix):
            if found.key.startswith(objects_prefix(self._agent)):
                objects.append(found)
            elif "/snapshots/" not in found.key or found.key in deleted:
                continue
            elif snapshot_number(found.key) is not None:  # raises for a form that we do not know
                documents.append(found.key)
        return objects, documents

    def _named(self, documents: Iterable[str]) -> set[str]:
        named: set[str] = set()
        for key in documents:
            named.update(entry.object for entry in decode(self._store.get(key), key).entries if entry.object)
        return named

    def _times(self) -> dict[int, float]:
        """When each snapshot of what the policy is for was written."""
        times: dict[int, float] = {}
        for found in self._store.list(snapshots_prefix(self._agent, self._region)):
            number = snapshot_number(found.key)
            if number is not None:
                times[number] = found.modified_at
        return times

    def _key_of(self, region: str, number: int) -> str:
        return snapshot_key(self._agent, region, number)

    # -- one at a time

    def _begin(self) -> tuple[int, _Record]:
        newest = 0
        for found in self._store.list(collections_prefix(self._agent, self._region)):
            number = collection_number(found.key)
            if number is not None:
                newest = number
                written_at = found.modified_at
        if newest and time.time() - written_at < DEAD_AFTER_S:
            self._check_done(newest)
        record = _Record(id=str(uuid.uuid4()), host=socket.gethostname(), time=_now())
        key = collection_key(self._agent, self._region, newest + 1)
        if not self._store.put_if_absent(key, msgspec.json.encode(record)):
            there = self._read(newest + 1)
            if there.id != record.id:
                raise _busy(self._agent, there)
        return newest + 1, record

    def _check_done(self, number: int) -> None:
        try:
            record = self._read(number)
        except ObjectNotFoundError:
            return  # it ended, and the next one has cleaned up
        if not record.done:
            raise _busy(self._agent, record)

    def _end(self, number: int, record: _Record) -> None:
        """Say that nothing is deleted any more, and clear away the records of those before."""
        done = msgspec.structs.replace(record, done=True)
        self._store.put(collection_key(self._agent, self._region, number), msgspec.json.encode(done))
        for found in list(self._store.list(collections_prefix(self._agent, self._region))):
            earlier = collection_number(found.key)
            if earlier is not None and earlier < number:
                self._store.delete(found.key)

    def _read(self, number: int) -> _Record:
        key = collection_key(self._agent, self._region, number)
        try:
            return _RECORD.decode(self._store.get(key))
        except msgspec.DecodeError as error:
            raise IntegrityError(f"{key}: not the record of a collection: {error}") from error


def agents(store: ObjectStore) -> Iterator[str]:
    """The agents that a store has anything of, in order of id. One request for each."""
    return _names(store, "agents/")


def tenants(store: ObjectStore) -> Iterator[str]:
    """The same of tenants, as owners."""
    return map(tenant_owner, _names(store, TENANTS_PREFIX))


def _names(store: ObjectStore, prefix: str) -> Iterator[str]:
    after = ""
    while (found := next(iter(store.list(prefix, start_after=after)), None)) is not None:
        name = found.key.split("/")[1]
        yield name
        after = f"{prefix}{name}0"  # the next character after the slash


def _busy(agent: str, record: _Record) -> BusyError:
    return BusyError(
        f"agent {agent}: a collection is under way since {record.time:%Y-%m-%d %H:%M} UTC on {record.host}",
        hint="wait for it; if it was killed, another may begin two hours after it did",
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _uptime() -> float:
    """Seconds that pass also while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# msgspec learns a type at its first use; two threads at once would crash the process.
_RECORD = msgspec.json.Decoder(_Record)
