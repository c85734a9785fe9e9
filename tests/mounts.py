"""Real homes for tests: starts the real daemon, waits until it is ready, and always gets rid of it.

With AGENTFUSE_TEST_HOME=/some/directory the "home" is a plain directory there and nothing is mounted:
that is how the tests themselves are shown to be right (tests marked ``mount`` are left out then).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry
from agentfuse.mountpoint import reopen
from agentfuse.regions import DEFAULT_REGIONS

AGENTFUSE = str(Path(sys.executable).with_name("agentfuse"))
PLAIN = os.environ.get("AGENTFUSE_TEST_HOME")
REGIONS = tuple(region.name for region in DEFAULT_REGIONS if not region.is_loose)
READY_S = 30.0
ENDED_S = 60.0
AGENT_UID = 4242

_numbers = itertools.count()
_live: set[Home] = set()


def base_directory() -> Path:
    """A new directory that other users may pass through, as pytest's own tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="agentfuse-test-", dir=PLAIN))
    path.chmod(0o755)
    return path


class Home:
    """One agent's home on this host: its mountpoint, state, store, and the daemon that serves it now.

    ``regions`` maps a region's name to (bytes quota, files quota); ``top`` holds other lines of the
    configuration. ``prefix`` is a command that starts the daemon (setpriv, unshare).
    """

    def __init__(
        self,
        base: Path,
        *,
        agent: str = "tester",
        regions: Mapping[str, tuple[int, int]] | None = None,
        top: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.base = base
        self.agent = agent
        self.path = base / "home"
        self.state = base / "state"
        self.store = base / "store"
        self.store_url: str | None = None  # where it is not the directory
        self.runtime = base / "run"
        self.config = base / "config.toml"
        self.execution = f"run-{next(_numbers)}"
        self.prefix = prefix
        self.process: subprocess.Popen[bytes] | None = None
        self.output: list[str] = []
        self.tolerated: list[str] = []
        self._reader: threading.Thread | None = None
        tables = [f"[regions.{n}]\nbytes = {b}\nfiles = {f}" for n, (b, f) in (regions or {}).items()]
        patience = "" if "flush_timeout" in top else 'flush_timeout = "0s"\n'
        self.config.write_text("\n".join([patience + top, *tables, ""]))
        self.path.mkdir(exist_ok=True)

    # The daemon ------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every agentfuse command of this home."""
        return {**os.environ, "AGENTFUSE_RUNTIME_DIR": str(self.runtime), "NO_COLOR": "1"}

    def mount_command(self, *extra: str) -> list[str]:
        """The command that mounts this home."""
        return [
            *self.prefix, AGENTFUSE, "mount", str(self.path), "--agent", self.agent,
            "--execution", self.execution, "--store", self.store_url or self.store.as_uri(),
            "--state", str(self.state), "--config", str(self.config), *extra,
        ]  # fmt: skip

    def agentfuse(self, *arguments: str, timeout_s: float = ENDED_S) -> subprocess.CompletedProcess[str]:
        """Run another verb of agentfuse on this host and return what it said."""
        return subprocess.run(
            [*self.prefix, AGENTFUSE, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def start(
        self, execution: str | None = None, *, fresh: bool = False, flags: tuple[str, ...] = ()
    ) -> Home:
        """Mount and return when it is usable. ``fresh``: as a new execution of the same agent."""
        if fresh:
            execution = f"run-{next(_numbers)}"
        self.execution = execution or self.execution
        if PLAIN:
            for name in REGIONS:
                (self.path / name).mkdir(exist_ok=True)
            return self
        _live.add(self)
        self.output = []
        self.process = subprocess.Popen(
            self.mount_command(*flags), env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process, ready), daemon=True)
        self._reader.start()
        if not ready.wait(READY_S) or not self.is_mounted():
            said = "\n".join(self.output)
            self.discard()
            raise AssertionError(f"the mount did not become ready; the daemon said:\n{said}")
        return self

    def _read(self, process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.output.append(text)
            if re.search(r"\bready\b", text):
                ready.set()
        ready.set()

    def ended(self, timeout_s: float = ENDED_S) -> int:
        """Wait for the daemon's end and return its exit code."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        assert self._reader is not None
        self._reader.join(timeout_s)
        return code

    def umount(self) -> None:
        """End the mount as an operator does and see that everything is durable."""
        if PLAIN:
            return
        done = self.agentfuse("umount", str(self.path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.ended() == 0, self.output
        assert not self.is_mounted()

    def kill(self, *, leave_stale: bool = True) -> None:
        """SIGKILL the daemon; the stale mount stays unless told otherwise."""
        assert self.process is not None
        self.process.kill()
        self.ended()
        if not leave_stale:
            detach(self.path)

    def signal(self, number: signal.Signals) -> int:
        """Send the daemon a signal and return the exit code it ends with."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.ended()

    def discard(self) -> None:
        """Get rid of the daemon and the mount, whatever state they are in. Never blocks for long."""
        if PLAIN:
            return
        _live.discard(self)
        process = self.process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                abort_connections(self.path)
                process.kill()
                process.wait(15)
        detach(self.path)

    # Looking ---------------------------------------------------------------------------------------

    @property
    def tree(self) -> Path:
        """The backing tree of the home on the local disk."""
        return self.path if PLAIN else self.state / "homes" / self.execution / "tree"

    @property
    def pid(self) -> int:
        """The process id of the daemon itself (not of a prefix that started it)."""
        return int(self.status()["pid"])

    def is_mounted(self) -> bool:
        """Whether something is mounted at the mountpoint, by mountinfo (never asks the mount)."""
        return bool(PLAIN) or bool(connections(self.path))

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        entry = Registry(self.runtime).find(self.path)
        return ControlClient(entry.socket).status()

    def settled(self) -> dict[str, Any]:
        """The status once the daemon has seen every close of this process: nobody waits for RELEASE."""
        deadline = time.monotonic() + READY_S
        while (status := self.status())["fuse"]["handles_open"] > self._open_here():
            assert time.monotonic() < deadline, f"handles are left open: {status['fuse']}"
        return status

    def _open_here(self) -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                is_ours = target.startswith(f"{self.path}/")
                count += is_ours and not stat.S_ISDIR(os.fstat(int(name)).st_mode)
        return count

    def usage(self, region: str) -> tuple[int, int]:
        """(bytes, files) that the daemon has charged to a region."""
        account = self.settled()["regions"][region]
        return account["bytes_used"], account["files_used"]

    def requests(self) -> dict[str, int]:
        """How many requests of each operation the daemon has answered so far."""
        return dict(self.status()["fuse"]["requests"])

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Fills the yielded dictionary with the requests made inside of the block."""
        counted: dict[str, int] = {}
        before = self.requests()
        yield counted
        after = self.requests()
        counted.update({name: n - before[name] for name, n in after.items() if n != before[name]})

    def log(self) -> str:
        """The daemon's log of this execution."""
        try:
            return (self.state / "homes" / self.execution / "daemon.log").read_text(errors="replace")
        except OSError:
            return ""

    def complaints(self) -> list[str]:
        """Lines of the log and the output that no healthy daemon writes, but for the tolerated ones."""
        lines = [*self.log().splitlines(), *self.output]
        bad = [line for line in lines if re.search(r"\bERROR\b|\bCRITICAL\b|Traceback", line)]
        return [line for line in bad if not any(re.search(t, line) for t in self.tolerated)]

    def rss_bytes(self) -> int:
        """Resident memory of the daemon."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the daemon has no VmRSS")


def _mounts() -> list[tuple[str, str, str]]:
    """(mountpoint, device minor, filesystem type) of every mount of this process's namespace."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        fields = left.split()
        where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        found.append((where, fields[2].partition(":")[2], right.split()[0]))
    return found


def mountpoints_below(path: Path) -> list[Path]:
    """Where something is mounted below a directory."""
    return [Path(where) for where, _, _ in _mounts() if where.startswith(f"{path}/")]


def connections(path: Path) -> list[str]:
    """The FUSE connection numbers mounted at a path, the topmost last."""
    return [minor for where, minor, kind in _mounts() if where == str(path) and kind.startswith("fuse")]


def eventually(what: Callable[[], object], timeout_s: float = ENDED_S) -> None:
    """Return when something is true that tells nobody of itself."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def wait_for_mount_change(until: Any, timeout_s: float = READY_S) -> None:
    """Return when ``until()`` is true, asked again whenever the mount table changes."""
    poller = select.poll()
    with open("/proc/self/mountinfo", "rb") as table:
        poller.register(table, select.POLLERR | select.POLLPRI)
        while not until():
            assert poller.poll(timeout_s * 1000), "the mount table did not change in time"


def detach(path: Path) -> None:
    """Take every mount off a path, lazily, for mounts stack; the directory may be removed then."""
    while connections(path):
        command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*command, str(path)], check=True, timeout=30)
    reopen(path)


def abort_connections(path: Path) -> None:
    """Make every request that hangs in a mount at this path fail now. Needs root."""
    if os.geteuid() != 0 or not connections(path):
        return
    control = Path(tempfile.mkdtemp(prefix="agentfuse-fusectl-"))
    subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=True)
    try:
        for minor in connections(path):
            with contextlib.suppress(OSError):
                (control / minor / "abort").write_text("1")
    finally:
        subprocess.run(["umount", "-l", str(control)], check=True)
        control.rmdir()


def abort_everything() -> None:
    """Abort the mounts of every live home of this test process."""
    for home in list(_live):
        abort_connections(home.path)


def remove_base(path: Path) -> None:
    """Remove a base directory; refuses to walk into anything still mounted."""
    assert not mountpoints_below(path), f"still mounted below {path}"
    subprocess.run(["chattr", "-R", "-i", str(path)], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(path)
