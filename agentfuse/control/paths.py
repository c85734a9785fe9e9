"""Paths of files in URLs and messages: a region's name, a slash, and the path in the region.

In URLs they are percent-encoded bytes; a slash in a path may be, too.
"""

from __future__ import annotations

import os
from urllib.parse import quote_from_bytes, unquote_to_bytes

from agentfuse.errors import UsageError
from agentfuse.home.walk import require_names

PATH_MAX = 4096
"""Bytes of a path for the kernel, with the NUL at its end."""


def split(path: str) -> tuple[str, bytes]:
    """(region, path in it, which may be empty) of a text like ``uploads/a.csv``. Raises ``UsageError``."""
    region, _, below = path.partition("/")
    if not region:
        raise UsageError(
            f"{path!a} names no region", hint="write it like uploads/a.csv, without a slash before it"
        )
    return region, checked(os.fsencode(below))


def checked(path: bytes) -> bytes:
    """The path in a region; empty is the region itself. Raises ``UsageError`` for what leads elsewhere."""
    if len(path) >= PATH_MAX:
        raise UsageError(
            f"a path has {len(path)} bytes, more than the {PATH_MAX - 1} that Linux takes",
            hint="name it by a shorter one",
        )
    require_names(path)
    return path


def decode(segment: str) -> bytes:
    """The bytes that a part of a URL stands for."""
    return unquote_to_bytes(segment)


def encode(region: str, path: bytes = b"") -> str:
    """``uploads/a%20b.csv``, to be appended to a URL."""
    name = quote_from_bytes(os.fsencode(region), safe="")
    return f"{name}/{quote_from_bytes(path)}" if path else name
