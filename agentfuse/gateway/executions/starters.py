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
from agentfuse.errors import EnvironmentProblem

_SAID_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which home is to be mounted where."""

    mountpoint: Path
    agent: str
    execution: str


class Starter(Protocol):
    """Starts daemons."""

    async def start(self, wanted: Wanted) -> None:
        """Mount a home; returns when it is usable. Raises ``EnvironmentProblem`` that says why it is not."""


class Child:
    """Starts daemons in sessions of their own. ``config_file``: where the configuration was read from."""

    def __init__(self, config: Config, config_file: Path | None, environ: Mapping[str, str]) -> None:
        self._options = ["--store", config.store, "--state", str(config.state), "--retain", "--background"]
        if config_file is not None:
            self._options += ["--config", str(config_file.absolute())]
        self._environ = {name: value for name, value in environ.items() if name != "AGENTFUSE_DEV_KEY"}

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
            raise EnvironmentProblem(f"the home cannot be mounted: {said or f'exit code {done.returncode}'}")
