"""Commits: what counts as a change, what travels, what an interruption leaves, and two at once."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from histories import take_turns
from memories import Run, picture
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import BusyError, EnvironmentProblem, StoreError
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key
from agentfuse.sync import engine, scan, upload
from agentfuse.sync.notes import Notes


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(local_store(tmp_path))


def restored(tmp_path: Path, store: CountingStore, name: str) -> Run:
    run = Run(tmp_path, store, name)
    run.restore()
    return run


def stretches(store: CountingStore) -> list[tuple[str, int, int]]:
    """Of every snapshot whose it is, what it follows and what it resumes; the oldest first."""
    history = History(store, "a", "shared")
    found = map(history.read, history.numbers())
    return [(each.execution, each.follows, each.resumes) for each in found]


def started(tmp_path: Path, store: CountingStore) -> Run:
    """An execution with some files that are all synced."""
    run = Run(tmp_path, store)
    run.write("d/one", b"1")
    run.write("d/two", b"22")
    run.write("large", os.urandom(2_000_000))
    run.commit()
    other = restored(tmp_path, store, "e2")
    store.reset()
    return other


def test_an_empty_memory_is_never_written(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    assert run.restore().number is None
    run.root.chmod(0o700)
    assert run.commit().number is None
    assert store.requests == {"list": 1}


def test_nothing_changed_costs_nothing(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    (run.root / "d/one").read_bytes()
    (run.root / "d/new").write_bytes(b"")
    (run.root / "d/new").unlink()  # leaves another mtime on its directory
    os.utime(run.root / "d", ns=(0, 0))
    assert run.commit().number is None
    assert not store.requests


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "d/one").write_bytes(b"x"),
        lambda root: (root / "d/one").chmod(0o600),
        lambda root: os.utime(root / "d/one", ns=(0, 1)),
        lambda root: (root / "d/one").rename(root / "d/three"),
        lambda root: (root / "d/one").unlink(),
        lambda root: (root / "new").mkdir(),
        lambda root: (root / "d").chmod(0o700),
        lambda root: root.chmod(0o700),
        lambda root: os.link(root / "d/one", root / "hard"),
        lambda root: os.symlink("d", root / "soft"),
        lambda root: os.mkfifo(root / "pipe"),
    ],
)
def test_every_change_of_substance_is_committed_and_comes_back(
    tmp_path: Path, store: CountingStore, change: Callable[[Path], object]
) -> None:
    run = started(tmp_path, store)
    change(run.root)
    assert run.commit().number == 2
    assert run.commit().number is None
    assert picture(restored(tmp_path, store, "e3").root) == picture(run.root)


def test_a_link_broken_with_the_same_content_is_a_change(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    one = run.write("one", b"1")
    os.link(one, run.root / "two")
    run.commit()
    copy = run.write("copy", b"1")
    os.utime(copy, ns=(0, one.stat().st_mtime_ns))
    copy.rename(run.root / "two")
    assert run.commit().number == 2
    other = restored(tmp_path, store, "e2")
    assert (other.root / "one").stat().st_nlink == 1


def test_only_changed_files_are_read(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, store)
    hashed = []
    original = scan.hash_file
    monkeypatch.setattr(scan, "hash_file", lambda file: hashed.append(file.fileno()) or original(file))
    run.another_process()
    run.write("d/one", b"other")
    assert run.commit().number == 2
    assert len(hashed) == 1


def test_a_change_with_a_forged_time_is_found(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    path = run.root / "d/one"
    before = path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    run.commit()
    assert (restored(tmp_path, store, "e3").root / "d/one").read_bytes() == b"2"


def test_a_change_within_the_same_tick_of_the_clock_is_found(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    path = run.write("file", b"0")
    stamp = path.stat().st_mtime_ns
    for number in range(1, 30):
        run.commit()
        path.write_bytes(b"%d" % (number % 10))
        os.utime(path, ns=(stamp, stamp))
    run.commit()
    assert (restored(tmp_path, store, "e2").root / "file").read_bytes() == b"9"


def test_known_contents_do_not_travel(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    large = (run.root / "large").read_bytes()
    run.write("copy", large)
    run.write("d/moved", b"1")
    (run.root / "d/one").unlink()
    report = run.commit()
    assert (report.number, report.objects_put, report.bytes_put) == (2, 0, 0)
    assert store.requests == {"list": 1, "put_if_absent": 1}


def test_equal_contents_travel_once(tmp_path: Path, store: CountingStore) -> None:
    run = Run(tmp_path, store)
    large = os.urandom(3_000_000)
    for number in range(5):
        run.write(f"large {number}", large)
        run.write(f"small {number}", b"small")
    report = run.commit()
    assert (report.objects_put, report.bytes_put, report.bytes) == (2, 3_000_005, 15_000_025)
    other = restored(tmp_path, store, "e2")
    assert picture(other.root) == picture(run.root)
    assert store.gets == 3


def test_small_changes_cost_one_object_and_one_document(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    for number in range(100):
        run.write(f"new {number}", b"%d" % number)
    report = run.commit()
    assert store.requests == {"list": 1, "put_if_absent": 2}
    assert (report.objects_put, report.files) == (1, 103)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_every_interruption_leaves_the_last_snapshot_and_can_be_resumed(tmp_path: Path, kind: str) -> None:
    inner = local_store(tmp_path)
    history = History(inner, "a", "shared")

    def attempt(name: str, fails_at: int) -> FaultyStore:
        run = restored(tmp_path, inner, name)
        run.write(f"large {name}", os.urandom(1_500_000))
        run.write(f"small {name}", os.urandom(1000))
        run.store = FaultyStore(inner, lambda n, *_: kind if n == fails_at else None)
        run.another_process()
        before = history.newest()
        try:
            number = run.commit().number
        except StoreError as error:
            assert "injected" in str(error)
            assert history.newest() == before, "what failed is not there"
            run.another_process()
            number = run.commit().number
        assert number == before + 1
        assert picture(restored(tmp_path, inner, f"after {name}").root) == picture(run.root)
        return run.store

    requests = len(attempt("clean", -1).keys)
    assert requests == 6  # list, two times stat and put, and put_if_absent
    for number in range(requests):
        assert len(attempt(f"fault {number}", number).keys) > number


def test_a_resumed_commit_does_not_send_again_what_arrived(tmp_path: Path, store: CountingStore) -> None:
    down = FaultyStore(
        store, lambda n, method, key: "before" if "/snapshots/" in key and method != "list" else None
    )
    run = Run(tmp_path, down)
    run.restore()
    run.write("large", os.urandom(5_000_000))
    run.write("small", b"1")
    with pytest.raises(StoreError):
        run.commit()
    down.fails = lambda *_: None
    store.reset()
    assert run.commit().objects_put == 0
    (run.root / "large").touch()
    run.write("another", b"2")
    down.fails = lambda n, method, key: "before" if "/snapshots/" in key and method != "list" else None
    with pytest.raises(StoreError):
        run.commit()
    down.fails = lambda *_: None
    run.another_process()  # has to ask
    store.reset()
    assert run.commit().objects_put == 0
    assert store.requests["stat"] == 1


def make_old(tmp_path: Path, key: str) -> None:
    os.utime(tmp_path / "store" / key, (1, 1))


@pytest.mark.parametrize("size", [1000, 2_000_000])
@pytest.mark.parametrize("restores", [False, True])
def test_an_old_object_that_may_be_collected_now_is_not_relied_upon(
    tmp_path: Path, store: CountingStore, size: int, restores: bool
) -> None:
    """No snapshot names it, so it can go at any moment; writing it again could not take that back."""
    run = Run(tmp_path, store)
    if restores:
        run.restore()
    content = os.urandom(size)
    run.write("file", content)
    key = object_key("a", upload.hashlib.sha256(content).hexdigest())
    store.put(key, content)
    make_old(tmp_path, key)
    run.commit()
    assert store.stat(key).modified_at == 1
    store.delete(key)
    assert (restored(tmp_path, store, "e2").root / "file").read_bytes() == content


def test_contents_that_only_an_older_snapshot_names_are_sent_again(
    tmp_path: Path, store: CountingStore
) -> None:
    run = started(tmp_path, store)
    for found in list(store.list("agents/a/objects/")):
        make_old(tmp_path, found.key)
    other = restored(tmp_path, store, "e3")
    (other.root / "large").unlink()
    other.commit()
    (run.root / "large").chmod(0o600)  # a change wins over a deletion, so the content is needed again
    store.reset()
    assert run.commit().objects_put == 1


def test_two_executions_never_overwrite_each_other(tmp_path: Path, store: CountingStore) -> None:
    one, two = started(tmp_path, store), restored(tmp_path, store, "e3")
    one.write("d/one", b"from e2")
    one.write("only e2", b"2")
    two.write("d/one", b"from e3")
    two.write("only e3", b"3")
    assert one.commit().number == 2
    report = two.commit()
    assert (report.number, [conflict.kept_at for conflict in report.conflicts]) == (
        3,
        [b".conflicts/e3/d/one"],
    )
    root = restored(tmp_path, store, "e4").root
    assert (root / "d/one").read_bytes() == b"from e2"
    assert (root / ".conflicts/e3/d/one").read_bytes() == b"from e3"
    assert (root / "only e2").read_bytes() + (root / "only e3").read_bytes() == b"23"


def test_an_execution_goes_on_after_its_changes_were_merged(tmp_path: Path, store: CountingStore) -> None:
    """Its own tree lacks what others did, and that must not be taken for deletions of its own."""
    one, two = started(tmp_path, store), restored(tmp_path, store, "e3")
    one.write("only e2", b"2")
    one.commit()
    two.write("d/one", b"3")
    two.commit("checkpoint")
    assert two.commit("checkpoint").number is None
    two.another_process()
    two.write("d/two", b"4")
    assert two.commit().number == 4
    assert two.commit().number is None
    root = restored(tmp_path, store, "e4").root
    assert (root / "only e2").read_bytes() == b"2"
    assert (root / "d/two").read_bytes() == b"4"
    assert not (root / ".conflicts").exists()


def test_a_snapshot_says_what_its_execution_went_on_from(tmp_path: Path, store: CountingStore) -> None:
    take_turns(tmp_path, store, "0ABAAB")
    assert stretches(store) == [("0", 0, 0), ("A", 1, 0), ("B", 2, 0), ("A", 3, 2), ("A", 3, 2), ("B", 5, 3)]


def test_a_process_that_goes_on_for_another_says_nothing_of_what_that_did(
    tmp_path: Path, store: CountingStore
) -> None:
    run = Run(tmp_path, store)
    for number in range(3):
        if number == 2:
            run.another_process()
        run.write("file", b"%d" % number)
        run.commit()
    assert stretches(store) == [("e1", 0, 0), ("e1", 0, 0), ("e1", 2, 0)]


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_commit_whose_answer_got_lost_is_gone_on_from(
    tmp_path: Path, store: CountingStore, kind: str
) -> None:
    """Whether it arrived or not, what its stretch claims is its execution's alone."""
    run = Run(tmp_path, store)
    run.write("file", b"0")
    run.commit()
    faulty = FaultyStore(
        store, lambda _, method, key: kind if method == "put_if_absent" and "2.json" in key else None
    )
    run.memory._history._store = faulty
    run.write("file", b"1")
    with contextlib.suppress(StoreError):
        run.commit()
    run.memory._history._store = store
    run.write("file", b"2")
    run.commit()
    assert stretches(store) == [("e1", 0, 0)] * (2 if kind == "before" else 3)


def test_many_executions_at_once_lose_nothing(tmp_path: Path, store: CountingStore) -> None:
    started(tmp_path, store)
    runs = [restored(tmp_path, store, f"run{number}") for number in range(5)]
    failures: list[BaseException] = []

    def work(run: Run) -> None:
        try:
            for step in range(4):
                run.write(f"{run.execution}/{step}", f"{run.execution} {step}".encode())
                run.write("d/one", f"{run.execution} {step}".encode())
                run.commit("checkpoint")
        except BaseException as error:  # noqa: BLE001  threads have no other way to fail a test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    root = restored(tmp_path, store, "last").root
    last_words = {path.read_bytes() for path in [root / "d/one", *root.glob(".conflicts/*/d/one")]}
    for run in runs:
        assert [(root / run.execution / str(step)).read_bytes() for step in range(4)] == [
            f"{run.execution} {step}".encode() for step in range(4)
        ]
    assert len(last_words) >= 2
    assert all(b"run" in words for words in last_words)
    assert History(store, "a", "shared").newest() == 1 + 4 * 5


def test_a_race_that_cannot_be_won_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AlwaysLost(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            other = Run(tmp_path, self.inner, f"other{len(self.keys)}")
            other.restore()
            other.write(f"other{len(self.keys)}", b"1")
            other.commit()
            return super().put_if_absent(key, body)

    monkeypatch.setattr(engine, "MAX_RACES", 3)
    run = Run(tmp_path, AlwaysLost(local_store(tmp_path)))
    run.write("mine", b"1")
    with pytest.raises(StoreError, match="lost 3 commits in a row"):
        run.commit()


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_lost_index_loses_no_change_and_no_deletion(
    tmp_path: Path, store: CountingStore, is_exact: bool
) -> None:
    run = started(tmp_path, store)
    if not is_exact:
        other = restored(tmp_path, store, "e3")
        other.write("only e3", b"3")
        other.commit()
        run.write("merged", b"m")
        run.commit()
    run.write("d/one", b"changed")
    (run.root / "d/two").unlink()
    run.index.close()
    (run.home / "index.db").write_bytes(b"junk")
    run.another_process()
    report = run.commit()
    assert report.number == (2 if is_exact else 4)
    assert not report.conflicts
    root = restored(tmp_path, store, "e4").root
    assert (root / "d/one").read_bytes() == b"changed"
    assert not (root / "d/two").exists()
    assert (root / "only e3").exists() is not is_exact
    run.another_process()
    store.reset()
    assert run.commit().number is None
    assert not store.requests


class Died(BaseException):
    """The process ended here."""


def killed_before_the_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit, and die when it has succeeded and nothing knows yet."""

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Notes, "write", die)
        run.commit()
    run.index.close()
    run.another_process()


@pytest.mark.parametrize("is_exact", [True, False])
def test_what_was_removed_after_a_commit_that_nobody_noted_does_not_come_back(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch, is_exact: bool
) -> None:
    run = started(tmp_path, store)
    if not is_exact:
        other = restored(tmp_path, store, "e3")
        other.write("only e3", b"3")
        other.commit()
    run.write("new", b"new")
    run.write("d/one", b"changed")
    killed_before_the_note(run, monkeypatch)
    (run.root / "new").unlink()
    run.write("d/one", b"changed again")
    report = run.commit()
    assert report.conflicts == ()
    root = restored(tmp_path, store, "e4").root
    assert not (root / "new").exists()
    assert not (root / ".conflicts").exists()
    assert (root / "d/one").read_bytes() == b"changed again"
    assert (root / "only e3").exists() is not is_exact


def test_going_back_after_a_commit_that_nobody_noted_is_committed(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, store)
    run.write("new", b"new")
    killed_before_the_note(run, monkeypatch)
    (run.root / "new").unlink()
    assert run.commit().number == 3
    assert not (restored(tmp_path, store, "e4").root / "new").exists()


def test_a_commit_whose_answer_was_lost_in_an_outage_is_known_for_ones_own_later(tmp_path: Path) -> None:
    fault: list[str] = []

    def fails(number: int, method: str, key: str) -> str | None:
        if fault and method == "put_if_absent" and "/snapshots/" in key:
            return fault[0]
        return "before" if fault and fault[0] == "after" and method == "get" else None

    run = started(tmp_path, FaultyStore(local_store(tmp_path), fails))
    for kind in ("before", "after"):
        run.write("new", kind.encode())
        fault[:] = [kind]
        with pytest.raises(StoreError):
            run.commit()
        fault.clear()
    run.write("new", b"newer")
    report = run.commit()
    assert (report.number, report.conflicts) == (3, ())
    assert (restored(tmp_path, run.store, "e4").root / "new").read_bytes() == b"newer"


def test_a_commit_that_arrives_long_after_it_was_given_up_is_known_for_ones_own(tmp_path: Path) -> None:
    """A request that hangs in the network, and gets to the store while the next commit is under way."""
    local = local_store(tmp_path)
    late: list[tuple[str, bytes]] = []

    class Slow(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            if "/snapshots/" not in key or key.endswith(f"{1:020}.json.gz"):
                return super().put_if_absent(key, body)
            if not late:
                late.append((key, body))
                raise StoreError("timed out")
            self.inner.put_if_absent(*late[0])
            return super().put_if_absent(key, body)

    run = started(tmp_path, Slow(local))
    run.write("new", b"new")
    run.write("other", b"other")
    with pytest.raises(StoreError, match="timed out"):
        run.commit()
    run.write("new", b"newer")
    (run.root / "other").unlink()
    report = run.commit()
    assert (report.number, report.conflicts) == (3, ())
    root = restored(tmp_path, local, "e4").root
    assert (root / "new").read_bytes() == b"newer"
    assert not (root / "other").exists()


def test_a_store_that_is_another_one_is_not_committed_to(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    run.store = CountingStore(local_store(tmp_path / "elsewhere"))
    run.another_process()
    run.write("new", b"1")
    with pytest.raises(StoreError, match="had snapshot 1 of shared"):
        run.commit()
    assert not run.store.puts


def test_a_file_that_changes_while_it_is_read_is_not_recorded(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, store)
    path = run.write("growing", b"x" * 100)
    original = scan.hash_file

    def grows(file):  # type: ignore[no-untyped-def]
        with path.open("ab") as more:
            more.write(b"y")
        return original(file)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "hash_file", grows)
        with pytest.raises(BusyError, match="'growing' changed while it was being read"):
            run.commit()
    assert History(store, "a", "shared").newest() == 1
    assert run.commit().number == 2


@pytest.mark.parametrize("size", [100, 2_000_000])
@pytest.mark.parametrize("change", [b"", b"shorter", b"same"])
def test_a_file_that_changes_after_it_was_hashed_is_not_uploaded(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch, size: int, change: bytes
) -> None:
    run = started(tmp_path, store)
    path = run.write("file", os.urandom(size))
    before = [found.key for found in store.list("agents/")]
    original = upload.Uploader.upload

    def changed_first(self, *args, **more):  # type: ignore[no-untyped-def]
        path.write_bytes(os.urandom(size) if change == b"same" else change)
        return original(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(upload.Uploader, "upload", changed_first)
        with pytest.raises(BusyError, match="'file' changed"):
            run.commit()
    assert History(store, "a", "shared").newest() == 1
    assert [found.key for found in store.list("agents/")] == before
    assert run.commit().number == 2


def test_a_vanished_root_is_not_taken_for_deletions(tmp_path: Path, store: CountingStore) -> None:
    run = started(tmp_path, store)
    run.root.rename(tmp_path / "away")
    with pytest.raises(EnvironmentProblem, match="No such file"):
        run.commit()
