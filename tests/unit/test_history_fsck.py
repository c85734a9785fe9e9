"""fsck: what is whole is found whole, and what is lost is told by snapshot and path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from histories import command, lived, told
from memories import SILENT, Run, grow_nasty_tree
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import NotFoundError, StoreError
from agentfuse.objectstore import ObjectStore
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key, snapshot_key
from agentfuse.snapshots.pins import Pins
from agentfuse.sync.fsck import Checker, FsckReport


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(local_store(tmp_path))


def fsck(store: ObjectStore, *, every: bool = True) -> FsckReport:
    return Checker(store, "a", SILENT).run(all_snapshots=every)


def lost(report: FsckReport) -> list[tuple[int, bytes | None]]:
    return [(loss.snapshot, loss.path) for loss in report.lost]


def place(store: ObjectStore, number: int, path: bytes) -> tuple[str, int]:
    (entry,) = (e for e in History(store, "a", "shared").read(number).entries if e.path == path)
    return object_key("a", entry.object), entry.offset


def flip(store: ObjectStore, key: str, at: int) -> None:
    content = bytearray(store.get(key))
    content[at] ^= 8
    store.put(key, content)


def test_what_is_whole_is_found_whole_and_read_once(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    store.reset()
    report = fsck(store)
    assert (report.snapshots, report.lost) == (4, [])
    assert report.contents == 5 + 2 + 1 + 2  # large, and what each snapshot brought
    documents = [key for _, key in store.keys if "/snapshots/0" in key]
    assert len(documents) == 4
    assert store.puts == store.requests["delete"] == 0
    assert fsck(store, every=False).snapshots == 1


def test_nasty_trees_are_whole(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    grow_nasty_tree(run.root)
    run.commit()
    assert fsck(store).lost == []


def test_a_flipped_bit_is_told_by_path_in_every_snapshot_that_has_it(
    tmp_path: Path, store: CountingStore
) -> None:
    lived(tmp_path, store)
    flip(store, *place(store, 1, b"d/small"))
    report = fsck(store)
    assert lost(report) == [(2, b"d/small"), (1, b"d/small")]
    assert "holds other bytes" in report.lost[0].problem
    assert lost(fsck(store, every=False)) == []
    flip(store, place(store, 1, b"large")[0], 1_000_000)
    assert lost(fsck(store, every=False)) == [(4, b"large")]


def test_a_missing_object_is_told_for_all_that_was_in_it(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    store.delete(place(store, 1, b"d/small")[0])
    report = fsck(store)
    names = [b"d/old", b"d/small", b"notes.md", b"\xff name"]
    assert [path for number, path in lost(report) if number == 1] == names
    assert [path for number, path in lost(report) if number == 4] == [b"\xff name"]


def test_a_truncated_object_loses_only_what_is_behind_the_cut(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    for number in range(4):
        run.write(str(number), b"%d" % number * 100)
    run.write("large", os.urandom(3_000_000))
    run.commit()
    for name, left in ((b"0", 250), (b"large", 2_999_999)):
        key, _ = place(store, 1, name)
        store.put(key, store.get(key)[:left])
    report = fsck(store)
    assert lost(report) == [(1, b"2"), (1, b"3"), (1, b"large")]
    assert all("bytes early" in loss.problem for loss in report.lost)


def test_a_damaged_document_hides_no_other(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    flip(store, snapshot_key("a", "shared", 2), 40)
    report = fsck(store)
    assert lost(report) == [(2, None)]
    assert report.snapshots == 4


def test_what_executions_kept_is_checked_and_named(tmp_path: Path, store: CountingStore) -> None:
    for number in range(2):
        kept = Run(tmp_path, store, f"e{number}", kept="downloads")
        kept.write("file", b"a download")
        kept.commit()
        kept.write("file", b"%d: another one" % number)
        kept.commit()
    assert (fsck(store, every=False).snapshots, fsck(store).snapshots) == (2, 4)
    assert fsck(store).contents == 3
    lived(tmp_path, store)
    assert (fsck(store, every=False).snapshots, fsck(store).snapshots) == (3, 8)
    (entry,) = (e for e in History(store, "a", kept.region).read(2).entries if e.path == b"file")
    flip(store, object_key("a", entry.object), entry.offset)
    done = command(store, "fsck", "--agent", "a", code=65)
    assert done.stdout.startswith(b"a/e1/downloads@2:file: object agents/a/objects/")
    (loss,) = told(store, "fsck", "--agent", "a", code=65)["lost"]
    assert (loss["in"], loss["snapshot"], loss["path"]) == ("a/e1/downloads@2", 2, "file")


def test_a_pinned_snapshot_that_is_gone_is_lost(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    Pins(store, "a", "shared").add(2)
    assert fsck(store).lost == []
    store.delete(snapshot_key("a", "shared", 2))
    assert lost(fsck(store)) == [(2, None)]


def test_what_is_collected_while_we_look_is_not_lost(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    gone = place(store, 1, b"d/old")[0]

    class Collected(CountingStore):
        def get(self, key: str, **options: int) -> bytes:  # type: ignore[override]
            if key == gone:
                self.inner.delete(snapshot_key("a", "shared", 1))
                self.inner.delete(snapshot_key("a", "shared", 2))
                self.inner.delete(gone)
            return super().get(key, **options)

    report = fsck(Collected(store))
    assert {number for number, _ in lost(report)} <= {3, 4}  # which still name it: those are lost


def test_a_store_that_fails_is_no_loss(tmp_path: Path, store: CountingStore) -> None:
    with pytest.raises(NotFoundError):
        fsck(store)
    lived(tmp_path, store)
    store.reset()
    fsck(store)
    for at in range(len(store.keys)):
        with pytest.raises(StoreError, match="injected"):
            fsck(FaultyStore(store, lambda n, *_, at=at: "before" if n == at else None))


def test_the_verb_exits_65_if_anything_is_lost(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    assert b"4 snapshots, 10 contents" in command(store, "fsck", "--agent", "a", "--all-snapshots").stdout
    assert told(store, "fsck", "--agent", "a")["lost"] == []
    flip(store, *place(store, 4, b"\xff name"))
    done = command(store, "fsck", "--agent", "a", code=65)
    assert done.stdout.startswith(b"a@4:\\xff name: object agents/a/objects/")
    assert b"something is lost in 1 of 1 snapshots" in done.stderr
    (loss,) = told(store, "fsck", "--agent", "a", code=65)["lost"]
    assert (loss["in"], loss["snapshot"], loss["path"]) == ("a@4", 4, "\udcff name")
    command(store, "fsck", "--agent", "b", code=66)
