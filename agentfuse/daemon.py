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
import shutil
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from agentfuse import mountpoint as mountpoints
from agentfuse.config import Config, format_size
from agentfuse.control.mountinfo import mounts_at, resolve_mountpoint
from agentfuse.control.registry import MountRecord, Registry, open_registry
from agentfuse.control.server import serve as serve_control
from agentfuse.errors import (
    AgentfuseError,
    EnvironmentProblem,
    MountError,
    UnflushedError,
    UsageError,
)
from agentfuse.fuse.session import Session, SessionOptions, mounted, widen_read_ahead
from agentfuse.home.index import Index
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home, HomeRecord, list_homes, now, take_stock
from agentfuse.objectstore import open_store, probe
from agentfuse.progress import Progress, Reporter
from agentfuse.regions import Region, Scope
from agentfuse.snapshots.entries import printable
from agentfuse.sync.engine import Memory
from agentfuse.sync.reports import CommitReport
from agentfuse.sync.walk import clear_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountSpec:
    """Which home to mount where. ``ephemeral``: the execution id was made up, nobody comes back to it."""

    mountpoint: Path
    agent: str
    execution: str
    ephemeral: bool


OnReady = Callable[[dict[str, object]], None]


def serve(config: Config, spec: MountSpec, reporter: Reporter, *, on_ready: OnReady) -> None:
    """Mount a home and block for the mount's whole life; ``on_ready`` gets its status once it is usable.

    Ends when the home is unmounted, by whomever, or at SIGTERM or SIGINT; then flushes. Raises
    ``UnflushedError`` when that fails: the home stays on this host, complete.
    """
    _prepare_process()
    registry = open_registry(os.environ)
    mountpoint = resolve_mountpoint(spec.mountpoint)
    lock = registry.lock(mountpoint)
    try:
        mountpoints.require_fuse()
        if mountpoints.prepare(mountpoint):
            reporter.say(f"replaced a dead mount at {mountpoint}")
        home = Home(config.state, spec.execution)
        _make_directory(home.path)
        with home.locked():
            keeper = HomeKeeper(config, spec, home, reporter)
            keeper.open()
            mount = Mount(config, replace(spec, mountpoint=mountpoint), keeper, registry, reporter)
            trio.run(mount.run, on_ready)
            if mount.failure is not None:
                if not mount.was_mounted and not keeper.resumed:
                    keeper.end()  # nobody has written anything
                raise mount.failure
            keeper.end()
    finally:
        registry.withdraw(mountpoint)
        lock.release()


class HomeKeeper:
    """Opens a home before the mount and flushes it after; what earlier runs left unfinished, too."""

    def __init__(self, config: Config, spec: MountSpec, home: Home, reporter: Reporter) -> None:
        self.config = config
        self.home = home
        self._spec = spec
        self._reporter = reporter
        self._owner = config.owner if os.geteuid() == 0 else None
        self.ledger = Ledger(config.regions)
        self.resumed = False

    def open(self) -> None:
        """Bring the home to where it can be mounted: laid out, restored, its use counted."""
        probe(open_store(self.config.store))
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
                hint=f"once the store works, mount agent {self._spec.agent} again on this host",
            ) from error

    def end(self) -> None:
        """Everything durable is in the store: mark the home so, or remove it when it cannot be resumed."""
        self._write(status="clean", ended_at=now())
        if self._spec.ephemeral or self.config.keep_ended_s == 0:
            _remove_home(self.home)

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
                agent=self._spec.agent,
                execution=self._spec.execution,
                store=self.config.store,
                status="restoring",
                created_at=now(),
            )
        elif record.agent != self._spec.agent:
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
        self._write(status="live", mountpoint=str(self._spec.mountpoint))

    def _finish_others(self) -> None:
        """Flush what earlier executions of this agent could not; what fails again stays and is told."""
        for home in list_homes(self.config.state):
            if home.execution == self._spec.execution:
                continue
            try:
                record = home.record()
                if record is None or record.agent != self._spec.agent or record.status != "live":
                    continue
                with home.locked():
                    self._finish(home, record)
            except AgentfuseError as error:
                if not home.is_locked():
                    self._reporter.say(f"execution {home.execution} is still unflushed: {error}")

    def _finish(self, home: Home, record: HomeRecord) -> None:
        self._reporter.say(f"finishing execution {record.execution}, which ended without its flush")
        for region in self._agent_regions():
            if (home.tree / region.name).is_dir():
                self._commit(home, record, region, "recovered")
        home.write_record(msgspec.structs.replace(record, status="clean", ended_at=now()))

    def _remove_expired(self) -> None:
        for home in list_homes(self.config.state):
            with contextlib.suppress(AgentfuseError):
                record = home.record()
                if record is None or record.status != "clean" or home.execution == self._spec.execution:
                    continue
                if (record.ended_at or 0) + self.config.keep_ended_s < now():
                    with home.locked():
                        _remove_home(home)

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
                store=open_store(record.store if record.status == "live" else self.config.store),
                agent=record.agent,
                execution=record.execution,
                root=home.tree / region.name,
                index=index,
                owner=self._owner,
                region=region.name,
            )
        finally:
            index.close()

    def _write(self, **changes: object) -> None:
        self.home.write_record(msgspec.structs.replace(self._record, **changes))


class Mount:
    """A home while it is mounted: the session, the control socket, the signals, and how it ends."""

    def __init__(
        self, config: Config, spec: MountSpec, keeper: HomeKeeper, registry: Registry, reporter: Reporter
    ) -> None:
        self._spec = spec
        self._keeper = keeper
        self._registry = registry
        self._reporter = reporter
        self._options = SessionOptions(
            allow_other=mountpoints.may_allow_other(), xattrs=config.xattrs, extra=config.mount_options
        )
        self._session: Session
        self.failure: AgentfuseError | None = None
        self.was_mounted = False
        self._state = "starting"
        self._live = trio.Event()
        self._started_at = now()
        self._listeners: set[trio.MemorySendChannel[dict[str, object]]] = set()
        self._flushing = trio.CancelScope()
        self._detach_limiter = trio.CapacityLimiter(2)

    async def run(self, on_ready: OnReady) -> None:
        """Serve until unmounted, then flush; ``failure`` says afterwards how that went."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                with self._mounted() as session:
                    self._session = session
                    await self._serve(nursery, on_ready)
                self._state = "flushing"
                await self._flush()
                nursery.cancel_scope.cancel()
        except* AgentfuseError as group:
            # A nursery wraps what leaves it; our callers want the error itself.
            self.failure = next(_leaves(group))

    def status(self) -> dict[str, object]:
        """The mount as JSON values."""
        record = self._registered()
        return {
            **asdict(record),
            "state": self._state,
            "state_dir": record.state,
            "owner": list(self._keeper.config.owner),
            "rss_bytes": _resident_bytes(),
            "regions": {account.name: account.as_dict() for account in self._keeper.ledger.accounts()},
            "fuse": self._session.as_dict(),
        }

    async def unmount(self, *, lazy: bool) -> AsyncGenerator[dict[str, object], None]:
        """Unmount and tell how the flush goes; the last object is ``done`` or ``error``."""
        send, receive = trio.open_memory_channel[dict[str, object]](256)
        self._listeners.add(send)
        try:
            if self._state == "live":
                await self._detach(lazy=lazy)
            async for line in receive:
                yield line
        finally:
            self._listeners.discard(send)

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[Session]:
        path = self._spec.mountpoint
        with (
            mountpoints.closed_below(path) as close_below,
            mounted(self._keeper.home.tree, path, self._keeper.ledger, self._options) as session,
        ):
            close_below()
            yield session

    async def _serve(self, nursery: trio.Nursery, on_ready: OnReady) -> None:
        path = self._spec.mountpoint
        minor = mounts_at(path)[-1].minor
        try:
            async with trio.open_nursery() as serving:
                serving.start_soon(self._run_session)
                await self._session.ready.wait()
                self.was_mounted = True
                if os.geteuid() == 0:
                    widen_read_ahead(minor)
                await nursery.start(serve_control, self._registry.socket_path(path), self)
                self._state = "live"
                self._live.set()
                self._registry.publish(self._registered())
                on_ready(self.status())
        finally:
            # After an unmount it is gone; after anything else it would stay behind as a dead mount.
            with trio.CancelScope(shield=True):
                if any(entry.is_ours and entry.minor == minor for entry in mounts_at(path)):
                    await trio.to_thread.run_sync(partial(mountpoints.detach, path, lazy=True))

    async def _run_session(self) -> None:
        try:
            await self._session.run()
        except Exception:
            log.exception("the FUSE session broke; what was written is flushed")

    async def _flush(self) -> None:
        self._keeper.report_to(_Listening(self._reporter, self._tell_from_thread))
        try:
            with self._flushing:
                await trio.to_thread.run_sync(self._keeper.flush, abandon_on_cancel=True)
            if self._flushing.cancelled_caught:
                raise UnflushedError(
                    f"the flush was interrupted: the memory of this run is in {self._keeper.home.tree}",
                    hint=f"mount agent {self._spec.agent} again on this host",
                )
            self._tell({"done": {"execution": self._spec.execution}})
        except AgentfuseError as error:
            self._tell({"error": _as_line(error)})
            raise
        finally:
            for listener in list(self._listeners):
                listener.close()

    async def _detach(self, *, lazy: bool) -> None:
        path = self._spec.mountpoint

        def detach() -> None:
            if lazy:
                mountpoints.write_back(path)
            mountpoints.detach(path, lazy=lazy)

        self._reporter.say(f"unmounting {path}")
        await trio.to_thread.run_sync(detach, limiter=self._detach_limiter)
        if lazy:
            self._session.stop()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                await self._live.wait()
                if self._state == "flushing":
                    self._flushing.cancel()
                else:
                    self._reporter.say(f"{signal.Signals(number).name}: unmounting")
                    await self._end()

    async def _end(self) -> None:
        try:
            await self._detach(lazy=True)
        except (MountError, OSError) as error:
            log.warning("unmounting: %s", error)
            self._session.stop()

    def _registered(self) -> MountRecord:
        return MountRecord(
            mountpoint=str(self._spec.mountpoint),
            execution=self._spec.execution,
            agent=self._spec.agent,
            pid=os.getpid(),
            state=str(self._keeper.config.state),
            store=self._keeper.config.store,
            started_at=self._started_at,
        )

    def _tell(self, line: dict[str, object]) -> None:
        for listener in list(self._listeners):
            # Who does not read misses progress, never the end: there is room for that.
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                listener.send_nowait(line)

    def _tell_from_thread(self, line: dict[str, object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._tell, line)


class _Listening:
    """Reports to the mount's own reporter, and to whoever waits for its end at the control socket."""

    def __init__(self, reporter: Reporter, tell: Callable[[dict[str, object]], None]) -> None:
        self._reporter = reporter
        self._tell = tell

    def say(self, text: str) -> None:
        self._reporter.say(text)
        self._tell({"say": text})

    def progress(self, moment: Progress) -> None:
        self._reporter.progress(moment)
        self._tell({"progress": asdict(moment)})


def _leaves(group: BaseExceptionGroup[AgentfuseError]) -> Iterator[AgentfuseError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _as_line(error: AgentfuseError) -> dict[str, object]:
    return {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}


def _told(region: str, report: CommitReport) -> Iterator[str]:
    if report.number is None:
        yield f"{region}/: unchanged, nothing to flush"
    else:
        yield (
            f"{region}/: flushed {format_size(report.bytes_put)} in {_count(report.objects_put, 'object')}; "
            f"snapshot {report.number} holds {_count(report.files, 'file')}, {format_size(report.bytes)}"
        )
    for conflict in report.conflicts:
        yield (
            f"{region}/: another execution changed {printable(conflict.path)} too: its version keeps the "
            f"name, this run's is kept as {printable(conflict.kept_at)}"
        )
    if report.skipped:
        yield f"{region}/: sockets and devices are not kept: {', '.join(report.skipped[:5])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _prepare_process() -> None:
    os.umask(0)  # the kernel has applied the caller's umask already
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path.parent.parent, 0o700)
    except OSError as error:
        raise EnvironmentProblem(
            f"the state directory {path.parent.parent} cannot be used: {os.strerror(error.errno or 0)}",
            hint="it must be writable and have free space; choose another with --state",
        ) from error


def _remove_home(home: Home) -> None:
    clear_tree(home.tree)
    shutil.rmtree(home.path)
