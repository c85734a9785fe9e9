"""Executions over HTTP: ``/agents/v2/executions`` and ``…/execute``."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import PlainTextResponse

from agentfuse.gateway import describe
from agentfuse.gateway.addresses import base_url
from agentfuse.gateway.asteroid import fields, items, listing, models
from agentfuse.gateway.asteroid.orders import execute_order, rerun_order, status_order
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.bodies import JsonAnswer, queries_of, read_json, text_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.service import Executions

MAX_WAIT_S = 25
MAX_BODY_BYTES = 256 * 1024
"""Of inputs: they are in the execution's record, which is written anew with every change."""

_ERRORS = (400, 401, 403, 404)
_ID = {"executionId": "The execution"}
_TIMEOUT = {"timeoutSeconds": f"How long to wait for the end, 1 to {MAX_WAIT_S}"}
_TIMEOUT_SCHEMA: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": MAX_WAIT_S}
_OBJECT = {"type": "object"}
_EXECUTE: dict[str, Any] = {
    "inputs": _OBJECT,
    "dynamicData": _OBJECT,
    "metadata": _OBJECT,
    "executionOptions": {
        "type": "object",
        "properties": {
            "variantKey": describe.TEXT,
            "softTimeoutMins": {"type": "integer", "minimum": 1},
        },
    },
    "tempFiles": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"id": describe.TEXT, "name": describe.TEXT},
            "required": ["id"],
        },
    },
    "files": {"type": "array", "items": describe.NAME},
    "profileId": describe.TEXT,
    "profileGroupId": describe.TEXT,
    "agentProfileId": describe.TEXT,
    "agentProfilePoolId": describe.TEXT,
    "version": {"type": "integer", "minimum": 0},
    "head": {"type": "boolean"},
    "onCapacityLimit": {"enum": ["queue", "reject"]},
}


def records_router(authenticate: Authenticate, api: ExecutionsApi) -> APIRouter:
    """The routes that need nothing but records, which every host has."""
    routes = _routes(authenticate)
    listed = describe.route(
        models.ExecutionPage,
        errors=models.Error,
        codes=(400, 401, 403),
        query=listing.QUERY,
        schemas=listing.SCHEMAS,
    )
    routes.get("/executions", name="executions_list", **listed)(api.list_executions)
    found = describe.route(models.ExecutionItem, errors=models.Error, codes=_ERRORS, path=_ID)
    routes.get("/executions/{executionId}", name="execution_get", **found)(api.get)
    return routes


def start_router(authenticate: Authenticate, api: ExecutionsApi) -> APIRouter:
    """The routes that begin executions."""
    routes = _routes(authenticate)
    described = partial(describe.route, errors=models.Error, codes=(*_ERRORS, 409, 413, 429, 503))
    for kind in ("agent", "workflow"):
        path = {f"{kind}Id": "The agent"}
        begun = described(models.Started, status=202, path=path, body=_EXECUTE)
        execute = f"/{kind}s/{{{kind}Id}}/execute"
        routes.post(execute, name=f"{kind}_execute_post", **begun)(api.execute)
        body = _EXECUTE | {"timeoutSeconds": _TIMEOUT_SCHEMA}
        waited = described(models.Waited, also=[202], path=path, body=body)
        routes.post(f"{execute}/sync", name=f"{kind}_execute_sync_post", **waited)(api.execute_sync)
    body = {"inputs": _OBJECT, "profileId": describe.TEXT, "agentProfileId": describe.TEXT}
    rerun = described(models.Started, status=202, path=_ID, body=body)
    routes.post("/executions/{executionId}/rerun", name="execution_rerun", **rerun)(api.rerun)
    return routes


def router(authenticate: Authenticate, api: ExecutionsApi) -> APIRouter:
    """The routes of one execution."""
    routes = _routes(authenticate)
    one = "/executions/{executionId}"
    described = partial(describe.route, errors=models.Error, codes=_ERRORS)
    waited = described(
        models.Waited, also=[202], path=_ID, query=_TIMEOUT, schemas={"timeoutSeconds": _TIMEOUT_SCHEMA}
    )
    routes.get(f"{one}/sync", name="execution_sync_get", **waited)(api.wait)
    _add_changes(routes, api)
    return routes


def _routes(authenticate: Authenticate) -> APIRouter:
    return APIRouter(
        prefix="/agents/v2",
        tags=["Executions"],
        dependencies=[Depends(authenticate), *DESCRIBED_ASTEROID],
    )


def _add_changes(routes: APIRouter, api: ExecutionsApi) -> None:
    one = "/executions/{executionId}"
    described = partial(describe.route, errors=models.Error, codes=(*_ERRORS, 409), path=_ID)
    for verb, change in (("cancel", api.cancel), ("pause", api.pause), ("resume", api.resume)):
        routes.post(f"{one}/{verb}", name=f"execution_{verb}", **described(models.StatusChange))(change)
    body: dict[str, Any] = {
        "status": {"enum": ["running", "paused", "cancelled", "completed", "failed"]},
        "reason": describe.TEXT,
        "result": _OBJECT,
    }
    updated = described("text/plain", body=body, required=["status"])
    routes.post(f"{one}/status", name="execution_status_update", **updated)(api.set_status)
    added = described("text/plain", status=201, body={"message": describe.TEXT}, required=["message"])
    routes.post(f"{one}/user-messages", name="execution_user_messages_add", **added)(api.add_message)
    routes.delete(one, name="execution_delete", **described(None))(api.delete)


class ExecutionsApi:
    """What the routes do."""

    def __init__(self, executions: Executions, *, public_url: str) -> None:
        self._executions = executions
        self._public_url = public_url

    async def execute(self, request: Request) -> Response:
        """Begin an execution of an agent. `{}` is a body. Staged files become its `uploads/`, and so do
        `files`, paths of the tenant's file store."""
        execution, _ = await self._execute(request)
        return JsonAnswer({"executionId": execution.id, "status": execution.status}, 202)

    async def execute_sync(self, request: Request) -> Response:
        """Begin an execution and wait for its end: 200, or 202 if it goes on."""
        execution, body = await self._execute(request, waits=True)
        timeout_s = fields.whole_or_none(body, "timeoutSeconds", 1, MAX_WAIT_S)
        return await self._wait(execution.organization, execution.id, timeout_s)

    async def wait(self, request: Request) -> Response:
        """Wait for the end of an execution: 200, or 202 if it goes on."""
        query = queries_of(request).get("timeoutSeconds")
        timeout_s = fields.whole(query[-1] if query else None, "timeoutSeconds", 1, MAX_WAIT_S)
        return await self._wait(key_of(request).organization, _id(request), timeout_s)

    async def get(self, request: Request) -> Response:
        """An execution."""
        execution = await self._executions.get(key_of(request).organization, _id(request))
        return JsonAnswer((await self._items(request, [execution]))[0])

    async def list_executions(self, request: Request) -> Response:
        """The organization's executions that match everything that is asked for, the newest first."""
        query, organization = queries_of(request), key_of(request).organization
        if listing.organization_of(query) not in (None, organization):
            raise DeniedError("User is not a member of the organization.", 403)
        wanted = listing.wanted(query, time.time())
        page, total = wanted.of(await self._executions.list(organization))
        found = await self._items(request, page)
        return JsonAnswer({"items": found, "page": wanted.page, "pageSize": wanted.page_size, "total": total})

    async def cancel(self, request: Request) -> Response:
        """End an execution. Its files are kept."""
        return await self._change(request, Status.CANCELLED)

    async def pause(self, request: Request) -> Response:
        """Stop what runs in an execution's home until it is resumed."""
        return await self._change(request, Status.PAUSED)

    async def resume(self, request: Request) -> Response:
        """Let a paused execution go on."""
        return await self._change(request, Status.RUNNING)

    async def set_status(self, request: Request) -> Response:
        """Give an execution another status. `completed` and `failed` are for the platform that runs agents;
        `reason` and `result` go with them."""
        order = status_order(await read_json(request, max_bytes=MAX_BODY_BYTES))
        await self._executions.set_status(
            key_of(request).organization, _id(request), order.status, reason=order.reason, result=order.result
        )
        return PlainTextResponse("Execution status updated.")

    async def add_message(self, request: Request) -> Response:
        """Tell the agent something."""
        body = await read_json(request)
        text_of(body, "message")
        message = fields.text_or_none(body, "message")
        assert message is not None
        key = key_of(request)
        await self._executions.add_message(key.organization, _id(request), message, key.id)
        return PlainTextResponse("Message added.", 201)

    async def delete(self, request: Request) -> Response:
        """Delete an execution that has ended."""
        await self._executions.delete(key_of(request).organization, _id(request))
        return Response(status_code=204)

    async def rerun(self, request: Request) -> Response:
        """Begin an execution as another one began, without its staged files."""
        body = await read_json(request, max_bytes=MAX_BODY_BYTES, may_be_empty=True)
        order = rerun_order(body)
        execution = await self._executions.rerun(
            key_of(request), _id(request), inputs=order.inputs, profile=order.profile
        )
        return JsonAnswer({"executionId": execution.id, "status": execution.status}, 202)

    async def _execute(self, request: Request, *, waits: bool = False) -> tuple[Execution, dict[str, Any]]:
        path = request.path_params
        agent = path["agentId"] if "agentId" in path else path["workflowId"]
        body = await read_json(request, max_bytes=MAX_BODY_BYTES, may_be_empty=True)
        if waits:
            fields.whole_or_none(body, "timeoutSeconds", 1, MAX_WAIT_S)  # before anything begins
        return await self._executions.execute(key_of(request), agent, execute_order(body)), body

    async def _wait(self, organization: str, execution: str, timeout_s: int | None) -> Response:
        found = await self._executions.wait(organization, execution, timeout_s or MAX_WAIT_S)
        return JsonAnswer(items.waited(found), 200 if found.status.is_terminal else 202)

    async def _change(self, request: Request, status: Status) -> Response:
        execution = await self._executions.set_status(key_of(request).organization, _id(request), status)
        return JsonAnswer({"executionId": execution.id, "status": status})

    async def _items(self, request: Request, executions: list[Execution]) -> list[dict[str, Any]]:
        organization, base = key_of(request).organization, base_url(request, self._public_url)
        agents = await self._executions.agents(organization, {each.agent for each in executions})
        return [items.item(each, agents[each.agent].version, base) for each in executions]


def _id(request: Request) -> str:
    return str(request.path_params["executionId"])
