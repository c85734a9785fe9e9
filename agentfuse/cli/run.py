"""``agentfuse run``: a home for one command. Mount, run, flush, pass the exit code on.

Precedence of exit codes: the command's own, unless that is 0 and the flush failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import replace
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.confinement import leave_keyring
from agentfuse.cli.holders import holders_of
from agentfuse.cli.output import note, print_error, terminal_reporter
from agentfuse.cli.sandbox import AGENT, FORWARDED, Bwrap, Kind, bwrap, private_directory
from agentfuse.cli.serving import Request, start_background
from agentfuse.cli.umount import clean_up, end_mount, published
from agentfuse.config import Config
from agentfuse.control.mountinfo import mounts_at
from agentfuse.control.registry import Registry, open_registry
from agentfuse.errors import AgentfuseError, UnflushedError, UsageError
from agentfuse.progress import Reporter

_SI_KERNEL = 0x80
_MOST_ENDS, _WITHIN_S = 5, 60.0
"""A daemon that is killed is started again, but not when it is killed so often: it would be again."""
_AGAIN_S, _AGAIN_AT_MOST_S = 0.5, 10.0
"""So much later is a start that failed tried again, each time twice as late."""
_GRACE_S = 10.0
"""How long a daemon whose flush failed may take to end before we leave it alone."""
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command(
        context_settings={"allow_interspersed_args": False},  # the command's own options are its own
    )(run)


def run(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The command and its arguments.")],
    *,
    agent: options.Agent,
    execution: options.Execution = None,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
    owner: options.Owner = None,
    mount_option: options.MountOptions = None,
    xattrs: options.Xattrs = None,
    sandbox: Annotated[
        Kind | None,
        typer.Option("--sandbox", help="As uid 1000, without capabilities, with nothing else to write to."),
    ] = None,
    network: Annotated[bool, typer.Option("--network", help="The sandbox has the host's network.")] = False,
    show: Annotated[
        list[str] | None,
        typer.Option("--show", metavar="PATH", help="A path of the host to read in the sandbox; repeatable."),
    ] = None,
) -> None:
    """Run CMD in an agent's home, mounted for it alone.

    The home is flushed afterwards. CMD's working directory and HOME are the home; AGENTFUSE_HOME,
    AGENTFUSE_AGENT and AGENTFUSE_EXECUTION are set. Signals sent to this process reach CMD. Exits with
    CMD's own code; if that is 0 and the flush failed, with the flush's. What agentfuse itself says goes
    to stderr. Should the daemon be killed, the home is mounted again under CMD.

    In a sandbox CMD has namespaces of its own, the home at /home/agent, a clean environment, and of the
    host only /usr and what --show names, to read.
    """
    if sandbox is None and (network or show):
        raise UsageError("--network and --show are for a sandbox", hint="add --sandbox bwrap")
    settings = options.configure(
        config=config, store=store, state=state, owner=owner, mount_option=mount_option, xattrs=xattrs
    )
    registry = open_registry(os.environ)
    reporter = terminal_reporter(note)
    with contextlib.ExitStack() as places:
        box = None
        if sandbox is not None:
            settings = _owned(settings)
            box = places.enter_context(bwrap(registry, settings.owner, network=network, shown=show or []))
        mountpoint = box.mountpoint if box else places.enter_context(private_directory(registry))
        request = Request.of(mountpoint, agent, execution)
        daemon = _Daemon(settings, request, reporter)
        code = _run_command(command, daemon, box)
        try:
            _flush(registry, request, settings, reporter)
        except AgentfuseError as error:
            print_error(error)
            code = code or error.exit_code
        except KeyboardInterrupt:
            os.kill(daemon.pid, signal.SIGTERM)  # which ends a flush, keeping the home
            print_error(
                UnflushedError(
                    f"interrupted while flushing: execution {request.execution} is not in the store yet",
                    hint=f"it is safe on this host: the next mount of agent {agent} here finishes it",
                )
            )
            code = code or UnflushedError.exit_code
        registry.wait_until_released(request.mountpoint, timeout_s=_GRACE_S)
    raise typer.Exit(code)


def _owned(settings: Config) -> Config:
    """In a sandbox the agent is nobody's equal, so root's homes are not root's there."""
    return replace(settings, owner=AGENT) if settings.owner[0] == 0 else settings


class _Daemon:
    """The daemon of this run. One that is killed is replaced, at the same path: its command goes on."""

    def __init__(self, settings: Config, request: Request, reporter: Reporter) -> None:
        self.settings = settings
        self.request = request
        self._reporter = reporter
        self._ends: list[float] = []
        self._again_at: float | None = None
        self._delay_s = _AGAIN_S
        self.pid = self._start()

    @property
    def wait_s(self) -> float | None:
        """When to look after it, whatever happens; None: when a process has ended."""
        return None if self._again_at is None else max(0.0, self._again_at - time.monotonic())

    def look_after(self, box: Bwrap | None) -> bool:
        """If it was killed, mount the home again; False: it is killed too often for that.

        A start that fails, as without the store, is told and tried again.
        """
        if self._again_at is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return True
            if not pid or not os.WIFSIGNALED(status):
                return True
            note(f"agentfuse: the daemon was ended by {signal.Signals(os.WTERMSIG(status)).name}")
            self._ends.append(time.monotonic())
        elif self.wait_s:
            return True
        self._again_at = None
        if len([at for at in self._ends if time.monotonic() - at < _WITHIN_S]) >= _MOST_ENDS:
            print_error(
                AgentfuseError(
                    f"the daemon was ended {_MOST_ENDS} times in {_WITHIN_S:.0f} s; now the command is ended",
                    hint=f"see {self.settings.state}/homes/{self.request.execution}/daemon.log, and dmesg",
                )
            )
            return False
        try:
            self.pid = self._start()
        except AgentfuseError as error:
            print_error(error)
            if error.exit_code == AgentfuseError.exit_code:  # it said nothing itself
                self._ends.append(time.monotonic())
            self._again_at = time.monotonic() + self._delay_s
            self._delay_s = min(2 * self._delay_s, _AGAIN_AT_MOST_S)
            return True
        self._delay_s = _AGAIN_S
        note("agentfuse: the home is mounted again")
        if box is not None and not box.follows:
            note(
                "agentfuse: its sandbox does not see that, for the directory above is no shared mount: end "
                "the command and run it again (what it closed is kept)"
            )
        return True

    def _start(self) -> int:
        return start_background(self.settings, self.request, self._reporter, ends_with_us=True).pid


def _run_command(command: list[str], daemon: _Daemon, box: Bwrap | None) -> int:
    """The command's exit code as a shell has it."""
    settings, request = daemon.settings, daemon.request
    home = box.home if box else str(request.mountpoint)
    # A secret of the daemon's is not the command's.
    secrets = {hook.secret_env for hook in settings.webhooks}
    environment = {name: value for name, value in os.environ.items() if name not in secrets}
    environment = {
        **(box.environment(environment) if box else environment),
        "HOME": home,
        "PWD": home,
        "AGENTFUSE_HOME": home,
        "AGENTFUSE_AGENT": request.agent,
        "AGENTFUSE_EXECUTION": request.execution,
    }
    watched = {*FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if box:
            signal.pthread_sigmask(signal.SIG_BLOCK, box.held_back)
            leave_keyring()

    uid, gid = settings.owner if box and os.geteuid() == 0 else (None, None)
    try:
        process = subprocess.Popen(
            box.command(command) if box else command,
            cwd=os.sep if box else home,
            env=environment,
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
            pass_fds=[] if box is None or box.terminal_filter is None else [box.terminal_filter],
            preexec_fn=prepare,  # noqa: PLW1509 -- no threads here
        )
    except FileNotFoundError:
        note(f"agentfuse: {command[0]}: command not found")
        return _NOT_FOUND
    except OSError as error:
        note(f"agentfuse: {command[0]}: {error.strerror}")
        return _NOT_EXECUTABLE
    else:
        while process.poll() is None:
            wait_s = daemon.wait_s
            caught = signal.sigwaitinfo(watched) if wait_s is None else signal.sigtimedwait(watched, wait_s)
            if caught is None or caught.si_signo == signal.SIGCHLD:
                if not daemon.look_after(box):
                    _send(process, box, signal.SIGTERM)
            # What a terminal sends (Ctrl-C) has reached a command in our session already.
            elif caught.si_code != _SI_KERNEL or (box and box.has_own_session):
                _send(process, box, caught.si_signo)
        daemon.look_after(box)
        code = process.returncode
        return 128 - code if code < 0 else code
    finally:
        _discard_pending(watched)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(process: subprocess.Popen[bytes], box: Bwrap | None, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(box.process(process.pid) if box else process.pid, number)


def _discard_pending(watched: set[signal.Signals]) -> None:
    """Signals that came for a command that is gone must not interrupt its flush."""
    while signal.sigpending() & watched:
        signal.sigwait(watched)


def _flush(registry: Registry, request: Request, settings: Config, reporter: Reporter) -> None:
    entry = published(registry, request.mountpoint)
    if entry is None or not entry.alive:
        if mounts_at(request.mountpoint):
            clean_up(registry, request.mountpoint, entry, settings)
        raise UnflushedError(
            f"the mount of execution {request.execution} had ended before its command did",
            hint=f"see {settings.state}/homes/{request.execution}/daemon.log",
        )
    left = holders_of(request.mountpoint)
    if left:
        note(f"agentfuse: still in the home, which is taken from them: {', '.join(map(str, left))}")
    end_mount(registry, entry, lazy=bool(left), timeout_s=None, reporter=reporter)
