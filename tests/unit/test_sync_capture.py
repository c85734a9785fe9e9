"""One moment of a region that moves: looks, the spool, and what a commit makes of them."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from memories import SILENT, Run

from agentfuse.errors import AgentfuseError, EnvironmentProblem
from agentfuse.fuse.boundary import Gate
from agentfuse.home.changes import Changes
from agentfuse.home.walk import SETTLED_NS
from agentfuse.objectstore import ObjectStore, open_store
from agentfuse.snapshots.history import History
from agentfuse.sync.contents import read_content
from agentfuse.sync.spool import Spool


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def run(tmp_path: Path, store: ObjectStore) -> Run:
    return Run(tmp_path, store)


def settle(root: Path) -> None:
    """Return when no file below is so young that a change could go unnoticed: that is a matter of time."""
    while any(time.time_ns() - os.lstat(path).st_ctime_ns < 2 * SETTLED_NS for path in root.rglob("*")):
        os.sched_yield()


def contents(store: ObjectStore, number: int) -> dict[bytes, bytes]:
    snapshot = History(store, "a", "shared").read(number)
    return {e.path: read_content(store, "a", e) for e in snapshot.entries if e.type == "file"}


def test_what_changes_after_the_look_is_not_in_the_commit(run: Run, store: ObjectStore) -> None:
    run.write("note", b"then")
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        moment.look()
        run.write("note", b"now, and longer")
        run.write("other", b"later")
        (run.root / "note").rename(run.root / "moved")
        report = run.memory.commit(SILENT, "checkpoint", moment)
    assert contents(store, report.number) == {b"note": b"then"}
    assert contents(store, run.commit().number) == {b"moved": b"now, and longer", b"other": b"later"}


def test_the_second_look_copies_only_what_changed_since_the_first(run: Run, store: ObjectStore) -> None:
    for name in ("a", "b", "c"):
        run.write(name, name.encode() * 1000)
    settle(run.root)
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        moment.look()
        run.write("b", b"changed")
        copied: list[int] = []
        add = spool.add
        spool.add = lambda fd: copied.append(fd) or add(fd)  # type: ignore[method-assign, func-returns-value]
        moment.look()
        assert len(copied) == 1
        report = run.memory.commit(SILENT, "checkpoint", moment)
    assert contents(store, report.number) == {b"a": b"a" * 1000, b"b": b"changed", b"c": b"c" * 1000}


def test_a_young_file_is_copied_again_for_its_time_does_not_tell(run: Run, store: ObjectStore) -> None:
    run.write("a", b"1")
    stamp = os.stat(run.root / "a")
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        moment.look()
        run.write("a", b"2")
        os.utime(run.root / "a", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        moment.look()
        assert contents(store, run.memory.commit(SILENT, "checkpoint", moment).number) == {b"a": b"2"}


def test_what_was_sent_travels_no_second_time_with_the_commit(run: Run) -> None:
    run.write("a", b"1" * 5000)
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        moment.look()
        run.memory.send(moment, SILENT)
    report = run.commit()
    assert (report.number, report.objects_put) == (1, 0)


def test_hard_links_and_empty_files_go_through_the_spool(run: Run, store: ObjectStore) -> None:
    run.write("a", b"one inode")
    os.link(run.root / "a", run.root / "b")
    run.write("empty", b"")
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        moment.look()
        number = run.memory.commit(SILENT, "checkpoint", moment).number
    assert contents(store, number) == {b"a": b"one inode", b"b": b"one inode", b"empty": b""}
    links = {e.path: e.link for e in History(store, "a", "shared").read(number).entries}
    assert links[b"a"] == links[b"b"] == 1


def test_a_look_at_what_vanishes_fails_and_a_later_one_counts(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write("a", b"1")
    run.write("b", b"2")
    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        add = spool.add

        def vanish(fd: int) -> object:
            (run.root / "b").unlink(missing_ok=True)
            return add(fd)

        monkeypatch.setattr(spool, "add", vanish)
        with pytest.raises(AgentfuseError):
            moment.look()
        moment.look()
        assert contents(store, run.memory.commit(SILENT, "checkpoint", moment).number) == {b"a": b"1"}


def test_a_full_disk_fails_the_capture_and_nothing_else(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write("a", b"1")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Spool(run.home) as spool:
        moment = run.memory.moment(SILENT, spool)
        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(EnvironmentProblem, match="No space left"):
            moment.look()
    assert contents(store, run.commit().number) == {b"a": b"1"}


def test_the_spool_copies_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another filesystem")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "a").write_bytes(os.urandom(3 * 2**20 + 1))
    with Spool(tmp_path) as spool, open(tmp_path / "a", "rb") as file:
        copies = [spool.add(file.fileno()), spool.add(file.fileno())]
        for copy in copies:
            assert copy.size == 3 * 2**20 + 1
            assert spool.open(copy).read(2**30) == (tmp_path / "a").read_bytes()
    assert os.listdir(tmp_path) == ["a"]


def test_changes_count_what_no_snapshot_holds() -> None:
    changes = Changes()
    woken: list[int] = []
    changes.on_change = lambda: woken.append(changes.version)
    assert (changes.totals(), changes.age_s()) == ((0, 0), None)
    changes.note(1, 100)
    changes.note(1, 200)
    changes.note(2, None)
    changes.note_complete()
    assert (changes.totals(), woken) == ((2, 200), [1, 3])
    assert changes.capture() == 3
    assert (changes.since, changes.closed_since) == (None, None)
    changes.note(3, 7)
    assert changes.totals() == (3, 207)
    changes.captured_is_lost()
    assert changes.totals() == (3, 207)
    assert changes.capture() == 4
    changes.captured_is_committed()
    assert (changes.totals(), changes.age_s()) == ((0, 0), None)


async def test_a_gate_lets_nobody_through_while_anybody_holds_it() -> None:
    gate = Gate()
    passed = trio.Event()

    async def pass_it() -> None:
        await gate.passed()
        passed.set()

    async with trio.open_nursery() as nursery:
        with gate.closed():
            with gate.closed():
                nursery.start_soon(pass_it)
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            assert gate.is_closed
            assert not passed.is_set()
        await passed.wait()
    assert not gate.is_closed


def test_a_hole_takes_no_room_in_the_spool_and_reads_as_zeros(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(200 * 2**20)
        file.seek(100 * 2**20)
        file.write(b"data")
    with Spool(tmp_path) as spool, open(tmp_path / "sparse", "rb") as file:
        before = os.statvfs(tmp_path).f_bfree
        copy = spool.add(file.fileno())
        assert copy.size == 200 * 2**20
        assert (before - os.statvfs(tmp_path).f_bfree) * os.statvfs(tmp_path).f_frsize < 50 * 2**20
        content = spool.open(copy)
        pieces = iter(lambda: content.read(2**20), b"")
        assert b"".join(piece.strip(b"\0") for piece in pieces) == b"data"


def test_the_spool_leaves_half_of_what_is_left_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 400)
    disk = os.statvfs(tmp_path)
    fields = list(disk)
    fields[4] = 30 * 4096 // disk.f_frsize  # f_bavail
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(fields))
    with Spool(tmp_path) as spool, open(tmp_path / "a", "rb") as file:
        with pytest.raises(OSError, match="too little room"):
            spool.add(file.fileno())
        fields[4] *= 2
        assert spool.add(file.fileno()).size == 102_400
