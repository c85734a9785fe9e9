"""Ids of files: the same as long as a file keeps its path, on every gateway, with nothing to remember."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from uuid import NAMESPACE_OID, UUID, uuid5


def file_id(execution: str, region: str, path: bytes) -> str:
    """The id of a file of an execution, whose own id is a UUID: ``uuid5`` of region and path."""
    return _uuid5(UUID(execution), region.encode() + b"/" + path)


def shared_file_id(agent: str, path: bytes) -> str:
    """The id of a file of an agent's memory; an agent's id is any text."""
    return _uuid5(_namespace(agent), b"shared/" + path)


@lru_cache(maxsize=1024)
def _namespace(agent: str) -> UUID:
    return uuid5(NAMESPACE_OID, f"agentfuse agent {agent}")


def _uuid5(namespace: UUID, name: bytes) -> str:
    """As ``uuid.uuid5``, which takes only text, and a path may be any bytes."""
    digest = hashlib.sha1(namespace.bytes + name, usedforsecurity=False).digest()
    return str(UUID(bytes=digest[:16], version=5))
