"""Where requests come in from other hosts, and where they leave for them: two layers of the application.

:class:`Arrivals` is the outermost one, so that every answer to another host, an error too, bears its proof.
:class:`Departures` is within the edge, which renders what goes wrong, as for any request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentfuse.errors import AgentfuseError, UsageError
from agentfuse.gateway.auth import Authenticate
from agentfuse.gateway.edge import StatedError
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.forwarding import target_of
from agentfuse.gateway.hosts.headers import Header, check_framing, end_to_end, values, without_ours
from agentfuse.gateway.hosts.proof import REQUEST_HEADER, Proofs
from agentfuse.gateway.hosts.roster import Host

_NONCE = "agentfuse.forwarded"
_REFUSAL = "agentfuse.refusal"


class ElsewhereError(Exception):
    """The request is another host's. Raised before anything of its body was read."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.url)
        self.host = host


class Arrivals:
    """Checks what claims to come from another host, and drops what a client may not say."""

    def __init__(self, app: ASGIApp, proofs: Proofs | None) -> None:
        self._app = app
        self._proofs = proofs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inside: dict[str, Any] = {**scope, "headers": without_ours(scope["headers"])}
        try:
            check_framing(scope["headers"])
        except UsageError as error:
            inside[_REFUSAL] = error
            send = _adding(lambda _, __: (b"connection", b"close"), send)
        try:
            nonce = self._check(scope)
        except AgentfuseError as error:
            inside[_REFUSAL] = error
        else:
            if nonce is not None:
                inside[_NONCE] = nonce
                send = self._proving(nonce, send)
        await self._app(inside, receive, send)

    def _check(self, scope: Scope) -> str | None:
        claims = values(scope["headers"], REQUEST_HEADER)
        if not claims or self._proofs is None:
            return None
        headers = end_to_end(scope["headers"])
        return self._proofs.check_request(b",".join(claims), scope["method"], target_of(scope), headers)

    def _proving(self, nonce: str, send: Send) -> Send:
        assert self._proofs
        proofs = self._proofs

        def proof(status: int, headers: list[Header]) -> Header:
            headers = [(name, value.strip()) for name, value in end_to_end(headers)]
            return proofs.sign_answer(nonce, status, headers)

        return _adding(proof, send)


def _adding(header: Callable[[int, list[Header]], Header], send: Send) -> Send:
    """Sends answers with one header more."""

    async def adding_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            message = {**message, "headers": [*headers, header(message["status"], headers)]}
        await send(message)

    return adding_send


class Departures:
    """Forwards what is another host's."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _REFUSAL in scope:
            raise scope[_REFUSAL]
        try:
            await self._app(scope, receive, send)
        except ElsewhereError as elsewhere:
            await self._hosts.forward(scope, receive, send, elsewhere.host)


def at_owner(
    authenticate: Authenticate, hosts: Hosts, find: Callable[[Request], Awaitable[Execution | None]]
) -> Authenticate:
    """A dependency that authenticates, and sends the request to the host that has the execution ``find``
    finds.

    An execution that has ended is everybody's. Raises ``ElsewhereError``; ``StatedError`` 503 when the host
    is not there, or when another host sent the request here by mistake.
    """

    async def authenticate_at_owner(request: Request) -> None:
        await authenticate(request)
        execution = await find(request)
        if execution is None or execution.status.is_terminal or execution.host == hosts.id:
            return
        host = hosts.find(execution.host)
        if _NONCE in request.scope:
            raise StatedError("this execution is not on the host that was asked to have it; try again", 503)
        if host is None:
            raise StatedError("the host that has this execution is not there now; try again", 503)
        raise ElsewhereError(host)

    return authenticate_at_owner


def where_executed(hosts: Hosts, request: Request) -> None:
    """For requests that begin an execution: sends them to another host if none begin here.

    Raises ``ElsewhereError``, ``StatedError`` 503.
    """
    if hosts.executes:
        hosts.check_owning()
        return
    host = hosts.least_busy()
    if host is None or _NONCE in request.scope:
        raise StatedError("no host that begins executions is there now; try again", 503)
    raise ElsewhereError(host)
