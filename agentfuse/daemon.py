"""The composition root of a mount: one process, one home, from the checks before to the flush after.

    prepare mountpoint -> finish what earlier runs left -> restore -> mount, serve -> unmount -> flush

Returns only when everything durable is in the object store; otherwise raises and leaves the home where
the next start finds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import trio

from agentfuse import longlived
from agentfuse.config import Config
from agentfuse.control.mountinfo import mounts_at, resolve_mountpoint
from agentfuse.control.registry import MountRecord, Registry, open_registry
from agentfuse.control.server import serve as serve_control
from agentfuse.door.doors import Doors
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    EnvironmentProblem,
    MountError,
    UsageError,
    leaves,
)
from agentfuse.events.bookmarks import Bookmarks
from agentfuse.events.endpoint import Endpoint, open_endpoints
from agentfuse.events.feed import EventFeed
from agentfuse.events.inbox import Inbox
from agentfuse.events.inboxes import Inboxes, Opened, open_inboxes
from agentfuse.events.log import EventLog
from agentfuse.events.notices import STATUS, Notices
from agentfuse.events.webhooks import Webhooks
from agentfuse.flush import FinalFlush, Watchers
from agentfuse.freezing import Freezer
from agentfuse.fuse.session import Session, SessionOptions, mounted, widen_read_ahead
from agentfuse.helped import mounter_of
from agentfuse.home.files import Files
from agentfuse.home.observer import Found
from agentfuse.home.quota import Account
from agentfuse.home.tree import Home, now, regular_files
from agentfuse.livefiles import LiveFiles
from agentfuse.metrics.publishing import keep_textfile
from agentfuse.mountpoint import Mounter
from agentfuse.operators import Life, Operators
from agentfuse.progress import Reporter
from agentfuse.regions import PLATFORM, Scope
from agentfuse.supervision import Supervisor, supervisor_of
from agentfuse.sync.backfill import Backfill
from agentfuse.sync.background import Pace, RegionSync
from agentfuse.sync.hydration import Hydration
from agentfuse.sync.keeper import HomeKeeper
from agentfuse.sync.recovery import owner_of
from agentfuse.values import of_mount

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountSpec:
    """Which home to mount where. ``ephemeral``: the execution id was made up, nobody comes back to it.
    ``retains``: see ``HomeKeeper``."""

    mountpoint: Path
    agent: str
    execution: str
    ephemeral: bool
    retains: bool = False


_RECENT_EVENTS = 2000
"""So many, at most, does a new mount find in its ``.agentfuse/``."""

_NOTICES_AGAIN_S = 10.0

OnReady = Callable[[dict[str, object]], None]


def serve(config: Config, spec: MountSpec, reporter: Reporter, *, on_ready: OnReady) -> None:
    """Mount a home and block for the mount's whole life; ``on_ready`` gets its status once it is usable.

    Ends when the home is unmounted, by whomever, or at SIGTERM or SIGINT; then flushes. Raises
    ``UnflushedError`` when that fails: the home stays on this host, complete.
    """
    _prepare_process()
    registry = open_registry(os.environ)
    mountpoint = resolve_mountpoint(spec.mountpoint)
    ours = {"state directory": config.state, "runtime directory": registry.runtime}
    if config.store.startswith("file://"):
        ours["object store"] = Path(unquote(config.store.removeprefix("file://")))
    _refuse_inside(mountpoint, ours)
    endpoints = open_endpoints(config.webhooks, os.environ)
    if config.metrics_file is not None:
        _refuse_inside(mountpoint, {"file of metrics": config.metrics_file})
    lock = registry.lock(mountpoint)
    try:
        inboxes = open_inboxes(
            config.inboxes, {**ours, "mountpoint": mountpoint}, agent=spec.agent, execution=spec.execution
        )
        mounter = mounter_of(config.mount_helper, mountpoint)
        if mounter.prepare():
            reporter.say(f"replaced a dead mount at {mountpoint}")
        home = Home(config.state, spec.execution)
        _make_directory(home.path)
        with home.locked(makes=True):
            keeper = HomeKeeper(
                config,
                home,
                agent=spec.agent,
                mountpoint=mountpoint,
                ephemeral=spec.ephemeral,
                reporter=reporter,
                retains=spec.retains,
            )
            keeper.open()
            whose = replace(spec, mountpoint=mountpoint)
            mount = Mount(
                config,
                whose,
                keeper,
                registry,
                reporter,
                mounter=mounter,
                endpoints=endpoints,
                inboxes=inboxes,
            )
            trio.run(mount.run, on_ready)
            if not mount.is_coming_back:
                mounter.reopen()
            if mount.failure is not None:
                if not mount.was_mounted and not keeper.resumed:
                    keeper.end()  # nobody has written anything
                raise mount.failure
    finally:
        registry.withdraw(mountpoint)
        lock.release()


class Mount:
    """The life of a mount: its session, its tasks, its signals, and how it ends."""

    def __init__(
        self,
        config: Config,
        spec: MountSpec,
        keeper: HomeKeeper,
        registry: Registry,
        reporter: Reporter,
        *,
        mounter: Mounter,
        endpoints: Sequence[Endpoint],
        inboxes: Sequence[Opened],
    ) -> None:
        self._spec = spec
        self._keeper = keeper
        self._registry = registry
        self._reporter = reporter
        self._mounter = mounter
        self._doors = Doors(spec.mountpoint, owner_of(config), keeper.ledger)
        self._options = SessionOptions(
            allow_other=mounter.allow_other,
            xattrs=config.xattrs,
            extra=config.mount_options,
            creator_of=self._doors.creator_of,
            content_of=self._content_of,
            rules=config.creators,
            agent_uid=config.owner[0] if config.owner[0] != os.geteuid() else None,
        )
        self._session: Session
        self._hydration = Hydration(keeper.absent)
        self._backfill = Backfill(self._hydration)
        self._hydrating = trio.CancelScope()
        self._notifying = trio.CancelScope()
        self.failure: AgentfuseError | None = None
        self.was_mounted = False
        self.is_coming_back = False
        """Its manager has ended it, and is likely to start it again."""
        self._life = Life()
        self._minor = -1
        self._started_at = now()
        self._watchers = Watchers()
        self._flush = FinalFlush(
            keeper,
            reporter,
            self._watchers,
            agent=spec.agent,
            timeout_s=config.flush_timeout_s,
            has_backlog=self._has_backlog,
        )
        self._syncs: list[RegionSync] = []
        self._pace = Pace(config.sync_delay_s, config.checkpoint_interval_s)
        self._synced = trio.Event()
        events = EventLog(keeper.home.events, keeper.home.tree)
        whose = {"agent": spec.agent, "execution": spec.execution}
        self._events = EventFeed(events, **whose)
        bookmarks = Bookmarks(events)
        self._webhooks = Webhooks(endpoints, self._events, bookmarks, **whose)
        self._inboxes = Inboxes([self._inbox(each, bookmarks) for each in inboxes])
        self._notices = Notices(self._events, self._doors, keeper.ledger, keeper.home.tree)
        self._detach_limiter = trio.CapacityLimiter(2)

    async def run(self, on_ready: OnReady) -> None:
        """Serve until unmounted, then flush; ``failure`` says afterwards how that went."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                self._watch_regions()
                self._inboxes.settle()
                self._notices.prepare(self._events.last(_RECENT_EVENTS))
                with self._mounted() as session:
                    self._session = session
                    await self._serve(nursery, on_ready)
                await self._flush.run(self._synced, self._webhooks.ended)
                nursery.cancel_scope.cancel()
        except* AgentfuseError as group:
            # A nursery wraps what leaves it; our callers want the error itself.
            self.failure = next(leaves(group))

    def _inbox(self, opened: Opened, bookmarks: Bookmarks) -> Inbox:
        region = opened.binding.region
        notifies = any(each.notify for each in self._keeper.config.regions if each.name == region)
        return Inbox(
            opened.path,
            opened.fd,
            creator=opened.binding.creator,
            tree=self._keeper.home.tree / region,
            doors=self._doors,
            account=self._keeper.ledger.by_directory[region.encode()],
            teller=self._events if notifies else None,
            bookmarks=bookmarks,
        )

    def _has_backlog(self) -> bool:
        return self._webhooks.has_backlog

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[Session]:
        with (
            self._mounter.mounting(noexec="noexec" in self._options.extra) as (target, is_mounted),
            mounted(
                self._keeper.home.tree,
                target,
                self._keeper.ledger,
                self._hydration,
                self._options,
                frozen=self._keeper.frozen,
            ) as session,
        ):
            is_mounted()
            yield session

    async def _serve(self, nursery: trio.Nursery, on_ready: OnReady) -> None:
        path = self._spec.mountpoint
        minor = self._minor = mounts_at(path)[-1].minor
        self._doors.device = os.makedev(0, minor)
        try:
            async with trio.open_nursery() as serving:
                serving.start_soon(self._run_session)
                await self._session.ready.wait()
                self.was_mounted = True
                if os.geteuid() == 0:
                    widen_read_ahead(minor)
                self._start_syncing(nursery)
                nursery.start_soon(self._doors.run)
                nursery.start_soon(self._events.run)
                nursery.start_soon(self._webhooks.run, self._events.ended)
                operators = self._operators()
                await nursery.start(serve_control, self._registry.socket_path(path), operators)
                await self._publish_metrics(nursery, operators)
                self._life.state = "live"
                self._life.live.set()
                self._registry.publish(operators.record)
                on_ready(operators.status())
                serving.start_soon(self._hydrate)
                serving.start_soon(self._notify)
                supervisor = supervisor_of(os.environ)
                if supervisor.watchdog_s is not None:
                    nursery.start_soon(self._answer_watchdog, supervisor, supervisor.watchdog_s)
        finally:
            self._life.state = "flushing"
            self._life.ended.set()
            for sync in self._syncs:
                sync.stop()
            # After an unmount it is gone; after anything else it would stay behind as a dead mount.
            if self._session.handles_open:  # nobody tells any more when those files are closed
                try:
                    for account in self._keeper.ledger.accounts():
                        if account.observer is not None:
                            self._compare_with_events(account)
                except (OSError, AgentfuseError) as error:
                    log.warning(
                        "events may be missing; the next start of this execution finds them: %s", error
                    )
            self._events.stop()
            with trio.CancelScope(shield=True):
                async with self._doors.closed():
                    pass
                if any(entry.is_ours and entry.minor == minor for entry in mounts_at(path)):
                    await trio.to_thread.run_sync(partial(self._mounter.detach, lazy=True))

    async def _run_session(self) -> None:
        try:
            await self._session.run()
        except Exception:
            log.exception("the FUSE session broke; what was written is flushed")
        self._hydrating.cancel()
        self._notifying.cancel()

    async def _notify(self) -> None:
        with self._notifying:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_agent)
                nursery.start_soon(self._inboxes.run)

    async def _tell_agent(self) -> None:
        while True:
            try:
                await self._notices.run()
            except Exception:  # whatever ails them, they are not worth a mount
                log.exception("unexpected error; %s/ goes on in a while", PLATFORM.name)
                await trio.sleep(_NOTICES_AGAIN_S)
            else:
                return

    async def _answer_watchdog(self, supervisor: Supervisor, watchdog_s: float) -> None:
        """While it is mounted, all is well as long as a request of somebody else's is answered."""
        while True:
            if self._life.state == "live":
                try:
                    await self._doors.ping()
                except BusyError:
                    pass  # it is being unmounted, which takes as long as the kernel has to write back
                except AgentfuseError as error:
                    log.warning("no answer through the mount: %s", error)
                    await trio.sleep(watchdog_s / 4)
                    continue
            supervisor.alive()
            await trio.sleep(watchdog_s / 4)

    def _content_of(self, name: bytes) -> bytes | None:
        """What a file of ``.agentfuse/`` is to hold when it is opened, if it is one that is made then."""
        if name != STATUS:
            return None
        return self._notices.status({"agent": self._spec.agent, "execution": self._spec.execution})

    async def _hydrate(self) -> None:
        with self._hydrating:
            await trio.to_thread.run_sync(self._keeper.synced.note_restored, abandon_on_cancel=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hydration.run)
                await self._backfill.run()

    def _watch_regions(self) -> None:
        """Have the regions that notify tell of their files, beginning with what nobody was told of."""
        for region in self._keeper.config.regions:
            if region.notify:
                account = self._keeper.ledger.by_directory[region.name.encode()]
                account.observer = self._events.observer(region.name, partial(self._files_of, region.name))
                was_restored = region.scope is Scope.AGENT and not self._keeper.resumed
                self._compare_with_events(account, silently=was_restored)

    async def _publish_metrics(self, nursery: trio.Nursery, operators: Operators) -> None:
        config = self._keeper.config
        if config.metrics is not None:
            await nursery.start(operators.scrapes.serve, config.metrics, operators.metrics)
        if config.metrics_file is not None:
            path = of_mount(config.metrics_file, agent=self._spec.agent, execution=self._spec.execution)
            nursery.start_soon(keep_textfile, path, operators.metrics, config.metrics_interval_s)

    def _files_of(self, region: str) -> Found:
        return self._session.files_of(region)

    def _compare_with_events(self, account: Account, *, silently: bool = False) -> None:
        found = regular_files(self._keeper.home.tree, account.name.encode())
        below = len(account.name) + 1
        self._events.compare(account.name, [(path[below:], st) for path, st in found], silently=silently)

    def _start_syncing(self, nursery: trio.Nursery) -> None:
        for region, memory in self._keeper.synced.memories.items():
            changes = self._keeper.ledger.by_directory[region.name.encode()].changes
            if changes is not None:
                self._syncs.append(
                    RegionSync(
                        region.name,
                        memory,
                        changes,
                        still=self._session.still,
                        spool_in=self._keeper.home.path,
                        pace=self._pace,
                        is_unknown=self._keeper.resumed,
                    )
                )
        nursery.start_soon(self._sync_in_background)

    async def _sync_in_background(self) -> None:
        async with trio.open_nursery() as syncing:
            for sync in self._syncs:
                syncing.start_soon(sync.run)
        self._synced.set()

    async def _detach(self, *, lazy: bool) -> None:
        path = self._spec.mountpoint
        self._life.leases.release()
        detach = partial(self._mounter.detach, lazy=lazy)
        if self._is_on_path():
            self._reporter.say(f"unmounting {path}")
            if lazy:
                try:
                    await self._doors.write_back(self._session.written())
                except AgentfuseError as error:
                    log.warning("mapped pages may be lost: %s", error)
            async with self._doors.closed():
                try:
                    await trio.to_thread.run_sync(detach, limiter=self._detach_limiter)
                except MountError:
                    if self._is_on_path():  # else somebody was faster, and it is what was wanted
                        raise
        elif lazy:
            log.warning("%s was detached by somebody else: mapped pages still unwritten are lost", path)
        if lazy:
            self._session.stop()

    def _is_on_path(self) -> bool:
        """Whether what is mounted at the path is this very mount: somebody may have taken it away."""
        found = mounts_at(self._spec.mountpoint)
        return bool(found) and found[-1].is_ours and found[-1].minor == self._minor

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                await self._life.live.wait()
                if self._life.state == "flushing":
                    self._flush.interrupt()
                else:
                    self._reporter.say(f"{signal.Signals(number).name}: unmounting")
                    self.is_coming_back = supervisor_of(os.environ).is_there
                    await self._end()

    async def _end(self) -> None:
        try:
            await self._detach(lazy=True)
        except (MountError, OSError) as error:
            log.warning("unmounting: %s", error)
            self._session.stop()

    def _operators(self) -> Operators:
        record = MountRecord(
            mountpoint=str(self._spec.mountpoint),
            execution=self._spec.execution,
            agent=self._spec.agent,
            pid=os.getpid(),
            state=str(self._keeper.config.state),
            store=self._keeper.config.store,
            started_at=self._started_at,
        )
        return Operators(
            record=record,
            life=self._life,
            keeper=self._keeper,
            session=self._session,
            feed=self._events,
            webhooks=self._webhooks,
            inboxes=self._inboxes,
            backfill=self._backfill,
            syncs=self._syncs,
            detach=self._detach,
            flush=self._flush,
            watchers=self._watchers,
            files=self._live_files(),
            doors=self._doors,
        )

    def _live_files(self) -> LiveFiles:
        tree, regions = self._keeper.home.tree, self._keeper.config.regions
        files = Files(tree, regions, agent=self._spec.agent, execution=self._spec.execution)
        freezer = Freezer(tree, self._keeper.frozen, self._session.is_written, self._keeper.remember_frozen)
        return LiveFiles(files, tree, self._hydration, self._doors, self._content_of, freezer=freezer)


def _prepare_process() -> None:
    longlived.prepare()
    os.umask(0)  # the kernel has applied the caller's umask already
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _refuse_inside(mountpoint: Path, ours: dict[str, Path]) -> None:
    """What the daemon itself needs must not be below its own mount: it would wait for itself."""
    for what, path in ours.items():
        if Path(os.path.realpath(path)).is_relative_to(mountpoint):
            raise UsageError(f"the {what} {path} is below the mountpoint {mountpoint}", hint="choose another")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path.parent.parent, 0o700)
    except OSError as error:
        raise EnvironmentProblem(
            f"the state directory {path.parent.parent} cannot be used: {os.strerror(error.errno or 0)}",
            hint="it must be writable and have free space; choose another with --state",
        ) from error
