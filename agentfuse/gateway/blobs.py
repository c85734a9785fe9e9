"""Links that need no key: ``/blobs/<id>?exp=<unix>&sig=<hmac>``, good for a quarter of an hour.

The id says what is meant, a content in the store or the place of a file of an execution, so that no gateway
remembers anything; the signature says that one made it. All gateways that sign with one secret serve each
other's links.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio
from fastapi import APIRouter, Depends, Request, Response

from agentfuse.admission import Gateway
from agentfuse.errors import BusyError, EnvironmentProblem, NotFoundError, WrongTypeError
from agentfuse.gateway import describe
from agentfuse.gateway.addresses import base_url
from agentfuse.gateway.auth import Authenticate
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.downloads import send_file
from agentfuse.gateway.edge import DeniedError
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.filetree import FileTree, Node
from agentfuse.gateway.secret_files import secret_in
from agentfuse.gateway.storedtree import StoredFile
from agentfuse.home.mime import UNKNOWN, type_of
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.layout import check_owner

LINK_S = 15 * 60
_DENIED = DeniedError("the link is not valid, or has expired", 403)


class Blob(msgspec.Struct, frozen=True, array_like=True, tag="content"):
    """A content in the store, and what the file is called."""

    owner: str
    object: str
    offset: int
    size: int
    sha256: str
    mtime_ns: int
    name: bytes
    media_type: str


class Place(msgspec.Struct, frozen=True, array_like=True, tag="place"):
    """A file of an execution, whatever it holds when it is fetched."""

    organization: str
    execution: str
    region: str
    path: bytes
    media_type: str


Meant = Blob | Place
TreeOf = Callable[[Place], Awaitable[FileTree]]


class Links:
    """Makes links and reads them: paths with a query. ``now`` is the time in seconds since the epoch."""

    def __init__(self, secret: bytes, now: Callable[[], float] = time.time) -> None:
        self.secret = secret
        self._now = now

    def make(self, file: StoredFile, media_type: str) -> str:
        """A link to a stored file's content, as it is."""
        entry = file.entry
        place = (file.owner, entry.object, entry.offset, entry.size, entry.sha256, entry.mtime_ns)
        return self.to(Blob(*place, entry.path.rpartition(b"/")[2], media_type))

    def to(self, meant: Meant) -> str:
        """A link to a file of an execution, by its place."""
        blob_id = base64.urlsafe_b64encode(msgspec.msgpack.encode(meant)).decode().rstrip("=")
        expires = int(self._now()) + LINK_S
        return f"/blobs/{blob_id}?exp={expires}&sig={self._sign(blob_id, str(expires))}"

    def read(self, blob_id: str, expires: str, signature: str) -> Meant:
        """What a link means. Raises ``DeniedError``."""
        expected = self._sign(blob_id, expires).encode()
        if not hmac.compare_digest(expected, signature.encode(errors="replace")):
            raise _DENIED
        if int(expires) <= self._now():
            raise _DENIED
        packed = base64.urlsafe_b64decode(blob_id + "=" * (-len(blob_id) % 4))
        meant: Meant = _MEANT.decode(packed)
        return meant

    async def authenticate(self, request: Request) -> None:
        """A dependency: the link is good; see :func:`place_of`. Raises ``DeniedError``."""
        expires, signature = query_of(request, "exp"), query_of(request, "sig")
        request.state.meant = self.read(request.path_params["blob_id"], expires, signature)

    def _sign(self, blob_id: str, expires: str) -> str:
        message = f"blob\n{blob_id}\n{expires}".encode(errors="replace")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def place_of(request: Request) -> Place | None:
    """The place that an authenticated link names; None: it is to a content in the store."""
    meant: Meant = request.state.meant
    return meant if isinstance(meant, Place) else None


def router(
    authenticate: Authenticate, store: ObjectStore, limiter: trio.CapacityLimiter, tree_of: TreeOf
) -> APIRouter:
    """The route of links. ``tree_of``: the files of an execution, where they are now."""
    routes = APIRouter(tags=["Links"], dependencies=[Depends(authenticate)])

    async def get_blob(request: Request) -> Response:
        """The content behind a link. It needs no key, and `Range` is understood."""
        meant: Meant = request.state.meant
        if isinstance(meant, Place):
            try:
                opened = await (await tree_of(meant)).open(meant.path)
            except WrongTypeError as error:
                raise NotFoundError(error.message) from error
            return await send_file(request, opened, meant.media_type)
        return await send_file(request, _stored(meant, store, limiter), meant.media_type)

    described = describe.route(
        UNKNOWN,
        codes=(400, 403, 404),
        path={"blob_id": "What is meant"},
        query={"exp": "Until when, in Unix time", "sig": "The gateway's signature"},
        required=["exp", "sig"],
    )
    routes.get("/blobs/{blob_id}", **described)(get_blob)
    routes.head("/blobs/{blob_id}", include_in_schema=False)(get_blob)
    return routes


def _stored(blob: Blob, store: ObjectStore, limiter: trio.CapacityLimiter) -> StoredFile:
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
    return StoredFile(store, check_owner(blob.owner), entry, limiter)


class FileLinks:
    """Absolute URLs of files that need no key. ``presigns``: some may be the object store's own."""

    def __init__(self, links: Links, *, public_url: str, presigns: bool) -> None:
        self._links = links
        self._public_url = public_url
        self._presigns = presigns

    async def urls(
        self, request: Request, execution: Execution, region: str, nodes: Sequence[Node]
    ) -> list[str]:
        """Of files of an execution, in their order; whatever they hold when they are fetched."""
        places = (
            Place(execution.organization, execution.id, region, node.path, type_of(node.path, None))
            for node in nodes
        )
        return [self.of_place(request, place) for place in places]

    def of_place(self, request: Request, place: Place) -> str:
        """Of a file of an execution, whether it is there or not; needs to ask nobody."""
        return base_url(request, self._public_url) + self._links.to(place)

    async def url(
        self,
        request: Request,
        tree: FileTree,
        node: Node,
        *,
        execution: Execution | None = None,
        region: str = "shared",
    ) -> str:
        """Of one file: of what it holds now if that is in the store, else as :meth:`urls`.

        ``execution`` is the one whose region it is in, None for a tree without one, which is stored.
        """
        file = await tree.open(node.path)
        try:
            if isinstance(file, StoredFile):
                return self._presigned(file) or base_url(request, self._public_url) + self._links.make(
                    file, type_of(node.path, None)
                )
        finally:
            await file.aclose()
        if execution is None:
            raise BusyError("the file is in a home since a moment ago", hint="ask again")
        return (await self.urls(request, execution, region, [node]))[0]

    def _presigned(self, file: StoredFile) -> str | None:
        """The store's own URL, of a content that is the whole of an object."""
        return file.presign(LINK_S, type_of(file.entry.path, None)) if self._presigns else None


def secret_of(settings: Gateway, state: Path) -> bytes:
    """What links are signed with: of the file that is configured, else the cluster's, else made once in the
    state directory. Raises ``ConfigError``."""
    if settings.blob_secret_file is not None:
        return secret_in(settings.blob_secret_file, "blob_secret_file")
    if settings.cluster_secret_file is not None:
        cluster = secret_in(settings.cluster_secret_file, "cluster_secret_file")
        return hmac.new(cluster, b"links", hashlib.sha256).hexdigest().encode()
    return _own_secret(state / "gateway" / "blob.secret")


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


# msgspec learns a type at its first use; two threads at once would crash the process.
_MEANT = msgspec.msgpack.Decoder(Meant)
