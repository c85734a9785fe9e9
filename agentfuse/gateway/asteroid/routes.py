"""All routes of the Asteroid API but staging, put together; each asks the host that has what it is about."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from fastapi import APIRouter, Request

from agentfuse.errors import NotFoundError
from agentfuse.gateway.asteroid import execution_files, executions, shared_files, whoami
from agentfuse.gateway.asteroid.uploads import Uploads
from agentfuse.gateway.auth import Authenticate, key_of
from agentfuse.gateway.blobs import FileLinks
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.crossing import at_owner, where_executed
from agentfuse.gateway.limits import Limits
from agentfuse.objectstore.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Asteroid:
    """What the API is made of. ``authenticate`` lets its keys pass."""

    authenticate: Authenticate
    executions: Executions
    hosts: Hosts
    store: ObjectStore
    links: FileLinks
    uploads: Uploads
    limits: Limits
    public_url: str

    def routers(self) -> Iterable[APIRouter]:
        """The routes."""
        begun = executions.ExecutionsApi(self.executions, public_url=self.public_url)
        of_executions = at_owner(self.authenticate, self.hosts, self._execution)
        yield executions.records_router(self.authenticate, begun)
        yield executions.start_router(self._where_begun, begun)
        yield executions.router(of_executions, begun)
        files = execution_files.ExecutionFiles(
            self.executions, self.links, self.uploads, public_url=self.public_url
        )
        yield execution_files.router(of_executions, files)
        memories = shared_files.SharedFiles(
            self.executions,
            self.links,
            self.uploads,
            store=self.store,
            limits=self.limits,
            public_url=self.public_url,
        )
        yield shared_files.router(at_owner(self.authenticate, self.hosts, self._home), memories)
        yield whoami.router(self.authenticate)

    async def _where_begun(self, request: Request) -> None:
        await self.authenticate(request)
        where_executed(self.hosts, request)

    async def _execution(self, request: Request) -> Execution | None:
        with suppress(NotFoundError):  # said by who deals with it
            return await self.executions.get(key_of(request).organization, request.path_params["executionId"])
        return None

    async def _home(self, request: Request) -> Execution | None:
        return await self.executions.home_of(key_of(request).organization, request.path_params["agentId"])
