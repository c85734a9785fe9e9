"""Executions through a real gateway, by its public routes, and what stands behind them on this host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import mounts
from gateways import Gateway

from agentfuse.config import load_config
from agentfuse.control.registry import Registry
from agentfuse.errors import NotFoundError
from agentfuse.gateway.executions.starters import Child, Starter

_T = TypeVar("_T")
DEADLINE_S = 60.0
TERMINAL = ("completed", "cancelled", "failed")


class Host:
    """A base directory with the state of one host, and the gateways that serve it one after the other."""

    def __init__(self, base: Path, *, settings: str = "", gateway_settings: str = "", top: str = "") -> None:
        self.base = base
        self.store = base / "store"
        self.settings = settings
        self.gateway_settings = gateway_settings
        self.top = top
        self.gateway: Gateway
        self.client: httpx.Client

    def start(self, **environ: str) -> None:
        """Another gateway, which must become ready."""
        self.gateway = Gateway(
            self.base,
            self.store.as_uri(),
            settings=self.settings,
            gateway=self.gateway_settings,
            top=self.top,
            **environ,
        )
        assert self.gateway.url, (self.gateway.process.poll(), "".join(self.gateway.log))
        self.client = self.gateway.client()

    def kill(self) -> None:
        """SIGKILL the gateway."""
        self.gateway.process.kill()
        self.gateway.wait()

    # What clients do ----------------------------------------------------------------------------------

    def stage(self, *files: tuple[str, bytes]) -> list[dict[str, str]]:
        """Stage files; what an execute names them by."""
        answer = self.client.post("/agents/v2/temp-files", files=[("files", file) for file in files])
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tempFiles"])

    def try_to_execute(self, agent: str = "ada", **body: Any) -> httpx.Response:
        """Ask for an execution."""
        return self.client.post(f"/agents/v2/agents/{agent}/execute", json=body)

    def execute(self, agent: str = "ada", **body: Any) -> str:
        """Begin an execution; its id."""
        answer = self.try_to_execute(agent, **body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["executionId"])

    def run(self, agent: str = "ada", **body: Any) -> str:
        """Begin an execution; its id, once it runs."""
        execution = self.execute(agent, **body)
        self.until(execution, "running")
        return execution

    def get(self, execution: str) -> dict[str, Any]:
        """What the gateway says of it."""
        answer = self.client.get(f"/agents/v2/executions/{execution}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, execution: str, *statuses: str) -> dict[str, Any]:
        """Wait for a status."""

        def there() -> dict[str, Any] | None:
            item = self.get(execution)
            if item["status"] in TERMINAL:
                assert item["status"] in statuses, item
            return item if item["status"] in statuses else None

        return until(there)

    def ask(self, execution: str, status: str, **more: Any) -> httpx.Response:
        """Ask for another status."""
        return self.client.post(f"/agents/v2/executions/{execution}/status", json={"status": status, **more})

    def end(self, execution: str, status: str = "completed") -> dict[str, Any]:
        """Have it end, and wait until it has."""
        answer = self.ask(execution, status)
        assert answer.status_code == 200, answer.text
        return self.until(execution, status)

    def files(self, execution: str) -> dict[str, tuple[int, str]]:
        """Size and creator of every file, by path."""
        answer = self.client.get(f"/agents/v2/executions/{execution}/files")
        assert answer.status_code == 200, answer.text
        return {
            file["filePath"]: (file["fileSize"], file["createdBy"])
            for files in answer.json()["directories"].values()
            for file in files
        }

    # What stands behind -------------------------------------------------------------------------------

    def home(self, execution: str) -> Path:
        """Where it is mounted."""
        return self.base / "state-mounts" / execution

    def revisions(self, execution: str) -> list[dict[str, Any]]:
        """All revisions of the record."""
        found = sorted(self.store.glob(f"executions/*/{execution}/*.json"))
        return [json.loads(path.read_bytes())["execution"] for path in found]

    def daemon(self, execution: str) -> int | None:
        """The pid of the daemon that serves it now."""
        with contextlib.suppress(NotFoundError):
            return Registry(self.base / "run").find_live(self.home(execution)).record.pid
        return None

    def agentfuse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb on this host."""
        environ = {**os.environ, "AGENTFUSE_RUNTIME_DIR": str(self.base / "run")}
        return subprocess.run(
            [mounts.AGENTFUSE, *arguments],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def clean_up(self) -> None:
        """End everything that this host runs."""
        self.gateway.process.kill()
        self.gateway.process.wait(DEADLINE_S)
        while processes := self._processes():  # supervisors, and daemons although they are just starting
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for path in mounts.mountpoints_below(self.base):
            mounts.detach(path)

    def _processes(self) -> list[int]:
        """Those that run on this host's state and have nobody else to end them."""
        ours = os.fsencode(self.base / "state")
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if any(word.startswith(ours) for word in words) and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
        return found


@contextmanager
def host(base: Path, *, kill_at: str = "", **options: Any) -> Iterator[Host]:
    """A host with a gateway; ``kill_at``: where that first one is killed."""
    base.mkdir(exist_ok=True)
    base.chmod(0o755)
    found = Host(base, **options)
    found.start(**({"AGENTFUSE_KILL_AT": kill_at} if kill_at else {}))
    try:
        yield found
    finally:
        found.clean_up()


def child() -> Starter:
    """Starts as a gateway without systemd does."""
    return Child(load_config(None, environ={"HOME": "/"}, overrides={}), None, os.environ)


def until(there: Callable[[], _T | None]) -> _T:
    """What is there, once it is."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := there()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found
