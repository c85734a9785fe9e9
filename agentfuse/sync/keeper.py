"""A home's life beside its mount: opened before, flushed after, finished later if that failed.

Ties the record on disk, the agent's memory and the store together. Knows no FUSE, so that recovering a
home needs no mount.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agentfuse.config import Config, format_size
from agentfuse.errors import AgentfuseError, BusyError, EnvironmentProblem, UnflushedError, UsageError
from agentfuse.home.index import Index
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home, HomeRecord, Status, list_homes, now, take_stock, write_durably
from agentfuse.home.walk import clear_tree
from agentfuse.objectstore import ObjectStore, open_store, probe
from agentfuse.progress import Reporter
from agentfuse.regions import Region, Scope
from agentfuse.snapshots.entries import printable
from agentfuse.sync.engine import Memory
from agentfuse.sync.reports import CommitReport


class HomeKeeper:
    """Opens a home before the mount and flushes it after; what earlier runs left unfinished, too.

    ``ephemeral``: the execution's id was made up, so nobody can come back to the home once it is clean.
    The caller holds the home's lock. ``resumed`` tells, once it is open, that a run of it did not end.
    """

    def __init__(
        self, config: Config, home: Home, *, agent: str, mountpoint: Path, ephemeral: bool, reporter: Reporter
    ) -> None:
        self.config = config
        self.home = home
        self._agent = agent
        self._mountpoint = mountpoint
        self._ephemeral = ephemeral
        self._reporter = reporter
        self._owner = config.owner if os.geteuid() == 0 else None
        self.ledger = Ledger(config.regions)
        self.resumed = False

    def open(self) -> None:
        """Bring the home to where it can be mounted: laid out, restored, its use counted."""
        probe(self._store(self.config.store))
        self._remember_store()
        self._remove_expired()
        self._finish_others()
        record = self._own_record()
        if record.status == "live":
            self.resumed = True
            self._reporter.say(f"resuming execution {record.execution}: it did not end cleanly")
            self.home.lay_out(self.config.regions, self._owner)
        else:
            self._restore(record)
        take_stock(self.home.tree, self.ledger)
        for account in self.ledger.accounts():
            if account.bytes_used > account.bytes_quota:
                self._reporter.say(f"{account.name}/ holds more than its quota: it can only shrink")

    def report_to(self, reporter: Reporter) -> None:
        """Tell ``reporter`` from now on."""
        self._reporter = reporter

    def flush(self) -> None:
        """Commit every agent-scoped region; raises ``UnflushedError``, the home being complete on disk."""
        try:
            for region in self._agent_regions():
                self._commit(self.home, self._record, region, "unmount")
        except (AgentfuseError, OSError) as error:
            raise UnflushedError(
                f"{error}: the memory of this run is not in the store yet, but whole in {self.home.tree}",
                hint=f"once the store works, mount agent {self._agent} again on this host",
            ) from error

    def end(self) -> None:
        """Everything durable is in the store: mark the home so, or remove it when it cannot be resumed."""
        self._write(status="clean", ended_at=now())
        if self._ephemeral or self.config.keep_ended_s == 0:
            remove_home(self.home)

    @property
    def _record(self) -> HomeRecord:
        record = self.home.record()
        if record is None:
            raise EnvironmentProblem(f"{self.home.path}/home.json has disappeared")
        return record

    def _own_record(self) -> HomeRecord:
        record = self.home.record()
        if record is None:
            record = HomeRecord(
                agent=self._agent,
                execution=self.home.execution,
                store=self.config.store,
                status="restoring",
                created_at=now(),
            )
        elif record.agent != self._agent:
            raise UsageError(
                f"execution {record.execution} belongs to agent {record.agent}",
                hint="give another --execution, or leave it out",
            )
        elif record.status == "live" and record.store != self.config.store:
            raise UsageError(
                f"execution {record.execution} has unflushed work for the store {record.store}",
                hint=f"mount it with --store {record.store}",
            )
        self.home.write_record(record)
        return record

    def _restore(self, record: HomeRecord) -> None:
        self._write(status="restoring", store=self.config.store, ended_at=None)
        self.home.lay_out(self.config.regions, self._owner)
        for region in self._agent_regions():
            clear_tree(self.home.tree / region.name)
            with self._memory(self.home, record, region) as memory:
                report = memory.restore(self._reporter)
            if report.number is None:
                self._reporter.say(f"{region.name}/: no snapshot yet, it starts empty")
            else:
                self._reporter.say(
                    f"{region.name}/: restored {_count(report.files, 'file')}, {format_size(report.bytes)}, "
                    f"from snapshot {report.number}"
                )
        self._write(status="live", mountpoint=str(self._mountpoint))

    def _finish_others(self) -> None:
        """Flush what earlier executions of this agent could not; what fails again stays and is told."""
        for home in self._other_homes():
            try:
                with self._held(home, "live") as record:
                    if record is not None and record.agent == self._agent:
                        self._finish(home, record)
            except BusyError:
                continue  # its daemon lives
            except AgentfuseError as error:
                self._reporter.say(f"execution {home.execution} is still unflushed: {error}")

    def _finish(self, home: Home, record: HomeRecord) -> None:
        self._reporter.say(f"finishing execution {record.execution}, which ended without its flush")
        for region in self._agent_regions():
            if (home.tree / region.name).is_dir():
                self._commit(home, record, region, "recovered")
        home.write_record(msgspec.structs.replace(record, status="clean", ended_at=now()))

    def _remove_expired(self) -> None:
        for home in self._other_homes():
            with contextlib.suppress(AgentfuseError), self._held(home, "clean") as record:
                if record is not None and (record.ended_at or 0) + self.config.keep_ended_s < now():
                    remove_home(home)

    def _other_homes(self) -> Iterator[Home]:
        return (home for home in list_homes(self.config.state) if home.execution != self.home.execution)

    @staticmethod
    @contextlib.contextmanager
    def _held(home: Home, status: Status) -> Iterator[HomeRecord | None]:
        """Hold a home's lock if its record has this status, which is what is yielded then.

        Looked at before, so that homes of no interest are not locked, and again under the lock.
        """
        record = home.record()
        if record is None or record.status != status:
            yield None
            return
        with home.locked():
            record = home.record()
            yield record if record is not None and record.status == status else None

    def _agent_regions(self) -> list[Region]:
        return [region for region in self.config.regions if region.scope is Scope.AGENT]

    def _commit(self, home: Home, record: HomeRecord, region: Region, reason: str) -> None:
        with self._memory(home, record, region) as memory:
            report = memory.commit(self._reporter, reason)
        for line in _told(region.name, report):
            self._reporter.say(line)

    @contextlib.contextmanager
    def _memory(self, home: Home, record: HomeRecord, region: Region) -> Iterator[Memory]:
        index = Index(home.index_of(region.name))
        try:
            yield Memory(
                store=self._store(record.store if record.status == "live" else self.config.store),
                agent=record.agent,
                execution=record.execution,
                root=home.tree / region.name,
                index=index,
                owner=self._owner,
                region=region.name,
            )
        finally:
            index.close()

    def _store(self, url: str) -> ObjectStore:
        """The store; one that this host has used must still be there: vanished is not empty."""
        return open_store(url, is_known=self._memo_of_store(url).exists())

    def _remember_store(self) -> None:
        memo = self._memo_of_store(self.config.store)
        if not memo.exists():
            memo.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(memo, self.config.store.encode() + b"\n")

    def _memo_of_store(self, url: str) -> Path:
        return self.config.state / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16]

    def _write(self, **changes: object) -> None:
        self.home.write_record(msgspec.structs.replace(self._record, **changes))


def _told(region: str, report: CommitReport) -> Iterator[str]:
    if report.number is None:
        yield f"{region}/: unchanged, nothing to flush"
    else:
        yield (
            f"{region}/: flushed {format_size(report.bytes_put)} in {_count(report.objects_put, 'object')}; "
            f"snapshot {report.number} holds {_count(report.files, 'file')}, {format_size(report.bytes)}"
        )
    for path in report.merged:
        yield f"{region}/: {path} holds what this run and another execution wrote, merged by line"
    for conflict in report.conflicts:
        yield (
            f"{region}/: another execution changed {printable(conflict.path)} too: its version keeps the "
            f"name, this run's is kept as {printable(conflict.kept_at)}"
        )
    if report.skipped:
        yield f"{region}/: sockets and devices are not kept: {', '.join(report.skipped[:5])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def remove_home(home: Home) -> None:
    """Remove a home from this host; the caller holds its lock and knows that it is clean."""
    clear_tree(home.tree)
    shutil.rmtree(home.path)
