"""Wrappers of object stores with the same interface: they count requests, fail on demand, or forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from agentfuse.errors import StoreError
from agentfuse.objectstore import ObjectStat, ObjectStore, Source
from agentfuse.objectstore.cache import CachedStore
from agentfuse.objectstore.local import LocalStore

PAGE = 1000


class CountingStore:
    """Counts requests by method; a list costs one for each page that is drawn."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.requests: Counter[str] = Counter()
        self.keys: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return self.inner.url

    def reset(self) -> None:
        self.requests.clear()
        self.keys.clear()

    def _count(self, method: str, key: str) -> None:
        self.requests[method] += 1
        self.keys.append((method, key))

    @property
    def puts(self) -> int:
        return self.requests["put"] + self.requests["put_if_absent"]

    @property
    def gets(self) -> int:
        return self.requests["get"] + self.requests["stream"]

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        self._count("put", key)
        self.inner.put(key, body, size_bytes=size_bytes)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        self._count("put_if_absent", key)
        return self.inner.put_if_absent(key, body)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._count("get", key)
        return self.inner.get(key, offset=offset, length=length)

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        self._count("stream", key)
        return self.inner.stream(key, offset=offset, length=length)

    def stat(self, key: str) -> ObjectStat:
        self._count("stat", key)
        return self.inner.stat(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        self._count("list", prefix)
        for drawn, found in enumerate(self.inner.list(prefix, start_after=start_after)):
            if drawn and drawn % PAGE == 0:
                self._count("list", prefix)
            yield found

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> str | None:
        return self.inner.presign(key, ttl_s, media_type=media_type, file_name=file_name)

    def delete(self, key: str) -> None:
        self._count("delete", key)
        self.inner.delete(key)

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        self._count("remove_leftovers", prefix)
        return self.inner.remove_leftovers(prefix, grace_s, dry_run=dry_run)

    def forget(self, key: str) -> None:
        self.inner.forget(key)


class FaultyStore(CountingStore):
    """Fails the requests that ``fails(number, method, key)`` names: "before" they take effect, or "after".

    Requests are numbered from 0. "after" is the answer that got lost.
    """

    def __init__(self, inner: ObjectStore, fails: Callable[[int, str, str], str | None]) -> None:
        super().__init__(inner)
        self.fails = fails
        self._lost_answer = False

    def _count(self, method: str, key: str) -> None:
        fault = self.fails(len(self.keys), method, key)
        super()._count(method, key)
        if fault == "before":
            raise StoreError(f"injected: {method} {key}")
        self._lost_answer = fault == "after"

    def _answer(self) -> None:
        if self._lost_answer:
            self._lost_answer = False
            raise StoreError("injected: the answer got lost")

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        super().put(key, body, size_bytes=size_bytes)
        self._answer()

    def put_if_absent(self, key: str, body: bytes) -> bool:
        won = super().put_if_absent(key, body)
        self._answer()
        return won


class ForgetfulStore(CachedStore):
    """A cache that writing does not fill, so that reading does."""

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        super().put(key, body, size_bytes=size_bytes)
        self.forget(key)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        won = super().put_if_absent(key, body)
        self.forget(key)
        return won


def local_store(root: Path) -> LocalStore:
    """A local store below a test's own directory."""
    return LocalStore(root / "store")
