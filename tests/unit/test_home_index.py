"""The index: what it keeps, what it survives, and that a mount without a memory never loads it."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agentfuse.errors import EnvironmentProblem
from agentfuse.home.index import Base, Index, Intent, Row


def row(number: int, **more: object) -> Row:
    fields = {
        "path": b"d/%d\xff" % number,
        "ino": number,
        "ctime_ns": number,
        "type": "file",
        "mode": 0o644,
        "mtime_ns": -number,
        "size": number,
        "sha256": f"{number:064x}",
        "object": f"{number:064x}",
        "offset": number,
        "target": b"",
        "link": 0,
        "xattrs": b"\x90",
    }
    return Row(**(fields | more))  # type: ignore[arg-type]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index.db")


def reopened(index: Index) -> Index:
    index.close()
    return Index(index._path)


def test_nothing_written_is_snapshot_zero_exactly_and_makes_no_file(index: Index, tmp_path: Path) -> None:
    assert index.load() == (Base(0, exact=True), [])
    index.clear()
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_loaded(index: Index) -> None:
    extremes = row(1, ino=2**64 - 1, mtime_ns=15_032_385_535 * 10**9, path=b"", size=2**50)
    index.write(Base(7, exact=True), changed=[extremes, row(2)])
    assert reopened(index).load() == (Base(7, exact=True), [extremes, row(2)])


def test_changes_and_removals_are_applied(index: Index) -> None:
    index.write(Base(1, exact=True), changed=[row(1), row(2), row(3)])
    index.write(Base(2, exact=False), changed=[row(2, size=99), row(4)], removed=[row(3).path])
    assert reopened(index).load() == (Base(2, exact=False), [row(1), row(2, size=99), row(4)])


def test_clear_forgets_everything(index: Index, tmp_path: Path) -> None:
    index.write(Base(1, exact=True), changed=[row(1)])
    index.clear()
    assert index.load() == (Base(0, exact=True), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_damaged_database_is_moved_aside_once_and_the_number_survives(
    index: Index, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    index.write(Base(7, exact=True), changed=[row(n) for n in range(500)])
    index.close()
    path = tmp_path / "index.db"
    content = path.read_bytes()
    path.write_bytes(
        {"garbage": b"junk" * 1000, "truncated": content[: len(content) // 2], "empty": b""}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert index.load() == (Base(7, exact=False, lost=True), [])
        assert index.load() == (Base(7, exact=False, lost=True), [])
    assert len(caplog.records) == (damage != "empty")
    assert len(list(tmp_path.glob("index.db.corrupt-*"))) == (damage != "empty")
    index.write(Base(8, exact=True), changed=[row(1)])
    assert reopened(index).load() == (Base(8, exact=True), [row(1)])


def test_flipped_bits_never_come_out_as_rows(index: Index, tmp_path: Path) -> None:
    rows = [row(n) for n in range(100, 400)]
    index.write(Base(7, exact=True), changed=rows)
    index.close()
    path = tmp_path / "index.db"
    whole = path.read_bytes()
    for seed in range(60):
        rng = random.Random(seed)
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        base, found = index.load()
        assert (base, found) == (Base(7, exact=False, lost=True), []) or (base.number == 7 and found == rows)
        index.close()


def test_a_lost_base_is_the_last_that_the_tree_was_equal_to(index: Index, tmp_path: Path) -> None:
    index.write(Base(7, exact=True), changed=[row(1)])
    index.write(Base(9, exact=False), changed=[row(1, size=5)])
    index.close()
    (tmp_path / "index.db").unlink()
    assert index.load() == (Base(7, exact=False, lost=True), [])


def test_damage_found_while_writing_gives_up_the_rows_not_the_number(index: Index, tmp_path: Path) -> None:
    (tmp_path / "index.db").write_bytes(b"junk" * 1000)
    index.write(Base(3, exact=True), changed=[row(1)])
    assert index.load() == (Base(3, exact=False, lost=True), [])


def test_a_schema_of_another_version_is_moved_aside(index: Index, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert index.load() == (Base(0, exact=True), [])
    assert list(tmp_path.glob("index.db.corrupt-*"))


def test_a_write_is_one_transaction(index: Index) -> None:
    index.write(Base(1, exact=True), changed=[row(1)])

    def failing():  # type: ignore[no-untyped-def]
        yield row(2)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        index.write(Base(2, exact=True), changed=failing(), removed=[row(1).path])
    assert reopened(index).load() == (Base(1, exact=True), [row(1)])


def test_an_intent_is_noted_when_it_turns_out_to_have_succeeded(index: Index) -> None:
    index.write(Base(1, exact=True), changed=[row(1), row(2)])
    index.intend(
        Intent("c-2", 2), Base(2, exact=False), changed=[row(1, size=5), row(3)], removed=[row(2).path]
    )
    index.intend(Intent("c-3", 3), Base(3, exact=True), changed=[row(4)])
    again = reopened(index)
    assert again.load() == (Base(1, exact=True), [row(1), row(2)])
    assert again.intents() == [Intent("c-2", 2), Intent("c-3", 3)]
    again.fulfil("c-2")
    assert again.load() == (Base(2, exact=False), [row(1, size=5), row(3)])
    assert again.intents() == []
    again.fulfil("c-3")
    assert again.load()[0].number == 2


def test_intents_end_with_the_next_note_or_are_given_up(index: Index) -> None:
    assert index.intents() == []
    index.intend(Intent("c-1", 1), Base(1, exact=True), changed=[row(1)])
    index.give_up("c-1")
    assert (index.intents(), index.load()) == ([], (Base(0, exact=True), []))
    index.intend(Intent("c-2", 1), Base(1, exact=True), changed=[row(1)])
    index.write(Base(1, exact=True), changed=[row(2)])
    assert (index.intents(), index.load()[1]) == ([], [row(2)])


def test_an_intent_with_a_flipped_bit_is_not_believed(index: Index, tmp_path: Path) -> None:
    index.write(Base(1, exact=True), changed=[row(1)])
    index.intend(Intent("c-2", 2), Base(2, exact=True), changed=[row(2)])
    index.close()
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("UPDATE intents SET noted = replace(noted, x'02', x'03')")
    connection.close()
    index.fulfil("c-2")
    assert index.load() == (Base(1, exact=False, lost=True), [])


def test_an_index_of_the_first_schema_is_taken_over(index: Index, tmp_path: Path) -> None:
    index.write(Base(1, exact=True), changed=[row(1)])
    index.close()
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.executescript("DROP TABLE intents; PRAGMA user_version = 1")
    connection.close()
    assert index.load() == (Base(1, exact=True), [row(1)])
    assert index.intents() == []


def test_it_may_be_used_from_many_threads(index: Index) -> None:
    threads = [
        threading.Thread(target=index.write, args=(Base(n, exact=True),), kwargs={"changed": [row(n)]})
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.load()[1] == [row(n) for n in range(1, 9)]


def test_a_directory_that_is_gone_is_the_machines_problem(tmp_path: Path) -> None:
    index = Index(tmp_path / "gone" / "index.db")
    with pytest.raises(EnvironmentProblem, match="unable to open"):
        index.write(Base(1, exact=True), changed=[row(1)])
    assert not list(tmp_path.glob("**/*corrupt*"))


def test_without_a_memory_sqlite_utils_is_not_loaded(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from agentfuse.home.index import Index
from agentfuse.objectstore import open_store, probe
from agentfuse.progress import Silent
from agentfuse.sync.engine import Memory

root = Path(sys.argv[1])
store = open_store(f"file://{root}/store")
probe(store)
memory = Memory(store=store, agent="a", execution="e", root=root, index=Index(root / "i"), owner=None)
memory.restore(Silent())
print(sorted({"sqlite_utils", "boto3", "concurrent.futures.thread"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "[]\n"
