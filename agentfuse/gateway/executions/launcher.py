"""The launchers of this host's executions: what a platform runs in a home, each under a supervisor.

The supervisor's directory tells everything (``supervisor``), so a gateway finds what another one has begun.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from agentfuse.admission import PLACES
from agentfuse.errors import EnvironmentProblem
from agentfuse.gateway.executions import supervisor
from agentfuse.gateway.executions.journal import Journal
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.starters import Starter
from agentfuse.home.tree import write_durably
from agentfuse.locks import is_held

_PLACE = re.compile("|".join(map(re.escape, PLACES)))
_LOG = logging.getLogger(__name__)

_POLL_S = 0.02
_LOOK_S = 0.5
_PAUSE_S = 5.0
_KILLS = 50
_LOG_BYTES = 4 * 1024 * 1024
_TOLD = ("PATH", "LANG", "LC_ALL", "TZ")
"""What a launcher gets of this process's environment; the rest may hold secrets."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a launcher ended: its exit code, negative for a signal, None when nobody can know."""

    code: int | None
    why: str = ""

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        if self.code is None:
            return f"nobody knows how the launcher ended{why}"
        if self.code < 0:
            return f"the launcher was ended by {signal.Signals(-self.code).name}{why}"
        return f"the launcher ended with exit code {self.code}{why}"


class Launchers:
    """Starts the configured command for executions; there is none to start if ``command`` is empty.

    ``grace_s``: how long it may take to end. ``lease``: the file of ``hosts.lease``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        journal: Journal,
        starter: Starter,
        lease: Path,
        grace_s: float,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._command = command
        self._journal = journal
        self._starter = starter
        self._lease = lease
        self._grace_s = grace_s
        self._limiter = limiter
        self._may_begin = trio.Event()
        self._may_begin.set()

    @property
    def is_configured(self) -> bool:
        """Whether executions that begin now get a launcher."""
        return bool(self._command)

    def has_begun(self, execution: str) -> bool:
        """Whether an execution has a launcher, or had one."""
        return (self._directory(execution) / "begun").exists()

    async def may_begin(self) -> None:
        """Wait until launchers may begin, see :meth:`fence`."""
        await self._may_begin.wait()

    async def start(self, record: Execution, home: Path) -> None:
        """Start it, unless it has been. Raises ``EnvironmentProblem``."""
        directory = self._directory(record.id)
        if self.has_begun(record.id):
            return
        await trio.to_thread.run_sync(self._prepare, record, home, directory, limiter=self._limiter)
        await self._starter.supervise(record.id, directory)
        if not self.has_begun(record.id):
            raise EnvironmentProblem("the supervisor of the launcher cannot be started")

    async def ended(self, execution: str) -> Exit:
        """Wait for the end of a launcher that has been started."""
        directory = self._directory(execution)
        while is_held(directory / "lock"):
            process = self._process(directory)
            if process is None:
                await trio.sleep(_POLL_S)
                continue
            try:
                if is_held(directory / "lock"):  # so it is the supervisor's, not one with its number
                    await trio.lowlevel.wait_readable(process)
            finally:
                os.close(process)
        try:
            return _EXIT.decode((directory / "exit").read_bytes())
        except FileNotFoundError:
            for _ in range(_KILLS):  # what is forked meanwhile, too
                inputs = directory / "inputs.json"
                if not await trio.to_thread.run_sync(_kill_left, inputs, limiter=self._limiter):
                    break
                await trio.sleep(_POLL_S)
            return Exit(None, "its supervisor was killed, or the host was restarted")
        except msgspec.MsgspecError as error:
            return Exit(None, f"what its supervisor wrote is damaged: {error}")

    async def stop(self, execution: str) -> None:
        """Have it end, by force after a while; returns when it has ended."""
        if self.has_begun(execution):
            self._signal(execution, signal.SIGTERM)
            await self.ended(execution)

    async def pause(self, execution: str, *, paused: bool) -> None:
        """Stop all its processes, or have them go on; what has ended stays as it is."""
        directory = self._directory(execution)
        mark = directory / "paused"
        if mark.exists() == paused or not is_held(directory / "lock"):
            return
        self._signal(execution, signal.SIGUSR1 if paused else signal.SIGUSR2)
        with trio.move_on_after(_PAUSE_S) as waiting:
            while mark.exists() != paused and is_held(directory / "lock"):  # noqa: ASYNC110
                await trio.sleep(_POLL_S)
        if waiting.cancelled_caught:
            _LOG.warning("execution %s: its launcher did not %s", execution, "stop" if paused else "go on")

    async def fence(self, executions: Sequence[str]) -> None:
        """Kill launchers; none begins until :meth:`unfence`."""
        if self._may_begin.is_set():
            self._may_begin = trio.Event()
        async with trio.open_nursery() as nursery:
            for execution in executions:
                if self.has_begun(execution):
                    nursery.start_soon(self._kill, execution)

    def unfence(self) -> None:
        """Launchers may begin again."""
        self._may_begin.set()

    async def _kill(self, execution: str) -> None:
        self._signal(execution, signal.SIGQUIT)
        await self.ended(execution)

    def _prepare(self, record: Execution, home: Path, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"cannot make {directory}: {error.strerror}") from error
        places = dict(zip(PLACES, (str(home), record.agent, record.id), strict=True))
        command = [_PLACE.sub(lambda found: places[found[0]], word) for word in self._command]
        inputs = directory / "inputs.json"
        environ = {name: os.environ[name] for name in _TOLD if name in os.environ} | {
            "HOME": str(home),
            "AGENTFUSE_HOME": str(home),
            "AGENTFUSE_AGENT": record.agent,
            "AGENTFUSE_EXECUTION": record.id,
            "AGENTFUSE_INPUTS": str(inputs),
        }
        launch: supervisor.Launch = {
            "command": command,
            "environ": environ,
            "cwd": str(home),
            "stdin": str(inputs),
            "log_bytes": _LOG_BYTES,
            "grace_s": self._grace_s,
            "lease": str(self._lease),
        }
        write_durably(inputs, json.dumps(record.inputs).encode() + b"\n")
        write_durably(directory / "launch.json", json.dumps(launch).encode())

    def _directory(self, execution: str) -> Path:
        return self._journal.directory(execution) / "launcher"

    def _signal(self, execution: str, number: signal.Signals) -> None:
        directory = self._directory(execution)
        process = self._process(directory)
        if process is None:
            return
        try:
            if is_held(directory / "lock"):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, number)
        finally:
            os.close(process)

    @staticmethod
    def _process(directory: Path) -> int | None:
        """A descriptor of what has the supervisor's number."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, ProcessLookupError):
            return os.pidfd_open(int(json.loads((directory / "begun").read_bytes())["pid"]))
        return None


def _kill_left(inputs: Path) -> int:
    """Kill what a launcher left when its supervisor was killed, as far as environments tell; how many."""
    ours = b"\0AGENTFUSE_INPUTS=" + os.fsencode(inputs) + b"\0"
    killed = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is none of ours
            process = os.pidfd_open(int(name))
            try:
                if ours in b"\0" + Path(f"/proc/{name}/environ").read_bytes():
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    killed += 1
            finally:
                os.close(process)
    return killed


# msgspec learns a type at its first use; two threads at once would crash the process.
_EXIT = msgspec.json.Decoder(Exit)
