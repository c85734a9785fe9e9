"""Collecting garbage: what the policy keeps, and that nothing that anybody relies on ever goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import append, command, lived, told
from memories import SILENT, Run, picture
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import AgentfuseError, BusyError, IntegrityError, StoreError
from agentfuse.objectstore import ObjectStore
from agentfuse.objectstore.local import LocalStore
from agentfuse.snapshots import collect
from agentfuse.snapshots.collect import Collector, CollectReport, agents
from agentfuse.snapshots.history import History, kept_regions
from agentfuse.snapshots.layout import collection_key, snapshot_key
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.retention import DAY_S, Policy
from agentfuse.sync.fsck import Checker
from agentfuse.sync.rewrite import Rewriter

STRICT = Policy(keep_last=1, keep_daily=0)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


def gc(store: ObjectStore, policy: Policy = STRICT, **options: Any) -> CollectReport:
    return Collector(store, "a", "shared").run(policy, **options)


def age(base: Path, days: float = 10, under: str = "agents") -> None:
    """Make everything that a store holds now this old."""
    then = time.time() - days * DAY_S
    for path in (base / "store" / under).rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def numbers(store: ObjectStore) -> list[int]:
    return list(History(store, "a", "shared").numbers())


def objects(store: ObjectStore) -> list[str]:
    return [found.key for found in store.list("agents/a/objects/")]


def check_whole(store: ObjectStore) -> None:
    assert Checker(store, "a", SILENT).run(all_snapshots=True).lost == []


def garbage(base: Path) -> LocalStore:
    """A history ten days old whose first snapshots name what the next run is about to write again."""
    store = local_store(base)
    first = Run(base, store, "e0")
    first.write("notes.md", b"# Notes\n")
    first.commit()
    first.write("daily", b"the same every day")
    first.write("large", b"large and the same " * 100_000)
    first.commit()
    (first.root / "daily").unlink()
    (first.root / "large").unlink()
    append(first, "- e0\n")
    first.commit()
    first.write("other", b"other")
    first.commit()
    age(base)
    return store


# -- what goes and what stays


def test_old_snapshots_and_what_only_they_name_go(tmp_path: Path, store: LocalStore) -> None:
    garbage(tmp_path)
    before = picture(tmp_path / "e0/shared")
    report = gc(store)
    assert (report.deleted_snapshots, report.kept_snapshots) == ([1, 2, 3], [4])
    assert numbers(store) == [4]
    check_whole(store)
    again = Run(tmp_path, store, "e9")
    again.restore()
    assert picture(again.root) == before
    assert len(objects(store)) == 2
    assert report.deleted_bytes > 1_900_000
    assert (report.deleted_objects, report.kept_objects) == (3, 2)
    assert gc(store).deleted_objects == 0


def test_nothing_young_goes(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    report = gc(store)
    assert (report.deleted_snapshots, report.deleted_objects) == ([], 0)
    store.put("agents/a/objects/ab/" + "ab" * 32, b"on its way into a snapshot")
    assert gc(store).young_objects == 1
    assert len(numbers(store)) == 4


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path: Path, store: LocalStore) -> None:
    garbage(tmp_path)
    counting = CountingStore(store)
    foretold = gc(counting, dry_run=True)
    assert counting.puts == counting.requests["delete"] == 0
    assert len(numbers(store)) == 4
    assert gc(store) == foretold
    assert foretold.deleted_bytes > 0


def test_pinned_snapshots_stay_whole(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    age(tmp_path)
    pins = Pins(store, "a", "shared")
    pins.add(2)
    assert gc(store).kept_snapshots == [2, 3, 4]
    check_whole(store)
    pins.remove(2)
    assert gc(store).deleted_snapshots == [2]


def test_a_pin_that_comes_meanwhile_is_respected(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    age(tmp_path)

    class PinnedMeanwhile(CountingStore):
        def delete(self, key: str) -> None:
            if key == snapshot_key("a", "shared", 1):
                Pins(self.inner, "a", "shared").add(2)
            super().delete(key)

    assert gc(PinnedMeanwhile(store)).kept_snapshots == [2, 3, 4]
    check_whole(store)


@pytest.mark.parametrize("place", ["executions/e1/workspace", "other", "a.b/c/d"])
def test_snapshots_of_every_region_and_execution_count(tmp_path: Path, store: LocalStore, place: str) -> None:
    garbage(tmp_path)
    key = f"agents/a/{place}/snapshots/" + "0" * 19 + "1.json.gz"
    store.put(key, store.get(snapshot_key("a", "shared", 2)))
    age(tmp_path)
    assert gc(store).deleted_objects == 0
    store.delete(key)
    assert gc(store).deleted_objects == 3


def test_a_snapshot_that_cannot_be_read_keeps_all_objects(tmp_path: Path, store: LocalStore) -> None:
    garbage(tmp_path)
    everything = objects(store)
    for bad, content in (("9.json.gz", b"junk"), ("9.json.zst", b"from the future")):
        key = "agents/a/other/snapshots/" + "0" * 19 + bad
        store.put(key, content)
        with pytest.raises(IntegrityError):
            gc(store)
        assert objects(store) == everything
        store.delete(key)
    assert gc(store).deleted_objects == 3


def test_a_damaged_snapshot_among_what_the_newest_runs_left_stays_and_keeps_all_objects(
    tmp_path: Path, store: LocalStore
) -> None:
    lived(tmp_path, store)
    store.put(snapshot_key("a", "shared", 3), b"junk")
    age(tmp_path)
    everything = objects(store)
    with pytest.raises(IntegrityError):
        gc(store, Policy(keep_last=2, keep_daily=0))
    assert numbers(store) == [3, 4]
    assert objects(store) == everything


def test_of_what_an_execution_kept_the_newest_stays(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    kept = Run(tmp_path, store, "e2", kept="workspace")
    for number in range(4):
        kept.write("file", b"%d" % number * 1000)
        kept.commit("checkpoint")
    age(tmp_path)
    other = Run(tmp_path, store, "e3", kept="workspace")
    for number in range(3):
        other.write("file", b"other %d" % number)
        other.commit("checkpoint")
    foretold = gc(store, dry_run=True)
    report = gc(store)
    assert report == foretold
    assert (report.deleted_of_executions, report.kept_of_executions) == (3, 4)
    assert {region: list(times) for region, times in kept_regions(store, "a").items()} == {
        "executions/e2/workspace": [4],
        "executions/e3/workspace": [1, 2, 3],
    }
    assert report.deleted_objects == 3
    check_whole(store)


def test_an_agent_that_only_kept_regions_of_executions_is_collected(
    tmp_path: Path, store: LocalStore
) -> None:
    kept = Run(tmp_path, store, "e1", kept="downloads")
    for number in range(3):
        kept.write("file", b"%d" % number)
        kept.commit("checkpoint")
    age(tmp_path)
    done = command(store, "gc", "--agent", "a").stdout
    assert b"a: deleted 2 snapshots of what executions kept; kept 1\n" in done
    check_whole(store)
    assert list(store.list("agents/a/shared/collections/"))


def test_a_collection_of_what_executions_kept_ends_in_time_and_goes_on(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for execution in ("e1", "e2"):
        kept = Run(tmp_path, store, execution, kept="downloads")
        for number in range(3):
            kept.write("file", f"{execution} {number}".encode())
            kept.commit("checkpoint")
    age(tmp_path)
    clock = iter([0.0, 1.0, 2.0, 3.0, *[collect.MAX_RUN_S + 1] * 9])
    monkeypatch.setattr(collect, "_uptime", lambda: next(clock))
    report = gc(store)
    assert (report.stopped, report.deleted_of_executions, report.deleted_objects) == (True, 3, 0)
    monkeypatch.undo()
    check_whole(store)
    report = gc(store)
    assert (report.stopped, report.deleted_of_executions, report.deleted_objects) == (False, 1, 4)
    check_whole(store)


def test_other_agents_are_not_touched(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    for agent in ("a-b", "a0", "b", "a.c"):
        store.put(f"agents/{agent}/objects/ab/" + "ab" * 32, b"1")
        store.put(f"agents/{agent}/objects/ac/" + "ac" * 32, b"1")
    age(tmp_path)
    gc(store)
    assert list(agents(store)) == ["a-b", "a.c", "a", "a0", "b"]
    assert all(len(list(store.list(f"agents/{agent}/objects/"))) == 2 for agent in ("a-b", "a0", "b", "a.c"))


# -- one at a time


def test_two_collections_do_not_run_at_once(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    age(tmp_path)
    refused = []

    class Another(CountingStore):
        def delete(self, key: str) -> None:
            if not refused:
                with pytest.raises(BusyError, match="under way since") as caught:
                    gc(self.inner)
                refused.append(caught)
            super().delete(key)

    gc(Another(store))
    assert refused
    assert len(list(store.list("agents/a/shared/collections/"))) == 1
    gc(store)
    assert [found.key for found in store.list("agents/a/shared/collections/")] == [
        collection_key("a", "shared", 2)
    ]


def test_of_two_that_begin_together_one_wins(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    age(tmp_path)

    class Overtaken(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            Collector(self.inner, "a", "shared")._begin()
            return super().put_if_absent(key, body)

    with pytest.raises(BusyError):
        gc(Overtaken(store))
    assert len(numbers(store)) == 4


def test_an_answer_that_got_lost_does_not_lock_out(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    age(tmp_path)

    class SentTwice(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            super().put_if_absent(key, body)
            return super().put_if_absent(key, body)

    assert gc(SentTwice(store)).deleted_snapshots == [1, 2]


def test_a_collection_ends_in_time(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(tmp_path, store)
    age(tmp_path)
    clock = iter([0.0, 1.0, *[collect.MAX_RUN_S + 1] * 9])
    monkeypatch.setattr(collect, "_uptime", lambda: next(clock))
    report = gc(store)
    assert (report.stopped, report.deleted_snapshots, report.deleted_objects) == (True, [1], 0)
    monkeypatch.undo()
    report = gc(store)
    assert (report.stopped, report.deleted_snapshots) == (False, [2])
    check_whole(store)


class Killed(BaseException):
    """The process is gone: nothing that it would do afterwards happens either."""


class Mortal(CountingStore):
    """Every request from one on kills."""

    def __init__(self, inner: ObjectStore, dies_at: int) -> None:
        super().__init__(inner)
        self.dies_at = dies_at

    def _count(self, method: str, key: str) -> None:
        if len(self.keys) >= self.dies_at:
            raise Killed
        super()._count(method, key)


def test_killed_at_any_point_it_leaves_a_whole_history_and_the_next_one_finishes(tmp_path: Path) -> None:
    dies_at, is_done = 0, False
    while not is_done:
        base = tmp_path / str(dies_at)
        store = garbage(base)
        try:
            gc(Mortal(store, dies_at))
            is_done = True
        except Killed:
            check_whole(store)
            assert numbers(store)[-1] == 4
            age(base, 0.1, "agents/a/shared/collections")  # more than two hours
            gc(store)
        assert numbers(store) == [4]
        assert len(objects(store)) == 2
        check_whole(store)
        dies_at += 1
    assert dies_at > 15


def test_a_request_that_fails_stops_it_and_nothing_else(tmp_path: Path) -> None:
    at, is_done = 0, False
    while not is_done:
        base = tmp_path / str(at)
        store = garbage(base)
        try:
            gc(FaultyStore(store, lambda n, *_, at=at: "before" if n == at else None))
            is_done = True
        except StoreError as error:
            assert "injected" in str(error)
            check_whole(store)
        at += 1
    assert at > 12


# -- beside commits: between each two requests of one, all of the other


class Between(CountingStore):
    """Does something else before one of its requests, which is numbered from 0."""

    def __init__(self, inner: ObjectStore, at: int, other: Callable[[], object]) -> None:
        super().__init__(inner)
        self.at = at
        self.other = other
        self.is_done = False

    def _count(self, method: str, key: str) -> None:
        if len(self.keys) == self.at and not self.is_done:
            self.is_done = True
            self.other()
        super()._count(method, key)


def write_again(run: Run) -> None:
    run.write("daily", b"the same every day")
    run.write("large", b"large and the same " * 100_000)


def interleavings(tmp_path: Path, one: Callable[[Path, int], bool]) -> int:
    """Run ``one(base, at)`` for every request number until it says that there was none of that number."""
    at = 0
    while one(tmp_path / str(at), at):
        at += 1
    return at


@pytest.mark.parametrize("restores", [False, True])
def test_a_collection_between_the_requests_of_a_commit(tmp_path: Path, restores: bool) -> None:
    def once(base: Path, at: int) -> bool:
        store = garbage(base)
        run = Run(base, store, "e1")
        if restores:
            run.restore()
        write_again(run)
        run.store = between = Between(store, at, lambda: gc(store))
        run.another_process() if not restores else setattr(run.memory, "_store", between)
        run.memory._uploader._store = between
        run.memory._history._store = between
        run.commit()
        check_whole(store)
        gc(store)
        check_whole(store)
        after = Run(base, store, "e2")
        after.restore()
        assert (after.root / "daily").read_bytes() == b"the same every day"
        assert (after.root / "large").stat().st_size == 1_900_000
        return between.is_done

    assert interleavings(tmp_path, once) >= 5


@pytest.mark.parametrize("restores", [False, True])
def test_a_commit_between_the_requests_of_a_collection(tmp_path: Path, restores: bool) -> None:
    def once(base: Path, at: int) -> bool:
        store = garbage(base)
        run = Run(base, store, "e1")
        if restores:
            run.restore()
        write_again(run)
        between = Between(store, at, run.commit)
        gc(between)
        check_whole(store)
        if between.is_done:
            after = Run(base, store, "e2")
            after.restore()
            assert (after.root / "large").stat().st_size == 1_900_000
            assert (after.root / "daily").read_bytes() == b"the same every day"
        return between.is_done

    assert interleavings(tmp_path, once) >= 15


def test_the_first_half_of_a_commit_before_and_the_second_after_each_request(tmp_path: Path) -> None:
    """Sent before a collection looked, committed while it deletes, and all that is between."""
    for split in range(8):

        def once(base: Path, at: int, split: int = split) -> bool:
            store = garbage(base)
            run = Run(base, store, "e1")
            run.restore()
            write_again(run)
            down = FaultyStore(store, lambda n, *_: "before" if n == split else None)
            run.store = down
            run.another_process()
            try:
                run.commit()
            except StoreError:
                run.store = store
                run.another_process()
            else:
                return False
            between = Between(store, at, run.commit)
            gc(between)
            check_whole(store)
            return between.is_done

        interleavings(tmp_path / f"split {split}", once)


def test_a_mount_whose_snapshot_was_overtaken_keeps_what_it_restores(tmp_path: Path) -> None:
    """Another run commits and a collection runs, while a restore is between two requests."""

    def once(base: Path, at: int) -> bool:
        store = garbage(base)
        other = Run(base, store, "e1")
        other.restore()

        def overtake() -> None:
            for path in ("other", "notes.md"):
                (other.root / path).unlink()
            other.write("new", b"1")
            other.commit()
            gc(store)

        between = Between(store, at, overtake)
        run = Run(base, between, "e2")
        run.restore()
        assert (run.root / "other").exists() is not (at == 0)
        run.write("mine", b"2")
        run.commit()
        check_whole(store)
        return between.is_done

    assert interleavings(tmp_path, once) >= 3


@pytest.mark.parametrize("verb", ["restore", "revert"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_going_back_beside_a_collection(tmp_path: Path, verb: str, is_inside: bool) -> None:
    """What comes back is named only by snapshots that are unpinned and collected meanwhile."""
    wanted = {"restore": ("daily", "large"), "revert": ("other",)}[verb]

    def go_back(on: ObjectStore) -> None:
        rewriter = Rewriter(on, "a", "shared", SILENT)
        rewriter.restore(2) if verb == "restore" else rewriter.revert("e1")

    def once(base: Path, at: int) -> bool:
        store = garbage(base)
        run = Run(base, store, "e1")
        run.restore()
        (run.root / "other").unlink()
        run.commit()
        later = Run(base, store, "e2")
        later.restore()
        later.write("later", b"1")
        later.commit()
        age(base)
        pins = Pins(store, "a", "shared")
        for number in (2, 4):
            pins.add(number)

        def collect_after_unpinning() -> None:
            for number in (2, 4):
                pins.remove(number)
            gc(store)

        if is_inside:
            between = Between(store, at, collect_after_unpinning)
            try:
                go_back(between)
            except AgentfuseError:
                assert between.is_done  # what it needs is gone: that is said, and nothing is committed
                assert numbers(store) == [5, 6]
        else:
            between = Between(store, at, lambda: go_back(store))
            gc(between)
        check_whole(store)
        gc(store)
        check_whole(store)
        if numbers(store)[-1] == 7:
            after = Run(base, store, "e3")
            after.restore()
            assert all((after.root / name).exists() for name in wanted)
        return between.is_done

    assert interleavings(tmp_path, once) >= 8


# -- the verb


def test_the_verb_says_what_it_freed(tmp_path: Path, store: LocalStore) -> None:
    garbage(tmp_path)
    store.put("agents/b/objects/ab/" + "ab" * 32, b"12345")
    age(tmp_path)
    gc_a = ("gc", "--agent", "a", "--keep-last", "1", "--keep-daily", "0")
    assert b"a: would delete 3 snapshots and 3 objects" in command(store, *gc_a, "--dry-run").stdout
    assert b"a: deleted 3 snapshots and 3 objects, " in command(store, *gc_a).stdout
    rows = told(store, "gc", "--all")["agents"]
    assert [(row["agent"], row["deleted_objects"], row["deleted_bytes"]) for row in rows] == [
        ("a", 0, 0),
        ("b", 1, 5),
    ]
    assert b"either one agent or all" in command(store, "gc", code=2).stderr
    assert b"not safe" in command(store, "gc", "--all", "--grace", "1h", code=2).stderr
    assert b"not a duration" in command(store, "gc", "--all", "--grace", "soon", code=2).stderr
    command(store, "gc", "--agent", "nobody", code=66)


def test_the_verb_cleans_up_after_interrupted_writes(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    leftovers = [tmp_path / "store/agents" / at / ".agentfuse-tmp-01" for at in ("a/objects", "b")]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert told(store, "gc", "--all")["interrupted_writes"] == 0, "they may still be under way"
    age(tmp_path)
    gc_a = ("gc", "--agent", "a")
    assert b"would clean up after 1 interrupted write\n" in command(store, *gc_a, "--dry-run").stdout
    assert all(path.exists() for path in leftovers)
    assert b"cleaned up after 1 interrupted write\n" in command(store, *gc_a).stdout
    assert [path.exists() for path in leftovers] == [False, True]
    assert told(store, "gc", "--all")["interrupted_writes"] == 1
    assert not any(path.exists() for path in leftovers)
    assert b"interrupted" not in command(store, "gc", "--all").stdout


def test_one_agents_trouble_does_not_keep_the_others_garbage(tmp_path: Path, store: LocalStore) -> None:
    lived(tmp_path, store)
    store.put("agents/b/objects/ab/" + "ab" * 32, b"12345")
    store.put(snapshot_key("a", "shared", 3), b"junk")
    age(tmp_path)
    done = command(store, "gc", "--all", code=65)
    assert b"b: deleted 0 snapshots and 1 object" in done.stdout
    assert b"00003.json.gz" in done.stderr
