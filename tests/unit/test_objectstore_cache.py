"""The cache of objects on this host: what it spares the store, what becomes of it when things go wrong."""

from __future__ import annotations

import fcntl
import io
import logging
import multiprocessing
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memories import Run, grow_nasty_tree, picture
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.objectstore import ranges
from agentfuse.objectstore.base import CHUNK_BYTES
from agentfuse.objectstore.cache import CachedStore, with_cache
from agentfuse.objectstore.ranges import BLOCK_BYTES, MAX_RANGES, RangeCache
from agentfuse.snapshots.layout import is_object_key, object_key

KEY = object_key("a", "0f" * 32)
OTHER = object_key("a", "f0" * 32)
BODY = random.Random(1).randbytes(3 * CHUNK_BYTES + 12_345)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, or becomes another user")


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(local_store(tmp_path))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def cached(store: CountingStore, directory: Path, max_bytes: int = 2**30) -> CachedStore:
    """The store as another process on this host opens it."""
    return CachedStore(store, directory, max_bytes, is_kept=is_object_key)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def kept(directory: Path) -> list[Path]:
    """The files with what is kept, the least recently used first."""
    return sorted(
        (path for path in files(directory) if path.parent != directory), key=lambda p: p.stat().st_mtime_ns
    )


def size(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(directory))


def object_gets(store: CountingStore) -> int:
    return sum(is_object_key(key) for method, key in store.keys if method in ("get", "stream"))


# -- an agent's memory


def fill(run: Run) -> None:
    grow_nasty_tree(run.root)
    for number in range(300):
        run.write(f"many/{number}", random.Random(number).randbytes(40_000))
    run.write("video", random.Random(2).randbytes(9_000_000))


def test_what_a_run_wrote_the_next_run_on_this_host_has(
    tmp_path: Path, store: CountingStore, directory: Path
) -> None:
    first = Run(tmp_path, cached(store, directory))
    fill(first)
    first.commit()
    store.reset()
    second = Run(tmp_path, cached(store, directory), "e2")
    second.restore()
    assert object_gets(store) == 0
    assert [method for method, key in store.keys if "/snapshots/" in key] == ["list", "get"]
    assert picture(second.root) == picture(first.root)


def test_what_a_run_read_the_next_run_on_this_host_has(
    tmp_path: Path, store: CountingStore, directory: Path
) -> None:
    first = Run(tmp_path, store)
    fill(first)
    first.commit()
    store.reset()
    for execution, expected in (("e2", [1, 99]), ("e3", [0, 0])):
        run = Run(tmp_path, cached(store, directory), execution)
        run.restore()
        assert expected[0] <= object_gets(store) <= expected[1]
        assert picture(run.root) == picture(first.root)
        store.reset()


def test_only_what_changed_comes_from_the_store(
    tmp_path: Path, store: CountingStore, directory: Path
) -> None:
    first = Run(tmp_path, cached(store, directory))
    fill(first)
    first.commit()
    elsewhere = Run(tmp_path, store, "elsewhere")
    elsewhere.restore()
    elsewhere.write("many/17", b"from another host")
    elsewhere.commit()
    store.reset()
    run = Run(tmp_path, cached(store, directory), "e2")
    run.restore()
    assert object_gets(store) == 1
    assert picture(run.root) == picture(elsewhere.root)


def test_an_object_that_was_damaged_is_read_anew_once_it_is_repaired(
    tmp_path: Path, store: CountingStore, directory: Path
) -> None:
    first = Run(tmp_path, store)
    first.write("notes", b"right " * 1000)
    first.write("large", BODY)
    first.commit()
    objects = [path for path in (tmp_path / "store/agents/a/objects").rglob("*") if path.is_file()]
    assert len(objects) == 2
    for number, path in enumerate(objects):
        right = path.read_bytes()
        path.write_bytes(right[:-1] + b"x")
        with pytest.raises(IntegrityError):
            Run(tmp_path, cached(store, directory / str(number)), f"damaged{number}").restore()
        path.write_bytes(right)
        run = Run(tmp_path, cached(store, directory / str(number)), f"repaired{number}")
        run.restore()
        assert picture(run.root) == picture(first.root)


def test_a_file_that_changes_all_the_time_leaves_room_for_the_others(
    tmp_path: Path, store: CountingStore, directory: Path
) -> None:
    run = Run(tmp_path, cached(store, directory, 6_000_000))
    run.write("old", random.Random(5).randbytes(2_000_000))
    for number in range(8):
        run.write("database", random.Random(number).randbytes(1_500_000))
        run.write("log", b"%d" % number)
        run.commit()
    store.reset()
    Run(tmp_path, cached(store, directory), "e2").restore()
    assert object_gets(store) == 0
    assert len(kept(directory)) == 3


# -- ranges


def test_reading_within_what_is_kept_makes_no_request(store: CountingStore, directory: Path) -> None:
    store.put(KEY, BODY)
    cache = cached(store, directory)
    assert cache.get(KEY, offset=100, length=len(BODY) - 200) == BODY[100:-100]
    store.reset()
    dice = random.Random(3)
    for _ in range(50):
        start = dice.randrange(100, len(BODY) - 200)
        length = dice.choice([1, 77, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES])
        length = min(length, len(BODY) - 100 - start)
        wanted = BODY[start : start + length]
        assert cache.get(KEY, offset=start, length=length) == wanted
        assert b"".join(cache.stream(KEY, offset=start, length=length)) == wanted
    assert not store.requests


def test_ranges_that_adjoin_serve_together(store: CountingStore, directory: Path) -> None:
    store.put(KEY, BODY)
    cache = cached(store, directory)
    for start, end in ((0, 10_000), (8_000, 2_000_000), (2_000_000, len(BODY))):
        cache.get(KEY, offset=start, length=end - start)
    store.reset()
    assert cache.get(KEY, length=len(BODY)) == BODY
    assert b"".join(cache.stream(KEY, length=len(BODY))) == BODY
    assert not store.requests


@pytest.mark.parametrize("call", ["get", "stream"])
def test_only_the_rest_is_asked_for_and_kept(store: CountingStore, directory: Path, call: str) -> None:
    class Ranged(CountingStore):
        asked: list[tuple[int, int | None]] = []  # noqa: RUF012

        def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
            self.asked.append((offset, length))
            return super().get(key, offset=offset, length=length)

        def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
            self.asked.append((offset, length))
            return super().stream(key, offset=offset, length=length)

    ranged = Ranged(store)
    store.put(KEY, BODY)
    cache = cached(ranged, directory)
    read: Callable[[], bytes] = (
        (lambda: cache.get(KEY, length=len(BODY)))
        if call == "get"
        else (lambda: b"".join(cache.stream(KEY, length=len(BODY))))
    )
    cache.get(KEY, length=1_500_000)
    ranged.asked.clear()
    assert read() == BODY
    assert ranged.asked == [(1_500_000, len(BODY) - 1_500_000)]
    assert read() == BODY
    assert len(ranged.asked) == 1


def test_what_covers_others_replaces_them(store: CountingStore, directory: Path) -> None:
    store.put(KEY, BODY)
    cache = cached(store, directory)
    for start in range(1, 30):
        cache.get(KEY, offset=start * 1000, length=10)
    assert len(kept(directory)) == 29
    cache.get(KEY, length=len(BODY))
    assert len(kept(directory)) == 1


def test_an_object_is_not_kept_in_endless_pieces(store: CountingStore, directory: Path) -> None:
    store.put(KEY, BODY)
    cache = cached(store, directory)
    for start in range(MAX_RANGES + 20):
        assert cache.get(KEY, offset=start * 1000, length=10) == BODY[start * 1000 :][:10]
    assert len(kept(directory)) == MAX_RANGES
    cache.get(KEY, length=len(BODY))
    assert len(kept(directory)) == 2, "the first piece, and the rest"


def test_stores_and_keys_are_told_apart(tmp_path: Path, directory: Path) -> None:
    stores = [CountingStore(local_store(tmp_path / name)) for name in ("one", "two")]
    for number, store in enumerate(stores):
        for key in (KEY, OTHER):
            store.put(key, f"{number} {key}".encode())
    for number, store in [*enumerate(stores)] * 2:
        for key in (KEY, OTHER):
            body = f"{number} {key}".encode()
            assert cached(store, directory).get(key, length=len(body)) == body


def test_only_objects_are_kept(store: CountingStore, directory: Path) -> None:
    cache = cached(store, directory)
    for key in ("agents/a/shared/snapshots/1", "agents/a/objects/x", f"tenants/{KEY}", "probe/1"):
        cache.put(key, b"one")
        assert cache.get(key, length=3) == b"one"
        store.put(key, b"two")
        assert cache.get(key, length=3) == b"two"
        assert list(cache.stream(key, length=3)) == [b"two"]
    assert not directory.exists()


def test_the_store_alone_says_what_there_is(store: CountingStore, directory: Path) -> None:
    cache = cached(store, directory)
    cache.put(KEY, BODY)
    store.delete(KEY)
    assert cache.get(KEY, length=10) == BODY[:10]
    assert list(cache.list("")) == []
    with pytest.raises(ObjectNotFoundError):
        cache.stat(KEY)


def test_a_local_store_and_a_cache_of_nothing_have_none(store: CountingStore, directory: Path) -> None:
    class Far(CountingStore):
        url = "s3://bucket"

    far = Far(store)
    assert with_cache(store, directory, 2**30, is_kept=is_object_key) is store
    assert with_cache(far, directory, 0, is_kept=is_object_key) is far
    assert isinstance(with_cache(far, directory, 1, is_kept=is_object_key), CachedStore)


def test_nobody_else_may_look_into_it(store: CountingStore, directory: Path) -> None:
    cached(store, directory).put(KEY, BODY)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in directory.rglob("*")} == {0}


# -- what is kept, and what is not


@pytest.mark.parametrize("how", ["bytes", "bytearray", "source", "absent"])
def test_what_the_store_accepted_is_kept(store: CountingStore, directory: Path, how: str) -> None:
    cache = cached(store, directory)
    if how == "absent":
        assert cache.put_if_absent(KEY, BODY)
    elif how == "source":
        cache.put(KEY, io.BytesIO(BODY), size_bytes=len(BODY))
    else:
        cache.put(KEY, BODY if how == "bytes" else bytearray(BODY))
    store.reset()
    assert cache.get(KEY, length=len(BODY)) == BODY
    assert not store.requests


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("how", ["bytes", "source", "absent"])
def test_what_the_store_did_not_accept_is_not_kept(
    tmp_path: Path, directory: Path, how: str, fault: str
) -> None:
    store = FaultyStore(local_store(tmp_path), lambda *_: None)
    cache = cached(store, directory)
    if how != "absent":
        cache.put(KEY, b"old")
    store.fails = lambda *_: fault
    with pytest.raises(StoreError, match="injected"):
        if how == "absent":
            cache.put_if_absent(KEY, BODY)
        elif how == "source":
            cache.put(KEY, io.BytesIO(BODY), size_bytes=len(BODY))
        else:
            cache.put(KEY, BODY)
    assert files(directory) == []


def test_a_source_that_breaks_off_is_not_kept(store: CountingStore, directory: Path) -> None:
    with pytest.raises(StoreError, match="gave"):
        cached(store, directory).put(KEY, io.BytesIO(BODY), size_bytes=len(BODY) + 1)
    assert files(directory) == []


def test_what_another_writer_put_is_not_kept_unread(store: CountingStore, directory: Path) -> None:
    store.put(KEY, b"theirs")
    cache = cached(store, directory)
    assert not cache.put_if_absent(KEY, b"mine!!")
    assert cache.get(KEY, length=6) == b"theirs"


def test_a_stream_that_nobody_reads_to_its_end_is_not_kept(store: CountingStore, directory: Path) -> None:
    store.put(KEY, BODY)
    stream = cached(store, directory).stream(KEY, length=len(BODY))
    assert next(stream) == BODY[:CHUNK_BYTES]
    assert len(files(directory)) == 1
    del stream
    assert files(directory) == []


def test_a_stream_that_breaks_is_not_kept(store: CountingStore, directory: Path) -> None:
    class Breaking(CountingStore):
        def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
            yield next(super().stream(key, offset=offset, length=length))
            raise StoreError("injected")

    store.put(KEY, BODY)
    with pytest.raises(StoreError, match="injected"):
        list(cached(Breaking(store), directory).stream(KEY, length=len(BODY)))
    assert files(directory) == []


def test_put_replaces_and_delete_removes_what_is_kept(store: CountingStore, directory: Path) -> None:
    cache = cached(store, directory)
    cache.put(KEY, b"old")
    cache.get(KEY, offset=1, length=1)
    cache.put(KEY, b"new, and longer")
    assert cache.get(KEY, length=3) == b"new"
    assert len(kept(directory)) == 1
    cache.put(OTHER, b"other")
    cache.delete(KEY)
    with pytest.raises(ObjectNotFoundError):
        cache.get(KEY, length=3)
    assert len(kept(directory)) == 1


# -- damage


def spoil(path: Path, how: str) -> None:
    right = path.read_bytes()
    match how:
        case "first bit":
            path.write_bytes(bytes([right[0] ^ 1]) + right[1:])
        case "in the middle":
            path.write_bytes(right[: len(BODY) // 2] + b"????" + right[len(BODY) // 2 + 4 :])
        case "checksum":
            path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        case "zeros":
            path.write_bytes(bytes(len(right)))
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(right[:-5])
        case "cut in the middle":
            path.write_bytes(right[: len(right) // 2])
        case "longer":
            path.write_bytes(right + b"more")


@pytest.mark.parametrize(
    "how",
    [
        "first bit",
        "in the middle",
        "checksum",
        "zeros",
        "empty",
        "cut",
        "cut in the middle",
        "longer",
    ],
)
@pytest.mark.parametrize("call", ["get", "stream"])
def test_what_was_damaged_comes_from_the_store(
    store: CountingStore, directory: Path, how: str, call: str
) -> None:
    store.put(KEY, BODY)
    cache = cached(store, directory)

    def read() -> bytes:
        if call == "get":
            return cache.get(KEY, length=len(BODY))
        return b"".join(cache.stream(KEY, length=len(BODY)))

    for _ in range(2):
        assert read() == read() == BODY
        spoil(kept(directory)[0], how)
        store.reset()
        assert read() == BODY
        assert store.gets == 1


def test_files_of_others_in_it_do_no_harm(store: CountingStore, directory: Path) -> None:
    cache = cached(store, directory)
    cache.put(KEY, BODY)
    (path,) = kept(directory)
    path.with_name(path.name + ".bak").write_bytes(b"?")
    path.with_name("README").write_bytes(b"?")
    (directory / "README").write_bytes(b"?")
    store.reset()
    assert cache.get(KEY, length=len(BODY)) == BODY
    assert not store.requests


# -- room


def key(number: int) -> str:
    return object_key("a", f"{number:064x}")


def test_the_least_recently_used_goes_first(store: CountingStore, directory: Path) -> None:
    cache = cached(store, directory, 10 * 110_000)
    for number in range(9):
        cache.put(key(number), bytes([number]) * 100_000)
    for number in (0, 3):
        cache.get(key(number), offset=50_000, length=10)
    list(cache.stream(key(5), length=100_000))
    for number in range(9, 15):
        cache.put(key(number), bytes([number]) * 100_000)
        assert size(directory) <= 10 * 110_000
    there = set()
    for number in range(15):
        store.reset()
        cached(store, directory, 0).get(key(number), length=100_000)  # keeps nothing itself
        if not store.requests:
            there.add(number)
    assert there == {0, 3, 5, *range(8, 15)}


def test_it_stays_below_its_bound_whatever_comes(store: CountingStore, directory: Path) -> None:
    dice = random.Random(4)
    cache = cached(store, directory, 3_000_000)
    for number in range(200):
        body = dice.randbytes(dice.choice([10, 5_000, 200_000, 1_000_000, 4_000_000]))
        cache.put(key(number), body)
        assert size(directory) <= 3_000_000
        assert cache.get(key(number), length=len(body)) == body
    assert size(directory) > 1_500_000


def test_room_is_looked_for_seldom(
    store: CountingStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    tidy = RangeCache._tidy
    monkeypatch.setattr(RangeCache, "_tidy", lambda self: (looks.append(1), tidy(self)))
    cache = cached(store, directory, 16_000_000)
    for number in range(1000):
        cache.put(key(number), bytes(40_000))
    assert len(looks) < 80


def _hammer(url_root: Path, directory: Path, seed: int) -> int:
    store = CountingStore(local_store(url_root))
    cache = cached(store, directory, 2_000_000)
    dice = random.Random(seed)
    wrong = 0
    for _ in range(300):
        number = dice.randrange(40)
        body = random.Random(number).randbytes(100_000 + number)
        start = dice.randrange(90_000)
        match dice.randrange(4):
            case 0:
                cache.put(key(number), body)
            case 1:
                wrong += cache.get(key(number), offset=start, length=9_000) != body[start : start + 9_000]
            case 2:
                wrong += b"".join(cache.stream(key(number), length=len(body))) != body
            case 3:
                cache.forget(key(number))
    return wrong


def test_processes_share_it(tmp_path: Path, directory: Path) -> None:
    store = local_store(tmp_path)
    for number in range(40):
        store.put(key(number), random.Random(number).randbytes(100_000 + number))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(_hammer, [(tmp_path, directory, seed) for seed in range(4)]) == [0] * 4
    assert not list(directory.glob("tmp-*"))
    assert size(directory) < 2_000_000 * (1 + 4 / 16) + 4 * 110_000
    cached(CountingStore(store), directory, 2_000_000).put(key(99), b"x")
    assert size(directory) <= 2_000_000


def _die_while_filling(directory: Path) -> None:
    with RangeCache(directory, 2**30).filling("0f" * 16, 0, 10) as filling:
        filling.write(bytes(10))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    store: CountingStore, directory: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_filling, args=(directory,))
    process.start()
    process.join()
    (left,) = files(directory)
    with RangeCache(directory, 2**30).filling("0f" * 16, 0, 4) as filling:
        filling.write(b"here")
        cached(store, directory).put(KEY, BODY)
        assert not left.exists()
        filling.keep()
    assert RangeCache(directory, 2**30).read("0f" * 16, 0, 4) == b"here"


# -- a disk that does not work


def use(store: CountingStore, cache: CachedStore) -> None:
    """All there is, as it must work whatever becomes of the cache."""
    for number in range(4):
        cache.put(key(number), BODY)
        assert cache.get(key(number), length=len(BODY)) == BODY
        cache.put(key(number), io.BytesIO(BODY), size_bytes=len(BODY))
        assert b"".join(cache.stream(key(number), length=len(BODY))) == BODY
        assert cache.get(key(number), offset=5, length=9) == BODY[5:14]
        assert cache.put_if_absent(key(number + 10), BODY)
        cache.delete(key(number + 10))
        assert store.inner.get(key(number)) == BODY


@as_root
def test_a_full_disk_fails_nothing(
    store: CountingStore, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranges, "RESERVE_BYTES", -(2**30))  # it believes that there is always room
    (small_disk / "others").write_bytes(bytes(3_000_000))
    use(store, cached(store, small_disk / "cache"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text
    assert not list((small_disk / "cache").glob("tmp-*"))


@as_root
def test_room_is_left_to_others_and_given_back_to_them(store: CountingStore, small_disk: Path) -> None:
    cache = cached(store, small_disk / "cache")
    use(store, cache)
    assert len(kept(small_disk)) > 0
    disk = os.statvfs(small_disk)
    assert disk.f_bavail * 10 >= disk.f_blocks
    with (small_disk / "others").open("wb", buffering=0) as others:
        others.write(bytes((disk.f_bavail - 10) * disk.f_frsize))
    cache.put(KEY, bytes(100_000))
    assert os.statvfs(small_disk).f_bavail * 10 >= disk.f_blocks


@as_root
def test_a_read_only_disk_is_still_read(
    store: CountingStore, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached(store, small_disk / "cache").put(KEY, BODY)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store.reset()
    cache = cached(store, small_disk / "cache")
    assert cache.get(KEY, length=len(BODY)) == BODY
    assert not store.requests
    use(store, cache)
    assert len(caplog.records) == 1


@as_root
def test_a_directory_that_is_not_ours_fails_nothing(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    scratch.chmod(0o777)
    (scratch / "closed").mkdir(mode=0o700)
    (scratch / "file").write_bytes(b"")
    for name in ("closed", "file"):
        os.seteuid(65534)
        try:
            store = CountingStore(local_store(scratch / f"of nobody {name}"))
            use(store, cached(store, scratch / name / "cache"))
        finally:
            os.seteuid(0)
    assert len(caplog.records) == 2


def test_a_lock_that_is_refused_fails_nothing(
    store: CountingStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    use(store, cached(store, directory))
