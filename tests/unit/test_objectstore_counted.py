"""What is counted of a store's requests: each once, whether it succeeds or not, and what a cache spares."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from stores import FaultyStore, local_store

from agentfuse.errors import ObjectNotFoundError, StoreError
from agentfuse.objectstore.cache import CachedStore
from agentfuse.objectstore.counted import KINDS, CountedStore, Traffic
from agentfuse.timings import number_of


def counts(traffic: Traffic) -> dict[str, int]:
    return {kind: number for kind in KINDS if (number := number_of(traffic.timings[kind]))}


def test_every_request_and_its_bytes_count_once(tmp_path: Path) -> None:
    traffic = Traffic()
    store = CountedStore(local_store(tmp_path), traffic)
    store.put("a/x", b"12345")
    store.put("a/y", io.BytesIO(b"123"), size_bytes=3)
    assert store.put_if_absent("a/z", b"1")
    assert store.get("a/x") == b"12345"
    assert b"".join(store.stream("a/x", offset=1, length=3)) == b"234"
    assert store.stat("a/y").size_bytes == 3
    assert [found.key for found in store.list("a/")] == ["a/x", "a/y", "a/z"]
    store.delete("a/x")
    assert counts(traffic) == dict.fromkeys(KINDS, 1) | {"put": 2}
    assert (traffic.bytes_sent, traffic.bytes_received) == (9, 8)
    assert not traffic.errors


def test_a_request_that_fails_counts_as_what_it_is(tmp_path: Path) -> None:
    traffic = Traffic()
    down = FaultyStore(local_store(tmp_path), lambda number, *_: "before" if number else None)
    store = CountedStore(down, traffic)
    with pytest.raises(ObjectNotFoundError):
        store.get("nothing")
    with pytest.raises(StoreError):
        store.put("a", b"1")
    with pytest.raises(StoreError):
        list(store.list("a"))
    assert traffic.errors == {("get", "not_found"): 1, ("put", "failed"): 1, ("list", "failed"): 1}
    assert counts(traffic) == {"get": 1, "put": 1, "list": 1}


def test_a_hit_is_a_read_that_needed_no_request(tmp_path: Path) -> None:
    traffic = Traffic()
    local_store(tmp_path).put("o", b"0123456789")
    store = CachedStore(
        CountedStore(local_store(tmp_path), traffic),
        tmp_path / "cache",
        2**20,
        is_kept=lambda _: True,
        traffic=traffic,
    )
    store.get("o", offset=0, length=4)
    store.get("o", offset=0, length=4)
    store.get("o", offset=0, length=10)
    assert b"".join(store.stream("o", length=10)) == b"0123456789"
    assert (traffic.cache_hits, traffic.cache_misses, traffic.cache_bytes) == (2, 2, 4 + 4 + 10)
    assert (number_of(traffic.timings["get"]), traffic.bytes_received) == (2, 10)
