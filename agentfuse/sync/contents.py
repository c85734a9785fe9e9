"""Reading one content from the store, verified: whole, in pieces, or as the source of an upload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from agentfuse.errors import IntegrityError, ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.entries import Entry, printable
from agentfuse.snapshots.layout import object_key


def read_content(store: ObjectStore, agent: str, entry: Entry) -> bytes:
    """The content of a file. Raises ``ObjectNotFoundError`` and ``IntegrityError``."""
    if not entry.size:
        return b""
    key = _key(agent, entry)
    content = store.get(key, offset=entry.offset, length=entry.size)
    verify(store, key, entry, len(content), hashlib.sha256(content).hexdigest())
    return content


def stream_content(store: ObjectStore, agent: str, entry: Entry) -> Iterator[bytes]:
    """The same in pieces. Of a wrong content the last piece never comes, but ``IntegrityError``."""
    if not entry.size:
        return
    key = _key(agent, entry)
    digest = hashlib.sha256()
    size = 0
    held = b""
    for piece in store.stream(key, offset=entry.offset, length=entry.size):
        if held:
            yield held
        digest.update(piece)
        size += len(piece)
        held = piece
    verify(store, key, entry, size, digest.hexdigest())
    yield held


def _key(agent: str, entry: Entry) -> str:
    if not entry.object:
        raise ObjectNotFoundError(
            f"no snapshot says where the store has the content of {printable(entry.path)!r} any more"
        )
    return object_key(agent, entry.object)


def verify(store: ObjectStore, key: str, entry: Entry, size: int, sha256: str) -> None:
    """Raise ``IntegrityError`` unless what was read of the object at ``key`` is what ``entry`` names.

    What this host keeps of a damaged object is dropped: once it is repaired, it must be seen to be.
    """
    if size == entry.size and sha256 == entry.sha256:
        return
    store.forget(key)
    problem = f"ends {entry.size - size} bytes early" if size != entry.size else "holds other bytes"
    raise IntegrityError(
        f"object {key}: {problem} for {printable(entry.path)!r} (bytes {entry.offset} to "
        f"{entry.offset + entry.size}, SHA-256 {entry.sha256})",
        hint="the object is damaged; earlier snapshots may not need it",
    )


class StoredSource:
    """A content of the store as what an upload reads from."""

    def __init__(self, store: ObjectStore, agent: str, entry: Entry) -> None:
        self._pieces = stream_content(store, agent, entry)
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; raises as :func:`stream_content` does."""
        if not self._rest:
            self._rest = next(self._pieces, b"")
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def close(self) -> None:
        """Nothing is held that needs it."""
