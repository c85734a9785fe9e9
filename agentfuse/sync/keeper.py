"""A home's life beside its mount: opened before, flushed after, finished later if that failed.

Ties the record on disk, the agent's memory and the store together. Knows no FUSE, so that recovering a
home needs no mount.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from agentfuse.config import Config, count, format_size
from agentfuse.errors import AgentfuseError, BusyError, EnvironmentProblem, UsageError
from agentfuse.home.frozen import Frozen, frozen_of
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home, HomeRecord, Status, list_homes, now, remove_home, take_stock
from agentfuse.home.walk import clear_tree, join
from agentfuse.killpoints import passing
from agentfuse.objectstore import probe
from agentfuse.objectstore.counted import Traffic
from agentfuse.progress import Reporter
from agentfuse.regions import retained
from agentfuse.sync.absent import Absent
from agentfuse.sync.recovery import finish, held, owner_of
from agentfuse.sync.stores import Stores
from agentfuse.sync.synced import SyncedRegions

UNDELIVERED_S = 7 * 24 * 3600.0
"""So long at least stays an ended home with events that a webhook, or a gateway, has not taken."""


def is_removable(record: HomeRecord, *, keep_s: float) -> bool:
    """Whether nothing needs a home here: all is in the store, and it has ended for ``keep_s``."""
    keep_s = max(keep_s, UNDELIVERED_S if record.undelivered else 0)
    return record.status == "clean" and (record.ended_at or 0) + keep_s <= now()


class HomeKeeper:
    """Opens a home before the mount and flushes it after; what earlier runs left unfinished, too.

    ``ephemeral``: the execution's id was made up, so nobody can come back to the home once it is clean.
    ``retains``: its files can be had afterwards, see ``regions.retained``; whoever asks for that removes the
    home when it has ended. A home that was made so stays so.
    The caller holds the home's lock. ``resumed`` tells, once it is open, that a run of it did not end;
    ``absent`` has the files whose contents are still in the store, ``frozen`` those that stay as they are,
    ``traffic`` counts what goes to the store.
    """

    def __init__(
        self,
        config: Config,
        home: Home,
        *,
        agent: str,
        mountpoint: Path,
        ephemeral: bool,
        reporter: Reporter,
        retains: bool = False,
    ) -> None:
        record = home.record()
        self._retains = retains or (record is not None and record.is_retained)
        self.config = replace(config, regions=retained(config.regions)) if self._retains else config
        self.home = home
        self._agent = agent
        self._mountpoint = mountpoint
        self._ephemeral = ephemeral
        self._reporter = reporter
        self._owner = owner_of(config)
        self.ledger = Ledger(self.config.regions)
        self.resumed = False
        self.synced: SyncedRegions
        self.frozen: Frozen
        self.absent = Absent()
        self.traffic = Traffic()
        self._writing = threading.Lock()

    def open(self) -> None:
        """Bring the home to where it can be mounted: laid out, restored, its use counted."""
        stores = Stores(self.config.state, cache_bytes=self.config.cache_bytes, traffic=self.traffic)
        store = stores.open(self.config.store)
        probe(store)
        stores.remember(self.config.store)
        self._remove_expired()
        self._finish_others()
        record = self._own_record()
        self.synced = SyncedRegions(self.config.regions, self.home, record, store, self._owner)
        if record.status == "live":
            self.resumed = True
            self._reporter.say(f"resuming execution {record.execution}: it did not end cleanly")
            self.home.lay_out(self.config.regions, self._owner)
            for _, memory in self.synced.agents():
                memory.resume(self.absent)
        else:
            self._restore()
        self.home.lay_out_platform()
        self.frozen = frozen_of(self.home.tree, self._record.frozen)
        take_stock(self.home.tree, self.ledger)
        for account in self.ledger.accounts():
            if account.name in record.quotas:
                account.bytes_quota, account.files_quota = record.quotas[account.name]
        for account in self.ledger.accounts():
            if account.bytes_used > account.bytes_quota:
                self._reporter.say(f"{account.name}/ holds more than its quota: it can only shrink")

    def remember_quota(self, region: str, bytes_quota: int, files_quota: int) -> None:
        """From now on this execution's region has these quotas, in later mounts, too. Changes no account."""
        with self._writing:
            quotas = {**self._record.quotas, region: (bytes_quota, files_quota)}
            self.home.write_record(msgspec.structs.replace(self._record, quotas=quotas))

    def remember_frozen(self, paths: Iterable[bytes]) -> None:
        """From now on the files at these paths, from the home's root, may be frozen."""
        self._write(frozen=list(paths))

    def flush(self, reporter: Reporter) -> None:
        """Commit every region that is kept in the store; the home is complete on disk whatever happens.

        Raises as ``Memory.commit`` does.
        """
        if self._record.unmounted_at is None:
            self._write(unmounted_at=now())
        self.synced.commit(reporter, "unmount", self.home.tree)

    def end(self, *, undelivered: bool = False) -> None:
        """Everything durable is in the store: mark the home so, or remove it when it cannot be resumed.

        ``undelivered``: webhooks have not taken all its events, so it is kept a while in any case.
        """
        passing("end.flushed")
        self._write(status="clean", ended_at=now(), undelivered=undelivered)
        is_needed = undelivered or self._retains
        if (self._ephemeral or self.config.keep_ended_s == 0) and not is_needed:
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
        record = msgspec.structs.replace(record, is_retained=self._retains, unmounted_at=None)
        self.home.write_record(record)
        return record

    def _restore(self) -> None:
        self._write(status="restoring", store=self.config.store, ended_at=None)
        self.home.lay_out(self.config.regions, self._owner)
        frozen = self._record.frozen
        for region, memory in self.synced.agents():
            clear_tree(self.home.tree / region.name)
            report = memory.restore(self._reporter, self.absent)
            frozen = [*frozen, *(join(region.name.encode(), path) for path in report.frozen)]
            if report.number is None:
                self._reporter.say(f"{region.name}/: no snapshot yet, it starts empty")
            else:
                self._reporter.say(
                    f"{region.name}/: restored {count(report.files, 'file')}, {format_size(report.bytes)}, "
                    f"from snapshot {report.number}"
                )
        passing("restore.noted")
        self._write(status="live", mountpoint=str(self._mountpoint), frozen=frozen)

    def _finish_others(self) -> None:
        """Flush what earlier executions of this agent could not; what fails again stays and is told."""
        for home in self._other_homes("live", agent=self._agent):
            try:
                with held(home) as record:
                    if record is not None and record.status == "live" and record.agent == self._agent:
                        finish(self.config, home, record, self._reporter)
            except BusyError:
                continue  # its daemon lives
            except AgentfuseError as error:
                self._reporter.say(f"execution {home.execution} is still unflushed: {error}")

    def _remove_expired(self) -> None:
        for home in self._other_homes("clean"):
            with contextlib.suppress(AgentfuseError), held(home) as record:
                if record is None:
                    continue
                # What a gateway retains it removes itself, if it is still there to do so.
                keep_s = max(self.config.keep_ended_s, UNDELIVERED_S if record.is_retained else 0)
                if is_removable(record, keep_s=keep_s):
                    remove_home(home)

    def _other_homes(self, status: Status, *, agent: str | None = None) -> Iterator[Home]:
        """The homes of this status, and agent, looked at without their locks, which are not taken without
        need: for one that a daemon holds that takes a quarter of a second, and there may be a hundred."""
        for home in list_homes(self.config.state):
            with contextlib.suppress(AgentfuseError):
                record = home.record() if home.execution != self.home.execution else None
                if record is not None and record.status == status and agent in {None, record.agent}:
                    yield home

    def _write(self, **changes: object) -> None:
        with self._writing:
            self.home.write_record(msgspec.structs.replace(self._record, **changes))
