"""Starts an execution's daemon and launcher so that they outlive this gateway: as children, or by systemd."""

from __future__ import annotations

import contextlib
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
from agentfuse.gateway.executions import supervisor
from agentfuse.gateway.executions.journal import Journal
from agentfuse.home.tree import write_durably

LAUNCHER_UNIT = "agentfuse-launcher@.service"
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
    """Starts daemons, and the supervisors of launchers."""

    async def start(self, wanted: Wanted) -> None:
        """Mount a home; returns when it is usable. Raises ``EnvironmentProblem`` that says why it is not, and
        ``BusyError`` when another process has the home now."""

    async def settle(self, execution: str) -> None:
        """What was done for a daemon that has ended is undone, or about to be: wait for that."""

    async def supervise(self, execution: str, directory: Path) -> None:
        """Run ``supervisor`` with a launcher's directory; returns when it has begun, or failed."""


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

    async def settle(self, execution: str) -> None:
        """Nothing was."""

    async def supervise(self, execution: str, directory: Path) -> None:
        await trio.run_process(
            supervisor.command(directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


class Systemd:
    """Starts them as instances of template units, which are systemd's from then on.

    ``unit`` is the daemons', like ``agentfuse-execution@.service``; the instance is the execution's id. What
    units need to know is in ``mount.env`` and ``launcher.env`` of its directory in the journal, which they
    find at ``executions`` in the runtime directory, wherever the state is.
    """

    def __init__(
        self, config: Config, config_file: Path | None, unit: str, journal: Journal, runtime: Path
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._unit = unit
        self._journal = journal
        self._runtime = runtime
        link = runtime / "executions"
        try:
            if not link.is_symlink() or link.readlink() != journal.path:
                with contextlib.suppress(FileNotFoundError):
                    link.unlink()
                link.symlink_to(journal.path)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot link {link} to {journal.path}: {error.strerror}", hint=f"rm -r {link}"
            ) from error

    async def start(self, wanted: Wanted) -> None:
        values = {
            "MOUNTPOINT": str(wanted.mountpoint),
            "AGENT": wanted.agent,
            "AGENTFUSE_STORE": self._config.store,
            "AGENTFUSE_STATE": str(self._config.state),
            "AGENTFUSE_RUNTIME_DIR": str(self._runtime),
        }
        if self._config_file is not None:
            values["AGENTFUSE_CONFIG"] = str(self._config_file.absolute())
        self._tell(wanted.execution, "mount.env", values)
        await self._systemctl("start", self._unit, wanted.execution)

    async def settle(self, execution: str) -> None:
        await self._systemctl("stop", self._unit, execution)

    async def supervise(self, execution: str, directory: Path) -> None:
        python, *options, script, _ = supervisor.command(directory)
        values = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHON": python,
            "OPTIONS": " ".join(options),
            "SUPERVISOR": script,
            "DIRECTORY": str(directory),
        }
        self._tell(execution, "launcher.env", values)
        await self._systemctl("start", LAUNCHER_UNIT, execution)

    def _tell(self, execution: str, name: str, values: Mapping[str, str]) -> None:
        lines = [f"{name}={_quoted(value)}\n" for name, value in values.items()]
        write_durably(self._journal.directory(execution) / name, "".join(lines).encode())

    async def _systemctl(self, verb: str, template: str, execution: str) -> None:
        unit = template.replace("@", f"@{execution}")
        try:
            done = await trio.run_process(
                ["systemctl", "--no-ask-password", verb, unit],
                stdin=subprocess.DEVNULL,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            raise EnvironmentProblem(f"systemctl cannot be run: {error.strerror}") from error
        if done.returncode:
            said = done.stderr[-_SAID_BYTES:].decode(errors="replace").strip()
            what = "started" if verb == "start" else "stopped"
            raise EnvironmentProblem(f"{unit} cannot be {what}: {said}", hint=f"journalctl -u {unit}")


def _quoted(value: str) -> str:
    """As systemd reads it in an EnvironmentFile."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
    return f'"{escaped}"'
