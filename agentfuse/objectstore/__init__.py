"""Object stores: a contract, a local directory and S3 that fulfil it, and a probe that asks for proof."""

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

_LOCAL = "file:///absolute/path"


def open_store(url: str, *, is_known: bool = False, patience_s: float | None = None) -> ObjectStore:
    """The object store of a URL. Nothing is read or written yet: :func:`probe` does that.

    ``patience_s``: how long one waits for an answer, for small objects and callers that ask again themselves.

    Raises ``UsageError`` for a scheme there is none of, for a malformed URL, and for one that holds
    credentials. An ``s3://`` store may look for credentials now, over the network on a cloud's machine.
    """
    if url.startswith("s3:"):
        from agentfuse.objectstore.s3_url import parse_s3_url  # noqa: PLC0415  a mount loads one store's code

        location = parse_s3_url(url)
        from agentfuse.objectstore.s3 import S3Store  # noqa: PLC0415  25 MB
        from agentfuse.objectstore.s3_sdk import PATIENCE, Patience  # noqa: PLC0415

        if patience_s is None:
            return S3Store(location, PATIENCE)
        return S3Store(location, Patience(patience_s, patience_s, patience_s, attempts=1))
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UsageError(
            f"store {url!r}: {'no scheme' if not parts.scheme else f'unknown scheme {parts.scheme!r}'}",
            hint=f"stores there are: {_LOCAL}, s3://bucket/prefix?endpoint_url=…&region=…",
        )
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
        raise UsageError(f"store {url!r}: malformed", hint=f"a local store is written {_LOCAL}")
    from agentfuse.objectstore.local import LocalStore  # noqa: PLC0415

    return LocalStore(Path(os.path.normpath(path)), is_known=is_known)
