"""Agents begin to exist here, with their first files. What else an agent has is the platform's."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import trio
from starlette.requests import Request
from starlette.responses import Response

from agentfuse.errors import ExistsError, NotFoundError, QuotaExceededError, UsageError
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import JsonAnswer, read_json
from agentfuse.gateway.downloads import timestamp
from agentfuse.gateway.filetree import NewFile
from agentfuse.gateway.shinzo.desk import Desk
from agentfuse.gateway.shinzo.filesystem import USER, Place
from agentfuse.gateway.shinzo.paths import absolute, path_in
from agentfuse.gateway.shinzo.uploads import decode, encoding_of
from agentfuse.gateway.spool import Spool, Spooled

MAX_BYTES = 8 * 1024 * 1024
MAX_FILES = 1000


class Creation:
    """What the route does."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def create(self, request: Request) -> Response:
        """Create an agent, of an `id` of yours or a new one, with `initial_files`. Other fields are taken and
        ignored: how an agent runs is not the gateway's business."""
        body = await read_json(request, max_bytes=MAX_BYTES)
        agent = _id_of(body)
        organization, limits = key_of(request).organization, self._desk.limits
        with Spool(self._desk.spool) as spool:
            files = await trio.to_thread.run_sync(_initial_files, body, spool, limiter=limits.spool)
            await trio.to_thread.run_sync(self._refuse_known, organization, agent, limiter=limits.reads)
            by_region = self._placed(agent, files)
            for place, placed in by_region.values():
                await _require_room(place, placed)
            made = await trio.to_thread.run_sync(
                self._desk.agents.claim, organization, agent, limiter=limits.reads
            )
            for place, placed in by_region.values():
                await place.tree.put(placed, creator=USER)
        answer = {
            "id": agent,
            "agentId": agent,
            "created_at": timestamp(int(made.created_at * 1e9)),
            "initial_files": [{"path": absolute(path), "size": body.size} for path, body in files],
        }
        return JsonAnswer(answer, 201)

    def _refuse_known(self, organization: str, agent: str) -> None:
        try:
            self._desk.agents.find(organization, agent)
        except NotFoundError:
            return
        raise ExistsError(f"agent {agent} exists already")

    def _placed(
        self, agent: str, files: Sequence[tuple[bytes, Spooled]]
    ) -> dict[str, tuple[Place, list[NewFile]]]:
        filesystem = self._desk.filesystems.idle(agent)
        found: dict[str, tuple[Place, list[NewFile]]] = {}
        for path, body in files:
            place = filesystem.place(path)
            if place.is_region:
                raise UsageError(f"{absolute(path)} is a region, not a file")
            _, placed = found.setdefault(place.region, (place, []))
            placed.append(NewFile(place.path, body))
        return found


def _id_of(body: dict[str, Any]) -> str:
    for name in ("id", "agentId"):
        value = body.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise UsageError(f"{name} must be a string")
            return value
    return str(uuid.uuid4())


def _initial_files(body: dict[str, Any], spool: Spool) -> list[tuple[bytes, Spooled]]:
    files = body.get("initial_files")
    if files is None:
        return []
    if not isinstance(files, list) or len(files) > MAX_FILES or not all(isinstance(f, dict) for f in files):
        raise UsageError(
            f"initial_files must be a list of up to {MAX_FILES} objects with path, content and encoding"
        )
    found = []
    for file in files:
        path, content = path_in(file, "path"), file.get("content")
        if not path or not isinstance(content, str):
            raise UsageError("each of initial_files needs a path and a content")
        body_ = spool.begin()
        for piece in decode(iter([content]), encoding_of(file)):
            body_.write(piece)
        found.append((path, body_))
    if len({path for path, _ in found}) < len(found):
        raise UsageError("initial_files names a path twice")
    return found


async def _require_room(place: Place, files: Sequence[NewFile]) -> None:
    """Refuse before the agent exists what can never fit; how full somebody else's of that name is, is not
    told."""
    if sum(file.body.size for file in files) > (await place.tree.usage()).bytes_quota:
        raise QuotaExceededError(f"initial_files are larger than {place.region} may be")
