"""The contract of object stores, one suite for every store there is."""

from __future__ import annotations

import io
import multiprocessing
import random
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from s3_servers import STORES
from stores import CountingStore, FaultyStore, ForgetfulStore

from agentfuse.errors import ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore import ObjectStore, open_store, probe
from agentfuse.objectstore.cache import CachedStore
from agentfuse.objectstore.counted import CountedStore, Traffic

WRAPPERS: dict[str, Callable[[ObjectStore, Path], ObjectStore]] = {
    "plain": lambda store, _: store,
    "counted": lambda store, _: CountedStore(store, Traffic()),
    "counting": lambda store, _: CountingStore(store),
    "faulty": lambda store, _: FaultyStore(store, lambda *_: None),
    "cached": lambda store, path: CachedStore(store, path / "cache", 2**30, is_kept=lambda _: True),
    "cached-by-reading": lambda store, path: ForgetfulStore(
        store, path / "cache", 2**30, is_kept=lambda _: True
    ),
}
# What wraps a store does the same to each: it is tried on the fastest one.
OPENED = [("local", wrapper) for wrapper in WRAPPERS] + [
    (name, "plain") for name in STORES if name != "local"
]


@pytest.fixture(params=OPENED, ids="-".join)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    name, wrapper = request.param
    return WRAPPERS[wrapper](open_store(STORES[name](request)), tmp_path)


def keys(store: ObjectStore, prefix: str = "", **options: str) -> list[str]:
    return [found.key for found in store.list(prefix, **options)]


def test_its_url_opens_it_again(store: ObjectStore) -> None:
    store.put("a/b", b"content")
    assert open_store(store.url).get("a/b") == b"content"


def test_a_presigned_url_gives_anybody_just_the_object_under_its_name(store: ObjectStore) -> None:
    store.put("dir/größe 1", b"content")
    url = store.presign("dir/größe 1", 60, media_type="text/csv", file_name='ü, "1".csv'.encode())
    with pytest.raises(UsageError, match="presigned"):
        store.presign("a", 8 * 24 * 3600)
    if url is None:
        assert store.url.startswith("file:")
        return
    answer = httpx.get(url, headers={"X-Api-Key": "of somebody", "Accept-Encoding": "gzip"}, timeout=30)
    assert (answer.status_code, answer.content) == (200, b"content")
    assert answer.headers["content-length"] == "7"
    assert "content-encoding" not in answer.headers
    assert answer.headers["content-type"] == "text/csv"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%BC%2C%20%221%22.csv"
    assert httpx.get(url.replace("gr", "Gr"), timeout=30).status_code in (403, 404)


def test_a_store_never_written_to_is_empty(store: ObjectStore) -> None:
    assert keys(store) == []
    with pytest.raises(ObjectNotFoundError):
        store.get("a")
    store.delete("a")


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 7])
def test_what_is_put_comes_back(store: ObjectStore, size: int) -> None:
    body = random.Random(size).randbytes(size)
    store.put("bytes", body)
    store.put("bytearray", bytearray(body))
    store.put("source", io.BytesIO(body), size_bytes=size)
    for key in ("bytes", "bytearray", "source"):
        assert store.get(key) == body
        assert b"".join(store.stream(key)) == body
        assert store.stat(key).size_bytes == size


def test_put_replaces_and_stat_tells_the_age(store: ObjectStore) -> None:
    store.put("a", b"old")
    before = store.stat("a")
    store.put("a", b"newer")
    after = store.stat("a")
    assert store.get("a") == b"newer"
    assert (after.key, after.size_bytes) == ("a", 5)
    assert after.modified_at >= before.modified_at > 1.5e9


@pytest.mark.parametrize("size", [4, 6])
def test_a_source_of_another_size_writes_nothing(store: ObjectStore, size: int) -> None:
    store.put("a", b"old")
    with pytest.raises(StoreError, match="gave"):
        store.put("a", io.BytesIO(b"12345"), size_bytes=size)
    assert store.get("a") == b"old"
    assert keys(store) == ["a"]


def test_a_source_that_fails_writes_nothing(store: ObjectStore) -> None:
    class Broken:
        def read(self, size: int, /) -> bytes:
            raise UsageError("the file changed")

    with pytest.raises(UsageError, match="the file changed"):
        store.put("a", Broken(), size_bytes=3)
    assert keys(store) == []


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 3, b"012"),
        (4, 2, b"45"),
        (7, None, b"789"),
        (8, 10, b"89"),
        (10, 1, b""),
        (99, 5, b""),
        (3, 0, b""),
    ],
)
def test_ranges(store: ObjectStore, offset: int, length: int | None, expected: bytes) -> None:
    store.put("digits", b"0123456789")
    for _ in range(2):
        assert store.get("digits", offset=offset, length=length) == expected
        assert b"".join(store.stream("digits", offset=offset, length=length)) == expected
    store.forget("digits")
    assert b"".join(store.stream("digits", offset=offset, length=length)) == expected


def test_absent_objects_are_said_to_be_absent(store: ObjectStore) -> None:
    store.put("there", b"")
    for ask in (store.get, store.stat, lambda key: list(store.stream(key))):
        with pytest.raises(ObjectNotFoundError, match="missing/object"):
            ask("missing/object")


def test_delete_removes_and_may_be_repeated(store: ObjectStore) -> None:
    store.put("a/b", b"1")
    store.put("a/c", b"2")
    store.delete("a/b")
    store.delete("a/b")
    assert keys(store) == ["a/c"]


def test_put_if_absent_keeps_what_is_there(store: ObjectStore) -> None:
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.get("a/b") == b"first"
    store.delete("a/b")
    assert store.put_if_absent("a/b", b"third")


def test_lists_are_in_order_of_the_whole_key(store: ObjectStore) -> None:
    wanted = ["a", "b-c", "b.d/x", "b/0", "b/c/d", "b/c0", "b0", "ba/z", "grün/ß", "z"]
    for key in random.Random(1).sample(wanted, len(wanted)):
        store.put(key, key.encode())
    assert keys(store) == wanted == sorted(wanted)
    assert keys(store, "b/") == ["b/0", "b/c/d", "b/c0"]
    assert keys(store, "b") == ["b-c", "b.d/x", "b/0", "b/c/d", "b/c0", "b0", "ba/z"]
    assert keys(store, "b/c") == ["b/c/d", "b/c0"]
    assert keys(store, "nothing/here/") == []
    for start_after in [*wanted, "b", "b/", "b/c/", "b/c/dd", "zz"]:
        assert keys(store, start_after=start_after) == [key for key in wanted if key > start_after]
        assert keys(store, "b/", start_after=start_after) == [
            key for key in wanted if key > start_after and key.startswith("b/")
        ]
    assert [found.size_bytes for found in store.list("b/c")] == [5, 4]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/abs",
        "a/../b",
        "..",
        ".",
        "a//b",
        "a/",
        "nul\0",
        "x" * 256,
        "a/" * 600 + "b",
        "\udcff",
        ".agentfuse-x/y",
    ],
)
def test_keys_that_no_store_may_see_are_refused(store: ObjectStore, key: str) -> None:
    for ask in (
        lambda: store.put(key, b""),
        lambda: store.put_if_absent(key, b""),
        lambda: store.get(key),
        lambda: store.stat(key),
        lambda: list(store.stream(key)),
        lambda: store.delete(key),
    ):
        with pytest.raises(UsageError, match="object key"):
            ask()


def test_of_many_threads_one_wins_put_if_absent(store: ObjectStore) -> None:
    barrier = threading.Barrier(16)
    won: list[int] = []

    def race(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("race/it", bytes([number]) * 200_000):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("race/it") == bytes(won) * 200_000


def _race(url: str, number: int, rounds: int) -> list[int]:
    store = open_store(url)
    return [each for each in range(rounds) if store.put_if_absent(f"race/{each:03}", bytes([number]))]


def test_of_many_processes_one_wins_put_if_absent(url: str) -> None:
    rounds = 20
    with multiprocessing.get_context("fork").Pool(6) as pool:
        wins = pool.starmap(_race, [(url, number, rounds) for number in range(6)])
    assert sorted(each for won in wins for each in won) == list(range(rounds))
    store = open_store(url)
    for number, won in enumerate(wins):
        assert all(store.get(f"race/{each:03}") == bytes([number]) for each in won)


def test_readers_never_see_half_an_object(store: ObjectStore) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(2)]
    store.put("a", bodies[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for body in bodies:
                store.put("a", body)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(store.get("a") in bodies for _ in range(50))
    finally:
        stop.set()
        writer.join()


def test_objects_are_no_leftovers(store: ObjectStore) -> None:
    store.remove_leftovers("", 0)  # of a store never written to
    for key in ("a", "b/c", "b/d"):
        store.put(key, io.BytesIO(key.encode()), size_bytes=len(key))
    for prefix in ("", "b/", "nothing/"):
        assert store.remove_leftovers(prefix, -60) == 0
    assert keys(store) == ["a", "b/c", "b/d"]


def test_the_probe_passes_and_leaves_nothing(store: ObjectStore) -> None:
    probe(store)
    assert keys(store) == []
