"""Links that need no key: ``/blobs/<id>?exp=<unix>&sig=<hmac>``, good for a quarter of an hour.

The id says what is meant, so that every gateway can serve it without asking anybody; the signature says that
a gateway made it. All gateways that sign with one secret serve each other's links.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio
from fastapi import APIRouter, Request, Response

from agentfuse.errors import ConfigError, EnvironmentProblem
from agentfuse.gateway import describe
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.downloads import send_file
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.home.mime import UNKNOWN
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.layout import check_owner

LINK_S = 15 * 60
_MIN_SECRET = 32
_DENIED = DeniedError("the link is not valid, or has expired", 403)


class _Blob(msgspec.Struct, frozen=True, array_like=True):
    """A content in the store, and what the file is called."""

    owner: str
    object: str
    offset: int
    size: int
    sha256: str
    mtime_ns: int
    name: bytes
    media_type: str


class Links:
    """Makes links and reads them. ``now`` is the time in seconds since the epoch."""

    def __init__(self, secret: bytes, now: Callable[[], float] = time.time) -> None:
        self.secret = secret
        self._now = now

    def make(self, file: StoredFile, media_type: str) -> str:
        """The path and query of a link to a file's content."""
        entry = file.entry
        place = (file.owner, entry.object, entry.offset, entry.size, entry.sha256, entry.mtime_ns)
        name = entry.path.rpartition(b"/")[2]
        packed = msgspec.msgpack.encode(_Blob(*place, name, media_type))
        blob_id = base64.urlsafe_b64encode(packed).decode().rstrip("=")
        expires = int(self._now()) + LINK_S
        return f"/blobs/{blob_id}?exp={expires}&sig={self._sign(blob_id, str(expires))}"

    def read(self, blob_id: str, expires: str, signature: str) -> tuple[str, Entry, str]:
        """Owner, entry and media type of a link. Raises ``DeniedError``."""
        expected = self._sign(blob_id, expires).encode()
        if not hmac.compare_digest(expected, signature.encode(errors="replace")):
            raise _DENIED
        if int(expires) <= self._now():
            raise _DENIED
        packed = base64.urlsafe_b64decode(blob_id + "=" * (-len(blob_id) % 4))
        blob = msgspec.msgpack.decode(packed, type=_Blob)
        entry = Entry(
            path=blob.name,
            type="file",
            mode=0,
            mtime_ns=blob.mtime_ns,
            size=blob.size,
            sha256=blob.sha256,
            object=blob.object,
            offset=blob.offset,
        )
        return check_owner(blob.owner), entry, blob.media_type

    def _sign(self, blob_id: str, expires: str) -> str:
        message = f"blob\n{blob_id}\n{expires}".encode(errors="replace")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def router(links: Links, store: ObjectStore, limiter: trio.CapacityLimiter) -> APIRouter:
    """The route of links."""
    routes = APIRouter(tags=["Links"])

    async def get_blob(request: Request) -> Response:
        """The content behind a link. It needs no key, and `Range` is understood."""
        expires, signature = query_of(request, "exp"), query_of(request, "sig")
        owner, entry, media_type = links.read(request.path_params["blob_id"], expires, signature)
        return await send_file(request, StoredFile(store, owner, entry, limiter), media_type)

    described = describe.route(
        UNKNOWN,
        codes=(400, 403),
        path={"blob_id": "What is meant"},
        query={"exp": "Until when, in Unix time", "sig": "The gateway's signature"},
        required=["exp", "sig"],
    )
    routes.get("/blobs/{blob_id}", **described)(get_blob)
    routes.head("/blobs/{blob_id}", include_in_schema=False)(get_blob)
    return routes


def secret_of(configured: Path | None, state: Path) -> bytes:
    """What links are signed with: of the file that is configured, else made once in the state directory."""
    if configured is None:
        return _own_secret(state / "gateway" / "blob.secret")
    try:
        secret = configured.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            [f"gateway.blob_secret_file: {configured}: {error.strerror}; correct the path"]
        ) from None
    if len(secret) < _MIN_SECRET:
        raise ConfigError(
            [f"gateway.blob_secret_file: fewer than {_MIN_SECRET} bytes; make some with openssl rand -hex 32"]
        )
    return secret


def _own_secret(path: Path) -> bytes:
    """The secret in a file that only its owner reads; whoever comes first makes it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(secrets.token_hex(32).encode())
                file.flush()
                os.fsync(fd)
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass  # another gateway of this host was faster: it is its secret
            finally:
                os.unlink(temporary)
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: {error.strerror}",
            hint="the state directory must be writable; choose another with --state",
        ) from error
