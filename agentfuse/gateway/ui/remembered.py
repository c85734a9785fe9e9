"""What pages of an agent's memory have in common: whose it is, and reading it, in threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import trio
from fastapi import Request
from starlette.responses import Response

from agentfuse.errors import UsageError
from agentfuse.gateway.agents import Agent, Agents
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.filetree import clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.pages import BASE, page
from agentfuse.gateway.ui.sessions import may_change
from agentfuse.gateway.ui.text import path_query
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Silent
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.history import History
from agentfuse.snapshots.references import MEMORY, read_snapshot
from agentfuse.sync.rewrite import Rewriter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: an agent of who is signed in, and a path in its memory."""

    agent: Agent
    path: bytes

    def href(self, what: str, path: bytes | None = None, **query: object) -> str:
        """An address below the agent's."""
        pairs = [f"{name}={quote(str(value), safe='')}" for name, value in query.items()]
        if path:
            pairs.append(f"path={path_query(path)}")
        where = f"{BASE}/agents/{quote(self.agent.id, safe='')}{what}"
        return where + ("?" + "&".join(pairs) if pairs else "")

    @property
    def steps(self) -> list[Step]:
        """The way to the agent."""
        return [Step("Agents", f"{BASE}/agents"), Step(self.agent.id, self.href(""))]


class Remembered:
    """Memories as snapshots have them."""

    def __init__(self, store: ObjectStore, agents: Agents, limits: Limits) -> None:
        self.store = store
        self._agents = agents
        self._limits = limits

    async def asked(self, request: Request) -> Asked:
        """Raises ``NotFoundError`` for an agent that is not of who asks."""
        organization, agent = key_of(request).organization, request.path_params["agent_id"]
        found = await self.read(lambda: self._agents.find(organization, agent))
        return Asked(found, clean(query_of(request, "path")))

    async def read(self, function: Callable[[], T]) -> T:
        """What a function that reads returns."""
        return await trio.to_thread.run_sync(function, limiter=self._limits.reads)

    async def rewrite(self, agent: Agent, function: Callable[[Rewriter], T]) -> T:
        """What a function that goes back, or plans it, returns."""
        rewriter = Rewriter(self.store, agent.id, MEMORY, Silent())
        return await trio.to_thread.run_sync(function, rewriter, limiter=self._limits.commits)

    def history(self, agent: Agent) -> History:
        """Of a memory."""
        return History(self.store, agent.id, MEMORY)

    def snapshot(self, agent: Agent, number: int) -> Snapshot:
        """Raises ``NotFoundError``."""
        return read_snapshot(self.history(agent), agent.id, number)

    def file(self, agent: Agent, entry: Entry) -> StoredFile:
        """An entry of a snapshot."""
        return StoredFile(self.store, agent.id, entry, self._limits.downloads)


def memory_page(template: str, request: Request, asked: Asked, *, code: int = 200, **values: Any) -> Response:
    """A page about a memory."""
    key = key_of(request)
    return page(
        template,
        code=code,
        key=key,
        section="agents",
        agent=asked.agent,
        asked=asked,
        may_change=may_change(key),
        **values,
    )


def snapshot_number(text: str) -> int:
    """A number of a snapshot; 0 where none is given. Raises ``UsageError``."""
    if not text.isascii() or not (text or "0").isdecimal() or len(text) > 18:
        raise UsageError("snapshots have whole numbers")
    return int(text or 0)
