"""The routes of the page, all below ``/ui``; see the modules of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from starlette.responses import RedirectResponse, Response

from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.crossing import at_owner
from agentfuse.gateway.ui.executions import ExecutionPages
from agentfuse.gateway.ui.forms import read_fields
from agentfuse.gateway.ui.pages import BASE, page
from agentfuse.gateway.ui.sessions import Sessions, own_pages_only


class Pages(Protocol):
    """Pages of one kind."""

    def add_to(self, routes: APIRouter) -> None:
        """Register their routes."""


def router(
    sessions: Sessions, memories: Sequence[Pages], executions: ExecutionPages, hosts: Hosts
) -> APIRouter:
    """All routes. What is of one execution is answered by the host that has it."""
    routes = APIRouter(include_in_schema=False)
    doors = _Doors(sessions)
    routes.get(f"{BASE}/sign-in")(doors.form)
    routes.post(f"{BASE}/sign-in")(doors.sign_in)
    routes.post(f"{BASE}/sign-out")(doors.sign_out)
    signed_in = APIRouter(prefix=BASE, dependencies=[Depends(sessions.require)])
    executions.add_to(signed_in)
    for pages in memories:
        pages.add_to(signed_in)
    routes.include_router(signed_in)
    owner = at_owner(sessions.require, hosts, executions.find)
    of_execution = APIRouter(prefix=BASE, dependencies=[Depends(owner)])
    executions.add_to_owners(of_execution)
    routes.include_router(of_execution)
    return routes


class _Doors:
    """Coming in and going out."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def form(self, request: Request) -> Response:
        target = _own(query_of(request, "next"))
        if self._sessions.find(request):
            return RedirectResponse(target, 303)
        return page("sign_in.html", key=None, next=target, problem="")

    async def sign_in(self, request: Request) -> Response:
        own_pages_only(request)
        fields = await read_fields(request)
        target = _own(fields.get("next", ""))
        response = RedirectResponse(target, 303)
        try:
            self._sessions.begin(request, response, fields.get("key", ""))
        except DeniedError as error:
            return page("sign_in.html", code=error.status, key=None, next=target, problem=error.message)
        return response

    async def sign_out(self, request: Request) -> Response:
        own_pages_only(request)
        response = RedirectResponse(f"{BASE}/sign-in", 303)
        self._sessions.end(request, response)
        return response


def _own(target: str) -> str:
    """Where to go on after signing in: a page of ours, or the first one."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return BASE
    is_own = target.isascii() and target.isprintable() and "\\" not in target
    is_own &= (
        not parts.scheme and not parts.netloc and (parts.path == BASE or parts.path.startswith(f"{BASE}/"))
    )
    return target if is_own and parts.path != f"{BASE}/sign-in" else BASE
