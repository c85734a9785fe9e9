"""How the daemon of an execution is started, so that it outlives this gateway: as a child, or by systemd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from agentfuse.config import Config
from agentfuse.errors import BusyError, EnvironmentProblem
from agentfuse.gateway.executions.journal import Journal
from agentfuse.home.tree import write_durably

_SAID_BYTES = 2000
_OURS = ("AGENTFUSE_DEV_KEY", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
"""A key, and what systemd tells the gateway alone."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which home is to be mounted where."""

    mountpoint: Path
    agent: str
    execution: str


class Starter(Protocol):
    """Starts daemons."""

    async def start(self, wanted: Wanted) -> None:
        """Mount a home; returns when it is usable. Raises ``EnvironmentProblem`` that says why it is not, and
        ``BusyError`` when another process has the home now."""


class Child:
    """Starts daemons in sessions of their own. ``config_file``: where the configuration was read from."""

    def __init__(self, config: Config, config_file: Path | None, environ: Mapping[str, str]) -> None:
        self._options = ["--store", config.store, "--state", str(config.state), "--retain", "--background"]
        if config_file is not None:
            self._options += ["--config", str(config_file.absolute())]
        self._environ = {name: value for name, value in environ.items() if name not in _OURS}

    async def start(self, wanted: Wanted) -> None:
        whose = ["--agent", wanted.agent, "--execution", wanted.execution]
        done = await trio.run_process(
            [sys.executable, "-m", "agentfuse", "mount", str(wanted.mountpoint), *whose, *self._options],
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            start_new_session=True,
            env=self._environ,
            cwd=os.sep,
        )
        if done.returncode:
            said = done.stderr[-_SAID_BYTES:].decode(errors="replace").strip()
            kind = BusyError if done.returncode == BusyError.exit_code else EnvironmentProblem
            raise kind(f"the home cannot be mounted: {said or f'exit code {done.returncode}'}")


class Systemd:
    """Starts daemons as instances of a template unit, which are systemd's from then on.

    ``unit`` is its name, like ``agentfuse-execution@.service``; the instance is the execution's id. What the
    unit needs to know is in ``STATE/gateway/executions/<id>/mount.env``.
    """

    def __init__(self, config: Config, config_file: Path | None, unit: str, journal: Journal) -> None:
        self._config = config
        self._config_file = config_file
        self._unit = unit
        self._journal = journal

    async def start(self, wanted: Wanted) -> None:
        values = {
            "MOUNTPOINT": str(wanted.mountpoint),
            "AGENT": wanted.agent,
            "AGENTFUSE_STORE": self._config.store,
            "AGENTFUSE_STATE": str(self._config.state),
        }
        if self._config_file is not None:
            values["AGENTFUSE_CONFIG"] = str(self._config_file.absolute())
        lines = [f"{name}={_quoted(value)}\n" for name, value in values.items()]
        write_durably(self._journal.directory(wanted.execution) / "mount.env", "".join(lines).encode())
        unit = self._unit.replace("@", f"@{wanted.execution}")
        try:
            done = await trio.run_process(
                ["systemctl", "start", unit],
                stdin=subprocess.DEVNULL,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            raise EnvironmentProblem(f"systemctl cannot be run: {error.strerror}") from error
        if done.returncode:
            said = done.stderr[-_SAID_BYTES:].decode(errors="replace").strip()
            raise EnvironmentProblem(f"{unit} cannot be started: {said}", hint=f"journalctl -u {unit}")


def _quoted(value: str) -> str:
    """As systemd reads it in an EnvironmentFile."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
    return f'"{escaped}"'
