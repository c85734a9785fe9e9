"""A client of one agent's files."""

from __future__ import annotations

import uuid
from typing import Any

import httpx


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

    def names(self, path: str = "", **query: Any) -> list[str]:
        """What a directory holds."""
        answer = self.ask("GET", f"directories/{path}", **query)
        assert answer.status_code == 200, answer.text
        return [entry["name"] for entry in answer.json()["entries"]]


def is_refused(answer: httpx.Response, status: int, code: str = "") -> bool:
    """An error in this API's words."""
    assert set(answer.json()) == {"error", "code"}, answer.text
    assert answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert not code or answer.json()["code"] == code
    return True
