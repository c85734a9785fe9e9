"""What all operations of this API need: whose agent it is, its files, a place for contents on their way; and
how fields of requests are read.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio
from starlette.requests import Request

from agentfuse.errors import NotFoundError, UsageError
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.auth import key_of
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.downloads import timestamp
from agentfuse.gateway.filetree import Node
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.shinzo.filesystem import Filesystem, Filesystems
from agentfuse.gateway.shinzo.paths import absolute, agent_of

_PERMISSIONS = re.compile(r"0?[0-7]{3}", re.A)
_TRUE, _FALSE = ("true", "1"), ("false", "0", "")
TYPES = {"dir": "directory"}
"""What this API calls a kind otherwise."""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where requests come in. ``spool`` is the directory for contents on their way, ``search_s`` how long
    contents are searched."""

    filesystems: Filesystems
    agents: Agents
    spool: Path
    limits: Limits
    max_request_bytes: int
    search_s: float

    async def open(self, request: Request) -> Filesystem:
        """The files of the agent that a request names. Raises ``NotFoundError`` for an agent that does not
        exist, or is somebody else's."""
        organization, agent = key_of(request).organization, agent_of(request)
        find = partial(self.agents.find, organization, agent)
        await trio.to_thread.run_sync(find, limiter=self.limits.reads)
        return await self.filesystems.of(organization, agent)

    async def open_to_create(self, request: Request, path: bytes) -> Filesystem:
        """As :meth:`open`, but an agent that does not exist begins to, if it can have such a path."""
        organization, agent = key_of(request).organization, agent_of(request)
        try:
            return await self.open(request)
        except NotFoundError:
            self.filesystems.idle(agent).place(path)
            claim = partial(self.agents.claim, organization, agent)
            await trio.to_thread.run_sync(claim, limiter=self.limits.reads)
        return await self.filesystems.of(organization, agent)


def query_flag(request: Request, name: str) -> bool:
    """A yes or no of the query, no where it is not there. Raises ``UsageError``."""
    value = query_of(request, name).lower()
    if value not in _TRUE + _FALSE:
        raise UsageError(f"{name} must be true or false")
    return value in _TRUE


def flag(body: dict[str, Any], *names: str) -> bool:
    """A yes or no of a body, no where it is not there. Raises ``UsageError``."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if not isinstance(value, bool):
                raise UsageError(f"{name} must be true or false")
            return value
    return False


def number(body: dict[str, Any], *names: str) -> int | None:
    """A whole number of a body that is not negative, None where it is not there. Raises ``UsageError``."""
    for name in names:
        value = body.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} must be a whole number that is not negative")
            return value
    return None


def permissions_of(body: dict[str, Any]) -> int | None:
    """The permissions of a body, None where there are none. Raises ``UsageError``."""
    value = body.get("permissions")
    if value is None:
        return None
    if not isinstance(value, str) or not _PERMISSIONS.fullmatch(value):
        raise UsageError("permissions must be three octal digits, like 644")
    return int(value, 8)


def now() -> str:
    """The time."""
    return timestamp(time.time_ns())


def kind_of(node: Node) -> str:
    """What this API calls what it is."""
    return TYPES.get(node.type, node.type)


def written(node: Node, when: str) -> dict[str, Any]:
    """The answer to a content that was written; ``when``: what its time is called."""
    return {"path": absolute(node.path), "size": node.size, when: timestamp(node.mtime_ns)}
