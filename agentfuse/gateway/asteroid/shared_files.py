"""An agent's memory over HTTP: ``/agents/v2/agents/{agentId}/shared-files``, as SDKs up to 1.6 have it.

It is the home's ``shared/`` while an execution of the agent runs here, and the newest snapshot otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import trio
from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import RedirectResponse

from agentfuse.errors import NotFoundError, UsageError
from agentfuse.gateway import describe
from agentfuse.gateway.addresses import base_url
from agentfuse.gateway.asteroid import files, models
from agentfuse.gateway.asteroid.uploads import Uploads, put_all
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.blobs import FileLinks
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import PATIENCE_S, Executions
from agentfuse.gateway.filetree import FileTree, NewFile, Node
from agentfuse.gateway.ids import shared_file_id
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.together import together
from agentfuse.objectstore.base import ObjectStore
from agentfuse.regions import Creator, MiB
from agentfuse.snapshots.entries import parent_of
from agentfuse.snapshots.history import History

MAX_FILE_BYTES = 200 * MiB

_USER = Creator.USER
_CHANGES = (400, 401, 403, 404, 409)


def router(authenticate: Authenticate, api: SharedFiles) -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/agents/v2/agents/{agentId}/shared-files",
        tags=["Files of agents"],
        dependencies=[Depends(authenticate), *DESCRIBED_ASTEROID],
    )
    agent = {"agentId": "The agent"}
    one = agent | {"fileId": "The file"}
    form: dict[str, Any] = {"body": {"files": describe.FILES}, "required": ["files"]}
    described = partial(describe.route, codes=_CHANGES)

    listed = describe.route(models.SharedFiles, codes=(400, 401, 403, 404), path=agent)
    routes.get("", name="agent_shared_files_get", **listed)(api.list_files)
    uploaded = describe.route(models.SharedUploaded, codes=(*_CHANGES, 413, 507), path=agent, **form)
    routes.post("", name="agent_shared_files_upload", **uploaded)(api.upload)
    cleared = described(None, path=agent)
    routes.delete("/delete-all", name="agent_shared_files_delete_all", **cleared)(api.delete_all)
    updated = describe.route(models.SharedFile, codes=(*_CHANGES, 413, 507), path=one, **form)
    routes.put("/{fileId}", name="agent_shared_files_update", **updated)(api.update)
    routes.delete("/{fileId}", name="agent_shared_files_delete", **described(None, path=one))(api.delete)
    body = {"isFrozen": {"type": "boolean"}}
    frozen = described(models.SharedFile, path=one, body=body, required=["isFrozen"])
    routes.patch("/{fileId}/freeze", name="agent_shared_files_freeze", **frozen)(api.freeze)
    redirected = describe.route(None, status=303, codes=(400, 401, 403, 404), path=one)
    download = "/{fileId}/download"
    routes.get(download, name="agent_shared_file_download_redirect", **redirected)(api.download)
    routes.head(download, include_in_schema=False)(api.download)
    return routes


@dataclass(frozen=True, slots=True)
class _Memory:
    """An agent's memory; ``home``: the execution whose home has it, if one runs."""

    agent: str
    tree: FileTree
    home: Execution | None


class SharedFiles:
    """What the routes do."""

    def __init__(
        self,
        executions: Executions,
        links: FileLinks,
        uploads: Uploads,
        *,
        store: ObjectStore,
        limits: Limits,
        public_url: str,
    ) -> None:
        self._executions = executions
        self._store = store
        self._limits = limits
        self._links = links
        self._uploads = uploads
        self._public_url = public_url

    async def list_files(self, request: Request) -> Response:
        """The files of an agent's memory."""
        memory = await self._memory(request)
        nodes = await _files(memory.tree)
        found = await self._shown(request, memory, nodes)
        return JsonAnswer({"files": found, "totalSize": sum(node.size for node in nodes)})

    async def upload(self, request: Request) -> Response:
        """Put files into an agent's memory. One whose name is taken gets another, `name (1)`."""
        memory = await self._memory(request)
        async with self._uploads.files(request, max_file_bytes=MAX_FILE_BYTES) as new:
            nodes = await put_all(memory.tree, new, on_collision="number")
        return JsonAnswer({"files": await self._shown(request, memory, nodes)})

    async def update(self, request: Request) -> Response:
        """Replace the content of a file; the request holds just one."""
        memory = await self._memory(request)
        node = await _find(memory, request)
        async with self._uploads.files(request, max_file_bytes=MAX_FILE_BYTES) as new:
            if len(new) != 1:
                raise UsageError("the request must hold exactly one file")
            replacing = [NewFile(node.path, new[0].body, node.mode)]
            nodes = await put_all(memory.tree, replacing, on_collision="replace")
        return JsonAnswer((await self._shown(request, memory, nodes))[0])

    async def delete(self, request: Request) -> Response:
        """Delete a file."""
        memory = await self._memory(request)
        node = await _find(memory, request)
        await memory.tree.delete(node.path, creator=_USER)
        return Response(status_code=204)

    async def delete_all(self, request: Request) -> Response:
        """Delete all files that are not frozen."""
        tree = (await self._memory(request)).tree
        nodes = await tree.list(b"", recursive=True)
        kept = {above for node in nodes if node.is_frozen for above in _with_parents(node.path)}

        async def delete(node: Node) -> None:
            with suppress(NotFoundError):
                await tree.delete(node.path, creator=_USER, recursive=node.is_dir)

        # The highest of what goes, each with all that is in it; together they are one snapshot.
        gone = [node for node in nodes if node.path not in kept and parent_of(node.path) in kept | {b""}]
        await together(partial(delete, node) for node in gone)
        return Response(status_code=204)

    async def freeze(self, request: Request) -> Response:
        """Freeze a file, so that nobody can change it or take it away, or have done with that."""
        is_frozen = (await read_json(request)).get("isFrozen")
        if not isinstance(is_frozen, bool):
            raise UsageError("isFrozen must be true or false")
        memory = await self._memory(request)
        node = await _find(memory, request)
        node = await memory.tree.set_frozen(node.path, is_frozen, creator=_USER)
        return JsonAnswer((await self._shown(request, memory, [node]))[0])

    async def download(self, request: Request) -> Response:
        """A link to a file."""
        memory = await self._memory(request)
        node = await _find(memory, request)
        url = await self._links.url(request, memory.tree, node, execution=memory.home)
        return RedirectResponse(url, 303)

    async def _memory(self, request: Request) -> _Memory:
        """The memory of the agent that a request names. Raises ``NotFoundError`` for another's."""
        organization, agent = key_of(request).organization, request.path_params["agentId"]
        await self._executions.agents(organization, [agent])
        home = await self._executions.home_of(organization, agent)
        if home is not None and home.ends_as is not None:  # its memory is on the way to the store
            home = await self._executions.wait(organization, home.id, PATIENCE_S)
        if home is not None and not home.status.is_terminal:
            return _Memory(agent, self._executions.tree(home, "shared"), home)
        return _Memory(agent, self._executions.idle_tree(agent), None)

    async def _shown(self, request: Request, memory: _Memory, nodes: Sequence[Node]) -> list[dict[str, Any]]:
        """SharedFiles. Their version is the number of the memory's newest snapshot: it grows with each."""
        history = History(self._store, memory.agent, "shared")
        version = await trio.to_thread.run_sync(history.newest, limiter=self._limits.reads)
        agent = quote(memory.agent, safe="")
        root = f"{base_url(request, self._public_url)}/agents/v2/agents/{agent}/shared-files"
        return [files.shared_file(memory.agent, root, node, max(1, version)) for node in nodes]


async def _files(tree: FileTree) -> list[Node]:
    return [node for node in await tree.list(b"", recursive=True) if node.type == "file"]


async def _find(memory: _Memory, request: Request) -> Node:
    """The file that a request names. Raises ``NotFoundError``."""
    wanted = request.path_params["fileId"].lower()
    for node in await _files(memory.tree):
        if shared_file_id(memory.agent, node.path) == wanted:
            return node
    raise NotFoundError("File not found.")


def _with_parents(path: bytes) -> Iterator[bytes]:
    """A path and the directories that it is in."""
    while path:
        yield path
        path = parent_of(path)
