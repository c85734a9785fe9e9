"""Pages of executions: which there are, how one stands, its files, what is sent to it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import trio
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from agentfuse.client import Event
from agentfuse.errors import AgentfuseError, NotFoundError, UsageError
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import TooLargeError, query_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.filetree import NewFile, Usage, clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.multipart import read_form
from agentfuse.gateway.spool import Spool
from agentfuse.gateway.ui import files
from agentfuse.gateway.ui.actions import ACTIONS, Action, address, is_active, is_possible
from agentfuse.gateway.ui.arrivals import ArrivalStream, Ticker, arrival
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.forms import number_of, whole
from agentfuse.gateway.ui.pages import BASE, HEADERS, fragment, page
from agentfuse.gateway.ui.sessions import may_change, may_run
from agentfuse.home.walk import join
from agentfuse.regions import LOOSE, Creator, Region

UPLOADS = "uploads"
"""The region that a person gives files into, unless another one is chosen."""

_PAGE = 25
_SHOWN_EVENTS = 50
_USAGE_S = 2.0
"""A page waits so long for what a home holds; then it is shown without."""

_ABOUT = {
    "shared": "the agent's memory",
    "workspace": "what the agent works on",
    "downloads": "what came from outside",
    "uploads": "what people gave it",
    "debug": "records of the platform",
    LOOSE: "loose files and settings",
}


class ExecutionPages:
    """The routes. ``regions`` are those of homes, ``host`` is this one's id, ``spool`` where uploads wait;
    ``closing`` is set when the gateway ends."""

    def __init__(
        self,
        executions: Executions,
        regions: Sequence[Region],
        *,
        host: str,
        spool: Path,
        limits: Limits,
        max_request_bytes: int,
        closing: trio.Event,
    ) -> None:
        self._executions = executions
        self._regions = {region.name: region for region in regions}
        self._host = host
        self._spool = spool
        self._limits = limits
        self._max_request_bytes = max_request_bytes
        self._ticker = Ticker(closing)

    def add_to(self, routes: APIRouter) -> None:
        """Register what is of no one execution."""
        routes.get("")(self.home)
        routes.get("/")(self.home)
        routes.get("/executions")(self.all)

    def add_to_owners(self, routes: APIRouter) -> None:
        """Register what only the host of an execution can answer."""
        one = "/executions/{execution_id}"
        routes.get(one)(self.one)
        routes.get(f"{one}/space")(self.space)
        routes.get(f"{one}/files")(self.files)
        routes.post(f"{one}/files")(self.upload)
        routes.get(f"{one}/content")(self.content)
        routes.get(f"{one}/arrivals")(self.arrivals)
        routes.get(f"{one}/{{action}}")(self.confirm)
        routes.post(f"{one}/{{action}}")(self.act)

    async def find(self, request: Request) -> Execution:
        """The execution that a request names, which :func:`_found` then tells. Raises ``NotFoundError``."""
        key, execution = key_of(request), request.path_params["execution_id"]
        request.state.execution = await self._executions.get(key.organization, execution)
        return _found(request)

    # -- all of them

    async def home(self, request: Request) -> Response:
        return RedirectResponse(f"{BASE}/executions", 303)

    async def all(self, request: Request) -> Response:
        key = key_of(request)
        status, agent = query_of(request, "status"), query_of(request, "agent").strip()
        found = [
            each
            for each in await self._executions.list(key.organization)
            if (not status or each.status.value == status) and (not agent or each.agent == agent)
        ]
        found.sort(key=lambda each: (-each.created_at, each.id))
        shown = files.paged(found, number_of(request, "page"), _PAGE)
        spaces: dict[str, Space | None] = {}
        async with trio.open_nursery() as nursery:
            for each in shown.rows:
                if is_active(each) and each.host == self._host:
                    nursery.start_soon(self._note_space, each, spaces)

        def href(to: int) -> str:
            query = {"status": status, "agent": agent, "page": to if to > 1 else ""}
            return f"{BASE}/executions?" + urlencode(
                {k: v for k, v in query.items() if v}, errors="surrogateescape"
            )

        return page(
            "executions.html",
            key=key,
            section="executions",
            shown=shown,
            spaces=spaces,
            is_active=is_active,
            statuses=list(Status),
            status=status,
            agent=agent,
            is_filtered=bool(status or agent),
            href=href,
        )

    async def _note_space(self, execution: Execution, spaces: dict[str, Space | None]) -> None:
        spaces[execution.id] = await self._space(execution)

    # -- one of them

    async def one(self, request: Request) -> Response:
        execution, key = _found(request), key_of(request)
        space, events = await self._space(execution), await self._events(execution)
        may_upload = self._may_upload(request, execution, UPLOADS)
        return page(
            "execution.html",
            key=key,
            section="executions",
            execution=execution,
            here=address(execution),
            steps=[Step("Executions", f"{BASE}/executions"), Step(execution.id[:8])],
            space=space,
            about=_ABOUT,
            actions=_possible(request, execution),
            arrivals=[arrival(execution, event) for event in events[: -_SHOWN_EVENTS - 1 : -1]],
            since=events[-1].seq if events else 0,
            is_live=not execution.status.is_terminal,
            details={
                name: json.dumps(value, indent=2, ensure_ascii=False)
                for name, value in (
                    ("Result", execution.result),
                    ("Inputs", execution.inputs),
                    ("Metadata", execution.metadata),
                    ("Options", execution.options),
                )
                if value
            },
            upload=address(execution, "/files", UPLOADS.encode()) if may_upload else "",
        )

    async def _events(self, execution: Execution) -> Sequence[Event]:
        if not execution.started_at:
            return []
        try:
            return await self._executions.events(execution)
        except AgentfuseError:  # its home is on its way to the store, or its daemon is restarted
            return []

    async def space(self, request: Request) -> Response:
        """What a running execution holds, for a list of several."""
        execution = _found(request)
        return HTMLResponse(fragment("minis.html", space=await self._space(execution)), headers=HEADERS)

    async def confirm(self, request: Request) -> Response:
        execution, action = _found(request), _action(request)
        return page(
            "confirm.html",
            key=key_of(request),
            section="executions",
            execution=execution,
            action=action,
            is_possible=is_possible(action, execution),
            here=address(execution),
            steps=[
                Step("Executions", f"{BASE}/executions"),
                Step(execution.id[:8], address(execution)),
                Step(action.label),
            ],
        )

    async def act(self, request: Request) -> Response:
        organization, execution = key_of(request).organization, request.path_params["execution_id"]
        action = _action(request)
        if not may_run(key_of(request)):
            raise DeniedError("This key may not pause or end executions: that needs one for asteroid.", 403)
        changed = await self._executions.set_status(
            organization, execution, action.status, reason="on the page"
        )
        return RedirectResponse(address(changed), 303)

    async def arrivals(self, request: Request) -> Response:
        """What happens in a home from now on; ends when it does."""
        execution, organization = _found(request), key_of(request).organization
        last = request.headers.get("last-event-id", "") or query_of(request, "since")

        async def state() -> dict[str, str] | None:
            now = await self._executions.get(organization, execution.id)
            if now.status.is_terminal or is_active(now) > is_active(execution):
                return None
            values = {"execution": now, "here": address(now)}
            actions = fragment("actions.html", actions=_possible(request, now), **values)
            parts = {"status": fragment("status.html", execution=now), "actions": actions}
            space = await self._space(now)
            if space is not None:
                parts["space"] = fragment("space.html", space=space, about=_ABOUT, **values)
            return parts

        def told(event: Event) -> tuple[str, str]:
            shown = arrival(execution, event)
            return fragment(
                "arrival.html", each=shown
            ), f"{shown.verb}: {event.region}/{ascii(event.path)[1:-1]}"

        follow = partial(self._executions.follow, execution)
        return ArrivalStream(self._ticker, follow, whole(last), state, told)

    # -- its files

    async def files(self, request: Request) -> Response:
        execution, (region, path) = _found(request), self._asked(request)
        tree = self._executions.tree(execution, region)
        node = await tree.stat(path) if path else None
        href = partial(address, execution, "/files")

        def below(inner: bytes) -> str:
            return href(_whole(region, inner))

        there = _whole(region, path)
        values: dict[str, Any] = {
            "execution": execution,
            "section": "executions",
            "key": key_of(request),
            "region": region,
            "path": path,
            "here": address(execution),
            "steps": files.steps(
                [
                    Step("Executions", f"{BASE}/executions"),
                    Step(execution.id[:8], address(execution)),
                    Step(region, below(b"")),
                ],
                path,
                below,
            ),
        }
        if node is None or node.is_dir:
            shown = files.listing(await tree.list(path), below, number_of(request, "page"))
            values["upload"] = href(there) if self._may_upload(request, execution, region) else ""
            return page("execution_files.html", shown=shown, there=href(there), **values)
        content = address(execution, "/content", there)
        preview = await files.preview(await tree.open(path), content) if node.type == "file" else None
        return page("execution_file.html", node=node, content=content, preview=preview, **values)

    async def content(self, request: Request) -> Response:
        execution, (region, path) = _found(request), self._asked(request)
        opened: files.Opened = partial(self._executions.tree(execution, region).open, path)
        return await files.send_content(request, opened, as_download=bool(query_of(request, "download")))

    async def upload(self, request: Request) -> Response:
        execution, (region, path) = _found(request), self._asked(request)
        if not self._may_upload(request, execution, region):
            raise UsageError(f"nothing can be added to {region} of this execution: it is {execution.status}")
        tree = self._executions.tree(execution, region)
        with Spool(self._spool) as spool:
            form = await read_form(
                request,
                spool,
                self._limits.spool,
                files="files",
                max_file_bytes=self._max_request_bytes,
                max_bytes=self._max_request_bytes,
            )
            given = [part for part in form.files if part.name or part.body.size]
            if not given:
                raise UsageError("no file was chosen")
            if any(part.is_too_large for part in given):
                raise TooLargeError(f"a file is larger than {self._max_request_bytes:,} bytes")
            if not all(part.name for part in given):
                raise UsageError("a file has no name")
            new = [NewFile(join(path, clean(part.name)), part.body) for part in given]
            await tree.put(new, creator=Creator.USER, on_collision="number")
        return RedirectResponse(address(execution, "/files", _whole(region, path)), 303)

    def _may_upload(self, request: Request, execution: Execution, region: str) -> bool:
        found = self._regions[region]
        return (
            may_change(key_of(request)) and is_active(execution) and not (found.root_only or found.is_loose)
        )

    def _asked(self, request: Request) -> tuple[str, bytes]:
        """The region and the path in it that a request is about."""
        region, _, path = clean(query_of(request, "path")).partition(b"/")
        name = os.fsdecode(region)
        if name not in self._regions:
            raise NotFoundError(f"a home has no region {name[:80]!a}")
        return name, path

    async def _space(self, execution: Execution) -> Space | None:
        """What its regions hold; None where that cannot be told now."""
        if not (is_active(execution) or execution.status.is_terminal):
            return None
        with trio.move_on_after(_USAGE_S):
            try:
                usage = await self._executions.usage(execution)
            except AgentfuseError:
                return None
            return Space([(name, usage[name]) for name in self._regions if name in usage])
        return None


@dataclass(frozen=True, slots=True)
class Space:
    """What regions hold, in the order of the configuration."""

    regions: list[tuple[str, Usage]]


def _found(request: Request) -> Execution:
    execution = request.state.execution
    assert isinstance(execution, Execution)
    return execution


def _possible(request: Request, execution: Execution) -> list[Action]:
    """What who is signed in may do to it now."""
    return [each for each in ACTIONS.values() if may_run(key_of(request)) and is_possible(each, execution)]


def _action(request: Request) -> Action:
    found = ACTIONS.get(request.path_params["action"])
    if found is None:
        raise NotFoundError("There is no such page.")
    return found


def _whole(region: str, path: bytes) -> bytes:
    """A path of a region as one of the home."""
    return join(os.fsencode(region), path) if path else os.fsencode(region)
