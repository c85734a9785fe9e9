"""Paths as requests and answers of this API write them.

In a URL a path is read from what was sent, not from what the server made of it: an escaped slash is a slash,
an escaped dot a dot, bytes that are not UTF-8 stay what they are; then it is checked.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request

from agentfuse.errors import UsageError
from agentfuse.gateway.filetree import clean

_BEFORE_PATH = 6  # "", "v1", "agent", the id, "filesystem", the kind


class _AnyPath(Convertor[str]):
    """A rest of a path, line breaks included."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("anypath", _AnyPath())


def agent_of(request: Request) -> str:
    """The agent that a URL names."""
    return unquote(_parts(request)[3].decode("ascii", "replace"), errors="surrogateescape")


def path_of(request: Request) -> bytes:
    """The path that a URL ends with, empty for the root. Raises ``UsageError``."""
    return clean(unquote_to_bytes(b"/".join(_parts(request)[_BEFORE_PATH:])))


def path_in(body: dict[str, Any], *names: str, default: str | None = None) -> bytes:
    """The path that a JSON object has under the first of some names. Raises ``UsageError``."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise UsageError(f"{name} must be a string")
            return clean(value)
    if default is None:
        raise UsageError(f"{names[0]} is missing")
    return clean(default)


def absolute(path: bytes) -> str:
    """A path as answers have it: ``/workspace/x``; bytes that are not UTF-8 are lone surrogates."""
    return "/" + os.fsdecode(path)


def _parts(request: Request) -> list[bytes]:
    raw: bytes = request.scope["raw_path"]
    return raw.split(b"/")
