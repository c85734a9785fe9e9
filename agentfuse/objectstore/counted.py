"""A store whose requests are counted and timed, whoever makes them, and what a cache before it spared.

Knows nothing of what becomes of the numbers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from agentfuse.errors import IntegrityError, ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStat, ObjectStore, Source
from agentfuse.timings import add_to, new_timing

_T = TypeVar("_T")

KINDS = ("put", "put_if_absent", "get", "stream", "stat", "list", "delete")


class Traffic:
    """Counts of what went to a store and to the cache before it. Any thread may add.

    ``timings`` (see ``agentfuse.timings``) has the requests that are done, by kind; ``errors`` those that
    failed, by kind and by ``not_found``, ``integrity`` or ``failed``. A hit is a read that needed no request.
    A listing counts once, however many pages it has.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.timings = {kind: new_timing() for kind in KINDS}
        self.errors: Counter[tuple[str, str]] = Counter()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.cache_hits = 0
        self.cache_misses = 0
        self.cache_bytes = 0

    def requested(self, kind: str, request: _Request) -> None:
        """A request is done, well or not."""
        with self._lock:
            add_to(self.timings[kind], request.spent_ns)
            self.bytes_sent += request.sent
            self.bytes_received += request.received
            if request.error:
                self.errors[kind, request.error] += 1

    def asked_cache(self, size_bytes: int, *, is_hit: bool) -> None:
        """A read asked the cache first, and ``size_bytes`` came from there."""
        with self._lock:
            self.cache_hits += is_hit
            self.cache_misses += not is_hit
            self.cache_bytes += size_bytes


@dataclass(slots=True)
class _Request:
    sent: int = 0
    received: int = 0
    spent_ns: int = 0
    error: str = ""


class CountedStore:
    """``store`` with its requests counted in ``traffic``."""

    def __init__(self, store: ObjectStore, traffic: Traffic) -> None:
        self._store = store
        self._traffic = traffic

    @property
    def url(self) -> str:
        """That of the store itself."""
        return self._store.url

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        """Write an object."""
        length = len(body) if isinstance(body, (bytes, bytearray)) else size_bytes or 0
        with self._counting("put", sent=length):
            self._store.put(key, body, size_bytes=size_bytes)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write an object only if the key has none."""
        with self._counting("put_if_absent", sent=len(body)):
            return self._store.put_if_absent(key, body)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object or of a range of it."""
        with self._counting("get") as request:
            data = self._store.get(key, offset=offset, length=length)
            request.received = len(data)
        return data

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same in pieces."""
        pieces = self._store.stream(key, offset=offset, length=length)
        for piece, request in self._drawn("stream", pieces):
            request.received += len(piece)
            yield piece

    def stat(self, key: str) -> ObjectStat:
        """Size and age of an object."""
        with self._counting("stat"):
            return self._store.stat(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """The objects under a prefix."""
        for found, _ in self._drawn("list", self._store.list(prefix, start_after=start_after)):
            yield found

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> str | None:
        """No request."""
        return self._store.presign(key, ttl_s, media_type=media_type, file_name=file_name)

    def delete(self, key: str) -> None:
        """Remove an object."""
        with self._counting("delete"):
            self._store.delete(key)

    def forget(self, key: str) -> None:
        """No request."""
        self._store.forget(key)

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        """Not counted: a mount never does this."""
        return self._store.remove_leftovers(prefix, grace_s, dry_run=dry_run)

    @contextlib.contextmanager
    def _counting(self, kind: str, *, sent: int = 0) -> Iterator[_Request]:
        request = _Request(sent)
        try:
            with _timing(request):
                yield request
        finally:
            self._traffic.requested(kind, request)

    def _drawn(self, kind: str, found: Iterator[_T]) -> Iterator[tuple[_T, _Request]]:
        """What is found, one by one; what its reader does in between is not the store's time."""
        request = _Request()
        try:
            while True:
                with _timing(request):
                    each = next(found, None)
                if each is None:
                    return
                yield each, request
        finally:
            self._traffic.requested(kind, request)


@contextlib.contextmanager
def _timing(request: _Request) -> Iterator[None]:
    begun = time.perf_counter_ns()
    try:
        yield
    except ObjectNotFoundError:
        request.error = "not_found"
        raise
    except IntegrityError:
        request.error = "integrity"
        raise
    except Exception:
        request.error = "failed"
        raise
    finally:
        request.spent_ns += time.perf_counter_ns() - begun
