"""Staging over HTTP, ``/agents/v2/temp-files``: files for an execution that is yet to begin."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import trio
from fastapi import APIRouter, Depends, Request, Response

from agentfuse.admission import ApiKey
from agentfuse.errors import UsageError
from agentfuse.gateway import describe
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.bodies import JsonAnswer, TooLargeError, query_of
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.filetree import Body
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.multipart import Part, read_form
from agentfuse.gateway.spool import Spool
from agentfuse.gateway.staging import Staging
from agentfuse.home.mime import HEAD_BYTES, type_of
from agentfuse.regions import MiB
from agentfuse.snapshots.entries import MAX_NAME_BYTES

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
    """What the routes do. ``spool`` is where bodies wait."""

    def __init__(self, staging: Staging, *, spool: Path, limits: Limits, max_request_bytes: int) -> None:
        self._staging = staging
        self._spool = spool
        self._limits = limits
        self._max_request_bytes = max_request_bytes

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
        with Spool(self._spool) as spool:
            form = await read_form(
                request,
                spool,
                self._limits.spool,
                files="files",
                max_file_bytes=MAX_FILE_BYTES,
                max_bytes=self._max_request_bytes,
            )
            files = [_checked(part) for part in form.files]
            if not files:
                raise UsageError("no files", hint="send them as parts named 'files'")
            if any(part.is_too_large for part in form.files):
                raise TooLargeError(f"a file is larger than {MAX_FILE_BYTES:,} bytes")
            staged = await trio.to_thread.run_sync(
                self._staging.stage, key.organization, files, limiter=self._limits.uploads
            )
        return JsonAnswer({"tempFiles": [{"id": each.id, "name": each.name} for each in staged]})


def _require_member(organization: str, key: ApiKey) -> None:
    try:
        asked = str(UUID(organization))
    except ValueError:
        raise UsageError("an organization is named by its UUID") from None
    if asked != key.organization:
        raise DeniedError("User is not a member of the organization.", 403)


def _checked(part: Part) -> tuple[str, str, Body]:
    """Name, media type and content of a part, if it can be a file."""
    if not part.name or part.name in (b".", b"..") or b"\0" in part.name or len(part.name) > MAX_NAME_BYTES:
        raise UsageError("a part without a name that a file can have")
    head = part.body.open().read(HEAD_BYTES)
    return os.fsdecode(part.name), type_of(part.name, head), part.body
