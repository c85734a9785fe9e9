"""Pages of agents and their memories: the files, their history, differences, and going back.

What a memory was is read from its snapshots. Going back is planned first, shown, and then done upon the
snapshot that the plan was made upon, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote

import trio
from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from agentfuse.errors import BusyError, NotFoundError, UsageError
from agentfuse.gateway.agents import Agent, Agents
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.filetree import clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.gateway.ui import files
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.forms import read_fields
from agentfuse.gateway.ui.pages import BASE, page
from agentfuse.gateway.ui.sessions import may_change
from agentfuse.gateway.ui.text import path_query
from agentfuse.objectstore.base import ObjectStore
from agentfuse.progress import Silent
from agentfuse.snapshots.account import account, versions
from agentfuse.snapshots.changes import changes, summarise
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.entries import Entry, parent_of, printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.rebase import by_path
from agentfuse.snapshots.references import MEMORY, find, read_snapshot
from agentfuse.sync.contents import read_content
from agentfuse.sync.rewrite import RewritePlan, Rewriter, RewriteReport
from agentfuse.sync.textdiff import Line, hunks
from agentfuse.sync.textmerge import MAX_TEXT_BYTES, is_text

_PAGE = 25
_MAX_DIFF_LINES = 3000
_MAX_VERSIONS = 50

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asks for."""

    agent: Agent
    path: bytes

    def href(self, what: str, path: bytes | None = None, **query: object) -> str:
        """An address below the agent's."""
        pairs = [f"{name}={quote(str(value), safe='')}" for name, value in query.items()]
        if path:
            pairs.append(f"path={path_query(path)}")
        return f"{BASE}/agents/{quote(self.agent.id, safe='')}{what}" + (
            "?" + "&".join(pairs) if pairs else ""
        )

    @property
    def steps(self) -> list[Step]:
        return [Step("Agents", f"{BASE}/agents"), Step(self.agent.id, self.href(""))]


class MemoryPages:
    """The routes."""

    def __init__(self, store: ObjectStore, agents: Agents, limits: Limits) -> None:
        self._store = store
        self._agents = agents
        self._limits = limits

    def add_to(self, routes: APIRouter) -> None:
        """Register the routes."""
        agent = "/agents/{agent_id}"
        routes.get("/agents")(self.all)
        routes.get("/agents/open")(self.open)
        routes.get(agent)(self.newest)
        routes.get(f"{agent}/history")(self.history)
        routes.get(f"{agent}/versions")(self.versions)
        routes.get(f"{agent}/diff")(self.diff)
        routes.get(f"{agent}/snapshots/{{number}}")(self.snapshot)
        routes.get(f"{agent}/snapshots/{{number}}/content")(self.content)
        routes.get(f"{agent}/restore")(self.plan_restore)
        routes.post(f"{agent}/restore")(self.restore)
        routes.get(f"{agent}/revert")(self.plan_revert)
        routes.post(f"{agent}/revert")(self.revert)

    # -- what there is

    async def all(self, request: Request) -> Response:
        key = key_of(request)
        found = await self._read(lambda: list(self._agents.all(key.organization)))
        found.sort(key=lambda agent: -agent.created_at)
        return page("agents.html", key=key, section="agents", agents=found)

    async def open(self, request: Request) -> Response:
        """The form that asks for an agent by its id."""
        agent = query_of(request, "agent").strip()
        return RedirectResponse(f"{BASE}/agents/{quote(agent, safe='')}" if agent else f"{BASE}/agents", 303)

    async def newest(self, request: Request) -> Response:
        asked = await self._asked(request)
        snapshot = await self._read(partial(self._newest, asked.agent))
        if snapshot is None:
            return page(
                "memory_none.html",
                key=key_of(request),
                section="agents",
                agent=asked.agent,
                steps=asked.steps,
            )
        return await self._shown(request, asked, snapshot, is_newest=True)

    async def snapshot(self, request: Request) -> Response:
        asked = await self._asked(request)
        snapshot = await self._read(partial(self._snapshot, asked.agent, _number(request)))
        return await self._shown(request, asked, snapshot, is_newest=False)

    async def content(self, request: Request) -> Response:
        asked = await self._asked(request)
        snapshot = await self._read(partial(self._snapshot, asked.agent, _number(request)))
        entry = find(snapshot, asked.path)
        if entry.type != "file":
            raise NotFoundError(f"{printable(asked.path)!r} is no file")

        async def opened() -> StoredFile:
            return self._opened(asked.agent, entry)

        return await files.send_content(request, opened, as_download=bool(query_of(request, "download")))

    async def _shown(
        self, request: Request, asked: _Asked, snapshot: Snapshot, *, is_newest: bool
    ) -> Response:
        """A directory or a file of a snapshot."""
        entry = find(snapshot, asked.path)
        place = "" if is_newest else f"/snapshots/{snapshot.number}"
        href = partial(asked.href, place)
        steps = asked.steps if is_newest else [*asked.steps, Step(f"Snapshot {snapshot.number}", href())]
        values: dict[str, Any] = {
            "key": key_of(request),
            "section": "agents",
            "agent": asked.agent,
            "snapshot": snapshot,
            "is_newest": is_newest,
            "path": asked.path,
            "asked": asked,
            "steps": files.steps(steps, asked.path, href),
            "may_change": may_change(key_of(request)),
        }
        if entry.type == "dir":
            inside = [each for each in snapshot.entries if each.path and parent_of(each.path) == entry.path]
            targets = {each.path: each.target for each in inside if each.target}
            nodes = [self._opened(asked.agent, each).node for each in inside]
            listing = files.listing(nodes, href, _whole(query_of(request, "page")), targets)
            return page("memory_files.html", listing=listing, href=href(asked.path), **values)
        content = asked.href(f"/snapshots/{snapshot.number}/content", asked.path)
        shown = None
        if entry.type == "file":
            shown = await files.preview(self._opened(asked.agent, entry), content)
        return page(
            "memory_file.html",
            node=self._opened(asked.agent, entry).node,
            entry=entry,
            content=content,
            shown=shown,
            **values,
        )

    # -- how it came to be so

    async def history(self, request: Request) -> Response:
        asked = await self._asked(request)
        by_run = query_of(request, "all") != "1"
        up_to = _whole(query_of(request, "up_to")) or None

        def read() -> list[object]:
            history = History(self._store, asked.agent.id, MEMORY)
            pinned = set(Pins(self._store, asked.agent.id, MEMORY).numbers())
            return list(islice(account(history, pinned, by_run=by_run, up_to=up_to), _PAGE + 1))

        found = await self._read(read)
        return page(
            "history.html",
            key=key_of(request),
            section="agents",
            agent=asked.agent,
            asked=asked,
            steps=asked.steps,
            rows=found[:_PAGE],
            older=found[_PAGE] if len(found) > _PAGE else None,
            by_run=by_run,
            is_first=up_to is None,
            may_change=may_change(key_of(request)),
        )

    async def versions(self, request: Request) -> Response:
        """How one file came to be what it is."""
        asked = await self._asked(request)

        def read() -> list[object]:
            return list(
                islice(versions(History(self._store, asked.agent.id, MEMORY), asked.path), _MAX_VERSIONS)
            )

        found = await self._read(read)
        return page(
            "versions.html",
            key=key_of(request),
            section="agents",
            agent=asked.agent,
            asked=asked,
            path=asked.path,
            steps=[*files.steps(asked.steps, asked.path, partial(asked.href, "")), Step("Versions")],
            versions=found,
        )

    async def diff(self, request: Request) -> Response:
        """What is different between two snapshots, or two versions of one file."""
        asked = await self._asked(request)
        before, after = (_whole(query_of(request, name)) for name in ("before", "after"))

        def read() -> tuple[dict[bytes, Entry], dict[bytes, Entry]]:
            one, other = (
                by_path(self._snapshot(asked.agent, number).entries) if number else {}
                for number in (before, after)
            )
            return one, other

        one, other = await self._read(read)
        whole = asked.href("/diff", before=before, after=after)
        values: dict[str, Any] = {
            "key": key_of(request),
            "section": "agents",
            "agent": asked.agent,
            "asked": asked,
            "before": before,
            "after": after,
            "steps": [*asked.steps, Step("History", asked.href("/history")), Step("What changed", whole)],
        }
        if not asked.path:
            found = list(changes(one, other))
            return page(
                "diff.html",
                changes=found,
                summary=summarise(one, other),
                whole=whole,
                done=query_of(request, "done") == "1",
                **values,
            )
        entries = one.get(asked.path), other.get(asked.path)
        if entries == (None, None):
            raise NotFoundError(f"{printable(asked.path)!r} is in neither of these snapshots")
        shown = await self._read(partial(self._text_diff, asked.agent, *entries))
        values["steps"] = [*values["steps"], Step(asked.path)]
        return page(
            "diff_file.html",
            path=asked.path,
            one=entries[0],
            other=entries[1],
            shown=shown,
            whole=whole,
            **values,
        )

    def _text_diff(self, agent: Agent, before: Entry | None, after: Entry | None) -> list[list[Line]] | str:
        """Hunks, or why there are none."""
        both = [entry for entry in (before, after) if entry]
        if any(entry.type != "file" for entry in both):
            return "It is not a file in both snapshots."
        if any(entry.size > MAX_TEXT_BYTES for entry in both):
            return "The file is too large to be compared here."
        one, other = (read_content(self._store, agent.id, each) if each else b"" for each in (before, after))
        if not (is_text(one) and is_text(other)):
            return "The file is no text. Both versions can be downloaded."
        if one == other:
            return "The text is the same in both."
        found: list[list[Line]] = []
        left = _MAX_DIFF_LINES
        for hunk in hunks(one, other):
            found.append(hunk[:left])
            left -= len(hunk)
            if left <= 0:
                break
        return found

    # -- going back

    async def plan_restore(self, request: Request) -> Response:
        asked, number = await self._asked(request), _whole(query_of(request, "number"))
        return await self._restore_page(request, asked, number)

    async def restore(self, request: Request) -> Response:
        asked, fields = await self._asked(request), await read_fields(request)
        number, upon = _whole(fields.get("number", "")), _whole(fields.get("upon", ""))
        try:
            report = await self._write(
                asked.agent, lambda rewriter: rewriter.restore(number, asked.path, upon=upon)
            )
        except BusyError:
            return await self._restore_page(request, asked, number, has_moved=True)
        return _done(asked, report)

    async def plan_revert(self, request: Request) -> Response:
        return await self._revert_page(request, await self._asked(request), query_of(request, "execution"))

    async def revert(self, request: Request) -> Response:
        asked, fields = await self._asked(request), await read_fields(request)
        execution, upon = fields.get("execution", ""), _whole(fields.get("upon", ""))
        try:
            report = await self._write(asked.agent, lambda rewriter: rewriter.revert(execution, upon=upon))
        except BusyError:
            return await self._revert_page(request, asked, execution, has_moved=True)
        return _done(asked, report)

    async def _restore_page(
        self, request: Request, asked: _Asked, number: int, *, has_moved: bool = False
    ) -> Response:
        plan = await self._write(asked.agent, lambda rewriter: rewriter.plan_restore(number, asked.path))
        what = {"number": number, "path": asked.path}
        return self._confirmation("restore.html", request, asked, plan, has_moved, **what)

    async def _revert_page(
        self, request: Request, asked: _Asked, execution: str, *, has_moved: bool = False
    ) -> Response:
        plan = await self._write(asked.agent, lambda rewriter: rewriter.plan_revert(execution))
        return self._confirmation("revert.html", request, asked, plan, has_moved, execution=execution)

    def _confirmation(
        self,
        template: str,
        request: Request,
        asked: _Asked,
        plan: RewritePlan,
        has_moved: bool,
        **values: object,
    ) -> Response:
        return page(
            template,
            code=409 if has_moved else 200,
            key=key_of(request),
            section="agents",
            agent=asked.agent,
            asked=asked,
            steps=[*asked.steps, Step("History", asked.href("/history")), Step("Go back")],
            plan=plan,
            has_moved=has_moved,
            may_change=may_change(key_of(request)),
            **values,
        )

    # -- in threads

    async def _read(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limits.reads)

    async def _write(self, agent: Agent, function: Callable[[Rewriter], T]) -> T:
        rewriter = Rewriter(self._store, agent.id, MEMORY, Silent())
        return await trio.to_thread.run_sync(function, rewriter, limiter=self._limits.commits)

    async def _asked(self, request: Request) -> _Asked:
        organization, agent = key_of(request).organization, request.path_params["agent_id"]
        found = await self._read(lambda: self._agents.find(organization, agent))
        return _Asked(found, clean(query_of(request, "path")))

    def _newest(self, agent: Agent) -> Snapshot | None:
        history = History(self._store, agent.id, MEMORY)
        newest = history.newest()
        return history.read(newest) if newest else None

    def _snapshot(self, agent: Agent, number: int) -> Snapshot:
        return read_snapshot(History(self._store, agent.id, MEMORY), agent.id, number)

    def _opened(self, agent: Agent, entry: Entry) -> StoredFile:
        return StoredFile(self._store, agent.id, entry, self._limits.downloads)


def _done(asked: _Asked, report: RewriteReport) -> Response:
    """On to the new snapshot: what it changed is there to be seen."""
    if report.number is None:
        return RedirectResponse(asked.href("/history"), 303)
    return RedirectResponse(asked.href("/diff", before=report.number - 1, after=report.number, done=1), 303)


def _number(request: Request) -> int:
    return _whole(request.path_params["number"])


def _whole(text: str) -> int:
    """A number of a snapshot; 0 where none is given."""
    if not text.isascii() or not (text or "0").isdecimal() or len(text) > 18:
        raise UsageError("snapshots have whole numbers")
    return int(text or 0)
