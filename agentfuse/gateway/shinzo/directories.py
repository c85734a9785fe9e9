"""Directories: list, make, remove."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import ExistsError, NotFoundError, WrongTypeError
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.downloads import timestamp
from agentfuse.gateway.edge import DeniedError, StatedError
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.shinzo.desk import (
    Desk,
    flag,
    kind_of,
    now,
    permissions_of,
    query_flag,
)
from agentfuse.gateway.shinzo.filesystem import USER
from agentfuse.gateway.shinzo.paths import absolute, path_of
from agentfuse.snapshots.entries import printable


class Directories:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list(self, request: Request) -> Response:
        """List a directory; without a path the agent's regions. Names are relative to it. What begins with a
        dot, or is in a directory that does, is hidden."""
        path = path_of(request)
        recursive, shows_hidden = query_flag(request, "recursive"), query_flag(request, "includeHidden")
        files = await self._desk.open(request)
        nodes = await files.list(path, recursive=recursive)
        start = len(path) + 1 if path else 0
        entries = [
            _entry(node, node.path[start:])
            for node in nodes
            if shows_hidden or not is_hidden(node.path[start:])
        ]
        return JsonAnswer({"path": absolute(path), "entries": entries})

    async def make(self, request: Request) -> Response:
        """Make a directory; with `recursive` those on the way, too. The agent begins to exist if need be."""
        path = path_of(request)
        body = await read_json(request, may_be_empty=True)
        recursive, mode = flag(body, "recursive"), permissions_of(body)
        if not path:
            raise ExistsError("'/' exists already")
        place = (await self._desk.open_to_create(request, path)).place(path)
        try:
            await place.tree.mkdir(place.path, creator=USER, parents=recursive)
        except NotFoundError as error:
            raise StatedError(f"{error.message}; recursive makes the directories on the way", 400) from error
        if mode is not None:
            await place.tree.annotate(place.path, creator=USER, mode=mode)
        return JsonAnswer({"path": absolute(path), "created_at": now()}, 201)

    async def remove(self, request: Request) -> Response:
        """Remove a directory; with `recursive`, in the body or the query, all that is in it, too."""
        path = path_of(request)
        recursive = query_flag(request, "recursive") or flag(
            await read_json(request, may_be_empty=True), "recursive"
        )
        place = (await self._desk.open(request)).place(path)
        if place.is_region:
            raise DeniedError(f"{printable(path)!r} is a region, which stays", 403)
        if not (await place.tree.stat(place.path)).is_dir:
            raise WrongTypeError(f"{printable(path)!r} is no directory", hint="delete it as a file")
        await place.tree.delete(place.path, creator=USER, recursive=recursive)
        return JsonAnswer({"message": "Directory deleted."})


def is_hidden(path: bytes) -> bool:
    """Whether a part of a path begins with a dot."""
    return path.startswith(b".") or b"/." in path


def _entry(node: Node, name: bytes) -> dict[str, Any]:
    return {
        "name": absolute(name)[1:],
        "type": kind_of(node),
        "size": node.size,
        "modified_at": timestamp(node.mtime_ns),
    }
