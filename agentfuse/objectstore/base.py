"""What every object store must do. Knows keys and bytes; no agents, no snapshots, no vendor.

The contract in one paragraph: the object at a key appears whole or not at all; ``put_if_absent`` has
exactly one winner; "absent" is said only by a store that answered, everything else is unknown and a
``StoreError``. All calls block and may come from any thread. Vendor exceptions never get out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from agentfuse.errors import UsageError

CHUNK_BYTES = 1024 * 1024
"""Size of the pieces in which contents travel when they are streamed."""

RESERVED_PREFIX = ".agentfuse-"
"""No component of a key starts like this: stores keep their own files under such names."""

MAX_KEY_BYTES = 1024
MAX_COMPONENT_BYTES = 255
MAX_PRESIGNED_S = 7 * 24 * 3600  # by the protocol of S3


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One object: ``modified_at`` is in seconds since the epoch, by the store's clock."""

    key: str
    size_bytes: int
    modified_at: float


class Source(Protocol):
    """Where the bytes of a large object come from: a binary file open for reading, or what acts like one."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; empty at the end. Raises ``AgentfuseError`` only, which ends the ``put``."""


class ObjectStore(Protocol):
    """A flat space of objects. Keys are checked with :func:`check_key`.

    Every method raises ``StoreError`` when the store failed, refused or cannot be reached.
    """

    @property
    def url(self) -> str:
        """The URL that opens this store again, without credentials."""

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        """Write an object, replacing one of the same key.

        A ``Source`` is read from where it stands and must give exactly ``size_bytes`` (required for it);
        otherwise nothing is written and ``StoreError`` is raised. When this returns the object is durable.
        """

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write an object only if the key has none, atomically; whether this call wrote it.

        Writers of one key must differ in their bytes (hold an id of their own), because an answer can get
        lost on the way. True is certain. False says that the key has an object, which may be this call's
        own: where a request was sent twice behind our backs, the second finds what the first wrote. So
        who is told False reads the key and looks for its id. After a ``StoreError``, too, it is unknown
        whether the object was written, and reading tells.
        """

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object, or of a range of it. A range beyond the end gives what there is.

        Raises ``ObjectNotFoundError`` when the store says there is none.
        """

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """As :meth:`get`, in pieces of at most ``CHUNK_BYTES``, for contents too large to hold.

        Errors come with the first piece or later; an object is never silently shortened by one.
        """

    def stat(self, key: str) -> ObjectStat:
        """Size and age of an object. Raises ``ObjectNotFoundError`` when the store says there is none."""

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """The objects whose keys start with ``prefix`` and follow ``start_after``, in key order.

        Lazy: at least 1,000 objects come of one request, and requests are made as the iterator is drawn.
        """

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> str | None:
        """A URL by which anybody may read an object for ``ttl_s`` seconds; None: this store has no such.

        It is served with the type and name given. No request is made, so the object need not be there. It
        says who signed it, and is as good as a key while it lasts: never log it. It ends earlier with the
        credentials that signed it, if those are temporary. Raises ``UsageError`` for more than 7 days.
        """

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def forget(self, key: str) -> None:
        """Drop what this host keeps of an object, whose bytes proved wrong or are wanted no more.

        Only a cache keeps any. The store is not asked, and this never fails.
        """

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        """Remove what broken-off writes left below ``prefix`` more than ``grace_s`` ago; how many there are.

        They are no objects, but take room. A write that is still under way after ``grace_s`` fails. A dry run
        only counts.
        """


def require_presignable(key: str, ttl_s: int) -> None:
    """Raise ``UsageError`` for what no URL may be made of."""
    check_key(key)
    if not 0 < ttl_s <= MAX_PRESIGNED_S:
        raise UsageError(f"a presigned URL lasts 1 to {MAX_PRESIGNED_S} seconds, not {ttl_s}")


def check_key(key: str) -> str:
    """Return ``key``, or raise ``UsageError`` when no store may be asked for it."""
    problem = _problem(key)
    if problem:
        raise UsageError(f"object key {key!r}: {problem}")
    return key


def _problem(key: str) -> str:
    if "\0" in key or key != key.encode(errors="replace").decode():
        return "contains NUL or is not valid Unicode"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"longer than {MAX_KEY_BYTES} bytes"
    for component in key.split("/"):
        if component in ("", ".", ".."):
            return "has an empty, '.' or '..' component"
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            return f"has a component of more than {MAX_COMPONENT_BYTES} bytes"
        if component.startswith(RESERVED_PREFIX):
            return f"has a component starting with {RESERVED_PREFIX!r}, which is the store's own"
    return ""
