"""A store whose objects are kept on this host as they travel, so that the next run fetches nothing.

A wrapper with the interface of what it wraps. Only what never changes may be kept, and always in the end the
store decides: whether an object is there, how old it is, and what a list says is never answered from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from agentfuse.objectstore.base import CHUNK_BYTES, ObjectStat, ObjectStore, Source
from agentfuse.objectstore.counted import Traffic
from agentfuse.objectstore.ranges import Filling, RangeCache


class CachedStore:
    """``store`` with a cache of at most ``max_bytes`` in ``directory``, which other processes may share.

    ``is_kept`` says of a key whether its object is immutable; others are passed through. What is read and
    written is kept; a range that was kept, in one piece or several, is read without a request. The cache
    never makes an operation fail.
    """

    def __init__(
        self,
        store: ObjectStore,
        directory: Path,
        max_bytes: int,
        *,
        is_kept: Callable[[str], bool],
        traffic: Traffic | None = None,
    ) -> None:
        self.store = store
        self._traffic = traffic or Traffic()
        self._ranges = RangeCache(directory, max_bytes)
        self._is_kept = is_kept

    @property
    def url(self) -> str:
        """That of the store itself."""
        return self.store.url

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        """Write an object; it is kept once the store has accepted it."""
        if not self._is_kept(key):
            self.store.put(key, body, size_bytes=size_bytes)
            return
        name = self._name(key)
        length = len(body) if isinstance(body, (bytes, bytearray)) else size_bytes or 0
        with self._ranges.filling(name, 0, length) as filling:
            try:
                if isinstance(body, (bytes, bytearray)):
                    self.store.put(key, body)
                    filling.write(body)
                else:
                    self.store.put(key, _Tee(body, filling), size_bytes=size_bytes)
            finally:
                self._ranges.forget(name)  # an error leaves unknown which object there is now
            filling.keep()

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write an object only if the key has none; it is kept if this call wrote it."""
        is_written = self.store.put_if_absent(key, body)
        if is_written and self._is_kept(key):
            self._keep(self._name(key), 0, body)
        return is_written

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object or of a range of it, of which the store is asked for what is missing."""
        if not length or not self._is_kept(key):
            return self.store.get(key, offset=offset, length=length)
        name = self._name(key)
        here = self._ranges.read(name, offset, length)
        done = len(here)
        self._traffic.asked_cache(done, is_hit=done == length)
        if done == length:
            return here
        rest = self.store.get(key, offset=offset + done, length=length - done)
        self._keep(name, offset + done, rest)
        return here + rest if here else rest

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same in pieces."""
        if not length or not self._is_kept(key):
            yield from self.store.stream(key, offset=offset, length=length)
            return
        name = self._name(key)
        end = offset + length
        while offset < end and (piece := self._ranges.read(name, offset, min(CHUNK_BYTES, end - offset))):
            offset += len(piece)
            yield piece
        self._traffic.asked_cache(length - (end - offset), is_hit=offset == end)
        if offset == end:
            return
        with self._ranges.filling(name, offset, end - offset) as filling:
            for piece in self.store.stream(key, offset=offset, length=end - offset):
                filling.write(piece)
                yield piece
            filling.keep()

    def stat(self, key: str) -> ObjectStat:
        """Size and age of an object, as the store says."""
        return self.store.stat(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """The store's objects under a prefix."""
        return self.store.list(prefix, start_after=start_after)

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> str | None:
        """A URL of the store's own."""
        return self.store.presign(key, ttl_s, media_type=media_type, file_name=file_name)

    def delete(self, key: str) -> None:
        """Remove an object, here too."""
        try:
            self.store.delete(key)
        finally:
            self.forget(key)

    def forget(self, key: str) -> None:
        """Drop what is kept of an object."""
        if self._is_kept(key):
            self._ranges.forget(self._name(key))

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        """In the store; the cache looks after its own."""
        return self.store.remove_leftovers(prefix, grace_s, dry_run=dry_run)

    def _name(self, key: str) -> str:
        return hashlib.sha256(f"{self.url}\0{key}".encode(errors="replace")).hexdigest()[:32]

    def _keep(self, name: str, offset: int, data: bytes) -> None:
        with self._ranges.filling(name, offset, len(data)) as filling:
            filling.write(data)
            filling.keep()


def with_cache(
    store: ObjectStore,
    directory: Path,
    max_bytes: int,
    *,
    is_kept: Callable[[str], bool],
    traffic: Traffic | None = None,
) -> ObjectStore:
    """A :class:`CachedStore`; or the store itself if it is a directory of this host, or there is no room."""
    if not max_bytes or store.url.startswith("file:"):
        return store
    return CachedStore(store, directory, max_bytes, is_kept=is_kept, traffic=traffic)


def without_cache(store: ObjectStore) -> ObjectStore:
    """What :func:`with_cache` was given."""
    return store.store if isinstance(store, CachedStore) else store


class _Tee:
    """A source that is written into a cache as it is read."""

    def __init__(self, source: Source, filling: Filling) -> None:
        self._source = source
        self._filling = filling

    def read(self, size: int, /) -> bytes:
        """What the source gives."""
        piece = self._source.read(size)
        self._filling.write(piece)
        return piece
