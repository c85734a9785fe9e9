"""The OpenAPI 3.1 document of the control API, made from its routes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from agentfuse import __version__
from agentfuse.control.messages import Error, Nothing
from agentfuse.control.route import AnyRoute, Media

_REFS = "#/components/schemas/{name}"
_ABOUT = {
    "region": "The region's name; home for what is loose in the home.",
    "path": "The path in the region: percent-encoded bytes, slashes as they are or encoded.",
}


def document(routes: Iterable[AnyRoute]) -> dict[str, object]:
    """The document, as JSON values."""
    routes = list(routes)
    shapes: dict[type[msgspec.Struct], None] = {Error: None}
    for route in routes:
        answer = route.answer.line if isinstance(route.answer, Media) else route.answer
        shapes |= dict.fromkeys(shape for shape in (route.query, route.body, answer) if shape is not None)
    schemas, components = msgspec.json.schema_components(shapes, ref_template=_REFS)
    named = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, named, components)
    queries = {route.query.__name__ for route in routes}  # they are parameters, not bodies
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentfuse control API",
            "version": __version__,
            "description": "Over the Unix socket of a mount, for root and the daemon's user.",
        },
        "servers": [{"url": "http://agentfuse", "description": "the host is not looked at"}],
        "paths": paths,
        "components": {"schemas": {name: each for name, each in components.items() if name not in queries}},
    }


def _operation(
    route: AnyRoute, named: dict[type[msgspec.Struct], dict[str, Any]], components: dict[str, Any]
) -> dict[str, object]:
    summary, _, description = (route.handler.__doc__ or "").partition("\n\n")
    operation: dict[str, object] = {
        "operationId": _id_of(route),
        "summary": summary,
        "parameters": [*_path_parameters(route), *_query_parameters(components[route.query.__name__])],
        "responses": {
            str(route.status): {"description": "It is done.", "content": _content(route.answer, named)},
            "default": {
                "description": "It was refused, or has failed.",
                "content": {"application/json": {"schema": named[Error]}},
            },
        },
    }
    if description:
        operation["description"] = " ".join(description.split())
    if route.takes_content:
        operation["requestBody"] = {"required": True, "content": {"application/octet-stream": {}}}
    elif route.body is not Nothing:
        operation["requestBody"] = {"content": {"application/json": {"schema": named[route.body]}}}
    return operation


def _id_of(route: AnyRoute) -> str:
    words = [word.strip("{}") for word in route.path.removeprefix("/v1/").replace(".", "_").split("/")]
    return "_".join([route.method.lower(), *(word.replace("-", "_") for word in words)])


def _path_parameters(route: AnyRoute) -> list[dict[str, object]]:
    return [
        {"name": name, "in": "path", "required": True, "description": about, "schema": {"type": "string"}}
        for name, about in _ABOUT.items()
        if f"{{{name}}}" in route.path
    ]


def _query_parameters(schema: dict[str, Any]) -> list[dict[str, object]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": shape}
        for name, shape in schema["properties"].items()
    ]


def _content(
    answer: type[msgspec.Struct] | Media, named: dict[type[msgspec.Struct], dict[str, Any]]
) -> dict[str, object]:
    if not isinstance(answer, Media):
        return {"application/json": {"schema": named[answer]}}
    if answer.line is None:
        return {name: {} for name in answer.types}
    # OpenAPI 3.1 has no word for one JSON value a line: the schema is that of each.
    return {name: {"schema": named[answer.line]} for name in answer.types}
