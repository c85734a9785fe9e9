"""The edge of the gateway: each family's words for what went wrong, and what is said in the log."""

from __future__ import annotations

import logging

import httpx
import pytest
import trio
import trio.testing
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from agentfuse.errors import (
    AgentfuseError,
    EnvironmentProblem,
    ExistsError,
    NotFoundError,
    QuotaExceededError,
    StoreError,
    UsageError,
)
from agentfuse.gateway.edge import DeniedError, Edge, StatedError
from agentfuse.gateway.metrics import Metrics

ASTEROID, FILES = "/agents/v2/context", "/agents/v2/executions/e/context-files"
STAGING, TENANT, SHINZO = "/agents/v2/temp-files/o", "/api/v1/files/move", "/v1/agent/a/filesystem/files/x"


async def asked(path: str, error: Exception) -> httpx.Response:
    async def endpoint(_: Request) -> Response:
        raise error

    edge = Middleware(Edge, metrics=Metrics())
    app = Starlette(routes=[Route("/{path:path}", endpoint)], middleware=[edge])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as client:
        return await client.get(path)


@pytest.mark.parametrize(
    ("path", "error", "status", "said"),
    [
        (ASTEROID, NotFoundError("no"), 404, {"code": 404, "message": "no"}),
        (ASTEROID, DeniedError("Unauthorized", 401), 401, {"code": 401, "message": "Unauthorized"}),
        (ASTEROID, StatedError("no", 410), 410, {"code": 410, "message": "no"}),
        (FILES, NotFoundError("Execution not found."), 404, "Execution not found."),
        (FILES, QuotaExceededError("full"), 507, "full"),
        (FILES, DeniedError("Unauthorized", 401), 401, {"code": 401, "message": "Unauthorized"}),
        (STAGING, UsageError("any"), 400, "Invalid file upload request."),
        (STAGING, DeniedError("any", 403), 403, "User is not a member of the organization."),
        (STAGING, ValueError("any"), 500, "Internal server error."),
        (TENANT, UsageError("bad", hint="do it"), 400, {"error": "bad (do it)"}),
        (TENANT, QuotaExceededError("full"), 507, {"error": "full"}),
        (TENANT, ValueError("any"), 500, {"error": "Internal server error."}),
        (TENANT, AgentfuseError("any"), 500, {"error": "Internal server error."}),
        (SHINZO, NotFoundError("no"), 404, {"error": "no", "code": "NOT_FOUND"}),
        (SHINZO, ExistsError("there"), 409, {"error": "there", "code": "ALREADY_EXISTS"}),
        (SHINZO, QuotaExceededError("full"), 507, {"error": "full", "code": "QUOTA_EXCEEDED"}),
        (SHINZO, DeniedError("no", 403), 403, {"error": "no", "code": "FORBIDDEN"}),
        (SHINZO, UsageError("bad"), 400, {"error": "bad", "code": "BAD_REQUEST"}),
        (SHINZO, ValueError("any"), 500, {"error": "Internal server error.", "code": "INTERNAL"}),
        ("/elsewhere", NotFoundError("no"), 404, "no"),
    ],
)
async def test_errors_come_in_the_words_of_the_api_that_was_asked(
    path: str, error: Exception, status: int, said: object
) -> None:
    answer = await asked(path, error)
    assert answer.status_code == status
    if isinstance(said, str):
        assert (answer.headers["content-type"].split(";")[0], answer.text) == ("text/plain", said)
    else:
        assert answer.json() == said
    assert ("www-authenticate" in answer.headers) == (status == 401)


async def test_what_nobody_expected_is_logged_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "the inside of things"
    answer = await asked(TENANT, ExceptionGroup("group", [ValueError(secret)]))
    assert secret not in answer.text
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.exc_info
    assert secret in caplog.text


@pytest.mark.parametrize("path", [TENANT, ASTEROID, SHINZO])
async def test_what_ails_the_store_is_for_the_log_only(path: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = await asked(path, StoreError("s3://bucket/key: refused", hint="look at the credentials"))
    assert answer.status_code == 502
    assert "bucket" not in answer.text
    assert "s3://bucket/key: refused" in caplog.text


class Crowded(EnvironmentProblem):
    """No room."""

    http_status = 503


async def test_who_may_ask_again_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    answer = await asked(TENANT, Crowded("no room", hint="/var/lib/x is full"))
    assert (answer.status_code, answer.json()) == (503, {"error": "no room"})
    assert answer.headers["retry-after"] == "1"
    assert "/var/lib/x is full" in caplog.text


async def test_what_ails_the_host_is_for_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    answer = await asked(TENANT, EnvironmentProblem("cannot write /var/lib/x", hint="free some space"))
    assert (answer.status_code, answer.json()) == (503, {"error": "the gateway's host cannot do this now"})
    assert "cannot write /var/lib/x" in caplog.text


async def test_an_answer_that_breaks_off_is_not_completed(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise StoreError("gone")

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await Edge(app, Metrics())(
        {"type": "http", "http_version": "1.1", "method": "GET", "path": "/", "headers": []}, receive, send
    )
    assert [message.get("body") for message in sent] == [None, b"some"]
    assert "cut off" in caplog.text


async def test_beyond_so_many_requests_at_a_time_others_are_told_to_wait() -> None:
    go = trio.Event()
    served: list[int] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> Message:
        await trio.lowlevel.checkpoint()  # as any server's does
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            served.append(message["status"])

    edge = Edge(app, Metrics())
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/api/v1/files", "headers": []}
    async with trio.open_nursery() as nursery:
        for _ in range(600):
            nursery.start_soon(edge, scope, receive, send)
        await trio.testing.wait_all_tasks_blocked()
        assert served == [503] * (600 - 512)
        go.set()
    assert served.count(200) == 512
    await edge(scope, receive, send)
    assert served[-1] == 200
