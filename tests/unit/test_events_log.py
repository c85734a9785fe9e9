"""The log of events: numbers without gaps, the same facts after any crash, damage survived."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowns import KnownFiles
from sqlite_utils import Database

from agentfuse import killpoints
from agentfuse.errors import EnvironmentProblem
from agentfuse.events import log as log_module
from agentfuse.events.arrivals import Completed, Moved, Replaced, Seen
from agentfuse.events.log import Event, EventLog, Happened, _KnownRows, _prepare
from agentfuse.home import marks
from agentfuse.regions import Creator


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "downloads").mkdir(parents=True)
    return path


@pytest.fixture
def log(tmp_path: Path, tree: Path) -> EventLog:
    return EventLog(tmp_path / "events.db", tree)


def reopened(log: EventLog) -> EventLog:
    log.close()
    return EventLog(log._path, log.tree, kept=log._kept)


def written(tree: Path, name: bytes, data: bytes = b"x") -> Happened:
    path = os.path.join(os.fsencode(tree / "downloads"), name)
    with open(path, "wb") as file:
        file.write(data)
    found = os.stat(path)
    seen = Seen(found.st_ino, found.st_size, found.st_mtime_ns)
    return Happened("downloads", 1.5, Completed(name, seen, "IN_CLOSE_WRITE"))


def listing(tree: Path) -> Happened:
    files = [
        (os.fsencode(entry.name), Seen(found.st_ino, found.st_size, found.st_mtime_ns))
        for entry in os.scandir(tree / "downloads")
        for found in [entry.stat()]
    ]
    return Happened("downloads", 2.5, Replaced(b"", files, "IN_CLOSE_WRITE", "IN_DELETE"))


def test_events_are_numbered_from_1_without_gaps_over_restarts(log: EventLog, tree: Path) -> None:
    assert (log.newest(), log.exists()) == (0, False)
    for number in range(7):
        log = reopened(log)
        events = log.append([written(tree, b"%d-%d" % (number, each)) for each in range(number)])
        assert len(events) == number
    assert [event.seq for event in log.read(0, 100)] == list(range(1, 22))
    assert [event.seq for event in log.read(15, 3)] == [16, 17, 18]
    assert reopened(log).newest() == 21


def test_an_event_has_the_facts(log: EventLog, tree: Path) -> None:
    log.append([written(tree, b"a.csv", b"a,b\n")])
    log.append([Happened("downloads", 3.0, Moved(b"a.csv", b"b.csv", Seen(9, 4, 7)))])
    first, second = log.read(0, 10)
    assert first == Event(
        1, 1.5, "arrived", "IN_CLOSE_WRITE", "downloads", b"a.csv", None, 4, "text/csv",
        hashlib.sha256(b"a,b\n").hexdigest(), "agent",
    )  # fmt: skip
    assert (second.kind, second.old_path, second.path, second.size) == ("moved", b"a.csv", b"b.csv", 4)


def test_a_hash_is_of_exactly_what_was_announced_or_there_is_none(
    log: EventLog, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = written(tree, b"changed", b"before")
    written(tree, b"changed", b"after it")
    monkeypatch.setattr(log_module, "HASHED_BYTES", 10)
    monkeypatch.setattr(log_module, "_HASHED_AT_ONCE", 15)
    batch = [
        changed,
        written(tree, b"large", bytes(11)),
        written(tree, b"ten", bytes(10)),
        written(tree, b"too much together", bytes(6)),
        written(tree, b"small", b"small"),
    ]
    assert [event.path for event in log.append(batch) if event.sha256] == [b"ten", b"small"]
    assert [event.path for event in log.append([batch[3]]) if event.sha256] == [b"too much together"]


def test_a_file_that_is_written_to_while_it_is_hashed_has_no_hash(
    log: EventLog, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = written(tree, b"a", b"first")
    read = os.pread

    def written_to(fd: int, size: int, offset: int) -> bytes:
        with open(tree / "downloads" / "a", "r+b") as file:
            file.write(b"other")
        return read(fd, size, offset)

    monkeypatch.setattr(os, "pread", written_to)
    (event,) = log.append([happened])
    assert event.sha256 is None


def made_by(tree: Path, name: str, creator: Creator) -> None:
    with (tree / "downloads" / name).open("ab") as file:
        marks.write_creator(file.fileno(), creator)


def test_an_event_says_who_made_the_file_also_of_one_that_is_gone(log: EventLog, tree: Path) -> None:
    arrived = written(tree, b"a")
    made_by(tree, "a", Creator.USER)
    told = log.append([arrived])
    (tree / "downloads" / "a").rename(tree / "downloads" / "b")
    st = (tree / "downloads" / "b").stat()
    seen = Seen(st.st_ino, st.st_size, st.st_mtime_ns)
    told += log.append([Happened("downloads", 2.0, Moved(b"a", b"b", seen))])
    (tree / "downloads" / "b").unlink()
    told += reopened(log).append([Happened("downloads", 3.0, Replaced(b"b", [], "", "IN_DELETE"))])
    assert [(event.kind, event.created_by) for event in told] == [
        ("arrived", "user"),
        ("moved", "user"),
        ("deleted", "user"),
    ]


def test_what_was_noted_silently_goes_as_whose_it_was(log: EventLog, tree: Path) -> None:
    written(tree, b"restored")
    made_by(tree, "restored", Creator.ENVIRONMENT)
    log.append([listing(tree)], silently=True)
    (tree / "downloads" / "restored").unlink()
    (event,) = log.append([listing(tree)])
    assert (event.kind, event.created_by) == ("deleted", "environment")


def test_another_file_at_a_known_path_is_not_taken_for_its_creators(log: EventLog, tree: Path) -> None:
    first = written(tree, b"a")
    made_by(tree, "a", Creator.USER)
    log.append([first])
    (tree / "downloads" / "new").write_bytes(b"forged")
    (tree / "downloads" / "new").replace(tree / "downloads" / "a")
    replaced = listing(tree)
    (tree / "downloads" / "a").unlink()
    (event,) = log.append([replaced])
    assert (event.kind, event.created_by) == ("modified", "agent")


@pytest.mark.parametrize(
    "name", [b"line\nbreak", b'"quoted"\t', b"\xff\xfe", b"n" * 255, "ä\u2028".encode(), b"\\n"]
)
def test_an_event_is_one_line_of_ascii_that_gives_the_name_back(
    log: EventLog, tree: Path, name: bytes
) -> None:
    (event,) = log.append([written(tree, name)])
    (again,) = reopened(log).read(0, 1)
    text = again.to_json(execution="e", agent="a")
    assert again == event
    assert text.isascii()
    assert b"\n" not in text
    fields = json.loads(text)
    assert os.fsencode(fields["path"]) == name
    assert (fields["mask"], fields["execution"], fields["agent"]) == (["IN_CLOSE_WRITE"], "e", "a")


def test_old_events_go_and_their_numbers_do_not_come_back(tmp_path: Path, tree: Path) -> None:
    log = EventLog(tmp_path / "events.db", tree, kept=10)
    for number in range(50):
        log.append([written(tree, b"%d" % number)])
    kept = [event.seq for event in log.read(0, 100)]
    assert kept == list(range(51 - len(kept), 51))
    assert 10 <= len(kept) <= 11


def test_what_is_noted_silently_is_not_told_of_later(log: EventLog, tree: Path) -> None:
    written(tree, b"restored")
    assert log.append([listing(tree)], silently=True) == []
    assert log.append([listing(tree)]) == []
    assert [event.kind for event in log.append([written(tree, b"restored", b"new")])] == ["modified"]


@pytest.mark.parametrize("damage", [b"junk" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_log_is_moved_aside_and_files_are_told_of_again(
    log: EventLog, tree: Path, tmp_path: Path, damage: bytes
) -> None:
    log.append([written(tree, b"a"), written(tree, b"b")])
    log.close()
    for path in tmp_path.glob("events.db*"):
        path.unlink()
    log._path.write_bytes(damage)
    log = reopened(log)
    assert {event.path for event in log.append([listing(tree)])} == {b"a", b"b"}
    assert [event.seq for event in log.read(0, 10)] == [1, 2]
    assert list(tmp_path.glob("events.db.corrupt-*"))


def test_a_directory_that_is_gone_is_the_machines_problem(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="unable to open"):
        EventLog(tmp_path / "gone" / "events.db", tree).append([written(tree, b"a")])


# A process that writes files, tells the log of each in batches, and dies somewhere on the way.
WRITES = """
import os, sys
from pathlib import Path
from agentfuse import killpoints
from agentfuse.events.log import EventLog
sys.path.insert(0, sys.argv[1])
from test_events_log import listing, written
base, step, passing, begin = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
log = EventLog(base / "events.db", base / "tree")
log.append([listing(base / "tree")])
killpoints.arm(step, passing)
for number in range(begin, begin + 20, 2):
    log.append([written(base / "tree", b"%d" % each) for each in (number, number + 1)])
"""


@pytest.mark.parametrize("step", ["announce.begun", "announce.judged", "announce.committed"])
def test_a_process_killed_at_any_step_leaves_a_log_that_the_next_one_completes(
    log: EventLog, tree: Path, tmp_path: Path, step: str
) -> None:
    rng = random.Random(step)
    for round_ in range(4):
        command = [
            sys.executable,
            "-c",
            WRITES,
            Path(__file__).parent,
            tmp_path,
            step,
            rng.randrange(1, 10),
            round_ * 20,
        ]
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(list(map(str, command)), env=environ, check=False)
        assert done.returncode == -signal.SIGKILL
    log.append([listing(tree)])
    events = log.read(0, 1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert {event.kind for event in events} == {"arrived"}
    assert sorted(event.path for event in events) == sorted(map(os.fsencode, os.listdir(tree / "downloads")))


def test_the_steps_of_announcing_are_armed_above() -> None:
    assert {step for step in killpoints.STEPS if step.startswith("announce.")} == {
        "announce.begun", "announce.judged", "announce.committed", "announce.told",
    }  # fmt: skip


PATHS = st.lists(st.sampled_from([b"a", b"b", b"a0", b"a!", b"\xff", b"a\xff"]), min_size=1, max_size=3).map(
    b"/".join
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PATHS, max_size=20), st.one_of(PATHS, st.just(b"")))
def test_the_rows_find_below_a_path_what_a_dictionary_finds(paths: list[bytes], asked: bytes) -> None:
    db = Database(sqlite3.connect(":memory:"))
    _prepare(db)
    rows, oracle = _KnownRows(db, "downloads"), KnownFiles()
    for number, path in enumerate(paths):
        seen = Seen(2**64 - 1 - number, number, -(2**70))
        rows.put(path, seen)
        oracle.put(path, seen)
    _KnownRows(db, "uploads").put(b"a", Seen(1, 1, 1))
    assert rows.at(asked) == oracle.at(asked)
    for path in set(paths):
        assert rows.get(path) == oracle.get(path)
        rows.remove(path)
    assert rows.at(b"") == []
