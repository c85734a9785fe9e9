"""Runs the real command line for tests, and leaves no mount and no daemon behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mounts import base_directory, connections, detach, remove_base

from agentfuse.control.registry import Registry

DEADLINE_S = 60.0


class Host:
    """A host of its own: registry, state, store and mountpoints below one directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.home = base / "home"
        self.state = base / "state"
        self.store = base / "store"
        self.runtime = base / "run"
        self.home.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AGENTFUSE_")},
            "AGENTFUSE_RUNTIME_DIR": str(self.runtime),
            "AGENTFUSE_STATE": str(self.state),
            "AGENTFUSE_STORE": self.store.as_uri(),
            "AGENTFUSE_CONFIG": str(base / "config.toml"),
        }
        (base / "config.toml").write_text('flush_timeout = "0s"\n')
        self._started: list[subprocess.Popen[str]] = []

    @property
    def registry(self) -> Registry:
        return Registry(self.runtime)

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            [sys.executable, "-m", "agentfuse", *map(str, arguments)],
            env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False, **options,
        )  # fmt: skip

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start a verb that the end of the test ends, too."""
        process = subprocess.Popen(
            [sys.executable, "-m", "agentfuse", *map(str, arguments)],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, **options,
        )  # fmt: skip
        self._started.append(process)
        return process

    def start_on_terminal(self, terminal: int, *arguments: object) -> subprocess.Popen[str]:
        """Start a verb as a shell does: in the foreground of a terminal of its own. Closes ``terminal``."""
        command = [sys.executable, "-m", "agentfuse", *map(str, arguments)]
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            env=self.environment, stdin=terminal, stdout=terminal, stderr=terminal, text=True,
        )  # fmt: skip
        os.close(terminal)
        self._started.append(process)
        return process

    def mount(self, *arguments: object, agent: str = "a", execution: str = "e1") -> int:
        """Mount the home in the background; the daemon's pid."""
        options = ("--agent", agent, "--execution", execution, "--background", *arguments)
        done = self.run("mount", self.home, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.registry.find(self.home).record.pid

    def kill(self) -> None:
        """SIGKILL the daemon of the home; its mount stays behind, dead."""
        os.kill(self.registry.find(self.home).record.pid, signal.SIGKILL)
        assert self.registry.wait_until_released(self.home, timeout_s=DEADLINE_S)

    def log(self, execution: str = "e1") -> str:
        return (self.state / "homes" / execution / "daemon.log").read_text()

    def clear(self) -> None:
        """End whatever is left."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=DEADLINE_S)
            process.kill()
        left = self.registry.list() if self.runtime.is_dir() else []
        for entry in left:
            if entry.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(entry.record.pid, signal.SIGCONT)
                    os.kill(entry.record.pid, signal.SIGTERM)
            if not self.registry.wait_until_released(Path(entry.record.mountpoint), timeout_s=20):
                os.kill(entry.record.pid, signal.SIGKILL)
                self.registry.wait_until_released(Path(entry.record.mountpoint), timeout_s=20)
        for path in {self.home, *(Path(entry.record.mountpoint) for entry in left)}:
            if connections(path):
                detach(path)


@contextlib.contextmanager
def new_host() -> Iterator[Host]:
    base = base_directory()
    host = Host(base)
    try:
        yield host
    finally:
        host.clear()
        remove_base(base)
