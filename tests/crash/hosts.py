"""Daemons as children of a process that has imported everything, on stores that fail as planned.

The only place that patches agentfuse: in the child, before it serves, ``LocalStore`` becomes a store that
injects faults, and waits before retries become short. Needs a caller without threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from crash.plan import Fault, Kill, Plan

from agentfuse import daemon, killpoints
from agentfuse.cli.output import LogReporter
from agentfuse.config import Config, load_config
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry
from agentfuse.errors import AgentfuseError, StoreError
from agentfuse.objectstore import ObjectStat, Source, local
from agentfuse.progress import Progress
from agentfuse.sync import backfill, background
from agentfuse.sync.recovery import recover

AGENT = "tester"
CONFIG = """
[regions.shared]
bytes = "400MiB"
"""
RETRY_S = (0.02, 0.05, 0.1)
"""How long to wait before trying again; as it is otherwise, a seed would take minutes."""

SLOW_READ_S = 0.2  # so that there is something to do while contents are still to come
_PR_SET_PDEATHSIG = 1
_RESTORED = re.compile(r"^shared/: (no snapshot yet|restored .* from snapshot (\d+))")


@dataclass(frozen=True)
class Place:
    """Where a seed is played. Everything of it lies below ``base``."""

    base: Path
    plan: Plan

    @property
    def store(self) -> Path:
        return self.base / "store"

    def state(self, host: int) -> Path:
        return self.base / f"host{host}"

    def runtime(self, host: int) -> Path:
        return self.base / f"run{host}"

    def mountpoint(self, execution: str) -> Path:
        return self.base / f"mount-{execution}"

    def journal(self, execution: str) -> Path:
        return self.base / f"journal-{execution}"

    def log(self, execution: str) -> Path:
        return self.base / f"log-{execution}"

    def home(self, host: int, execution: str) -> Path:
        return self.state(host) / "homes" / execution


class Daemon:
    """A daemon that was forked. ``status`` is None when it ended before it was ready; ``said`` is what it
    reported until then.
    """

    def __init__(self, place: Place, host: int, execution: str) -> None:
        self._place = place
        self._host = host
        self._execution = execution
        self.pid = 0
        self.code: int | None = None
        self.status: dict[str, Any] | None = None
        self.said: list[str] = []

    @property
    def path(self) -> Path:
        return self._place.mountpoint(self._execution)

    @property
    def control(self) -> ControlClient:
        registry = Registry(self._place.runtime(self._host))
        return ControlClient(registry.socket_path(self.path), deadline_s=60)

    def start(self, kill: Kill | None = None, faults: tuple[Fault, ...] = (), seed: int = 0) -> bool:
        """Fork, and wait until it is ready (true) or has ended (false)."""
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            where = self._place, self._host, self._execution
            _in_daemon(*where, lambda: _serve(*where, writer), kill=kill, faults=_Faults(faults, seed))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            for line in pipe:
                message = json.loads(line)
                self.said += [message["say"]] if "say" in message else []
                self.status = message.get("ready", self.status)
        if self.status is None:
            self.wait()
        return self.status is not None

    @property
    def has_restored(self) -> bool:
        """Whether the memory was brought from the store, rather than found as an earlier daemon left it."""
        return any(_RESTORED.search(line) for line in self.said)

    @property
    def restored_from(self) -> int | None:
        """The number of the snapshot that was brought; None for none."""
        found = [match for line in self.said if (match := _RESTORED.search(line))]
        return int(found[0][2]) if found and found[0][2] else None

    def kill(self) -> None:
        if self.pid and self.code is None:
            with contextlib.suppress(ProcessLookupError):  # as from a timer, just when it has ended
                os.kill(self.pid, signal.SIGKILL)

    def has_ended(self, *, within_s: float) -> bool:
        """Whether it ends, or has ended, within so many seconds."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                return bool(select.select([pidfd], [], [], within_s)[0])
            finally:
                os.close(pidfd)
        return True

    def wait(self) -> int:
        """Its exit code; negative for a signal's."""
        if self.code is None:
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def umount(self) -> int:
        """Unmount through its control socket, wait for the end, and return the exit code."""
        with contextlib.suppress(AgentfuseError):  # it may die of it, or fail: the exit code tells
            for _ in self.control.unmount(lazy=False):
                pass
        return self.wait()

    def terminate(self) -> int:
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def sync(self) -> None:
        """Raises ``AgentfuseError`` unless everything closed before is durable."""
        for _ in self.control.sync(timeout_s=20):
            pass


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """This process does not outlive the one that forked it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _in_daemon(
    place: Place, host: int, execution: str, work: Callable[[], int], *, kill: Kill | None, faults: _Faults
) -> NoReturn:
    """Be the process that does ``work`` as a daemon of a host, until its end."""
    code = 70
    try:
        die_with_parent()
        _to_log(place.log(execution))
        _prepare(place.runtime(host), faults)
        if kill and kill.step:
            killpoints.arm(kill.step, kill.passing)
        code = work()
    except BaseException:
        logging.getLogger("crash").exception("unexpected error")
    finally:
        os._exit(code)


def _prepare(runtime: Path, faults: _Faults) -> None:
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(os.getpid())
    os.environ["AGENTFUSE_RUNTIME_DIR"] = str(runtime)
    FaultyStore.faults = faults
    local.LocalStore = FaultyStore  # type: ignore[misc]
    background.RETRY_S = daemon._RETRY_S = RETRY_S
    backfill._FIRST_RETRY_S, *_, backfill._LAST_RETRY_S = RETRY_S


def recover_in_child(place: Place, host: int, kill: Kill | None) -> int:
    """Fork a process that finishes what is unfinished on a host, as ``agentfuse recover``; its process id."""
    pid = os.fork()
    if pid == 0:
        where = place, host, f"sweep{host}"
        _in_daemon(*where, lambda: _recover(place, host), kill=kill, faults=_Faults((), 0))
    return pid


def _recover(place: Place, host: int) -> int:
    outcomes = recover(_config(place, host), LogReporter())
    return max([0, *(each.error.exit_code for each in outcomes if each.error is not None)])


def _serve(place: Place, host: int, execution: str, pipe: int) -> int:
    told = _Telling(pipe)
    spec = daemon.MountSpec(place.mountpoint(execution), AGENT, execution, ephemeral=False)
    try:
        daemon.serve(_config(place, host), spec, told, on_ready=told.ready)
    except AgentfuseError as error:
        logging.getLogger("crash").warning("exit code %d: %s", error.exit_code, error)
        return error.exit_code
    return 0


def _config(place: Place, host: int) -> Config:
    plan = place.plan
    overrides = {"store": place.store.as_uri(), "state": str(place.state(host))}
    return replace(
        load_config(place.base / "config.toml", environ={}, overrides=overrides),
        keep_ended_s=plan.keep_ended_s,
        sync_delay_s=plan.sync_delay_s,
        checkpoint_interval_s=plan.checkpoint_interval_s,
        flush_timeout_s=2,
    )


def _to_log(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    form = f"%(asctime)s {os.getpid()} %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form, force=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


class _Telling:
    """Tells the parent of the start, and the log of everything."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def say(self, text: str) -> None:
        self._tell({"say": text})
        logging.getLogger("crash").info("%s", text)

    def progress(self, moment: Progress) -> None:
        pass

    def ready(self, status: dict[str, object]) -> None:
        self._tell({"ready": status})
        os.close(self._pipe)
        self._pipe = -1

    def _tell(self, message: dict[str, object]) -> None:
        if self._pipe >= 0:
            os.write(self._pipe, json.dumps(message).encode() + b"\n")


class _Faults:
    """Decides for each request, by its number, what goes wrong with it."""

    def __init__(self, faults: tuple[Fault, ...], seed: int) -> None:
        self._faults = faults
        self._seed = seed
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def meet(self, what: str, *, writes: bool = False, slow_s: float = 0.03) -> Iterator[None]:
        number = next(self._numbers)
        rng = random.Random(f"{self._seed} {number}")
        met = {
            fault.kind
            for fault in self._faults
            if fault.first <= number < fault.last and rng.randrange(100) < fault.percent
        }
        if "slow" in met:
            time.sleep(rng.uniform(0, slow_s))
        for kind in met & {"refused", "dropped", "outage"}:
            raise StoreError(f"injected: {kind}: request {number}, {what}")
        yield
        if writes and "answer-lost" in met:
            raise StoreError(f"injected: the answer got lost: request {number}, {what}")


class FaultyStore(local.LocalStore):
    """A local store whose requests meet the faults that are planned for this process."""

    faults: _Faults

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        with self.faults.meet(f"put {key}", writes=True):
            super().put(key, body, size_bytes=size_bytes)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        with self.faults.meet(f"put_if_absent {key}", writes=True):
            return super().put_if_absent(key, body)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self.faults.meet(f"get {key}", slow_s=SLOW_READ_S):
            return super().get(key, offset=offset, length=length)

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self.faults.meet(f"stream {key}", slow_s=SLOW_READ_S):
            pass
        return super().stream(key, offset=offset, length=length)

    def stat(self, key: str) -> ObjectStat:
        with self.faults.meet(f"stat {key}"):
            return super().stat(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        with self.faults.meet(f"list {prefix}"):
            pass
        return super().list(prefix, start_after=start_after)

    def delete(self, key: str) -> None:
        with self.faults.meet(f"delete {key}", writes=True):
            super().delete(key)


def call_in_child(work: Callable[[], None], log: Path) -> int:
    """Fork a process that does ``work`` and ends; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _to_log(log)
            work()
            code = 0
        except BaseException:
            logging.getLogger("crash").exception("unexpected error")
        finally:
            os._exit(code)
    return pid
