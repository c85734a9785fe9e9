"""Object stores: a contract, a local directory that fulfils it, and a probe that asks for proof."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from agentfuse.errors import ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore.base import ObjectStat, ObjectStore, Source
from agentfuse.objectstore.probe import probe

__all__ = [
    "ObjectNotFoundError",
    "ObjectStat",
    "ObjectStore",
    "Source",
    "StoreError",
    "open_store",
    "probe",
]

_SCHEMES = "file:///absolute/path"


def open_store(url: str) -> ObjectStore:
    """The object store of a URL. Nothing is read or written yet: :func:`probe` does that.

    Raises ``UsageError`` for a scheme there is none of, and for a malformed URL.
    """
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UsageError(
            f"store {url!r}: {'no scheme' if not parts.scheme else f'unknown scheme {parts.scheme!r}'}",
            hint=f"stores there are: {_SCHEMES}",
        )
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
        raise UsageError(f"store {url!r}: malformed", hint=f"a local store is written {_SCHEMES}")
    from agentfuse.objectstore.local import LocalStore  # noqa: PLC0415  a mount loads one store's code

    return LocalStore(Path(os.path.normpath(path)))
