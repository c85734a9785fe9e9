"""Who asks: ``GET /agents/v2/context`` and ``GET /users/v2/whoami``."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from agentfuse.gateway import describe
from agentfuse.gateway.asteroid import models
from agentfuse.gateway.auth import DESCRIBED_ASTEROID, Authenticate, key_of
from agentfuse.gateway.bodies import JsonAnswer


def router(authenticate: Authenticate) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Context"], dependencies=[Depends(authenticate), *DESCRIBED_ASTEROID])
    asked = describe.route(models.Context, errors=models.Error, codes=(401, 403))
    routes.get("/agents/v2/context", name="context_get", **asked)(_context)
    asked = describe.route(models.WhoAmI, errors=models.Error, codes=(401, 403))
    routes.get("/users/v2/whoami", name="whoami_get", **asked)(_whoami)
    return routes


async def _context(request: Request) -> Response:
    """The organization that the key is of."""
    key = key_of(request)
    organization = {"id": key.organization, "name": key.tenant}
    return JsonAnswer({"userId": key.id, "email": "", "organizations": [organization]})


async def _whoami(request: Request) -> Response:
    """What the key is."""
    key = key_of(request)
    return JsonAnswer(
        {
            "kind": "api_key",
            "id": key.id,
            "credential": "org_api_key",
            "organizationId": key.organization,
        }
    )
