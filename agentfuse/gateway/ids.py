"""Ids of files: the same as long as a file keeps its path, on every gateway, with nothing to remember."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from uuid import NAMESPACE_OID, UUID, uuid5

_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def file_id(execution: str, region: str, path: bytes) -> str:
    """The id of a file of an execution, whose own id is a UUID: ``uuid5`` of region and path."""
    return _uuid5(_uuid(execution), region.encode() + b"/" + path)


def shared_file_id(agent: str, path: bytes) -> str:
    """The id of a file of an agent's memory; an agent's id is any text."""
    return _uuid5(_namespace(agent), b"shared/" + path)


@lru_cache(maxsize=1024)
def _uuid(execution: str) -> bytes:
    return UUID(execution).bytes


@lru_cache(maxsize=1024)
def _namespace(agent: str) -> bytes:
    return uuid5(NAMESPACE_OID, f"agentfuse agent {agent}").bytes


def _uuid5(namespace: bytes, name: bytes) -> str:
    """As ``uuid.uuid5``, which takes only text, and a path may be any bytes; long lists have many."""
    digits = hashlib.sha1(namespace + name, usedforsecurity=False).hexdigest()
    variant = _VARIANT[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"
