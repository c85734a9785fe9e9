"""The table of all routes, and the one of a request."""

from __future__ import annotations

from agentfuse.control import activity_routes, file_routes, mount_routes
from agentfuse.control.contract import MountControl
from agentfuse.control.messages import AnyQuery, Nothing, OpenApi
from agentfuse.control.openapi import document
from agentfuse.control.route import Answer, AnyRoute, Call, Reply, Route, path_of
from agentfuse.control.transport import RequestError


async def _openapi(control: MountControl, call: Call[AnyQuery, Nothing]) -> Reply:
    """This description."""
    return Answer(document(ROUTES))


ROUTES: tuple[AnyRoute, ...] = (
    Route("GET", "/v1/openapi.json", _openapi, OpenApi),
    *mount_routes.ROUTES,
    *activity_routes.ROUTES,
    *file_routes.ROUTES,
)


def find(method: bytes, target: bytes) -> AnyRoute:
    """The route of a request. Raises ``RequestError``."""
    path = path_of(target)
    here = [route for route in ROUTES if route.match(path) is not None]
    if not here:
        there_are = ", ".join(dict.fromkeys(route.path for route in ROUTES))
        raise RequestError(404, "no such path", code="not_found", hint=f"there are {there_are}")
    for route in here:
        if route.method == method.decode("ascii", "replace"):
            return route
    allowed = ", ".join(route.method for route in here)
    raise RequestError(
        405, f"this path takes {allowed} only", code="method_not_allowed", headers=[("Allow", allowed)]
    )
