"""Pages of how a memory came to be so: who saved what and when, versions of a file, differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from agentfuse.errors import NotFoundError
from agentfuse.gateway.agents import Agent
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.ui import files
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.remembered import Asked, Remembered, memory_page, snapshot_number
from agentfuse.snapshots.account import Committed, Damaged, Version, account, versions
from agentfuse.snapshots.changes import Change, Summary, changes, summarise
from agentfuse.snapshots.entries import Entry, printable
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.rebase import Listing, by_path
from agentfuse.snapshots.references import MEMORY
from agentfuse.sync.contents import read_content
from agentfuse.sync.textdiff import Line, hunks
from agentfuse.sync.textmerge import MAX_TEXT_BYTES, is_text

_PAGE = 25
_MAX_LINES = 3000
_MAX_VERSIONS = 50


class HistoryPages:
    """The routes."""

    def __init__(self, remembered: Remembered, executions: Executions) -> None:
        self._remembered = remembered
        self._executions = executions

    def add_to(self, routes: APIRouter) -> None:
        """Register the routes."""
        routes.get("/agents/{agent_id}/history")(self.history)
        routes.get("/agents/{agent_id}/versions")(self.versions)
        routes.get("/agents/{agent_id}/diff")(self.diff)

    async def history(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        by_run = query_of(request, "all") != "1"
        up_to = snapshot_number(query_of(request, "up_to")) or None

        def read() -> Sequence[Committed | Damaged]:
            history = self._remembered.history(asked.agent)
            pinned = set(Pins(self._remembered.store, asked.agent.id, MEMORY).numbers())
            return list(islice(account(history, pinned, by_run=by_run, up_to=up_to), _PAGE + 1))

        found = await self._remembered.read(read)
        return memory_page(
            "history.html",
            request,
            asked,
            steps=asked.steps,
            rows=found[:_PAGE],
            older=found[_PAGE] if len(found) > _PAGE else None,
            by_run=by_run,
            is_first=up_to is None,
            known=await self._known(request),
        )

    async def versions(self, request: Request) -> Response:
        """How one file came to be what it is."""
        asked = await self._remembered.asked(request)

        def read() -> Sequence[Version]:
            history = self._remembered.history(asked.agent)
            return list(islice(versions(history, asked.path), _MAX_VERSIONS))

        found = await self._remembered.read(read)
        steps = [*files.steps(asked.steps, asked.path, partial(asked.href, "")), Step("Versions")]
        values: dict[str, Any] = {
            "path": asked.path,
            "steps": steps,
            "versions": found,
            "known": await self._known(request),
        }
        return memory_page("versions.html", request, asked, **values)

    async def diff(self, request: Request) -> Response:
        """What is different between two snapshots, or two versions of one file."""
        asked = await self._remembered.asked(request)
        numbers = [snapshot_number(query_of(request, name)) for name in ("before", "after")]
        whole = asked.href("/diff", before=numbers[0], after=numbers[1])
        values: dict[str, Any] = {
            "before": numbers[0],
            "after": numbers[1],
            "whole": whole,
            "steps": [*asked.steps, Step("History", asked.href("/history")), Step("What changed", whole)],
        }
        if asked.path:
            return await self._file_diff(request, asked, numbers, values)

        def read() -> tuple[Sequence[Change], Summary]:
            one, other = (self._listing(asked.agent, number) for number in numbers)
            return list(changes(one, other)), summarise(one, other)

        values["changes"], values["summary"] = await self._remembered.read(read)
        return memory_page("diff.html", request, asked, done=query_of(request, "done") == "1", **values)

    async def _file_diff(
        self, request: Request, asked: Asked, numbers: Sequence[int], values: dict[str, Any]
    ) -> Response:
        def read() -> tuple[Entry | None, Entry | None, list[list[Line]] | str]:
            one, other = (self._listing(asked.agent, number).get(asked.path) for number in numbers)
            return one, other, self._text_diff(asked.agent, one, other)

        one, other, shown = await self._remembered.read(read)
        if one is None and other is None:
            raise NotFoundError(f"{printable(asked.path)!r} is in neither of these snapshots")
        values["steps"] = [*values["steps"], Step(asked.path)]
        values |= {"path": asked.path, "one": one, "other": other, "shown": shown}
        return memory_page("diff_file.html", request, asked, **values)

    async def _known(self, request: Request) -> set[str]:
        """The executions that have a page."""
        return {each.id for each in await self._executions.list(key_of(request).organization)}

    def _listing(self, agent: Agent, number: int) -> Listing:
        return by_path(self._remembered.snapshot(agent, number).entries) if number else {}

    def _text_diff(self, agent: Agent, before: Entry | None, after: Entry | None) -> list[list[Line]] | str:
        """Hunks, or why there are none."""
        both = [entry for entry in (before, after) if entry]
        if any(entry.type != "file" for entry in both):
            return "It is not a file in both snapshots."
        if any(entry.size > MAX_TEXT_BYTES for entry in both):
            return "The file is too large to be compared here."
        store = self._remembered.store
        one, other = (read_content(store, agent.id, each) if each else b"" for each in (before, after))
        if not (is_text(one) and is_text(other)):
            return "The file is no text. Both versions can be downloaded."
        if one == other:
            return "The text is the same in both."
        found: list[list[Line]] = []
        left = _MAX_LINES
        for hunk in hunks(one, other):
            found.append(hunk[:left])
            left -= len(hunk)
            if left <= 0:
                break
        return found
