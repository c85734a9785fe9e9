"""Starts the daemon of a mount: in this process, or in a child that reports when it is ready.

The daemon and what it needs are imported where it runs, so that a waiting parent stays small.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from agentfuse.cli.output import LogReporter, terminal_reporter
from agentfuse.config import Config, parse_agent_id, parse_execution_id
from agentfuse.control.mountinfo import mounts_at, resolve_mountpoint
from agentfuse.errors import AgentfuseError
from agentfuse.logs import Whose, is_journal, log_to_file, log_to_stream
from agentfuse.progress import Progress, Reporter
from agentfuse.supervision import SupervisedReporter, supervisor_of

OnReady = Callable[[dict[str, object]], None]

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Request:
    """Which home shall be mounted where; ids are valid and the mountpoint resolved."""

    mountpoint: Path
    agent: str
    execution: str
    ephemeral: bool
    retains: bool = False

    @classmethod
    def of(
        cls, mountpoint: str | Path, agent: str, execution: str | None, *, retains: bool = False
    ) -> Request:
        """Check what the command line says; an execution that nobody named gets a new id."""
        return cls(
            mountpoint=resolve_mountpoint(mountpoint),
            agent=parse_agent_id(agent),
            execution=parse_execution_id(execution) if execution is not None else str(uuid.uuid4()),
            ephemeral=execution is None,
            retains=retains,
        )

    @property
    def whose(self) -> Whose:
        """What each line of its log says of it."""
        return Whose(self.agent, self.execution, str(self.mountpoint))

    def __str__(self) -> str:
        return f"{self.mountpoint} (agent {self.agent}, execution {self.execution})"


@dataclass(frozen=True, slots=True)
class Started:
    """A daemon in the background that is ready. It is a child of this process."""

    pid: int
    status: dict[str, Any]


def serve_foreground(config: Config, request: Request) -> None:
    """Be the daemon until the mount ends; raises as ``daemon.serve`` does."""
    log_to_stream(sys.stderr, config.log_format, request.whose, os.environ)
    is_logged = config.log_format in {"journald", "json"} or is_journal(sys.stderr, os.environ)
    supervisor = supervisor_of(os.environ)
    reporter: Reporter = LogReporter() if is_logged else terminal_reporter()
    reporter = SupervisedReporter(reporter, supervisor)

    def on_ready(status: dict[str, object]) -> None:
        reporter.say(f"ready: {request}, pid {status['pid']}")
        reporter.say(f"end it with: agentfuse umount {request.mountpoint} (or Ctrl-C)")
        supervisor.ready(f"mounted at {request}")

    _serve(config, request, reporter, on_ready)
    reporter.say("everything is durable")


def start_background(
    config: Config, request: Request, reporter: Reporter, *, ends_with_us: bool = False
) -> Started:
    """Start the daemon in a session of its own and return when it is ready.

    ``reporter`` hears of the restore. ``ends_with_us``: should this process die, the daemon unmounts
    and flushes. Raises the daemon's own error when it does not become ready. Forks: call it before
    there are threads.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _background(config, request, reporter, writer, ends_with_us)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        try:
            answer = pipe.readline()
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            raise
    message = json.loads(answer) if answer.endswith(b"\n") else {}
    if "ready" in message:
        return Started(pid, message["ready"])
    _, code = os.waitpid(pid, 0)
    raise _failure(message, code)


def _failure(message: dict[str, Any], wait_status: int) -> AgentfuseError:
    if "error" not in message:
        code = os.waitstatus_to_exitcode(wait_status)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return AgentfuseError(f"the daemon {how} before it was ready", hint="run it without --background")
    error = AgentfuseError(message["error"]["message"], hint=message["error"]["hint"])
    error.exit_code = message["error"]["exit_code"]  # type: ignore[misc]
    return error


def _background(
    config: Config, request: Request, reporter: Reporter, pipe: int, ends_with_us: bool
) -> NoReturn:
    """The child's whole life. Never returns into the parent's code."""
    code = AgentfuseError.exit_code
    try:
        code = _Background(config, request, reporter, pipe).run(ends_with_us)
    except BaseException:  # noqa: BLE001 -- the outermost edge of this process
        traceback.print_exc()
    finally:
        logging.shutdown()
        os._exit(code)


class _Background:
    """The daemon in its child: tells the parent once how it started, then only its log."""

    def __init__(self, config: Config, request: Request, reporter: Reporter, pipe: int) -> None:
        self._config = config
        self._request = request
        self._reporter = reporter
        self._pipe: IO[bytes] | None = os.fdopen(pipe, "wb")

    def run(self, ends_with_us: bool) -> int:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who starts us may have blocked some for itself
        os.setsid()
        if ends_with_us:
            parent = os.getppid()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                return 0
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        log_to_stream(sys.stderr, self._config.log_format, self._request.whose, os.environ)
        try:
            _serve(self._config, self._request, self, self._ready)
        except AgentfuseError as error:
            return self._failed(error)
        except Exception as error:
            if self._pipe is None or os.environ.get("AGENTFUSE_DEBUG"):
                logging.getLogger(__name__).exception("unexpected error")
            return self._failed(
                AgentfuseError(
                    f"unexpected {type(error).__name__}: {error}",
                    hint="this is a mistake of agentfuse; AGENTFUSE_DEBUG=1 shows where",
                )
            )
        logging.getLogger("agentfuse").info("everything is durable")
        return 0

    def say(self, text: str) -> None:
        """To the parent's terminal until ready, to the log from then on."""
        self._reporter.say(text)

    def progress(self, moment: Progress) -> None:
        """As ``say``."""
        self._reporter.progress(moment)

    def _ready(self, status: dict[str, object]) -> None:
        log = self._config.state / "homes" / self._request.execution / "daemon.log"
        log_to_file(log, self._config.log_format, self._request.whose, os.environ)
        with open(log, "ab") as file:  # for what libfuse and a dying interpreter write
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self._reporter = LogReporter()
        self._reporter.say(f"ready: {self._request}, pid {os.getpid()}")
        self._tell({"ready": status})

    def _failed(self, error: AgentfuseError) -> int:
        if self._pipe:
            self._tell(
                {"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}}
            )
        else:
            logging.getLogger("agentfuse").error("%s", error)
        return error.exit_code

    def _tell(self, message: dict[str, object]) -> None:
        if self._pipe:
            try:
                self._pipe.write(json.dumps(message).encode() + b"\n")
                self._pipe.close()
            except BrokenPipeError:
                logging.getLogger(__name__).warning("whoever started this mount did not wait for it")
            self._pipe = None


def _serve(config: Config, request: Request, reporter: Reporter, on_ready: OnReady) -> None:
    from agentfuse import daemon  # noqa: PLC0415  only the process that mounts pays for it

    ready = False

    def note_ready(status: dict[str, object]) -> None:
        nonlocal ready
        ready = True
        on_ready(status)

    def hang_up(*_: object) -> None:
        # A terminal that closes ends its mount as SIGTERM does. Often it comes twice, or after a SIGTERM,
        # and a second SIGTERM would interrupt the flush: so not when the home is unmounted already.
        if not ready or mounts_at(request.mountpoint):
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGHUP, hang_up)
    faulthandler.register(signal.SIGUSR1)
    spec = daemon.MountSpec(
        request.mountpoint, request.agent, request.execution, request.ephemeral, request.retains
    )
    daemon.serve(config, spec, reporter, on_ready=note_ready)
