"""Restoring what is damaged or hostile: refused or contained, never believed and never half accepted."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import msgspec
import pytest
from listings import directory, file, listing, packed, snapshot, symlink, unpacked
from memories import SILENT, Run, picture
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import EnvironmentProblem, IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.home.index import Base
from agentfuse.home.walk import clear_tree
from agentfuse.snapshots.document import encode
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key, snapshot_key
from agentfuse.sync.fetch import plan
from agentfuse.sync.hydrate import hydrate
from agentfuse.sync.reports import Meter


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    run = Run(tmp_path, local_store(tmp_path))
    for number in range(20):
        run.write(f"small {number}", b"%d" % number * 50)
    run.write("large", os.urandom(3_000_000))
    run.commit()
    return CountingStore(run.store)


def largest_first(store: CountingStore) -> list[Path]:
    root = Path(store.url.removeprefix("file://"))
    return sorted((p for p in root.glob("agents/a/objects/*/*")), key=lambda p: -p.stat().st_size)


def refuse(tmp_path: Path, store: CountingStore, error: type[StoreError], match: str) -> None:
    """A restore fails, says why, and leaves an index that claims nothing; a second one tells the same."""
    run = Run(tmp_path, store, "e2")
    for _ in range(2):
        with pytest.raises(error, match=match):
            run.restore()
        assert run.index.load() == (Base(0, exact=True), [])
        clear_tree(run.root)
        run.another_process()


@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_is_found(tmp_path: Path, store: CountingStore, which: int) -> None:
    path = largest_first(store)[which]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refuse(
        tmp_path,
        store,
        IntegrityError,
        rf"object agents/a/objects/.*{path.name}: holds other bytes for '(large|small)",
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("left", [0, 10])
def test_a_truncated_object_is_found(tmp_path: Path, store: CountingStore, which: int, left: int) -> None:
    path = largest_first(store)[which]
    os.truncate(path, left)
    refuse(tmp_path, store, IntegrityError, rf"object .*{path.name}: ends \d+ bytes early")


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_object_is_found(tmp_path: Path, store: CountingStore, which: int) -> None:
    path = largest_first(store)[which]
    path.unlink()
    refuse(tmp_path, store, ObjectNotFoundError, path.name)


def test_a_damaged_document_is_found(tmp_path: Path, store: CountingStore) -> None:
    key = snapshot_key("a", "shared", 1)
    store.put(key, store.get(key)[:-20])
    refuse(tmp_path, store, IntegrityError, f"snapshot {key}")


def test_every_failed_request_fails_the_restore_and_the_next_is_whole(
    tmp_path: Path, store: CountingStore
) -> None:
    store.reset()
    whole = Run(tmp_path, store, "whole")
    whole.restore()
    requests = len(store.keys)
    assert requests == 4
    for number in range(requests):
        run = Run(
            tmp_path, FaultyStore(store, lambda n, *_, at=number: "before" if n == at else None), f"r{number}"
        )
        with pytest.raises(StoreError, match="injected"):
            run.restore()
        clear_tree(run.root)
        assert run.restore().number == 1
        assert picture(run.root) == picture(whole.root)


def test_a_stream_that_breaks_off_leaves_nothing_open(tmp_path: Path, store: CountingStore) -> None:
    class BreaksOff(CountingStore):
        def stream(self, key: str, **options: Any):  # type: ignore[no-untyped-def]
            yield next(iter(self.inner.stream(key, **options)))
            raise StoreError("the connection is gone")

    before = len(os.listdir("/proc/self/fd"))
    run = Run(tmp_path, BreaksOff(store), "e2")
    with pytest.raises(StoreError, match="the connection is gone"):
        run.restore()
    assert len(os.listdir("/proc/self/fd")) <= before  # earlier leftovers may be collected meanwhile


def put_document(store: CountingStore, *entries: Entry, **header: Any) -> None:
    store.put(snapshot_key("a", "shared", 1), encode(snapshot(listing(*entries).values(), **header)))


def test_symlinks_lead_nowhere(tmp_path: Path) -> None:
    """A sound listing cannot go through a symlink; an unsound one that got this far cannot either."""
    outside = tmp_path / "outside"
    outside.mkdir()
    content = file(b"", b"evil")
    store = local_store(tmp_path)
    store.put(object_key("a", content.sha256), b"evil")
    escape = symlink(b"way", str(outside).encode())
    inside = msgspec.structs.replace(content, path=b"way/evil")
    root = tmp_path / "root"
    root.mkdir()
    entries = {entry.path: entry for entry in (directory(b""), escape, inside)}
    with pytest.raises(EnvironmentProblem):
        hydrate(store, "a", entries, root, owner=None, meter=Meter(SILENT, "restore"))
    assert not list(outside.iterdir())


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", "link/evil"])
def test_paths_that_lead_outside_are_refused_before_anything_is_written(tmp_path: Path, path: str) -> None:
    store = CountingStore(local_store(tmp_path))
    header, lines = unpacked(encode(snapshot(listing(directory(b"a"), symlink(b"link", b"/tmp")).values())))
    lines.append({"path": path, "type": "dir", "mode": "0755", "mtime": "0.000000000"})
    header["totals"]["entries"] += 1
    store.put(snapshot_key("a", "shared", 1), packed(header, lines))
    run = Run(tmp_path, store, "e2")
    with pytest.raises(IntegrityError, match=r"component|absolute|parent"):
        run.restore()
    assert not list(run.root.iterdir())


def test_contents_of_other_agents_are_out_of_reach(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    secret = file(b"stolen", b"secret")
    store.put(object_key("b", secret.sha256), b"secret")
    put_document(store, secret)
    with pytest.raises(ObjectNotFoundError, match="agents/a/objects"):
        Run(tmp_path, store, "e2").restore()


def test_totals_that_no_disk_holds_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    huge = msgspec.structs.replace(file(b"huge", b"x"), size=2**50)
    put_document(store, huge)
    store.reset()
    with pytest.raises(EnvironmentProblem, match="has room for"):
        Run(tmp_path, store, "e2").restore()
    assert store.gets == 1  # the document


def test_a_root_that_is_not_empty_is_left_alone(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store, "e2")
    run.write("precious", b"not in any snapshot")
    with pytest.raises(EnvironmentProblem, match="not empty"):
        run.restore()
    assert [path.name for path in run.root.iterdir()] == ["precious"]


def test_a_full_disk_is_said_to_be_full(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = namedtuple("room", "f_bavail f_frsize f_files f_favail")
    for too_little in (room(700, 4096, 1000, 1000), room(10**9, 4096, 1000, 20)):
        monkeypatch.setattr(os, "statvfs", lambda _, found=too_little: found)
        run = Run(tmp_path, store, "e2")
        with pytest.raises(EnvironmentProblem, match=r"21 files of 3,00\d,\d\d\d bytes"):
            run.restore()
        assert not list(run.root.iterdir())


def test_newer_snapshots_of_a_newer_format_stop_a_commit(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store, "e2")
    run.restore()
    header, lines = unpacked(store.get(snapshot_key("a", "shared", 1)))
    store.put(snapshot_key("a", "shared", 2), packed(header | {"number": 2, "format": 3}, lines))
    run.write("new", b"1")
    with pytest.raises(IntegrityError, match="format 3"):
        run.commit()
    assert History(store, "a", "shared").newest() == 2


def test_plans_are_bounded_whatever_the_places_are() -> None:
    def at(offset: int, size: int, name: str = "a" * 64) -> Entry:
        return Entry(
            path=b"x", type="file", mode=0, mtime_ns=0, size=size, sha256="", object=name, offset=offset
        )

    overlapping = [at(0, 8_000_000), *(at(n, 1000) for n in range(100))]
    assert [(run.offset, run.end) for run in plan(overlapping)] == [(0, 8_000_000)]
    far = [at(0, 10), at(1_000_000, 10), at(2**61, 10), at(0, 10, "b" * 64)]
    assert len(plan(far)) == 4
    assert all(
        run.end - run.offset <= 8 * 2**20 for run in plan([at(n * 1_000_000, 1_000_000) for n in range(50)])
    )
    assert [run.end for run in plan([at(0, 2**40), at(2**40, 5)])] == [2**40, 2**40 + 5]
