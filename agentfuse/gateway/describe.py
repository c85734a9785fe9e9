"""What the OpenAPI document says of routes. The routes read their requests themselves, so that who asks is
known before anything of a body is read; here is what they read and answer, for people and generators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel

FILES: dict[str, Any] = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
TEXT: dict[str, Any] = {"type": "string"}
NAME: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 4095}


class TenantNode(BaseModel):
    """A file; of a directory only name, path and is_dir."""

    name: str
    path: str
    is_dir: bool
    size: int | None = None
    updated_at: str | None = None


class TenantListing(BaseModel):
    """What a directory holds."""

    files: list[TenantNode]


class TenantPlaced(BaseModel):
    """A file that was uploaded."""

    path: str
    size: int


class TenantUploaded(BaseModel):
    """The files that were uploaded."""

    uploaded: list[TenantPlaced]


class TenantError(BaseModel):
    """What went wrong."""

    error: str


class Success(BaseModel):
    """It is done."""

    success: Literal[True]


class TempFile(BaseModel):
    """A staged file."""

    id: str
    name: str


class TempFiles(BaseModel):
    """Staged files, in the order they came."""

    tempFiles: list[TempFile]  # noqa: N815  # the API's word


class Ready(BaseModel):
    """Whether requests can be served, and if not why."""

    ready: bool
    problem: str | None = None


_SEE_OTHER = 303

Answer = type[BaseModel] | type[list[Any]] | str | None
"""A model, a list of one, a media type, or None for no body at all."""


_OF_ANY: dict[int | str, dict[str, Any]] = {
    408: {"description": "The body does not come, or takes too long"},
    431: {"description": "The path, the query or the headers are too long"},
    502: {"description": "The object store failed"},
    503: {"description": "The gateway cannot do it now, ask again"},
}


def route(
    answer: Answer,
    *,
    status: int | None = None,
    also: Iterable[int] = (),
    errors: type[BaseModel] | str = "text/plain",
    codes: Iterable[int] = (),
    path: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    body: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
) -> dict[str, Any]:
    """Arguments of a route's decorator.

    ``answer`` comes with ``status``, by default 200, or 204 for None, and with those in ``also``. ``errors``:
    a model or media type, of the statuses ``codes``. ``path`` and ``query``: parameters and what they are;
    ``schemas``: of those that are not any text; ``required`` names those, and properties of
    ``body``, that must be there. A body with ``files`` is a form, another one JSON. 303 is a redirect.
    """
    needed = set(required)
    extra: dict[str, Any] = {}
    parameters = [("path", *each) for each in (path or {}).items()]
    parameters += [("query", *each) for each in (query or {}).items()]
    if parameters:
        extra["parameters"] = [
            {
                "name": name,
                "in": where,
                "required": where == "path" or name in needed,
                "description": what,
                "schema": (schemas or {}).get(name, NAME if where == "path" or name in needed else TEXT),
            }
            for where, name, what in parameters
        ]
    if body:
        media = "multipart/form-data" if "files" in body else "application/json"
        if media == "application/json":  # null is as good as nothing
            body = {k: v if k in needed else {"anyOf": [v, {"type": "null"}]} for k, v in body.items()}
        schema = {"type": "object", "properties": body, "required": sorted(needed & body.keys())}
        extra["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
    status = status or (204 if answer is None else 200)
    answers = {each: _response(answer) for each in (status, *also)}
    if status == _SEE_OTHER:
        location = {"Location": {"schema": {"type": "string", "format": "uri"}}}
        answers[status] = {"description": "Where it is", "headers": location}
    return {
        "status_code": status,
        "response_model": None,
        "response_class": Response,  # of no type: what is answered is said below
        "responses": _OF_ANY | answers | {code: _response(errors) for code in codes},
        "openapi_extra": extra,
    }


def _response(what: Answer) -> dict[str, Any]:
    if what is None:
        return {"description": "Done"}
    if isinstance(what, str):
        schema = TEXT if what == "text/plain" else {"type": "string", "format": "binary"}
        return {"description": "", "content": {what: {"schema": schema}}}
    return {"model": what}
