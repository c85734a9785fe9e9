"""The verbs that look into a history and change it by adding to it, as programs run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from histories import command, lived, take_turns, told
from stores import local_store

from agentfuse.objectstore.local import LocalStore
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key, snapshot_key


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A history that no test changes."""
    base = tmp_path_factory.mktemp("memory")
    store = local_store(base)
    lived(base, store)
    return store


# -- log, diff, show


def test_log_is_newest_first_with_what_each_snapshot_changed(memory: LocalStore) -> None:
    rows = told(memory, "log", "--agent", "a")
    assert [(row["number"], row["execution"], row["reason"]) for row in rows] == [
        (4, "e3", "end"),
        (3, "e2", "end"),
        (2, "e2", "checkpoint"),
        (1, "e1", "end"),
    ]
    assert [tuple(row["changed"].values()) for row in rows] == [
        (1, 0, 1, 28),
        (0, 1, 1, 13),
        (1, 0, 1, 27),
        (6, 0, 0, 1_600_030),
    ]
    assert [row["parent"] for row in rows] == [row["compared_with"] or 0 for row in rows] == [3, 2, 1, 0]
    assert rows[0]["totals"] == {"files": 6, "bytes": 1_600_059, "entries": 8}
    assert not any(row["pinned"] or row["error"] for row in rows)
    assert [row["number"] for row in told(memory, "log", "--agent", "a", "--last", "2")] == [4, 3]
    text = command(memory, "log", "--agent", "a").stdout.decode()
    assert [line.split()[0] for line in text.splitlines()] == ["SNAPSHOT", "4", "3", "2", "1"]
    assert "+1 ~1" in text
    assert "+1 -1" not in text


def test_log_compares_over_gaps_and_says_so(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    store.delete(snapshot_key("a", "shared", 3))
    rows = told(store, "log", "--agent", "a")
    assert [(row["number"], row["compared_with"]) for row in rows] == [(4, 2), (2, 1), (1, None)]
    assert rows[0]["changed"] == {"added": 1, "removed": 1, "changed": 2, "bytes": 41}
    assert b"since 2 by others, too" in command(store, "log", "--agent", "a").stdout
    store.delete(snapshot_key("a", "shared", 1))
    assert told(store, "log", "--agent", "a")[1]["changed"] is None


def test_log_tells_what_a_run_changed_also_when_its_earlier_snapshots_are_gone(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    store.delete(snapshot_key("a", "shared", 2))
    row = told(store, "log", "--agent", "a")[1]
    assert (row["number"], row["parent"], row["follows"], row["compared_with"]) == (3, 2, 1, 1)
    assert row["changed"] == {"added": 1, "removed": 1, "changed": 2, "bytes": 40}
    line = command(store, "log", "--agent", "a").stdout.decode().splitlines()[2]
    assert "+1 -1 ~2 since 1 " in line
    assert "others" not in line


def test_log_of_runs_has_a_line_for_what_each_did_without_another_in_between(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    take_turns(tmp_path, store, "0ABAABB")
    rows = told(store, "log", "--agent", "a", "--runs")
    assert [(row["number"], row["execution"], row["compared_with"]) for row in rows] == [
        (7, "B", 5),
        (5, "A", 3),
        (3, "B", 2),
        (2, "A", 1),
        (1, "0", None),
    ]
    assert [row["changed"]["added"] for row in rows] == [2, 2, 1, 1, 2]
    store.delete(snapshot_key("a", "shared", 6))
    store.delete(snapshot_key("a", "shared", 4))
    assert told(store, "log", "--agent", "a", "--runs") == rows
    assert told(store, "log", "--agent", "a", "--runs", "--last", "2") == rows[:2]
    assert b"since" not in command(store, "log", "--agent", "a", "--runs").stdout
    store.put(snapshot_key("a", "shared", 5), b"junk")
    found = told(store, "log", "--agent", "a", "--runs", code=65)
    assert [row["number"] for row in found if row["error"]] == [5]


def test_a_damaged_snapshot_hides_no_other(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    store.put(snapshot_key("a", "shared", 2), b"junk")
    done = command(store, "log", "--agent", "a", code=65)
    assert b"damaged snapshots: 2" in done.stderr
    assert [line.split()[:2][-1][:4] for line in done.stdout.decode().splitlines()[1:]][2] == "dama"
    assert [row["error"] is None for row in told(store, "log", "--agent", "a", code=65)] == [
        True,
        True,
        False,
        True,
    ]


def test_diff_says_what_was_added_removed_and_changed(memory: LocalStore) -> None:
    found = {change["path"]: change for change in told(memory, "diff", "a@1", "a@latest")}
    assert {path: change["change"] for path, change in found.items()} == {
        "d/new": "added",
        "d/old": "removed",
        "d/small": "changed",
        "later": "added",
        "notes.md": "changed",
    }
    assert found["d/small"]["before"]["size"] == 5
    assert found["d/small"]["after"]["size"] == 13
    assert found["d/old"]["after"] is None
    lines = command(memory, "diff", "a@1", "a@-0", code=2).stderr
    assert b"AGENT@-1" in lines
    text = command(memory, "diff", "a@1", "a@latest").stdout.decode()
    assert [line.split() for line in text.splitlines()][:3] == [
        ["+", "d/new", "9", "B"],
        ["-", "d/old", "3", "B"],
        ["~", "d/small", "5", "B", "->", "13", "B"],
    ]
    assert b"nothing differs" in command(memory, "diff", "a@4", "a@latest").stdout


def test_show_prints_a_verified_content(memory: LocalStore) -> None:
    assert command(memory, "show", "a@1:notes.md").stdout == b"# Notes\n- e1\n"
    assert command(memory, "show", "a@-1:notes.md").stdout == b"# Notes\n- e1\n- e2\n"
    assert command(memory, "show", "a@latest:large").stdout == b"0123456789abcdef" * 100_000
    assert command(memory, "show", b"a@1:\xff name").stdout == b"not utf-8"
    assert command(memory, "show", "a@1:link").stdout == b"symlink -> d/small\n"
    assert told(memory, "show", "a@1:d/small")["size"] == 5


def test_show_lists_a_directory(memory: LocalStore) -> None:
    names = [entry["path"] for entry in told(memory, "show", "a@1")]
    assert names == ["d", "large", "link", "notes.md", "\udcff name"]
    assert [entry["path"] for entry in told(memory, "show", "a@1:/d/")] == ["d/old", "d/small"]
    assert b"\\xff name" in command(memory, "show", "a@1:").stdout
    assert b"link -> d/small" in command(memory, "show", "a@1:").stdout


@pytest.mark.parametrize("name", ["notes.md", "large"])
def test_nothing_is_shown_of_a_content_that_is_damaged(tmp_path: Path, name: str) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    (entry,) = (e for e in History(store, "a", "shared").read(1).entries if e.path == name.encode())
    key = object_key("a", entry.object)
    content = bytearray(store.get(key))
    content[entry.offset + entry.size - 1] ^= 1
    store.put(key, content)
    done = command(store, "show", f"a@1:{name}", code=65)
    assert done.stdout == b""
    assert b"holds other bytes" in done.stderr
    store.delete(key)
    assert command(store, "show", f"a@1:{name}", code=66).stdout == b""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("log", "--agent", "b"), 66, b"is the name right"),
        (("log", "--agent", "a/b"), 2, b"cannot be an agent id"),
        (("show", "a@9:x"), 66, b"agentfuse log --agent a"),
        (("show", "a@1:nothing"), 66, b"agentfuse show a@1:"),
        (("show", "a"), 2, b"AGENT@NUMBER"),
        (("diff", "a@1:d", "a@2"), 2, b"whole snapshots"),
        (("diff", "a@1", "a@-9"), 66, b"only 4 snapshots"),
    ],
)
def test_errors_name_the_fix(memory: LocalStore, arguments: tuple[str, ...], code: int, says: bytes) -> None:
    done = command(memory, *arguments, code=code)
    assert says in done.stderr
    assert done.stdout == b""


def test_a_store_that_is_none_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/other").write_bytes(b"")
    assert b"is no agentfuse store" in command(local_store(tmp_path), "log", "--agent", "a", code=69).stderr


def test_a_reader_that_left_early_is_no_error(memory: LocalStore) -> None:
    shown = [sys.executable, "-m", "agentfuse", "show", "a@1:large", "--store", memory.url]
    process = subprocess.Popen(shown, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(4) == b"0123"
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in said


# -- restore, revert, pin


def test_restore_as_a_new_snapshot_and_into_a_directory(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    said = command(store, "restore", "a@1:d").stdout
    assert said == b"a@5 is as a@1 was in d: 1 added, 1 removed, 1 changed\n"
    assert command(store, "show", "a@latest:d/small").stdout == b"small"
    assert b"nothing to restore" in command(store, "restore", "a@1", "d").stdout
    out = tmp_path / "out"
    assert b"restored 6 files" in command(store, "restore", "a@5", "--to", str(out)).stdout
    assert (out / "notes.md").read_bytes() == b"# Notes\n- e1\n- e2\n- e3\n"
    assert (out / os.fsdecode(b"\xff name")).exists()
    assert b"not empty" in command(store, "restore", "a@5", "--to", str(out), code=69).stderr
    command(store, "restore", b"a@1", b"\xff name", "--to", str(tmp_path / "one"))
    assert os.listdir(os.fsencode(tmp_path / "one")) == [b"\xff name"]
    assert command(store, "restore", "a@1:d", "d", code=2).stdout == b""


def test_revert_tells_what_it_took_back_and_what_stays(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    said = command(store, "revert", "--agent", "a", "--execution", "e2").stdout.decode().splitlines()
    assert said == [
        "notes.md: its lines were taken out, later changes stay",
        "a@5 is without what execution e2 changed: 1 added, 1 removed, 2 changed",
    ]
    assert b"is left to take back" in command(store, "revert", "--agent", "a", "--execution", "e2").stdout
    assert (
        "notes.md: added by e1"
        in command(store, "revert", "--agent", "a", "--execution", "e1").stdout.decode()
    )
    command(store, "revert", "--agent", "a", "--execution", "e9", code=66)


def test_pins_are_listed_in_the_log(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    lived(tmp_path, store)
    assert command(store, "pin", "a@-2").stdout == b"pinned a@2\n"
    assert command(store, "pin", "a@9", code=66).stdout == b""
    assert [row["number"] for row in told(store, "log", "--agent", "a") if row["pinned"]] == [2]
    assert b"pinned" in command(store, "log", "--agent", "a").stdout
    assert command(store, "unpin", "a@2").stdout == b"unpinned a@2\n"
    assert b"is not pinned" in command(store, "unpin", "a@2", code=66).stderr
    assert b"whole snapshot" in command(store, "pin", "a@2:d", code=2).stderr
    assert not any(row["pinned"] for row in told(store, "log", "--agent", "a"))
