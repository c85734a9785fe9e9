"""Going back: restoring earlier states as new snapshots, and taking back what one run changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from histories import append, lived, take_turns
from memories import SILENT, Run, grow_nasty_tree, picture
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import BusyError, EnvironmentProblem, FrozenError, NotFoundError, StoreError, UsageError
from agentfuse.home import marks
from agentfuse.objectstore import ObjectStore
from agentfuse.snapshots.changes import changes
from agentfuse.snapshots.collect import Collector
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key, snapshot_key
from agentfuse.snapshots.rebase import by_path
from agentfuse.snapshots.retention import Policy
from agentfuse.sync.export import export
from agentfuse.sync.rewrite import Rewriter


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(local_store(tmp_path))


def rewriter(store: ObjectStore) -> Rewriter:
    return Rewriter(store, "a", "shared", SILENT)


def restored(tmp_path: Path, store: ObjectStore, name: str) -> Path:
    run = Run(tmp_path, store, name)
    run.restore()
    return run.root


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


# -- restore


def test_an_earlier_state_comes_back_as_the_newest(tmp_path: Path, store: CountingStore) -> None:
    first = Run(tmp_path, store, "e1")
    grow_nasty_tree(first.root)
    first.commit()
    before = picture(first.root)
    for name in ("a/x", "large", "sparse"):
        (first.root / name).unlink()
    first.write("later", b"1")
    first.commit()
    report = rewriter(store).restore(1)
    assert report.number == 3
    assert report.changed.removed == 1
    assert picture(restored(tmp_path, store, "e2")) == before
    assert rewriter(store).restore(1).number is None


def test_what_is_frozen_is_thawed_before_it_is_taken_back(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store, "e1")
    run.write("d/other", b"1")
    run.commit("end")
    run = Run(tmp_path, store, "e2")
    run.restore()
    run.write("d/frozen", b"stays")
    run.write("d/other", b"2")
    with (run.root / "d/frozen").open("rb+") as file:
        marks.write_frozen(file.fileno(), frozen=True)
    run.commit("end")
    history = rewriter(store)
    for take_back in (
        lambda: history.restore(1),
        lambda: history.restore(1, b"d"),
        lambda: history.plan_restore(1),
        lambda: history.revert("e2"),
        lambda: history.plan_revert("e2"),
    ):
        with pytest.raises(FrozenError, match="d/frozen"):
            take_back()
    assert history.restore(1, b"d/other").number == 3
    assert files(restored(tmp_path, store, "e3")) == {"d/frozen": b"stays", "d/other": b"1"}


def test_a_path_comes_back_and_all_else_stays(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    rewriter(store).restore(1, b"d")
    found = files(restored(tmp_path, store, "e4"))
    assert (found["d/small"], found["d/old"], "d/new" in found) == (b"small", b"old", False)
    assert found["notes.md"].endswith(b"- e3\n")
    rewriter(store).restore(3, b"d/new")
    rewriter(store).restore(1, b"\xff name")
    found = files(restored(tmp_path, store, "e5"))
    assert found["d/new"] == b"new of e2"


def test_a_path_comes_back_with_its_directories_and_links(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    run.write("d/e/one", b"1")
    os.link(run.root / "d/e/one", run.root / "d/e/two")
    os.link(run.root / "d/e/one", run.root / "outside")
    (run.root / "d").chmod(0o750)
    run.commit()
    for name in ("d/e/one", "d/e/two"):
        (run.root / name).unlink()
    (run.root / "d/e").rmdir()
    (run.root / "d").rmdir()
    run.write("x", b"x")
    os.link(run.root / "x", run.root / "y")
    run.commit()
    rewriter(store).restore(1, b"d/e")
    root = restored(tmp_path, store, "e2")
    assert (root / "d/e/one").samefile(root / "d/e/two")
    assert (root / "x").samefile(root / "y")
    assert not (root / "outside").samefile(root / "d/e/one")
    assert (root / "d").stat().st_mode & 0o7777 == 0o750


def test_a_database_comes_back_with_its_log_and_without_that_of_another_day(
    tmp_path: Path, store: CountingStore
) -> None:
    run = Run(tmp_path, store)
    run.write("m.db", b"1")
    run.write("m.db-wal", b"log of 1")
    run.commit()
    (run.root / "m.db-wal").unlink()
    run.write("m.db", b"2")
    run.write("m.db-journal", b"journal of 2")
    run.commit()
    rewriter(store).restore(1, b"m.db")
    assert files(restored(tmp_path, store, "e2")) == {"m.db": b"1", "m.db-wal": b"log of 1"}
    rewriter(store).restore(2, b"m.db")
    assert files(restored(tmp_path, store, "e3")) == {"m.db": b"2", "m.db-journal": b"journal of 2"}
    export(store, History(store, "a", "shared").read(1), b"m.db", tmp_path / "out", SILENT)
    assert files(tmp_path / "out") == {"m.db": b"1", "m.db-wal": b"log of 1"}


def test_what_is_in_the_way_is_not_removed(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    run.write("d/x", b"1")
    run.commit()
    (run.root / "d/x").unlink()
    (run.root / "d").rmdir()
    run.write("d", b"a file now")
    run.commit()
    with pytest.raises(UsageError, match="d is no directory any more"):
        rewriter(store).restore(1, b"d/x")
    assert rewriter(store).restore(1, b"d").number == 3


def test_what_is_not_there_is_not_found(tmp_path: Path, store: CountingStore) -> None:
    with pytest.raises(NotFoundError, match="no snapshot"):
        rewriter(store).restore(1)
    lived(tmp_path, store)
    for number, path in ((9, b""), (1, b"later")):
        with pytest.raises(NotFoundError):
            rewriter(store).restore(number, path)
    with pytest.raises(NotFoundError, match="execution nobody made no snapshot"):
        rewriter(store).revert("nobody")
    assert History(store, "a", "shared").newest() == 4


def test_restored_contents_do_not_lean_on_the_old_snapshot(tmp_path: Path, store: CountingStore) -> None:
    """It may be collected at any moment, with all that only it names."""
    run = Run(tmp_path, store)
    run.write("large", os.urandom(2_000_000))
    run.write("small", b"small")
    before = picture(run.root)
    run.commit()
    old = [found.key for found in store.list("agents/a/objects/")]
    for key in old:
        os.utime(tmp_path / "store" / key, (1, 1))
    (run.root / "large").unlink()
    (run.root / "small").unlink()
    run.commit()
    rewriter(store).restore(1)
    for key in (*old, snapshot_key("a", "shared", 1)):
        store.delete(key)
    assert picture(restored(tmp_path, store, "e2")) == before


def test_a_lost_race_is_composed_again(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)

    class Raced(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            if key == snapshot_key("a", "shared", 5):
                other = Run(tmp_path, self.inner, "e9")
                other.restore()
                other.write("raced", b"1")
                other.commit()
            return super().put_if_absent(key, body)

    report = rewriter(Raced(store)).restore(1, b"d")
    assert report.number == 6
    found = files(restored(tmp_path, store, "e4"))
    assert found["raced"] == b"1"
    assert found["d/small"] == b"small"


def test_a_plan_is_what_is_then_done_or_nothing_is(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    history = History(store, "a", "shared")
    stale = rewriter(store).plan_restore(1)
    reverted = rewriter(store).plan_revert("e2")
    assert rewriter(store).revert("e2", upon=reverted.upon).number == reverted.upon + 1
    with pytest.raises(BusyError):
        rewriter(store).restore(1, upon=stale.upon)
    assert history.newest() == reverted.upon + 1
    restored = rewriter(store).plan_restore(1)
    assert rewriter(store).restore(1, upon=restored.upon).number == restored.upon + 1
    for plan in (reverted, restored):
        before, after = (by_path(history.read(plan.upon + later).entries) for later in (0, 1))
        done = {(each.path, each.kind) for each in changes(before, after)}
        assert {(each.path, each.kind) for each in plan.changes} == done != set()


def test_every_failed_request_leaves_the_history_as_it_was(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    at = 0
    while True:
        faulty = FaultyStore(store, lambda n, *_, at=at: "before" if n == at else None)
        try:
            report = rewriter(faulty).revert("e2")
        except StoreError as error:
            assert "injected" in str(error)
            assert History(store, "a", "shared").newest() == 4
            at += 1
            continue
        assert report.number == 5
        assert len(faulty.keys) <= at  # fewer: what arrived before is not sent again
        break
    assert at > 5


# -- revert


def test_what_a_run_changed_is_taken_back_and_later_changes_stay(
    tmp_path: Path, store: CountingStore
) -> None:
    lived(tmp_path, store)
    report = rewriter(store).revert("e2")
    assert (report.number, report.conflicts, report.merged, report.kept) == (5, (), ("notes.md",), ())
    found = files(restored(tmp_path, store, "e4"))
    assert found["notes.md"] == b"# Notes\n- e1\n- e3\n"
    assert found["d/small"] == b"small"
    assert found["d/old"] == b"old"
    assert found["later"] == b"of e3"
    assert "d/new" not in found
    assert rewriter(store).revert("e2").number is None


def test_the_first_run_can_be_taken_back(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    report = rewriter(store).revert("e1")
    assert set(report.kept) == {"d/small", "notes.md"}
    found = files(restored(tmp_path, store, "e4"))
    assert set(found) == {"d/new", "d/small", "later", "notes.md"}


def test_a_revert_can_be_reverted(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    before = files(restored(tmp_path, store, "before"))
    rewriter(store).revert("e2")
    rewriter(store).revert("revert-of-e2")
    after = files(restored(tmp_path, store, "after"))
    assert after.keys() == before.keys()
    assert sorted(after.pop("notes.md").split()) == sorted(before.pop("notes.md").split())
    assert after == before


def test_runs_that_took_turns_are_parted(tmp_path: Path, store: CountingStore) -> None:
    base = Run(tmp_path, store, "e0")
    base.write("notes.md", b"# Notes\n")
    base.commit()
    one, two = Run(tmp_path, store, "e1"), Run(tmp_path, store, "e2")
    for run in (one, two):
        run.restore()
    for step in range(3):
        for run in (one, two):
            append(run, f"- {run.execution} {step}\n")
            run.write(f"{run.execution} {step}", b"1")
            run.commit("checkpoint")
    report = rewriter(store).revert("e1")
    assert not report.conflicts
    found = files(restored(tmp_path, store, "look"))
    assert found["notes.md"] == b"# Notes\n" + b"".join(b"- e2 %d\n" % step for step in range(3))
    assert sorted(found) == ["e2 0", "e2 1", "e2 2", "notes.md"]


def test_what_a_later_run_changed_too_is_kept_in_both_versions(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store, "e1")
    run.write("data", b"\x00 of e1")
    run.commit()
    for name in ("e2", "e3"):
        run = Run(tmp_path, store, name)
        run.restore()
        run.write("data", b"\x00 of " + name.encode())
        run.commit()
    report = rewriter(store).revert("e2")
    assert [(c.path, c.kept_at) for c in report.conflicts] == [(b"data", b".conflicts/revert-of-e2/data")]
    found = files(restored(tmp_path, store, "e4"))
    assert found == {"data": b"\x00 of e3", ".conflicts/revert-of-e2/data": b"\x00 of e1"}


def test_a_run_whose_beginning_was_collected_cannot_be_taken_back(
    tmp_path: Path, store: CountingStore
) -> None:
    lived(tmp_path, store)
    store.delete(snapshot_key("a", "shared", 1))
    with pytest.raises(NotFoundError, match=r"snapshot 1, which it began with, was collected"):
        rewriter(store).revert("e2")
    store.delete(snapshot_key("a", "shared", 2))
    assert rewriter(store).revert("e3").number == 5


def test_a_run_that_lacks_a_part_of_what_it_did_is_not_taken_back_by_half(
    tmp_path: Path, store: CountingStore
) -> None:
    take_turns(tmp_path, store, "ABA")
    store.delete(snapshot_key("a", "shared", 1))
    with pytest.raises(NotFoundError, match=r"snapshot 1, which it made, was collected"):
        rewriter(store).revert("A")
    assert History(store, "a", "shared").newest() == 3


@pytest.mark.parametrize("turns", ["0ABAAB", "0AAABBBA", "0ABBBBBBBB", "0BBAAAAAB"])
@pytest.mark.parametrize("reverted", ["A", "B"])
@pytest.mark.parametrize("is_collected", [False, True])
def test_exactly_what_one_of_two_that_took_turns_changed_is_taken_back(
    tmp_path: Path, store: CountingStore, turns: str, reverted: str, is_collected: bool
) -> None:
    take_turns(tmp_path, store, turns)
    if is_collected:
        for path in (tmp_path / "store/agents").rglob("*"):
            if path.is_file():
                os.utime(path, (1, 1))
        report = Collector(store, "a", "shared").run(Policy(keep_last=2, keep_daily=0))
        stays = {n for n, who in enumerate(turns, 1) if turns[n:][:1] != who}
        assert set(report.kept_snapshots) == stays
    rewriter(store).revert(reverted)
    found = files(restored(tmp_path, store, "look"))
    others = [(n, who) for n, who in enumerate(turns, 1) if who != reverted]
    assert {name: content for name, content in found.items() if name != "notes.md"} == {
        f"{who} {n}": b"%d" % n for n, who in others
    }
    assert found["notes.md"] == b"".join(f"- {who} {n}\n".encode() for n, who in others)


# -- into a directory


def test_a_snapshot_is_written_into_a_directory(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    grow_nasty_tree(run.root)
    run.commit()
    snapshot = History(store, "a", "shared").read(1)
    export(store, snapshot, b"", tmp_path / "out", SILENT)
    without_creators = [
        {path: each[:-1] for path, each in picture(root).items()} for root in (run.root, tmp_path / "out")
    ]
    assert without_creators[0] == without_creators[1]
    export(store, snapshot, b"a-b", tmp_path / "part", SILENT)
    assert (tmp_path / "part/hard").read_bytes() == b"6"
    export(store, snapshot, b"a/x", tmp_path / "file", SILENT)
    assert (tmp_path / "file/x").read_bytes() == b"6"
    with pytest.raises(EnvironmentProblem, match="not empty"):
        export(store, snapshot, b"", tmp_path / "out", SILENT)
    with pytest.raises(EnvironmentProblem, match="No such file"):
        export(store, snapshot, b"", tmp_path / "no/where", SILENT)


def test_a_damaged_object_is_not_restored(tmp_path: Path, store: CountingStore) -> None:
    lived(tmp_path, store)
    (entry,) = (e for e in History(store, "a", "shared").read(1).entries if e.path == b"d/old")
    key = object_key("a", entry.object)
    store.put(key, b"\xff" * len(store.get(key)))
    with pytest.raises(StoreError, match="holds other bytes"):
        rewriter(store).restore(1)
    assert History(store, "a", "shared").newest() == 4
