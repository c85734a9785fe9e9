"""Files of executions over HTTP: ``/agents/v2/executions/{executionId}/files`` and its like."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import trio
from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import PlainTextResponse, RedirectResponse

from agentfuse.errors import BusyError, NotFoundError, UsageError, WrongTypeError
from agentfuse.gateway import describe
from agentfuse.gateway.addresses import base_url
from agentfuse.gateway.asteroid import activities, fields, files, models
from agentfuse.gateway.asteroid.uploads import Uploads, put_all
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.blobs import FileLinks, Place
from agentfuse.gateway.bodies import JsonAnswer, query_of
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.ids import file_id
from agentfuse.gateway.together import together
from agentfuse.regions import MiB

MAX_FILE_BYTES = 200 * MiB
"""What an execution's uploads may hold by default."""

_AT_ONCE = 2000
_KEPT_PLACES = 50_000
_ID = {"executionId": "The execution"}


def router(authenticate: Authenticate, api: ExecutionFiles) -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/agents/v2/executions/{executionId}",
        tags=["Files of executions"],
        dependencies=[Depends(authenticate), *DESCRIBED_ASTEROID],
    )
    described = partial(describe.route, codes=(401, 403, 404), path=_ID)
    all_files = described(models.AgentFiles)
    routes.get("/files", name="execution_files_get", **all_files)(api.list_files)
    routes.get("/agent-files", name="execution_agent_files_get", **all_files)(api.list_files)
    context = described(list[models.ContextFile])
    routes.get("/context-files", name="execution_context_files_get", **context)(api.list_context)
    uploaded = describe.route(
        "text/plain",
        codes=(400, 401, 403, 404, 409, 413, 507),
        path=_ID,
        body={"files": describe.FILES},
        required=["files"],
    )
    routes.post("/context-files", name="execution_context_files_upload", **uploaded)(api.upload)
    happened = describe.route(
        list[models.Activity],
        errors=models.Error,
        codes=(400, 401, 403, 404),
        path=_ID,
        query={"order": "By time, asc by default", "limit": "How many at most"},
        schemas={
            "order": {"enum": list(activities.DIRECTIONS)},
            "limit": {"type": "integer", "minimum": 1, "maximum": activities.MAX_LIMIT},
        },
    )
    routes.get("/activities", name="execution_activities_get", **happened)(api.activities)
    downloads = {
        "files": api.download,
        "agent-files": api.download_agent_file,
        "context-files": api.download_context_file,
        "debug-files": api.download_debug_file,
    }
    redirected = describe.route(None, status=303, codes=(401, 403, 404), path=_ID | {"fileId": "The file"})
    for kind, download in downloads.items():
        name = f"execution_{kind.replace('-', '_').removesuffix('s')}_download_redirect"
        routes.get(f"/{kind}/{{fileId}}/download", name=name, **redirected)(download)
        routes.head(f"/{kind}/{{fileId}}/download", include_in_schema=False)(download)
    return routes


class ExecutionFiles:
    """What the routes do."""

    def __init__(
        self, executions: Executions, links: FileLinks, uploads: Uploads, *, public_url: str
    ) -> None:
        self._executions = executions
        self._links = links
        self._uploads = uploads
        self._public_url = public_url
        self._places: OrderedDict[tuple[str, str], tuple[str, bytes]] = OrderedDict()

    async def list_files(self, request: Request) -> Response:
        """All files of an execution by region, while it runs and after."""
        execution = await self._execution(request)
        nodes = await self._nodes(execution, files.DIRECTORIES)
        root = self._root(request, execution)
        directories: dict[str, list[dict[str, Any]]] = {}
        for region, found in nodes.items():
            shown = directories[region] = []
            for start in range(0, len(found), _AT_ONCE):
                shown += [
                    files.agent_file(execution, root, region, node)
                    for node in found[start : start + _AT_ONCE]
                ]
                await trio.lowlevel.checkpoint()  # others want to be answered, too
            self._remember(execution, region, shown, found)
        return JsonAnswer(files.agent_files(directories))

    async def list_context(self, request: Request) -> Response:
        """What was attached to an execution, and what it downloaded."""
        execution = await self._execution(request)
        root, found = self._root(request, execution), []
        for region, nodes in (await self._nodes(execution, files.CONTEXT)).items():
            urls = await self._links.urls(request, execution, region, nodes)
            shown = [
                files.context_file(execution, root, region, node, url)
                for node, url in zip(nodes, urls, strict=True)
            ]
            self._remember(execution, region, shown, nodes)
            found += shown
        return JsonAnswer(found)

    async def upload(self, request: Request) -> Response:
        """Put files into `uploads/` of an execution that runs: all of them, or none. One whose name is taken
        gets another, `name (1)`."""
        execution = await self._execution(request)
        _require_running(execution)
        async with self._uploads.files(request, max_file_bytes=MAX_FILE_BYTES) as new:
            execution = await self._execution(request)  # it may have taken its time
            _require_running(execution)
            await put_all(self._executions.tree(execution, "uploads"), new, on_collision="number")
        return PlainTextResponse("Files uploaded.")

    async def download(self, request: Request) -> Response:
        """A link to a file of any region."""
        return await self._download(request, files.DIRECTORIES)

    async def download_agent_file(self, request: Request) -> Response:
        """The same."""
        return await self._download(request, files.DIRECTORIES)

    async def download_context_file(self, request: Request) -> Response:
        """A link to a file of `uploads/` or `downloads/`."""
        return await self._download(request, files.CONTEXT)

    async def download_debug_file(self, request: Request) -> Response:
        """A link to a file of `debug/`."""
        return await self._download(request, ("debug",))

    async def _download(self, request: Request, regions: Sequence[str]) -> Response:
        execution = await self._execution(request)
        wanted = request.path_params["fileId"].lower()
        region, node = await self._find(execution, regions, wanted)
        tree = self._executions.tree(execution, region)
        try:
            url = await self._links.url(request, tree, node, execution=execution, region=region)
        except (NotFoundError, WrongTypeError) as error:  # it is just being replaced
            raise NotFoundError("File not found.") from error
        return RedirectResponse(url, 303)

    async def activities(self, request: Request) -> Response:
        """What happened: changes of status, messages of users, files that came to `uploads/` and
        `downloads/`. `presignedUrl` needs no key."""
        order = fields.one_of(query_of(request, "order") or None, "order", activities.DIRECTIONS)
        limit = fields.whole(query_of(request, "limit") or None, "limit", 1, activities.MAX_LIMIT)
        execution = await self._execution(request)
        queued = execution.status is Status.QUEUED
        events = [] if queued else await self._executions.events(execution)
        # Other regions that are configured to notify are unknown to the API.
        arrivals = activities.arrivals(each for each in events if each.region in files.DIRECTORIES)
        nodes = await self._nodes(execution, sorted({each.region for each in arrivals}))
        sizes = {(region, node.path): node.size for region, found in nodes.items() for node in found}
        shown = [replace(each, size=sizes.get((each.region, each.path), each.size)) for each in arrivals]

        def url_of(file: activities.Arrival) -> str:
            place = Place(execution.organization, execution.id, file.region, file.path, file.media_type)
            return self._links.of_place(request, place)

        render = partial(
            activities.activities, execution, shown, url_of, is_descending=order == "desc", limit=limit
        )
        # Thousands of links take their time.
        return JsonAnswer(await trio.to_thread.run_sync(render, limiter=self._uploads.limits.reads))

    async def _execution(self, request: Request) -> Execution:
        return await self._executions.get(key_of(request).organization, request.path_params["executionId"])

    async def _find(self, execution: Execution, regions: Sequence[str], wanted: str) -> tuple[str, Node]:
        """The file of an id. Raises ``NotFoundError``."""
        known = self._places.get((execution.id, wanted))
        if known is not None and known[0] in regions:
            with suppress(NotFoundError):
                node = await self._executions.tree(execution, known[0]).stat(known[1])
                if node.type == "file":
                    return known[0], node
        for region, nodes in (await self._nodes(execution, regions)).items():
            for node in nodes:
                if file_id(execution.id, region, node.path) == wanted:
                    return region, node
        raise NotFoundError("File not found.")

    async def _nodes(self, execution: Execution, regions: Sequence[str]) -> dict[str, Sequence[Node]]:
        """The files of some regions."""
        found: dict[str, Sequence[Node]] = dict.fromkeys(regions, ())
        if execution.status is Status.QUEUED:  # it has no home, and is in no hurry to get one
            return found

        async def look(region: str) -> None:
            nodes = await self._executions.tree(execution, region).list(b"", recursive=True)
            found[region] = [node for node in nodes if node.type == "file"]

        await together(partial(look, region) for region in regions)
        return found

    def _remember(
        self, execution: Execution, region: str, shown: Sequence[dict[str, Any]], nodes: Sequence[Node]
    ) -> None:
        """Where files are that somebody has just seen, and is likely to ask for."""
        for file, node in zip(shown, nodes, strict=True):
            self._places[execution.id, file["id"]] = (region, node.path)
        while len(self._places) > _KEPT_PLACES:
            self._places.popitem(last=False)

    def _root(self, request: Request, execution: Execution) -> str:
        return f"{base_url(request, self._public_url)}/agents/v2/executions/{execution.id}"


def _require_running(execution: Execution) -> None:
    if execution.status.is_terminal or execution.ends_as is not None:
        raise UsageError("the execution has ended")
    if execution.status is Status.QUEUED:
        raise BusyError(
            "the execution has not begun", hint="stage files for it instead, or wait until it runs"
        )
