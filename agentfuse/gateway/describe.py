"""What the OpenAPI document says of routes. The routes read their requests themselves, so that who asks is
known before anything of a body is read; here is what they read and answer, for people and generators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

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


def route(
    answer: type[BaseModel] | str | None,
    *,
    errors: type[BaseModel] | str = "text/plain",
    codes: Iterable[int] = (),
    path: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
) -> dict[str, Any]:
    """Arguments of a route's decorator.

    ``answer``: a model, a media type, or None for 204. ``errors``: the same, of the statuses ``codes``.
    ``path`` and ``query``: parameters and what they are; ``required`` names those, and properties of
    ``body``, that must be there. A body with ``files`` is a form, another one JSON.
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
                "schema": NAME if where == "path" or name in needed else TEXT,
            }
            for where, name, what in parameters
        ]
    if body:
        media = "multipart/form-data" if "files" in body else "application/json"
        schema = {"type": "object", "properties": body, "required": sorted(needed & body.keys())}
        extra["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
    status = 204 if answer is None else 200
    return {
        "status_code": status,
        "response_model": None,
        "responses": {status: _response(answer), **{code: _response(errors) for code in codes}},
        "openapi_extra": extra,
    }


def _response(what: type[BaseModel] | str | None) -> dict[str, Any]:
    if what is None:
        return {"description": "Done"}
    if isinstance(what, str):
        schema = TEXT if what == "text/plain" else {"type": "string", "format": "binary"}
        return {"description": "", "content": {what: {"schema": schema}}}
    return {"model": what}
