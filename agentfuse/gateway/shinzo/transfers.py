"""Copies and moves, one or many in a request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import trio
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.client import AsyncHome
from agentfuse.control.registry import NoDaemonError
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    ChangedError,
    ExistsError,
    FrozenError,
    NotFoundError,
    UnflushedError,
    UsageError,
)
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.edge import problem_of
from agentfuse.gateway.filetree import NewFile, Node
from agentfuse.gateway.shinzo.desk import Desk, flag
from agentfuse.gateway.shinzo.filesystem import USER, Filesystem, Place
from agentfuse.gateway.shinzo.paths import absolute, path_in
from agentfuse.gateway.spool import Spool
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.snapshots.entries import printable

_MAX_OPERATIONS = 1000

Verb = Literal["copy", "move"]


class Transfers:
    """What the routes do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def copy(self, request: Request) -> Response:
        """Copy a file or directory; or several, with `operations`, each of which may fail by itself."""
        return await self._transfer(request, "copy")

    async def move(self, request: Request) -> Response:
        """Move or rename a file or directory; or several, with `operations`, each of which may fail by
        itself."""
        return await self._transfer(request, "move")

    async def _transfer(self, request: Request, verb: Verb) -> Response:
        body = await read_json(request)
        operations = body.get("operations")
        if operations is None:
            source, target = path_in(body, "source"), path_in(body, "destination")
            overwrite = flag(body, "overwrite")
            await self._one(await self._desk.open(request), verb, source, target, overwrite=overwrite)
            return JsonAnswer({"results": [_result(body, True)]})
        if not isinstance(operations, list) or not all(isinstance(each, dict) for each in operations):
            raise UsageError("operations must be a list of {source, destination, overwrite}")
        if not 0 < len(operations) <= _MAX_OPERATIONS:
            raise UsageError(f"there may be 1 to {_MAX_OPERATIONS} operations")
        files = await self._desk.open(request)
        return JsonAnswer({"results": [await self._attempted(files, verb, each) for each in operations]})

    async def _attempted(self, files: Filesystem, verb: Verb, operation: dict[str, Any]) -> dict[str, Any]:
        try:
            source, target = path_in(operation, "source"), path_in(operation, "destination")
            await self._one(files, verb, source, target, overwrite=flag(operation, "overwrite"))
        except AgentfuseError as error:
            problem = problem_of(error)
            if problem is None:
                raise
            return _result(operation, False) | {"error": problem.message}
        return _result(operation, True)

    async def _one(
        self, files: Filesystem, verb: Verb, source: bytes, target: bytes, *, overwrite: bool
    ) -> None:
        old, new = files.place(source), files.place(target)
        if old.region == new.region:
            work = old.tree.copy if verb == "copy" else old.tree.move
            await work(old.path, new.path, creator=USER, overwrite=overwrite)
            return
        if old.is_region or new.is_region:
            raise UsageError("a region cannot be moved, copied or replaced")
        top = await old.tree.stat(old.path)
        await _require_free(new, is_directory=top.is_dir, overwrite=overwrite)
        if files.home is not None:
            await _within(files.home, verb, old, new, overwrite=overwrite)
        else:
            await self._across(top, old, new, overwrite=overwrite, keeps=verb == "copy")

    async def _across(self, top: Node, old: Place, new: Place, *, overwrite: bool, keeps: bool) -> None:
        """To another region in the store: everything is there before anything is removed, and what somebody
        changed meanwhile is not."""
        nodes = [top, *(await old.tree.list(old.path, recursive=True) if top.is_dir else [])]
        others = [node for node in nodes if node.type not in ("file", "dir")]
        if others:
            raise UsageError(
                f"{printable(others[0].path)!r} is a {others[0].type}, which cannot leave its region",
                hint="copy what it leads to",
            )
        if not keeps and any(node.is_frozen for node in nodes):
            raise FrozenError(f"{printable(old.whole(top).path)!r} is frozen, or holds what is")
        with Spool(self._desk.spool) as spool:
            files = [await self._fetched(node, old, new, spool) for node in nodes if node.type == "file"]
            directories = [_moved(node, old, new) for node in nodes if node.is_dir]
            await new.tree.put(
                files,
                creator=USER,
                on_collision="replace" if overwrite else "refuse",
                directories=directories,
            )
        for node in nodes:
            if node.labels or (node.is_dir and node.mode != 0o755):
                target = _moved(node, old, new)
                await new.tree.annotate(target, creator=USER, mode=node.mode, labels=node.labels)
        if not keeps:
            assert isinstance(old.tree, StoredTree)  # none is live here
            try:
                await old.tree.delete_unchanged(nodes, creator=USER)
            except ChangedError as error:
                raise BusyError(f"{error.message}: it was copied, and both are there") from error

    async def _fetched(self, node: Node, old: Place, new: Place, spool: Spool) -> NewFile:
        limiter = self._desk.limits.spool
        opened = await old.tree.open(node.path)
        try:
            body = await trio.to_thread.run_sync(spool.begin, limiter=limiter)
            async for piece in opened.stream():
                await trio.to_thread.run_sync(body.write, piece, limiter=limiter)
        finally:
            await opened.aclose()
        return NewFile(_moved(node, old, new), body, node.mode)


def _moved(node: Node, old: Place, new: Place) -> bytes:
    return new.path + node.path[len(old.path) :]


async def _within(home: Path, verb: Verb, old: Place, new: Place, *, overwrite: bool) -> None:
    """To another region of a live home, in one step."""
    source, target = (f"{place.region}/{os.fsdecode(place.path)}" for place in (old, new))
    live = AsyncHome(home)
    work = live.copy if verb == "copy" else live.move
    try:
        await work(source, target, creator=USER, on_collision="replace" if overwrite else "refuse")
    except NoDaemonError as error:
        raise UnflushedError(error.message, hint="ask again a little later") from error


async def _require_free(place: Place, *, is_directory: bool, overwrite: bool) -> None:
    try:
        there = await place.tree.stat(place.path)
    except NotFoundError:
        return
    if there.is_dir or is_directory or not overwrite:
        raise ExistsError(f"{printable(place.whole(there).path)!r} exists already")


def _result(operation: dict[str, Any], success: bool) -> dict[str, Any]:
    """Of an operation; paths as answers have them where they are paths."""
    return {
        "source": _shown(operation, "source"),
        "destination": _shown(operation, "destination"),
        "success": success,
    }


def _shown(operation: dict[str, Any], name: str) -> Any:
    try:
        return absolute(path_in(operation, name))
    except UsageError:
        return operation.get(name)
