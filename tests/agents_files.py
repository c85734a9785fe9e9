"""A client of one agent's files."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import mounts
from gateways import DEADLINE_S, Gateway


class Agent:
    """An agent, by a client's eyes; ``base`` is where its files are."""

    def __init__(self, client: httpx.Client, agent: str = "") -> None:
        self.client = client
        self.id = agent or f"agent-{uuid.uuid4()}"
        self.base = f"/v1/agent/{self.id}/filesystem"

    def ask(self, method: str, where: str, body: Any = None, **query: Any) -> httpx.Response:
        """Any request; ``where`` is behind the base, escaped as it is to be sent."""
        return self.client.request(method, f"{self.base}/{where}", json=body, params=query or None)

    def create(self, path: str, content: str = "", **fields: Any) -> httpx.Response:
        """Create a file."""
        return self.ask("POST", f"files/{path}", {"content": content} | fields)

    def read(self, path: str, **query: Any) -> httpx.Response:
        """Read a file."""
        return self.ask("GET", f"files/{path}", **query)

    def patch(self, path: str, operation: str, content: str, **fields: Any) -> httpx.Response:
        """Patch a file."""
        return self.ask("PATCH", f"files/{path}", {"operation": operation, "content": content} | fields)

    def content(self, path: str) -> str:
        """What a text file holds."""
        answer = self.read(path)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["content"])

    def empty(self, directory: str) -> None:
        """Remove what a directory holds."""
        for entry in self.ask("GET", f"directories/{directory}", includeHidden="true").json()["entries"]:
            kind = "directories" if entry["type"] == "directory" else "files"
            path = quote(os.fsencode(entry["name"]), safe="")
            answer = self.ask("DELETE", f"{kind}/{directory}/{path}?recursive=true")
            assert answer.status_code == 200, answer.text

    def names(self, path: str = "", **query: Any) -> list[str]:
        """What a directory holds."""
        answer = self.ask("GET", f"directories/{path}", **query)
        assert answer.status_code == 200, answer.text
        return [entry["name"] for entry in answer.json()["entries"]]


@dataclass(frozen=True)
class Home:
    """A live home of an agent: where it is mounted, and its execution."""

    agent: Agent
    path: Path
    execution: str

    def end(self) -> None:
        """Have the execution end, and wait until everything is in the store."""
        answer = self.agent.client.post(
            f"/agents/v2/executions/{self.execution}/status", json={"status": "cancelled"}
        )
        assert answer.status_code in (200, 409), answer.text
        self.wait_for("cancelled")

    def wait_for(self, status: str) -> None:
        """Until it has a status."""
        until = time.monotonic() + DEADLINE_S
        while True:
            item = self.agent.client.get(f"/agents/v2/executions/{self.execution}").json()
            if item["status"] == status:
                return
            assert time.monotonic() < until, item
            time.sleep(0.05)


@contextmanager
def executing(gateway: Gateway, agent: Agent) -> Iterator[Home]:
    """An execution of an agent that runs, and has ended at the end."""
    base = gateway.state.parent
    base.chmod(0o755)
    answer = agent.client.post(f"/agents/v2/agents/{agent.id}/execute", json={})
    assert answer.status_code == 202, answer.text
    execution = answer.json()["executionId"]
    home = Home(agent, base / "state-mounts" / execution, execution)
    try:
        home.wait_for("running")
        yield home
        home.end()
    finally:
        for path in mounts.mountpoints_below(base):
            if path.name == execution:
                mounts.detach(path)


def is_refused(answer: httpx.Response, status: int, code: str = "") -> bool:
    """An error in this API's words."""
    assert set(answer.json()) == {"error", "code"}, answer.text
    assert answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert not code or answer.json()["code"] == code
    return True
