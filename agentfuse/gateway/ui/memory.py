"""Pages of agents, and of the files that an agent remembers or remembered."""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from agentfuse.errors import NotFoundError
from agentfuse.gateway.agents import Agent
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.gateway.ui import files
from agentfuse.gateway.ui.actions import address, is_active
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.forms import number_of
from agentfuse.gateway.ui.pages import BASE, page
from agentfuse.gateway.ui.remembered import Asked, Remembered, memory_page, snapshot_number
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import parent_of, printable
from agentfuse.snapshots.references import MEMORY, find

_AGENTS = 50


class MemoryPages:
    """The routes."""

    def __init__(self, remembered: Remembered, executions: Executions) -> None:
        self._remembered = remembered
        self._executions = executions

    def add_to(self, routes: APIRouter) -> None:
        """Register the routes."""
        routes.get("/agents")(self.all)
        routes.get("/agents/open")(self.open)
        routes.get("/agents/{agent_id}")(self.newest)
        routes.get("/agents/{agent_id}/snapshots/{number}")(self.snapshot)
        routes.get("/agents/{agent_id}/snapshots/{number}/content")(self.content)

    async def all(self, request: Request) -> Response:
        """The agents that have run, each with its newest execution."""
        key = key_of(request)
        newest: dict[str, Execution] = {}
        for each in await self._executions.list(key.organization):
            if each.agent not in newest or newest[each.agent].created_at < each.created_at:
                newest[each.agent] = each
        found = sorted(newest.values(), key=lambda each: (-each.created_at, each.id))
        shown = files.paged(found, number_of(request, "page"), _AGENTS)
        return page("agents.html", key=key, section="agents", shown=shown, here=f"{BASE}/agents")

    async def open(self, request: Request) -> Response:
        """The form that asks for an agent by its id."""
        agent = quote(os.fsencode(query_of(request, "agent").strip()), safe="")
        return RedirectResponse(f"{BASE}/agents/{agent}" if agent else f"{BASE}/agents", 303)

    async def newest(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        snapshot = await self._remembered.read(partial(self._newest, asked.agent))
        live = await self._live(request, asked.agent)
        if snapshot is None:
            return memory_page("memory_none.html", request, asked, steps=asked.steps, live=live)
        return await self._shown(request, asked, snapshot, is_newest=True, live=live)

    async def snapshot(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        return await self._shown(request, asked, await self._named(request, asked), is_newest=False)

    async def content(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        entry = find(await self._named(request, asked), asked.path)
        if entry.type != "file":
            raise NotFoundError(f"{printable(asked.path)!r} is no file")

        async def opened() -> StoredFile:
            return self._remembered.file(asked.agent, entry)

        return await files.send_content(request, opened, as_download=bool(query_of(request, "download")))

    async def _named(self, request: Request, asked: Asked) -> Snapshot:
        number = snapshot_number(request.path_params["number"])
        return await self._remembered.read(partial(self._remembered.snapshot, asked.agent, number))

    async def _shown(
        self, request: Request, asked: Asked, snapshot: Snapshot, *, is_newest: bool, live: str = ""
    ) -> Response:
        """A directory or a file of a snapshot."""
        entry = find(snapshot, asked.path)
        href = partial(asked.href, "" if is_newest else f"/snapshots/{snapshot.number}")
        steps = asked.steps if is_newest else [*asked.steps, Step(f"Snapshot {snapshot.number}", href())]
        values: dict[str, Any] = {
            "snapshot": snapshot,
            "is_newest": is_newest,
            "path": asked.path,
            "steps": files.steps(steps, asked.path, href),
            "live": live,
        }
        if entry.type == "dir":
            inside = [each for each in snapshot.entries if each.path and parent_of(each.path) == entry.path]
            targets = {each.path: each.target for each in inside if each.target}
            nodes = [self._remembered.file(asked.agent, each).node for each in inside]
            shown = files.listing(nodes, href, number_of(request, "page"), targets)
            return memory_page(
                "memory_files.html", request, asked, shown=shown, here=href(asked.path), **values
            )
        file = self._remembered.file(asked.agent, entry)
        content = asked.href(f"/snapshots/{snapshot.number}/content", asked.path)
        preview = await files.preview(file, content) if entry.type == "file" else None
        values |= {"node": file.node, "entry": entry, "content": content, "preview": preview}
        return memory_page("memory_file.html", request, asked, **values)

    async def _live(self, request: Request, agent: Agent) -> str:
        """Where the memory is in use: the address of its files in an execution that goes on."""
        for each in await self._executions.list(key_of(request).organization):
            if each.agent == agent.id and is_active(each):
                return address(each, "/files", MEMORY.encode())
        return ""

    def _newest(self, agent: Agent) -> Snapshot | None:
        history = self._remembered.history(agent)
        newest = history.newest()
        return history.read(newest) if newest else None
