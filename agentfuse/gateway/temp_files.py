"""Staging over HTTP, ``/agents/v2/temp-files``: files for an execution that is yet to begin."""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from uuid import UUID

import trio
from fastapi import APIRouter, Depends, Request, Response

from agentfuse.admission import ApiKey
from agentfuse.errors import UsageError
from agentfuse.gateway import describe
from agentfuse.gateway.asteroid.uploads import Uploads
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.bodies import JsonAnswer, query_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.filetree import Body, NewFile
from agentfuse.gateway.staging import Staging
from agentfuse.home.mime import HEAD_BYTES, type_of
from agentfuse.regions import MiB

MAX_FILE_BYTES = 200 * MiB
"""What an execution's uploads may hold by default: a larger file could never be attached."""


def router(authenticate: Authenticate, api: TempFiles) -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/agents/v2/temp-files",
        tags=["Staging"],
        dependencies=[Depends(authenticate), *DESCRIBED_ASTEROID],
    )
    described: partial[dict[str, Any]] = partial(
        describe.route,
        describe.TempFiles,
        codes=(400, 401, 403, 413, 500),
        body={"files": describe.FILES},
        required=["files"],
    )
    named = described(path={"organizationId": "The organization, a UUID"})
    routes.post("/{organizationId}", name="temp_files_stage", **named)(api.stage)
    by_default = described(query={"organizationId": "The organization; by default the key's"})
    routes.post("", name="temp_files_upload", **by_default)(api.upload)
    return routes


class TempFiles:
    """What the routes do."""

    def __init__(self, staging: Staging, uploads: Uploads) -> None:
        self._staging = staging
        self._uploads = uploads

    async def stage(self, request: Request) -> Response:
        """Stage files of an organization for an execution. They expire after 60 minutes."""
        return await self._stage(request, request.path_params["organizationId"])

    async def upload(self, request: Request) -> Response:
        """Stage files of the key's organization for an execution. They expire after 60 minutes."""
        organization = query_of(request, "organizationId") or key_of(request).organization
        return await self._stage(request, organization)

    async def _stage(self, request: Request, organization: str) -> Response:
        key = key_of(request)
        _require_member(organization, key)
        async with self._uploads.files(request, max_file_bytes=MAX_FILE_BYTES) as files:
            staged = await trio.to_thread.run_sync(
                self._staging.stage,
                key.organization,
                [_described(file) for file in files],
                limiter=self._uploads.limits.uploads,
            )
        return JsonAnswer({"tempFiles": [{"id": each.id, "name": each.name} for each in staged]})


def _require_member(organization: str, key: ApiKey) -> None:
    try:
        asked = str(UUID(organization))
    except ValueError:
        raise UsageError("an organization is named by its UUID") from None
    if asked != key.organization:
        raise DeniedError("User is not a member of the organization.", 403)


def _described(file: NewFile) -> tuple[str, str, Body]:
    """Name, media type and content of a file."""
    head = file.body.open().read(HEAD_BYTES)
    return os.fsdecode(file.path), type_of(file.path, head), file.body
