"""The edge of the gateway: where errors become answers, once, in the words of the API that was asked.

Each family of APIs has its own body for errors. What is not ours to foresee is logged with its traceback and
answered 500; whoever is below raises, and logs nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentfuse.control.registry import NoDaemonError
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    EnvironmentProblem,
    ExistsError,
    NotFoundError,
    QuotaExceededError,
    StoreError,
    UsageError,
)
from agentfuse.gateway.bodies import JsonAnswer
from agentfuse.gateway.metrics import Metrics
from agentfuse.gateway.ui.pages import problem_page

_LOG = logging.getLogger(__name__)

_DRAIN_BYTES = 256 * 1024 * 1024
_DRAIN_S = 5.0
_MAX_HEAD_BYTES = 16 * 1024
_MAX_REQUESTS = 512
_MAX_LINGERING = 128

_SHINZO_CODES = {
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    409: "CONFLICT",
}


class DeniedError(UsageError):
    """Who asks is not known, 401, or may not do this, 403."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StatedError(AgentfuseError):
    """An answer whose status the API's contract states, whatever the error is elsewhere."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Problem:
    """An error on its way out."""

    status: int
    message: str
    kind: type[Exception]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of APIs: the paths that are its own, and how it says that something went wrong."""

    name: str
    paths: re.Pattern[str]
    render: Callable[[Problem], Response]


def _asteroid(problem: Problem) -> Response:
    return JsonAnswer({"code": problem.status, "message": problem.message}, problem.status)


_STAGING_TEXTS = {
    400: "Invalid file upload request.",
    403: "User is not a member of the organization.",
    500: "Internal server error.",
}


def _staging(problem: Problem) -> Response:
    if problem.status == 401:
        return _asteroid(problem)
    return PlainTextResponse(_STAGING_TEXTS.get(problem.status, problem.message), problem.status)


def _files(problem: Problem) -> Response:
    return _asteroid(problem) if problem.status == 401 else _text(problem)


def _text(problem: Problem) -> Response:
    return PlainTextResponse(problem.message, problem.status)


def _tenant_files(problem: Problem) -> Response:
    return JsonAnswer({"error": problem.message}, problem.status)


def _shinzo(problem: Problem) -> Response:
    kinds = {QuotaExceededError: "QUOTA_EXCEEDED", ExistsError: "ALREADY_EXISTS", BusyError: "CONFLICT"}
    kinds |= {NotFoundError: "NOT_FOUND", StoreError: "STORE_UNAVAILABLE"}
    code = next((code for kind, code in kinds.items() if issubclass(problem.kind, kind)), "")
    code = code or _SHINZO_CODES.get(problem.status, "INTERNAL" if problem.status >= 500 else "BAD_REQUEST")
    return JsonAnswer({"error": problem.message, "code": code}, problem.status)


def _page(problem: Problem) -> Response:
    return problem_page(problem.status, problem.message)


FAMILIES = (
    Family("page", re.compile(r"/ui(/.*)?", re.S), _page),
    Family("staging", re.compile(r"/agents/v2/temp-files(/.*)?", re.S), _staging),
    Family("asteroid", re.compile(r"/agents/v2/executions/[^/]*/[a-z]*-?files(/.*)?", re.S), _files),
    Family("asteroid", re.compile(r"/agents/v2/agents/[^/]*/shared-files(/.*)?", re.S), _files),
    Family("asteroid", re.compile(r"/(agents|users)/v2(/.*)?", re.S), _asteroid),
    Family("tenant-files", re.compile(r"/api/v1/files(/.*)?", re.S), _tenant_files),
    Family("shinzo", re.compile(r"/v1/agent(/.*)?", re.S), _shinzo),
    Family("links", re.compile(r"/blobs/.*", re.S), _text),
)
_OTHERS = Family("other", re.compile(r".*", re.S), _text)


def family_of(path: str) -> Family:
    """Whose path it is."""
    return next((each for each in FAMILIES if each.paths.fullmatch(path)), _OTHERS)


class Edge:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._requests = 0
        self._lingers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope.get("http_version") not in ("1.0", "1.1"):
            # The server would go over to HTTP/2 for who asks, past what a proxy in front has let through.
            too_new = Problem(505, "speak HTTP/1.1", UsageError)
            await self._answer(scope, receive, _finishing(receive, send), too_new)
            return
        if _head_bytes(scope) > _MAX_HEAD_BYTES:
            too_long = Problem(431, "the path, the query or the headers are too long", UsageError)
            await self._answer(scope, receive, _finishing(receive, send), too_long)
            return
        if self._requests >= _MAX_REQUESTS:
            busy = Problem(503, "the gateway has too many requests at a time", BusyError)
            await self._answer(scope, receive, _finishing(receive, send), busy)
            return
        self._requests += 1
        self._metrics.begun()
        began, status = trio.current_time(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            try:
                await send(message)
            except (trio.BusyResourceError, trio.ClosedResourceError):
                # The server is hanging up on a client that sent what is no request after this one.
                raise ClientDisconnect from None

        try:
            await self._serve(scope, receive, noting_send)
        except ClientDisconnect:
            pass
        finally:
            self._requests -= 1
            self._metrics.ended(family_of(scope["path"]).name, status, trio.current_time() - began)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _finishing(receive, send)
        has_begun = has_read_all = False

        async def noting_receive() -> Message:
            nonlocal has_read_all
            message = await receive()
            has_read_all = not message.get("more_body", False)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  # the outermost edge
            problem = problem_of(error)
            if problem is None:
                _LOG.exception("%s %s: unexpected error", scope["method"], scope["path"])
                problem = Problem(500, "Internal server error.", type(error))
            if has_begun:
                # All that is left is to end without the rest, which cuts the connection: nobody takes it
                # for whole.
                _LOG.warning("%s %s: cut off: %s", scope["method"], scope["path"], problem.message)
                return
            await self._answer(
                scope, receive, send if has_read_all else self._lingering(receive, send), problem
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        response = family_of(scope["path"]).render(problem)
        if problem.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        elif problem.status == 503:
            response.headers["Retry-After"] = "1"
        await response(scope, receive, send)

    def _lingering(self, receive: Receive, send: Send) -> Send:
        """Sends an answer to who may still be sending his body, and ends it when that was taken, within
        reason: closed at once, the connection would be reset, and most clients would not see the answer.
        Those who have no key must not fill the gateway by that, so few linger at a time."""

        async def lingering_send(message: Message) -> None:
            if _is_last(message) and self._lingers < _MAX_LINGERING:
                await send({**message, "more_body": True})
                self._lingers += 1
                try:
                    await _drain(receive)
                finally:
                    self._lingers -= 1
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        return lingering_send


def problem_of(error: Exception) -> Problem | None:
    """What to say of an error; None if it is not one that we know."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, DeniedError | StatedError):
        return Problem(error.status, error.message, type(error))
    if isinstance(error, AgentfuseError):
        # What is wrong within is for the log of the host, which has it, and its hint for operators.
        status = error.http_status
        message = str(error) if isinstance(error, UsageError) else error.message
        if isinstance(error, NoDaemonError):
            status, message = 503, "the home is not there just now; ask again a little later"
        elif isinstance(error, StoreError):
            _LOG.warning("%s", error)
            status, message = 502, "the object store failed or cannot be reached"
        elif isinstance(error, EnvironmentProblem):
            _LOG.warning("%s", error)
            if status != 503:
                status, message = 503, "the gateway's host cannot do this now"
        elif status == 500:
            return None
        return Problem(status, message, type(error))
    return None


async def http_problem(request: Request, error: Exception) -> Response:
    """What Starlette itself answers: no such path, no such method."""
    assert isinstance(error, HTTPException)
    response = family_of(request.scope["path"]).render(
        Problem(error.status_code, error.detail, HTTPException)
    )
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return response


def _methods_of(request: Request) -> set[str]:
    """What the path of a request can be asked for: each method is a route of its own."""
    found = set()
    for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return found


def _finishing(receive: Receive, send: Send) -> Send:
    """Takes what still comes of a body while the end of the answer is sent: the server first hands over what
    it has, and would wait for ever for who does not read any more."""

    async def finishing_send(message: Message) -> None:
        if not _is_last(message):
            await send(message)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_take, receive)
            await send(message)
            nursery.cancel_scope.cancel()

    return finishing_send


def _head_bytes(scope: Scope) -> int:
    """How long the request is without its body; the server looks only while it is not complete."""
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))


def _is_last(message: Message) -> bool:
    return bool(message["type"] == "http.response.body") and not message.get("more_body", False)


async def _take(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Take what is left of a body."""
    left = _DRAIN_BYTES
    with trio.move_on_after(_DRAIN_S):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return
