"""Tenant Files, ``/api/v1/files``: the store that a tenant's clients upload to, list, and download from.

To the letter of the API's contract: everything is checked in the order 401, 400, 404, 413, 507, and an upload
is stored as a whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastapi import APIRouter, Depends, Request, Response

from agentfuse.errors import ExistsError, NotFoundError, QuotaExceededError, UsageError, WrongTypeError
from agentfuse.gateway import describe
from agentfuse.gateway.auth import DESCRIBED_BEARER, Authenticate, key_of
from agentfuse.gateway.bodies import JsonAnswer, TooLargeError, query_of, read_json, text_of
from agentfuse.gateway.downloads import send_file, timestamp
from agentfuse.gateway.edge import StatedError
from agentfuse.gateway.filetree import NewFile, Node, clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.multipart import Form, read_form
from agentfuse.gateway.spool import Spool
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.home.walk import join
from agentfuse.regions import Creator, MiB

MAX_FILE_BYTES = 50 * MiB

_USER = Creator.USER
_CHANGES = (400, 401, 413, 507)


def router(authenticate: Authenticate, api: TenantFiles) -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/api/v1/files",
        tags=["Tenant files"],
        dependencies=[Depends(authenticate), *DESCRIBED_BEARER],
    )
    described = partial(describe.route, errors=describe.TenantError)
    path: dict[str, Any] = {"query": {"path": "Relative path"}, "required": ["path"]}
    form = {"files": describe.FILES, "path": describe.TEXT}
    move, mkdir = dict.fromkeys(("src_path", "dst_path"), describe.NAME), {"path": describe.NAME}

    listed = described(describe.TenantListing, codes=(400, 401), query={"path": "Directory"})
    routes.get("", name="list_files", **listed)(api.list)
    downloaded = described("application/octet-stream", codes=(400, 401, 404), **path)
    routes.get("/download", name="download_file", **downloaded)(api.download)
    routes.head("/download", include_in_schema=False)(api.download)
    uploaded = described(describe.TenantUploaded, codes=_CHANGES, body=form, required=["files"])
    routes.post("/upload", name="upload_files", **uploaded)(api.upload)
    routes.delete("", name="delete_file", **described(None, codes=(400, 401), **path))(api.delete)
    moved = described(describe.Success, codes=_CHANGES, body=move, required=move)
    routes.post("/move", name="move_file", **moved)(api.move)
    made = described(describe.Success, codes=_CHANGES, body=mkdir, required=mkdir)
    routes.post("/mkdir", name="make_directory", **made)(api.mkdir)
    return routes


class TenantFiles:
    """What the routes do. ``tree_of`` gives a tenant's tree, ``spool`` is where bodies wait."""

    def __init__(
        self,
        tree_of: Callable[[str], StoredTree],
        *,
        spool: Path,
        limits: Limits,
        max_request_bytes: int,
    ) -> None:
        self._tree_of = tree_of
        self._spool = spool
        self._limits = limits
        self._max_request_bytes = max_request_bytes

    async def list(self, request: Request) -> Response:
        """List a directory; empty `path` for the root. A path that is no directory holds nothing."""
        path = _clean(query_of(request, "path"))
        try:
            nodes = await self._tree(request).list(path)
        except (NotFoundError, WrongTypeError):
            nodes = []
        return JsonAnswer({"files": [_listed(node) for node in nodes]})

    async def download(self, request: Request) -> Response:
        """Download a file. `Range`, `If-None-Match` and `If-Range` are understood."""
        path = _required(query_of(request, "path"), "path")
        try:
            file = await self._tree(request).open(path)
        except WrongTypeError as error:
            raise NotFoundError(error.message) from error
        return await send_file(request, file, "application/octet-stream")

    async def upload(self, request: Request) -> Response:
        """Upload files, 50 MiB each at most, under the prefix `path`: all of them or none."""
        tree = self._tree(request)
        with Spool(self._spool) as spool:
            form = await read_form(
                request,
                spool,
                self._limits.spool,
                files="files",
                max_file_bytes=MAX_FILE_BYTES,
                max_bytes=self._max_request_bytes,
            )
            files = _placed(form)
            if any(part.is_too_large for part in form.files):
                await _refuse_too_large(tree, files)
            nodes = await tree.put(files, creator=_USER)
        return JsonAnswer({"uploaded": [{"path": _text(n.path), "size": n.size} for n in nodes]})

    async def delete(self, request: Request) -> Response:
        """Delete a file, or an empty directory. One that is not there is no error."""
        path = _required(query_of(request, "path"), "path")
        with suppress(NotFoundError):
            await self._tree(request).delete(path, creator=_USER)
        return Response(status_code=204)

    async def move(self, request: Request) -> Response:
        """Move or rename a file or directory. Directories on the way are made; nothing is replaced."""
        body = await read_json(request)
        source, target = (_required(text_of(body, name), name) for name in ("src_path", "dst_path"))
        await _valid(self._tree(request).move(source, target, creator=_USER))
        return JsonAnswer({"success": True})

    async def mkdir(self, request: Request) -> Response:
        """Make a directory and those that it is in. One that is there already is no error."""
        path = _required(text_of(await read_json(request), "path"), "path")
        await _valid(self._tree(request).mkdir(path, creator=_USER, parents=True, exist_ok=True))
        return JsonAnswer({"success": True})

    def _tree(self, request: Request) -> StoredTree:
        return self._tree_of(key_of(request).tenant)


def _clean(text: str) -> bytes:
    if "\\" in text:
        raise UsageError("a path must not contain a backslash", hint="separate directories by '/'")
    return clean(text)


def _required(text: str, name: str) -> bytes:
    path = _clean(text)
    if not path:
        raise UsageError(f"{name} is missing", hint="name a file or directory")
    return path


def _placed(form: Form) -> list[NewFile]:
    """Where the files of a form go."""
    prefix = _clean(os.fsdecode(form.fields.get("path", b"")))
    if not form.files:
        raise UsageError("no files", hint="send them as parts named 'files' of multipart/form-data")
    files = []
    for part in form.files:
        name = _required(os.fsdecode(part.name), "the name of a file")
        files.append(NewFile(join(prefix, name), part.body))
    return files


async def _refuse_too_large(tree: StoredTree, files: list[NewFile]) -> NoReturn:
    """A file is too large; but a name that cannot be comes first."""
    with suppress(QuotaExceededError):
        await tree.check(files)
    raise TooLargeError(f"a file is larger than {MAX_FILE_BYTES:,} bytes")


async def _valid(change: Awaitable[None]) -> None:
    """What is missing, or there already, is a mistake of the request here."""
    try:
        await change
    except (NotFoundError, ExistsError) as error:
        raise StatedError(error.message, 400) from error


def _listed(node: Node) -> dict[str, Any]:
    listed = {"name": _text(node.name), "path": _text(node.path), "is_dir": node.is_dir}
    if not node.is_dir:
        listed |= {"size": node.size, "updated_at": timestamp(node.mtime_ns)}
    return listed


def _text(path: bytes) -> str:
    return os.fsdecode(path)
