"""Syncing during the run: what reaches the store by itself, the barrier, what a dead store does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import READY_S, Home

from agentfuse import killpoints
from agentfuse.objectstore import open_store
from agentfuse.snapshots.document import Snapshot
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import execution_region
from agentfuse.sync.contents import read_content

pytestmark = pytest.mark.mount

QUICK = 'sync_delay = "200ms"\ncheckpoint_interval = "300ms"\n'
NEVER = 'sync_delay = "1d"\ncheckpoint_interval = "1d"\n'

Make = Callable[..., Home]


def snapshots(home: Home, region: str = "shared") -> list[Snapshot]:
    history = History(open_store(home.store.as_uri()), home.agent, region)
    return [history.read(number) for number in history.numbers()]


def contents(home: Home, snapshot: Snapshot) -> dict[str, bytes]:
    store = open_store(home.store.as_uri())
    files = (entry for entry in snapshot.entries if entry.type == "file")
    return {entry.path.decode(): read_content(store, home.agent, entry) for entry in files}


def newest(home: Home, region: str = "shared") -> dict[str, bytes]:
    return contents(home, snapshots(home, region)[-1])


def sync_state(home: Home, region: str = "shared") -> dict[str, Any]:
    return dict(home.status()["sync"][region])


def until(is_so: Callable[[], bool], what: str) -> None:
    """Return when it is so; the mount is asked again and again, because what it does has no other sign."""
    deadline = time.monotonic() + READY_S
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"


def sync(home: Home, *options: str) -> subprocess.CompletedProcess[str]:
    return home.agentfuse("sync", str(home.path), *options)


@contextlib.contextmanager
def outage(home: Home) -> Iterator[None]:
    """The store is gone, then it is back."""
    aside = home.store.with_name("elsewhere")
    home.store.rename(aside)
    try:
        yield
    finally:
        aside.rename(home.store)


def test_a_closed_file_reaches_a_snapshot_by_itself(new_home: Make) -> None:
    home = new_home(top=QUICK).start()
    (home.path / "shared" / "note").write_text("learned")
    until(lambda: sync_state(home)["snapshot"] == 1, "a snapshot")
    assert newest(home) == {"note": b"learned"}
    state = sync_state(home)
    assert (state["dirty_files"], state["oldest_unsynced_s"], state["error"]) == (0, None, None)
    home.umount()
    assert len(snapshots(home)) == 1  # the unmount had nothing left to do


def test_a_file_that_stays_open_is_captured_too(new_home: Make) -> None:
    home = new_home(top=QUICK).start()
    with open(home.path / "shared" / "log", "ab", buffering=0) as log:
        log.write(b"one\n")
        until(lambda: sync_state(home)["snapshot"] == 1, "a snapshot")
        assert newest(home) == {"log": b"one\n"}
        log.write(b"two\n")
        until(lambda: sync_state(home)["snapshot"] == 2, "another snapshot")
        assert newest(home) == {"log": b"one\ntwo\n"}


def test_every_kind_of_change_is_noticed(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    shared = home.path / "shared"
    (shared / "a").write_text("a")
    changes: list[Callable[[], object]] = [
        lambda: (shared / "a").write_text("b"),
        lambda: (shared / "a").chmod(0o600),
        lambda: (shared / "a").rename(shared / "b"),
        lambda: (shared / "c").hardlink_to(shared / "b"),
        lambda: (shared / "s").symlink_to("b"),
        (shared / "d").mkdir,
        (shared / "c").unlink,
        (shared / "d").rmdir,
        lambda: (shared / "b").rename(home.path / "workspace" / "b"),
        lambda: (home.path / "workspace" / "b").rename(shared / "again"),
        (shared / "empty").touch,
    ]
    for number, change in enumerate(changes, start=1):
        assert sync(home).returncode == 0
        assert len(snapshots(home)) == number
        change()
    assert sync(home).returncode == 0
    assert newest(home) == {"again": b"b", "empty": b""}


def test_the_barrier_says_what_it_did_and_that_there_was_nothing_to_do(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    (home.path / "shared" / "note").write_text("learned")
    state = sync_state(home)
    assert (state["dirty_files"], state["dirty_bytes"]) == (1, 7)
    assert "1 file, 7 B" in home.agentfuse("df", str(home.path)).stdout
    done = sync(home)
    assert (done.returncode, done.stdout) == (
        0,
        "shared/: snapshot 1 holds 1 file, 7 B; sent 7 B in 1 object\n",
    )
    assert newest(home) == {"note": b"learned"}
    assert sync(home).stdout == "shared/: everything was in the store already\n"
    answer = json.loads(sync(home, "--json").stdout)
    assert answer["regions"]["shared"]["commit"] is None
    assert len(snapshots(home)) == 1


def test_the_barrier_converges_while_the_agent_goes_on_writing(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    shared = home.path / "shared"
    stop = threading.Event()

    def write() -> None:
        number = 0
        with open(shared / "log", "ab", buffering=0) as log:
            while not stop.is_set():
                number += 1
                log.write(b"%d\n" % number)
                (shared / f"file{number % 50}").write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round_ in range(5):
            (shared / "mark").write_text(str(round_))
            assert sync(home).returncode == 0
            found = newest(home)
            assert found["mark"] == str(round_).encode()
            lines = found["log"].split()
            assert lines == [b"%d" % n for n in range(1, len(lines) + 1)]
    finally:
        stop.set()
        writer.join()


WRITES_PAIRS = """
import os, sys
shared, stop = sys.argv[1:]
first = os.open(shared + "/first", os.O_RDWR | os.O_CREAT)
second = os.open(shared + "/sub/second", os.O_RDWR | os.O_CREAT)
number = 0
while not os.path.exists(stop):
    number += 1
    os.pwrite(first, b"%020d" % number * 5000, 0)
    os.pwrite(second, b"%020d" % number, 0)
    if number % 20 == 0:
        os.rename(shared + "/sub", shared + "/other")
        os.rename(shared + "/other", shared + "/sub")
"""


def test_a_checkpoint_is_one_moment_of_all_files(new_home: Make, tmp_path: Path) -> None:
    home = new_home(top=QUICK.replace("300ms", "100ms")).start()
    (home.path / "shared" / "sub").mkdir()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES_PAIRS, str(home.path / "shared"), str(tmp_path / "stop")]
    )
    try:
        until(lambda: (sync_state(home)["snapshot"] or 0) >= 8, "eight checkpoints")
    finally:
        (tmp_path / "stop").touch()
        assert writer.wait(READY_S) == 0
    home.umount()
    for snapshot in snapshots(home):
        found = {path.rpartition("/")[2]: content for path, content in contents(home, snapshot).items()}
        if not found.get("second"):
            continue
        numbers = {found["first"][at : at + 20] for at in range(0, 100_000, 20)}
        # One request carries all of the first file, so it holds one number, or is a moment ahead.
        assert len(numbers) == 1
        assert int(numbers.pop()) - int(found["second"]) in (0, 1)


WRITES_ROWS = """
import sqlite3, sys, os
database, stop = sys.argv[1:]
db = sqlite3.connect(database, isolation_level=None)
db.execute("PRAGMA journal_mode = " + os.environ["MODE"])
db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, filler BLOB)")
n = 0
while not os.path.exists(stop):
    db.execute("BEGIN")
    for _ in range(10):
        n += 1
        db.execute("INSERT INTO t VALUES (?, zeroblob(3000))", (n,))
    db.execute("DELETE FROM t WHERE n < ?", (n - 500,))
    db.execute("COMMIT")
    open(stop + ".begun", "w").close()
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_under_write_is_sound_in_every_checkpoint(
    new_home: Make, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new_home(top=QUICK.replace("300ms", "100ms")).start()
    monkeypatch.setenv("MODE", mode)
    database = home.path / "shared" / "facts.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITES_ROWS, str(database), str(tmp_path / "stop")])
    try:
        until((tmp_path / "stop.begun").exists, "the first rows")
        begun = sync_state(home)["snapshot"] or 0
        until(lambda: (sync_state(home)["snapshot"] or 0) >= begun + 6, "six checkpoints")
    finally:
        (tmp_path / "stop").touch()
        assert writer.wait(READY_S) == 0
    home.umount()
    sound = 0
    for snapshot in snapshots(home):
        copy = tmp_path / f"copy{snapshot.number}"
        copy.mkdir()
        for path, content in contents(home, snapshot).items():
            (copy / path).write_bytes(content)
        with contextlib.closing(sqlite3.connect(copy / "facts.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if db.execute("SELECT 1 FROM sqlite_master").fetchall():
                low, high, count = db.execute("SELECT min(n), max(n), count(*) FROM t").fetchone()
                assert count == 0 or high - low + 1 == count
                sound += count > 0
    assert sound >= 4


def test_a_dead_store_stops_nobody_and_is_caught_up_with(new_home: Make) -> None:
    home = new_home(top=QUICK).start()
    shared = home.path / "shared"
    (shared / "before").write_text("1")
    assert sync(home).returncode == 0
    with outage(home):
        (shared / "during").write_text("2")
        until(lambda: sync_state(home)["state"] == "failing", "a failure")
        assert "it was there and is gone" in sync_state(home)["error"]
        refused = sync(home, "--timeout", "0.5")
        assert refused.returncode == 75
        assert "shared/: 1 changed file, 1 B, in no snapshot yet" in refused.stderr
        assert "it was there and is gone" in refused.stderr
        assert "live, not syncing" in home.agentfuse("ps", "--state", str(home.state)).stdout
        (shared / "still").write_text("3")
        assert (shared / "during").read_text() == "2"
    assert sync(home).returncode == 0
    assert newest(home) == {"before": b"1", "during": b"2", "still": b"3"}
    home.tolerated.append("is not synced")
    home.umount()


def test_an_unmount_tries_a_dead_store_again_until_it_is_back(new_home: Make) -> None:
    home = new_home(top=NEVER + 'flush_timeout = "60s"\n').start()
    (home.path / "shared" / "note").write_text("learned")
    with outage(home):
        ending = subprocess.Popen(
            [*home.mount_command()[:1], "umount", str(home.path)],
            env=home.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert ending.stdout is not None
        said = next((line for line in ending.stdout if "not flushed yet" in line), "")
        assert "trying again in 1 s" in said
    rest = ending.stdout.read()
    assert ending.wait(READY_S) == 0, rest
    assert home.ended() == 0
    assert newest(home) == {"note": b"learned"}


def test_an_unmount_that_ran_out_of_time_leaves_all_to_recover(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    (home.path / "shared" / "note").write_text("learned")
    with outage(home):
        failed = home.agentfuse("umount", str(home.path), "--timeout", "0")
        assert failed.returncode == 75
        assert "agentfuse recover" in failed.stderr
        assert home.ended() == 75
        state = ("--state", str(home.state))
        (row,) = json.loads(home.agentfuse("ps", "--json", *state).stdout)
        assert (row["state"], row["execution"]) == ("unflushed", home.execution)
        again = home.agentfuse("recover", *state)
        assert again.returncode == 75
        assert "1 of 1 unfinished home could not be recovered" in again.stderr
    done = home.agentfuse("recover", *state)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "recovered 1 home")
    assert newest(home) == {"note": b"learned"}
    assert snapshots(home)[-1].reason == "recovered"
    assert home.agentfuse("recover", *state).stdout == "nothing is left to recover\n"
    assert len(snapshots(home)) == 1


def test_recover_finishes_a_killed_home_and_leaves_a_living_one_alone(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    (home.path / "shared" / "note").write_text("learned")
    state = ("--state", str(home.state))
    (alive,) = json.loads(home.agentfuse("recover", "--json", *state).stdout)
    assert (alive["outcome"], alive["execution"]) == ("mounted", home.execution)
    assert snapshots(home) == []
    home.kill(leave_stale=False)
    (dead,) = json.loads(home.agentfuse("recover", "--json", *state).stdout)
    assert (dead["outcome"], dead["error"]) == ("recovered", None)
    assert newest(home) == {"note": b"learned"}


def test_a_resumed_home_is_synced_though_nothing_changes_any_more(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    (home.path / "shared" / "note").write_text("learned")
    home.kill(leave_stale=False)
    home.config.write_text(QUICK)
    home.start()
    until(lambda: sync_state(home)["snapshot"] == 1, "a snapshot")
    assert newest(home) == {"note": b"learned"}


def test_all_that_a_mount_commits_on_its_own_is_one_stretch(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    for number in (1, 2):
        (home.path / "shared" / str(number)).write_text("1")
        assert sync(home).returncode == 0
    (home.path / "shared" / "3").write_text("1")
    home.umount()
    found = snapshots(home)
    assert [(each.reason, each.follows) for each in found] == [
        ("checkpoint", 0),
        ("checkpoint", 0),
        ("unmount", 0),
    ]


def test_regions_of_the_execution_are_kept_as_configured(new_home: Make) -> None:
    home = new_home(
        top=QUICK + '[regions.workspace]\nsync = "at_end"\n[regions.downloads]\nsync = "continuous"\n'
    ).start()
    for region in ("workspace", "downloads", "uploads"):
        (home.path / region / "file").write_text(region)
    place = {region: execution_region(home.execution, region) for region in ("workspace", "downloads")}
    until(lambda: sync_state(home, "downloads")["snapshot"] == 1, "a snapshot of downloads")
    assert newest(home, place["downloads"]) == {"file": b"downloads"}
    assert snapshots(home, place["workspace"]) == []
    assert sorted(home.status()["sync"]) == ["downloads", "shared"]
    home.umount()
    assert newest(home, place["workspace"]) == {"file": b"workspace"}
    assert snapshots(home, execution_region(home.execution, "uploads")) == []
    assert snapshots(home) == []
    # It can be listed and fetched after the run.
    whose, at = f"{home.agent}/{home.execution}/workspace", ("--store", home.store.as_uri())
    assert "file" in home.agentfuse("show", f"{whose}@latest:", *at).stdout
    assert home.agentfuse("show", f"{whose}@latest:file", *at).stdout == "workspace"
    log = home.agentfuse(
        "log", "--agent", home.agent, "--region", f"{home.execution}/workspace", "--json", *at
    )
    assert [row["reason"] for row in json.loads(log.stdout)] == ["unmount"]
    assert home.agentfuse("restore", f"{whose}@1", "--to", str(home.base / "back"), *at).returncode == 0
    assert (home.base / "back" / "file").read_text() == "workspace"
    refused = home.agentfuse("restore", f"{whose}@1", *at)
    assert (refused.returncode, "give --to DIR" in refused.stderr) == (2, True)


def test_two_runs_of_one_agent_checkpoint_beside_each_other(new_home: Make) -> None:
    one = new_home(top=NEVER).start()
    two = new_home(top=NEVER, agent=one.agent)
    two.store = one.store
    two.start()
    for home in (one, two):
        (home.path / "shared" / f"of-{home.execution}").write_text(home.execution)
        (home.path / "shared" / "data.bin").write_bytes(b"\0" + home.execution.encode())
        assert sync(home).returncode == 0
    found = newest(one)
    kept_at = f".conflicts/{two.execution}/data.bin"
    assert found == {
        f"of-{one.execution}": one.execution.encode(),
        f"of-{two.execution}": two.execution.encode(),
        "data.bin": b"\0" + one.execution.encode(),
        kept_at: b"\0" + two.execution.encode(),
    }
    assert sync_state(two)["conflicts"] == [{"path": "data.bin", "kept_at": kept_at}]
    assert f"data.bin: kept as {kept_at}" in two.agentfuse("status", str(two.path)).stdout
    # What was in conflict stays so without making more of it.
    (two.path / "shared" / "more").write_text("2")
    assert sync(two).returncode == 0
    assert newest(one) == {**found, "more": b"2"}
    for home in (one, two):
        home.umount()
    # The next run has both versions, and its operator is told.
    two.start(fresh=True)
    assert (two.path / "shared" / kept_at).read_bytes() == b"\0" + kept_at.split("/")[1].encode()
    assert sync_state(two)["conflicts"] == [{"path": "data.bin", "kept_at": kept_at}]
    (two.path / "shared" / kept_at).unlink()
    assert sync_state(two)["conflicts"] == []


MAPS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, os.fstat(fd).st_size)
os.close(fd)
for page in range(0, len(mapped), 4096):
    mapped[page : page + 4] = b"DATA"
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["sync", "sigterm", "lazy"])
def test_what_was_written_through_a_mapping_counts_as_written(new_home: Make, how: str) -> None:
    home = new_home(top=NEVER).start()
    path = home.path / "shared" / "mapped"
    path.write_bytes(bytes(16 * 2**20))
    with subprocess.Popen(
        [sys.executable, "-c", MAPS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        if how == "sync":
            assert sync(home).returncode == 0
        elif how == "sigterm":
            assert home.signal(signal.SIGTERM) == 0
        else:
            assert home.agentfuse("umount", "--lazy", str(home.path)).returncode == 0
        found = newest(home)["mapped"]
        writer.kill()
    assert {found[page : page + 4] for page in range(0, len(found), 4096)} == {b"DATA"}


def test_a_daemon_that_dies_while_mapped_pages_are_fetched_is_dead(
    new_home: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of it that waited for its own answer would keep it, its locks and the mount for ever."""
    home = new_home(top=NEVER).start()
    path = home.path / "shared" / "mapped"
    path.write_bytes(bytes(2**20))
    home.umount()
    with monkeypatch.context() as patch:
        patch.setenv(killpoints.VARIABLE, "write.begun")
        home.start(fresh=True)
    with subprocess.Popen(
        [sys.executable, "-c", MAPS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        assert sync(home).returncode != 0
        assert home.ended() == -signal.SIGKILL
        writer.kill()
    home.start()
    assert path.read_bytes() == bytes(2**20)
    home.umount()


def test_a_nearly_full_disk_makes_no_conflict_of_a_run_with_itself(new_home: Make) -> None:
    home = new_home(top=NEVER)
    home.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(home.state)], check=True)
    try:
        home.start()
        note = home.path / "shared" / "note.bin"
        note.write_bytes(b"\0v1" + bytes(100))
        (home.path / "shared" / "gone").write_text("soon")
        assert sync(home).returncode == 0
        with open(home.path / "workspace" / "filler", "wb", buffering=0) as filler:
            while (free := _free(home.state) - 8192) > 0:
                filler.write(bytes(min(free, 65536)))
        for number in range(2, 6):
            with open(note, "r+b") as file:
                file.write(b"\0v%d" % number)
            (home.path / "shared" / "gone").unlink(missing_ok=True)
            sync(home, "--timeout", "5")
        (home.path / "workspace" / "filler").unlink()
        home.tolerated.append("No space left|disk is full")
        home.umount()
        assert newest(home) == {"note.bin": b"\0v5" + bytes(100)}
    finally:
        home.discard()
        subprocess.run(["umount", "-l", str(home.state)], check=True)


def test_a_content_that_the_store_has_lost_keeps_no_other_from_being_kept(new_home: Make) -> None:
    home = new_home(top=NEVER).start()
    (home.path / "shared" / "lost").write_bytes(os.urandom(2 * 2**20))
    (home.path / "shared" / "kept").write_text("kept")
    home.umount()
    (entry,) = [each for each in snapshots(home)[-1].entries if each.path == b"lost"]
    next(home.store.rglob(entry.object)).unlink()
    home.start(fresh=True)
    other = new_home(top=NEVER, agent=home.agent)
    other.store = home.store
    other.start()
    (other.path / "shared" / "lost").unlink()
    other.tolerated.append("shared/lost cannot be read")
    other.umount()
    (home.path / "shared" / "lost").chmod(0o600)
    (home.path / "shared" / "learned").write_text("learned")
    home.tolerated += ["shared/lost cannot be read", "lost is left out, for its content is lost"]
    assert sync(home).returncode == 0
    assert newest(home) == {"kept": b"kept", "learned": b"learned"}
    home.umount()


def _free(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize
