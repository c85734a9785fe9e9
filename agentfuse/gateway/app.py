"""The application: all routes, put together from values. Knows no configuration and no server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypedDict

import trio
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from agentfuse import __version__
from agentfuse.admission import Gateway
from agentfuse.gateway import blobs, health, metrics, temp_files, tenant_files
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.asteroid.routes import Asteroid
from agentfuse.gateway.asteroid.uploads import Uploads
from agentfuse.gateway.auth import (
    ASTEROID_HEADERS,
    SHINZO_HEADERS,
    TENANT_HEADERS,
    Authenticate,
    Keyring,
    key_dependency,
)
from agentfuse.gateway.edge import Edge, http_problem
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.filetree import FileTree
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.gateway.hosts.crossing import Arrivals, Departures, at_owner
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.shinzo import routes as shinzo
from agentfuse.gateway.shinzo.desk import Desk
from agentfuse.gateway.shinzo.filesystem import Filesystems
from agentfuse.gateway.shinzo.homes import Homes
from agentfuse.gateway.staging import Staging
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.gateway.trees import Trees
from agentfuse.gateway.ui import routes as page_routes
from agentfuse.gateway.ui.executions import ExecutionPages
from agentfuse.gateway.ui.history import HistoryPages
from agentfuse.gateway.ui.memory import MemoryPages
from agentfuse.gateway.ui.remembered import Remembered
from agentfuse.gateway.ui.rewrites import RewritePages
from agentfuse.gateway.ui.sessions import Sessions
from agentfuse.objectstore.base import ObjectStore
from agentfuse.regions import Region
from agentfuse.snapshots.layout import TENANT_FILES, tenant_owner

_DESCRIPTION = """Agents' homes over HTTP: staging, the tenant file store, and links to contents.

Asteroid routes take a key in `X-Api-Key` or `X-Asteroid-Agents-Api-Key`, the others as
`Authorization: Bearer`.
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the application is made of. ``spool`` is a directory for bodies of requests on their way;
    ``closing`` is set when no request may go on for long any more."""

    settings: Gateway
    regions: Sequence[Region]
    store: ObjectStore
    trees: Trees
    agents: Agents
    executions: Executions
    links: blobs.Links
    limits: Limits
    metrics: metrics.Metrics
    spool: Path
    hosts: Hosts
    closing: trio.Event


class _Bodies(TypedDict):
    spool: Path
    limits: Limits
    max_request_bytes: int


def build(parts: Parts) -> FastAPI:
    """The application of a gateway. It is served within the nursery that its trees commit in."""
    app = FastAPI(
        title="agentfuse gateway",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(Departures, hosts=parts.hosts)
    app.add_middleware(Edge, metrics=parts.metrics)
    app.add_middleware(Arrivals, proofs=parts.hosts.proofs)
    app.add_exception_handler(HTTPException, http_problem)
    settings, keyring = parts.settings, Keyring(parts.settings.keys)

    def tree_of(tenant: str) -> StoredTree:
        return parts.trees.get(tenant_owner(tenant), TENANT_FILES, settings.quota_of(tenant))

    bodies: _Bodies = {
        "spool": parts.spool,
        "limits": parts.limits,
        "max_request_bytes": settings.max_request_bytes,
    }
    asteroid = key_dependency(keyring, "asteroid", ASTEROID_HEADERS)
    uploads = Uploads(**bodies)
    app.include_router(temp_files.router(asteroid, temp_files.TempFiles(Staging(parts.store), uploads)))
    api = Asteroid(
        authenticate=asteroid,
        executions=parts.executions,
        hosts=parts.hosts,
        store=parts.store,
        links=blobs.FileLinks(parts.links, public_url=settings.public_url, presigns=settings.presign),
        uploads=uploads,
        limits=parts.limits,
        public_url=settings.public_url,
    )
    for router in api.routers():
        app.include_router(router)
    tenant = key_dependency(keyring, "tenant-files", TENANT_HEADERS)
    app.include_router(tenant_files.router(tenant, tenant_files.TenantFiles(tree_of, **bodies)))
    app.include_router(_shinzo(parts, key_dependency(keyring, "shinzo", SHINZO_HEADERS)))
    app.include_router(_page(parts, keyring, bodies))
    app.include_router(_links(parts))
    app.include_router(health.router(health.Readiness(parts.store, parts.hosts)))
    app.include_router(metrics.router(parts.metrics))
    _add_docs(app)
    return app


def _page(parts: Parts, keyring: Keyring, bodies: _Bodies) -> APIRouter:
    settings = parts.settings
    sessions = Sessions(parts.links.secret, keyring, is_https=settings.public_url.startswith("https://"))
    remembered = Remembered(parts.store, parts.agents, parts.limits)
    memories = (
        MemoryPages(remembered, parts.executions),
        HistoryPages(remembered, parts.executions),
        RewritePages(remembered),
    )
    executions = ExecutionPages(
        parts.executions, parts.regions, host=parts.hosts.id, closing=parts.closing, **bodies
    )
    return page_routes.router(sessions, memories, executions, parts.hosts)


def _links(parts: Parts) -> APIRouter:
    async def find(request: Request) -> Execution | None:
        place = blobs.place_of(request)
        return None if place is None else await parts.executions.get(place.organization, place.execution)

    async def tree_of(place: blobs.Place) -> FileTree:
        execution = await parts.executions.get(place.organization, place.execution)
        return parts.executions.tree(execution, place.region)

    authenticate = at_owner(parts.links.authenticate, parts.hosts, find)
    return blobs.router(authenticate, parts.store, parts.limits.downloads, tree_of)


def _shinzo(parts: Parts, authenticate: Authenticate) -> APIRouter:
    homes = Homes(parts.executions, [region.name for region in parts.regions])
    desk = Desk(
        filesystems=Filesystems(parts.regions, parts.trees.get, homes.of),
        agents=parts.agents,
        spool=parts.spool,
        limits=parts.limits,
        max_request_bytes=parts.settings.max_request_bytes,
        search_s=parts.settings.search_s,
    )
    return shinzo.router(at_owner(authenticate, parts.hosts, homes.find), desk)


def _add_docs(app: FastAPI) -> None:
    page = resources.files("agentfuse.gateway").joinpath("docs.html").read_bytes()
    script = page.partition(b"<script>")[2].partition(b"</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = (
        "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; connect-src 'self'; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})
