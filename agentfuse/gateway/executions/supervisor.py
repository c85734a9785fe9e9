"""Runs the launcher of one execution and outlives the gateway: a small process of the standard library alone.

    python -IS supervisor.py DIRECTORY

``DIRECTORY/launch.json`` says what to run. The supervisor holds ``lock``, writes ``begun`` (its pid) before
anything runs and ``exit`` when all is over, both durably: what has begun is never begun again, and a gateway
that was not there knows how it ended. Output goes to ``output.log``, the older half of it to
``output.log.1``.

SIGTERM ends the launcher: SIGTERM for all its processes, SIGKILL after the grace. SIGUSR1 stops all of them
and makes ``paused``, SIGUSR2 has them go on. At SIGQUIT, and when the time in the lease's file has come, all
are killed at once: another host may go on then.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from typing import TypedDict

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PIECE = 65536
_PIECES = 16
_LAST_PIECES = 1024  # more than a pipe holds
_AGAIN_S = 0.01
_STOP_S, _STOPS_S = 2.0, 0.001
_STILL = (b"T", b"t", b"D")
"""Stopped, or within the kernel, where it waits for a disk, or for its child of a vfork, and stops after."""
_NOT_STARTED = 127
_HEEDED = (signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_prctl = ctypes.CDLL(None).prctl


def command(directory: os.PathLike[str]) -> list[str]:
    """What runs a supervisor."""
    return [sys.executable, "-I", "-S", __file__, os.fspath(directory)]


def main(directory: str) -> None:
    """Run it in a process of its own; returns when that has begun, or another one had."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os.read(reader, 1)
        return
    os.setsid()
    os.chdir(directory)
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if os.path.exists("begun"):
        return
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _write("begun", {"pid": os.getpid()})
    os.close(writer)
    with open("launch.json", encoding="utf-8") as file:
        launch = json.load(file)
    _write("exit", Supervisor(launch).run())


class Launch(TypedDict):
    """What to run: ``stdin`` and ``lease`` are paths."""

    command: list[str]
    environ: dict[str, str]
    cwd: str
    stdin: str
    log_bytes: int
    grace_s: float
    lease: str


class Supervisor:
    """One launcher."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._kill_at = math.inf
        self._why = ""
        self._log = open("output.log", "ab", buffering=0)  # noqa: SIM115  # until the end of the process
        self._log_bytes = launch["log_bytes"]

    def run(self) -> dict[str, object]:
        """What is to be known of its end."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in _HEEDED:
            signal.signal(number, lambda *_: None)
        if self._lease() <= time.clock_gettime(time.CLOCK_BOOTTIME):
            return {"code": _NOT_STARTED, "why": "the host has lost its lease"}
        try:
            launcher = self._start()
        except OSError as error:
            return {"code": _NOT_STARTED, "why": f"it cannot be started: {error.strerror}"}
        assert launcher.stdout
        os.set_blocking(launcher.stdout.fileno(), False)
        waiting = select.poll()
        waiting.register(wake, select.POLLIN)
        waiting.register(launcher.stdout.fileno(), select.POLLIN)
        while launcher.poll() is None:
            due_s = min(self._kill_at, self._lease()) - time.clock_gettime(time.CLOCK_BOOTTIME)
            if due_s <= 0:
                self._end_at_once()
                due_s = 1.0  # what was forked meanwhile
            for fd, _ in waiting.poll(min(due_s, 3600.0) * 1000 + 1):
                if fd == wake:
                    self._heed(os.read(wake, 512))
                elif not self._take_output(fd, _PIECES):
                    waiting.unregister(fd)
            _reap(launcher.pid)
        while _signal_all(signal.SIGKILL):
            _reap(launcher.pid)
            time.sleep(_AGAIN_S)  # one that waits for a disk dies when it has waited
        self._take_output(launcher.stdout.fileno(), _LAST_PIECES)
        return {"code": launcher.returncode, "why": self._why}

    def _start(self) -> subprocess.Popen[bytes]:
        launch = self._launch
        with open(launch["stdin"], "rb") as stdin:
            return subprocess.Popen(
                launch["command"],
                env=launch["environ"],
                cwd=launch["cwd"],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  # one thread
            )

    def _heed(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers and self._kill_at == math.inf:
            self._why = "told to end"
            _signal_all(signal.SIGTERM)
            _signal_all(signal.SIGCONT)
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            self._kill_at = now + self._launch["grace_s"]
        if signal.SIGQUIT in numbers:
            self._end_at_once()
        if signal.SIGUSR1 in numbers:
            patience = time.monotonic() + _STOP_S
            _signal_all(signal.SIGSTOP)
            while _descendants(_STILL) and time.monotonic() < patience:  # those forked meanwhile, too
                time.sleep(_STOPS_S)
                _signal_all(signal.SIGSTOP)
            _write("paused", {})
        if signal.SIGUSR2 in numbers:
            _signal_all(signal.SIGCONT)
            with contextlib.suppress(FileNotFoundError):
                os.unlink("paused")

    def _lease(self) -> float:
        """When this host's lease ends, in seconds since the boot; never, where there is none."""
        try:
            with open(self._launch["lease"], encoding="ascii") as file:
                return float(file.read())
        except (OSError, ValueError):
            return math.inf

    def _end_at_once(self) -> None:
        self._why = self._why or "the host lost its lease"
        _signal_all(signal.SIGKILL)

    def _take_output(self, fd: int, pieces: int) -> bool:
        """Log what there is, so many pieces at most, for some write faster than it is read; False when there
        will be no more."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(pieces):
                piece = os.read(fd, _PIECE)
                if not piece:
                    return False
                with contextlib.suppress(OSError):  # a full disk does not end the launcher
                    self._log.write(piece)
                    if self._log.tell() > self._log_bytes // 2:
                        os.replace("output.log", "output.log.1")
                        self._log.close()
                        self._log = open("output.log", "ab", buffering=0)  # noqa: SIM115
        return True


def _signal_all(number: int) -> list[int]:
    """Signal everything that descends from this process; whom."""
    below = _descendants()
    for pid in below:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have become another user's
            os.kill(pid, number)
    return below


def _descendants(but: tuple[bytes, ...] = ()) -> list[int]:
    """Those that live, parents before children, without those in such a state."""
    children: dict[int, list[int]] = {}
    left_out: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(name))
                if state in but:
                    left_out.add(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return [pid for pid in found[1:] if pid not in left_out]


def _reap(launcher: int) -> None:
    """Bury what came to be our child, but the launcher, whose exit code is another's to take."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == launcher:
                return
            os.waitpid(ended.si_pid, 0)


def _write(name: str, content: dict[str, object]) -> None:
    temporary = f".{name}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, name)
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


if __name__ == "__main__":
    main(sys.argv[1])
