"""The routes: the guide's and the reference's, which differ in places."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.security import APIKeyHeader
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.gateway import describe
from agentfuse.gateway.auth import DESCRIBED_BEARER, Authenticate
from agentfuse.gateway.describe import NAME, TEXT
from agentfuse.gateway.shinzo import models
from agentfuse.gateway.shinzo.archives import Archives
from agentfuse.gateway.shinzo.creation import Creation
from agentfuse.gateway.shinzo.desk import Desk
from agentfuse.gateway.shinzo.directories import Directories
from agentfuse.gateway.shinzo.files import Files
from agentfuse.gateway.shinzo.metadata import Metadata
from agentfuse.gateway.shinzo.packing import FORMATS
from agentfuse.gateway.shinzo.search import Search
from agentfuse.gateway.shinzo.transfers import Transfers

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

_FLAG: dict[str, Any] = {"type": "boolean"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_TEXTS: dict[str, Any] = {"type": "array", "items": TEXT}
_OBJECTS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
_ENCODING: dict[str, Any] = {"enum": ["utf-8", "base64"]}
_PERMISSIONS: dict[str, Any] = {"type": "string", "pattern": "^0?[0-7]{3}$"}
_READS, _CHANGES = (400, 401, 403, 404, 409), (400, 401, 403, 404, 409, 413, 507)
_AGENT = {"agentId": "The agent"}
_PATH = _AGENT | {"path": "A path that begins with a region, like workspace/a.txt"}
_DESCRIBED = [
    *DESCRIBED_BEARER,
    Depends(APIKeyHeader(name="x-shinzo-api-key", scheme_name="ShinzoApiKey", auto_error=False)),
]


def router(authenticate: Authenticate, desk: Desk) -> APIRouter:
    """All of them."""
    routes = APIRouter(
        prefix="/v1/agent",
        tags=["Agents' files"],
        dependencies=[Depends(authenticate), *_DESCRIBED],
    )
    _add_files(routes, Files(desk))
    _add_directories(routes, Directories(desk))
    _add_metadata(routes, Metadata(desk))
    _add_transfers(routes, Transfers(desk))
    _add_archives(routes, Archives(desk))
    _add_search(routes, Search(desk))
    _add_creation(routes, Creation(desk))
    return routes


_described = partial(describe.route, errors=models.ShinzoError)


def _add(
    routes: APIRouter, method: str, places: Sequence[str], name: str, handler: Handler, **described: Any
) -> None:
    """One operation at each of its places, of which the first is in the document."""
    for place in places:
        routes.add_api_route(
            place,
            handler,
            methods=[method],
            name=name,
            include_in_schema=place == places[0],
            **described,
        )


def _add_files(routes: APIRouter, api: Files) -> None:
    add = partial(_add, routes)
    at = ["/{agentId}/filesystem/files/{path:anypath}"]
    content = {"content": TEXT, "encoding": _ENCODING}
    read = _described(
        models.FileContent,
        codes=_READS,
        path=_PATH,
        query={"encoding": "utf-8 or base64", "download": "true: the file itself"},
        schemas={"encoding": _ENCODING, "download": _FLAG},
    )
    read["responses"][200] |= {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
    add("GET", at, "read_agent_file", api.read, **read)
    created = content | {"overwrite": _FLAG, "permissions": _PERMISSIONS}
    create = _described(
        models.Created, status=201, codes=_CHANGES, path=_PATH, body=created, required=["content"]
    )
    add("POST", at, "create_agent_file", api.create, **create)
    update = _described(models.Updated, codes=_CHANGES, path=_PATH, body=content, required=["content"])
    add("PUT", at, "update_agent_file", api.update, **update)
    operations = {"enum": ["append", "prepend", "insert", "replace"]}
    patched = content | {"operation": operations, "position": _COUNT, "length": _COUNT}
    patch = _described(
        models.Updated, codes=_CHANGES, path=_PATH, body=patched, required=["operation", "content"]
    )
    add("PATCH", at, "patch_agent_file", api.patch, **patch)
    add(
        "DELETE",
        at,
        "delete_agent_file",
        api.delete,
        **_described(models.FileDeleted, codes=_READS, path=_PATH),
    )


def _add_directories(routes: APIRouter, api: Directories) -> None:
    add = partial(_add, routes)
    at, root = "/{agentId}/filesystem/directories/{path:anypath}", "/{agentId}/filesystem/directories"
    flags = {"recursive": _FLAG, "includeHidden": _FLAG}
    listed = _described(
        models.DirectoryListing,
        codes=_READS,
        path=_PATH,
        query={"recursive": "What is below, too", "includeHidden": "What begins with a dot, too"},
        schemas=flags,
    )
    add("GET", [at, root], "list_agent_directory", api.list, **listed)
    body = {"recursive": _FLAG, "permissions": _PERMISSIONS}
    made = _described(models.DirectoryMade, status=201, codes=_CHANGES, path=_PATH, body=body)
    add("POST", [at, root], "make_agent_directory", api.make, **made)
    removed = _described(
        models.DirectoryDeleted,
        codes=_READS,
        path=_PATH,
        query={"recursive": "With all that is in it"},
        schemas=flags,
    )
    add("DELETE", [at, root], "remove_agent_directory", api.remove, **removed)


def _add_metadata(routes: APIRouter, api: Metadata) -> None:
    at, root = "/{agentId}/filesystem/metadata/{path:anypath}", "/{agentId}/filesystem/metadata"
    described = _described(models.FileMetadata, codes=_READS, path=_PATH)
    _add(routes, "GET", [at, root], "get_agent_file_metadata", api.get, **described)
    body = {"permissions": _PERMISSIONS, "owner": TEXT, "group": TEXT, "tags": _TEXTS}
    described = _described(models.FileMetadata, codes=_CHANGES, path=_PATH, body=body)
    _add(routes, "PUT", [at], "set_agent_file_metadata", api.set, **described)
    _add(routes, "PATCH", [at], "change_agent_file_metadata", api.set, **described)


def _add_transfers(routes: APIRouter, api: Transfers) -> None:
    body = {"source": NAME, "destination": NAME, "overwrite": _FLAG, "operations": _OBJECTS}
    described = _described(models.Transferred, codes=_CHANGES, path=_AGENT, body=body)
    for verb, handler in (("copy", api.copy), ("move", api.move)):
        places = [f"/{{agentId}}/filesystem/{verb}", f"/{{agentId}}/filesystem/operations/{verb}"]
        _add(routes, "POST", places, f"{verb}_agent_files", handler, **described)


def _add_archives(routes: APIRouter, api: Archives) -> None:
    body: dict[str, Any] = {
        "paths": _TEXTS,
        "outputPath": NAME,
        "format": {"enum": list(FORMATS)},
        "compressionLevel": {"type": "integer", "minimum": 0, "maximum": 9},
        "overwrite": _FLAG,
    }
    packed = _described(
        models.Archived, status=201, codes=_CHANGES, path=_AGENT, body=body, required=["paths", "outputPath"]
    )
    at = "/{agentId}/filesystem/"
    _add(routes, "POST", [f"{at}archive", f"{at}archives"], "archive_agent_files", api.pack, **packed)
    body = {"archivePath": NAME, "outputPath": NAME, "overwrite": _FLAG}
    extracted = _described(
        models.Extracted, codes=_CHANGES, path=_AGENT, body=body, required=["archivePath", "outputPath"]
    )
    places = [f"{at}extract", f"{at}archives/extract"]
    _add(routes, "POST", places, "extract_agent_archive", api.extract, **extracted)


def _add_search(routes: APIRouter, api: Search) -> None:
    body = {
        "query": NAME,
        "type": {"enum": ["filename", "content", "both"]},
        "path": TEXT,
        "filePattern": TEXT,
        "caseSensitive": _FLAG,
        "maxResults": _COUNT | {"minimum": 1},
    }
    described = _described(models.SearchResults, codes=_READS, path=_AGENT, body=body, required=["query"])
    places = ["/{agentId}/filesystem/search", "/{agentId}/filesystem/operations/search"]
    _add(routes, "POST", places, "search_agent_files", api.search, **described)


def _add_creation(routes: APIRouter, api: Creation) -> None:
    body = {"id": TEXT, "initial_files": _OBJECTS}
    described = _described(models.AgentCreated, status=201, codes=_CHANGES, body=body)
    _add(routes, "POST", ["/create", ""], "create_agent", api.create, **described)
