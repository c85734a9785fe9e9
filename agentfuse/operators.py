"""What operators ask of a mounted home, whoever carries it to them: the MountControl of the control API.

Looks at the parts of a mount and starts what they can do; when a mount lives and how it ends is the daemon's.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import trio

from agentfuse.control.contract import MountControl, Wanted
from agentfuse.control.messages import Level
from agentfuse.control.registry import MountRecord
from agentfuse.door.doors import Doors
from agentfuse.errors import BusyError, NotFoundError
from agentfuse.events.feed import EventFeed, Line
from agentfuse.events.inboxes import Inboxes
from agentfuse.events.webhooks import Webhooks
from agentfuse.flush import FinalFlush, Watchers
from agentfuse.fuse.session import Session
from agentfuse.home.quota import Account
from agentfuse.inspection import Live, check_rest, check_still
from agentfuse.livefiles import LiveFiles
from agentfuse.logs import set_level
from agentfuse.metrics import readings
from agentfuse.metrics.exposition import render
from agentfuse.metrics.publishing import Scrapes
from agentfuse.stacks import stacks
from agentfuse.sync.backfill import Backfill
from agentfuse.sync.background import RegionSync
from agentfuse.sync.keeper import HomeKeeper
from agentfuse.sync.reports import CommitReport
from agentfuse.sync.synced import told
from agentfuse.tracing import trace
from agentfuse.watching import watch

HELD_ELSEWHERE_S = 2.0
"""How long after an unmount the kernel may take before somebody else must be holding the mount."""


CAUGHT_UP_S = 5.0
"""How long a check, and whoever waits for it, gives what happened to get into the log of events."""

_HEARTBEAT_S = 1.0
_EVENTS_SHOWN = 8


class Leases:
    """Who has asked that nothing changes for a while. An unmount does not wait for them."""

    def __init__(self) -> None:
        self._held: set[ExitStack] = set()

    @contextmanager
    def hold(self, still: AbstractContextManager[None]) -> Iterator[trio.Event]:
        """Hold ``still``; the event says that it was released."""
        released = trio.Event()
        with ExitStack() as stack:
            stack.callback(released.set)
            stack.enter_context(still)
            self._held.add(stack)
            try:
                yield released
            finally:
                self._held.discard(stack)

    def release(self) -> None:
        """Let everything go on."""
        for stack in list(self._held):
            stack.close()


@dataclass(slots=True)
class Life:
    """Where a mount is in its life: ``live`` once it is usable, ``ended`` when it is no longer mounted."""

    state: Literal["starting", "live", "flushing"] = "starting"
    live: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    leases: Leases = field(default_factory=Leases)


class Detach(Protocol):
    """Takes the mount off its path; ``lazy``: though files of it are open."""

    def __call__(self, *, lazy: bool) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Operators:
    """A mount as its operators see it. ``detach`` unmounts, ``flush`` is what follows."""

    record: MountRecord
    life: Life
    keeper: HomeKeeper
    session: Session
    feed: EventFeed
    webhooks: Webhooks
    inboxes: Inboxes
    backfill: Backfill
    syncs: Sequence[RegionSync]
    detach: Detach
    flush: FinalFlush
    watchers: Watchers
    files: LiveFiles
    doors: Doors
    _changing_quotas: trio.Lock = field(default_factory=trio.Lock)
    scrapes: Scrapes = field(default_factory=Scrapes)
    rendering: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, 1))

    def status(self) -> dict[str, object]:
        """The mount as JSON values."""
        return {
            **asdict(self.record),
            "state": self.life.state,
            "state_dir": self.record.state,
            "owner": list(self.keeper.config.owner),
            "metrics_url": self.scrapes.url,
            "rss_bytes": readings.resident_bytes(),
            "regions": {account.name: account.as_dict() for account in self.keeper.ledger.accounts()},
            "sync": {sync.name: sync.as_dict() for sync in self.syncs},
            "hydration": self.backfill.as_dict(),
            "events": self.feed.as_dict(),
            "webhooks": self.webhooks.as_list(),
            "inboxes": self.inboxes.as_list(),
            "fuse": self.session.as_dict(),
        }

    async def metrics(self) -> bytes:
        """Everything that is counted, in Prometheus' text format."""
        found = [
            *readings.of_mount(self.record),
            *readings.of_session(self.session),
            *readings.of_regions(list(self.keeper.ledger.accounts())),
            *readings.of_sync(self.syncs, self.keeper.absent),
            *readings.of_traffic(self.keeper.traffic),
            *readings.of_events(self.feed, self.webhooks),
            *readings.of_inboxes(self.inboxes),
        ]
        write = partial(render, found, agent=self.record.agent, execution=self.record.execution)
        return await trio.to_thread.run_sync(write, limiter=self.rendering)

    def trace(self, wanted: Wanted, *, for_s: float | None) -> AsyncGenerator[list[dict[str, object]], None]:
        """Requests as they happen; see ``tracing.trace``."""
        return trace(self.session.tracer, wanted, for_s=for_s, ended=self.life.ended)

    def watch(self, *, interval_s: float, frames: int | None) -> AsyncGenerator[dict[str, object], None]:
        """What the mount did in each interval, and what it is at its end."""

        def now() -> dict[str, object]:
            events = [json.loads(line.text) for line in self.feed.recent(_EVENTS_SHOWN)]
            return {"status": self.status(), "events": events}

        tracer, ended = self.session.tracer, self.life.ended
        return watch(tracer, now, interval_s=interval_s, frames=frames, ended=ended)

    def regions(self) -> list[dict[str, object]]:
        """The regions with their settings and their use."""
        return [
            {
                "name": region.name,
                "scope": region.scope.value,
                "sync": region.sync.value,
                "notify": region.notify,
                "creator": region.creator.value,
                **self._account(region.name).as_dict(),
            }
            for region in self.keeper.config.regions
        ]

    async def set_quota(self, region: str, *, bytes_quota: int | None, files_quota: int | None) -> None:
        """Change what a region may hold; kept in the home's record, so later mounts of it know.

        What it holds already may be more: then it can only shrink.
        """
        account = self._account(region)
        async with self._changing_quotas:
            self._require_live()
            size = account.bytes_quota if bytes_quota is None else bytes_quota
            files = account.files_quota if files_quota is None else files_quota
            await trio.to_thread.run_sync(self.keeper.remember_quota, region, size, files)
            account.bytes_quota, account.files_quota = size, files

    def events(
        self, *, since: int | None, region: str | None, follow: bool
    ) -> AsyncGenerator[list[Line], None]:
        """Events as they come; see ``EventFeed.subscribe``."""
        return self.feed.subscribe(since, region=region, follow=follow, heartbeats=True)

    async def sync(self, *, timeout_s: float) -> AsyncGenerator[dict[str, object], None]:
        """Wait until everything changed before the call is in a snapshot; the last object is ``done``.

        Raises ``UnflushedError`` when that takes longer than ``timeout_s``.
        """
        self._require_live()
        deadline = trio.current_time() + timeout_s
        # What programs wrote through mappings is the kernel's until it is written back.
        await self.doors.write_back(self.session.written())
        regions: dict[str, object] = {}
        for sync in self.syncs:
            report = await sync.barrier(deadline=deadline)
            regions[sync.name] = {**sync.as_dict(), "commit": report and report.as_dict()}
            yield {"say": _synced_line(sync.name, report)}
        yield {"done": {"execution": self.record.execution, "regions": regions}}

    def checkpoint(self) -> dict[str, dict[str, object]]:
        """Begin to commit what is changed, without waiting for it."""
        self._require_live()
        for sync in self.syncs:
            sync.hurry()
        return {sync.name: sync.as_dict() for sync in self.syncs}

    async def drain(self, *, timeout_s: float, hold_s: float) -> AsyncGenerator[dict[str, object], None]:
        """Sync, then let nothing change for ``hold_s``, an unmount excepted, or until this is closed.

        Between ``drained`` and the end it yields empty objects. Raises as :meth:`sync` does, and
        ``BusyError`` when the mount was ended meanwhile.
        """
        deadline = trio.current_time() + timeout_s
        # Most of it, and what is the kernel's still, while everybody goes on.
        async with aclosing(self.sync(timeout_s=timeout_s)) as lines:
            async for line in lines:
                if "done" not in line:
                    yield line
        with self.life.leases.hold(self.session.still()) as released:
            for sync in self.syncs:
                await sync.barrier(deadline=deadline)
            state = {sync.name: sync.as_dict() for sync in self.syncs}
            yield {"drained": {"execution": self.record.execution, "regions": state}}
            until = trio.current_time() + hold_s
            while not released.is_set() and trio.current_time() < until:
                with trio.move_on_at(min(until, trio.current_time() + _HEARTBEAT_S)):
                    await released.wait()
                yield {}
            if released.is_set():
                raise BusyError("the mount has ended meanwhile", hint="what was drained is in the store")
        yield {"done": {"execution": self.record.execution}}

    async def unmount(
        self, *, lazy: bool, timeout_s: float | None
    ) -> AsyncGenerator[dict[str, object], None]:
        """Unmount and tell how the flush goes; the last object is ``done`` or ``error``.

        ``timeout_s``: for so long an unreachable store is tried again; None is what is configured.
        """
        if timeout_s is not None:
            self.flush.timeout_s = timeout_s
        async with self.watchers.watching() as lines:
            if self.life.state == "live":
                await self.detach(lazy=lazy)
                with trio.move_on_after(HELD_ELSEWHERE_S):
                    await self.session.ended.wait()
                # The life itself ends later: our own tasks may take their time, and that is nobody's hold.
                if not self.session.ended.is_set():
                    yield {
                        "say": "unmounted here, but another mount namespace (a sandbox, a container) still "
                        "holds it: waiting for that to end; `agentfuse umount --lazy` does not wait"
                    }
            async for line in lines:
                yield line

    async def check(self) -> dict[str, object]:
        """Whether the home is sound, at a moment for which whoever wants to change something waits.

        See ``inspection.HomeReport``.
        """
        self._require_live()
        home, regions = self.keeper.home, self.keeper.config.regions
        with self.session.still():
            booked, unfinished = self.session.booked(), self.session.unfinished()
            held = None
            with trio.move_on_after(CAUGHT_UP_S):
                held = await self.feed.caught_up()
            live = Live(booked, unfinished, held)
            report = await trio.to_thread.run_sync(check_still, home, regions, live)
        await trio.to_thread.run_sync(partial(check_rest, home, regions, report, is_live=True))
        return report.as_dict()

    def set_log_level(self, level: Level) -> None:
        """Log from this level on, until this process ends."""
        set_level(level)

    def dump(self) -> str:
        """What every thread and every task does, for people."""
        facts = [
            f"pid {self.record.pid}",
            self.record.mountpoint,
            self.life.state,
            f"{readings.resident_bytes()} bytes resident",
            f"{len(os.listdir('/proc/self/fd'))} descriptors",
            f"{self.session.handles_open} files open in the home",
        ]
        return f"{', '.join(facts)}\n\n{stacks()}"

    def _account(self, region: str) -> Account:
        accounts = self.keeper.ledger.accounts()
        for account in accounts:
            if account.name == region:
                return account
        names = ", ".join(account.name for account in accounts)
        raise NotFoundError(f"there is no region {region[:80]!r}", hint=f"there are {names}")

    def _require_live(self) -> None:
        if self.life.state != "live":
            raise BusyError(
                f"{self.record.mountpoint} is {self.life.state}", hint="agentfuse umount waits for it"
            )


if TYPE_CHECKING:  # that it is what the control API needs is seen here, not where it is handed over
    _control: type[MountControl] = Operators


def _synced_line(region: str, report: CommitReport | None) -> str:
    if report is None:
        return f"{region}/: everything was in the store already"
    return "\n".join(told(region, report))
