"""``fsck --local``: a sound home is found sound, whatever is going on in it, and what is wrong is named."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounts import Home

from agentfuse.home.index import Index
from agentfuse.home.marks import CREATOR, NAME

pytestmark = pytest.mark.mount

Make = Callable[..., Home]


def fsck(home: Home, where: Path, code: int = 0) -> dict[str, Any]:
    """What is said of the only home there."""
    done = home.agentfuse(
        "fsck", "--local", str(where), "--config", str(home.config), "--state", str(home.state), "--json"
    )
    assert done.returncode == code, done.stdout + done.stderr
    (report,) = json.loads(done.stdout)["homes"]
    return dict(report)


def test_a_home_in_the_middle_of_work_is_sound(new_home: Make) -> None:
    home = new_home().start()
    downloads = home.path / "downloads"
    (downloads / "empty").touch()
    (downloads / "whole").write_text("whole")
    os.link(downloads / "whole", downloads / "again")
    (downloads / "a.part").write_text("half")
    (home.path / "shared" / "note").write_text("learned")
    with (
        open(downloads / "gone", "wb", buffering=0) as gone,
        open(downloads / "slow", "wb", buffering=0) as slow,
    ):
        gone.write(bytes(5000))
        slow.write(b"half")
        (downloads / "gone").unlink()
        report = fsck(home, home.path)
        assert (report["execution"], report["problems"], report["notes"]) == (home.execution, [], [])
        assert report["regions"]["downloads"] == {"bytes_used": 5 + 4 + 4, "files_used": 4}
    home.kill(leave_stale=False)
    assert fsck(home, home.path)["problems"] == []
    home.start()
    home.umount()
    report = fsck(home, home.state)
    assert (report["problems"], report["notes"]) == ([], [])
    said = home.agentfuse("fsck", "--local", str(home.state)).stdout
    assert said.startswith(f"checked {home.execution}: ")
    assert "nothing wrong" in said


def test_what_was_done_behind_a_mount_is_found(new_home: Make) -> None:
    home = new_home().start()
    for name in ("changed", "removed"):
        (home.path / "downloads" / name).write_text(name)
    home.settled()
    (home.tree / "workspace" / "came").write_text("12345")
    (home.tree / "downloads" / "changed").write_text("something longer")
    (home.tree / "downloads" / "removed").unlink()
    problems = fsck(home, home.path, code=65)["problems"]
    assert "workspace: charged with 0 bytes in 0 files, but there are 5 in 1" in problems
    assert any(line.startswith("downloads: charged with") for line in problems)
    assert "'downloads/changed': it has changed, and nobody was told of that" in problems
    assert "'downloads/removed': it is gone, and nobody was told of that" in problems
    assert len(problems) == 4
    home.kill(leave_stale=False)


def test_what_is_wrong_with_an_ended_home_is_named(new_home: Make) -> None:
    home = new_home().start()
    for number in range(5):
        (home.path / "downloads" / f"{number}").write_text("x")
    (home.path / "shared" / "note").write_text("learned")
    home.umount()
    state = home.tree.parent
    os.setxattr(home.tree / "downloads" / "0", NAME, b"short")
    os.setxattr(home.tree / "downloads", CREATOR, b"god")
    with sqlite3.connect(state / "events.db") as log:
        log.execute("DELETE FROM events WHERE seq = 3")
    index = Index(state / "shared.index.db")
    base, rows = index.load()
    index.write(base, changed=[row._replace(sha256="0" * 64) for row in rows if row.sha256])
    index.close()
    found = os.stat(home.tree / "shared" / "note")
    assert any(row.ctime_ns == found.st_ctime_ns for row in rows)
    (state / ".home.json.7.tmp").write_text("{")
    (home.tree / ".agentfuse" / "incoming" / "7").write_text("half")
    assert sorted(fsck(home, home.path, code=65)["problems"]) == [
        "'downloads': the mark user.agentfuse.creator says b'god', which is nothing we know",
        "'downloads/0': the mark user.agentfuse.absent says b'short', which is nothing we know",
        "'shared/note': its content is not what was synced",
        ".agentfuse/incoming/7: came only in part",
        ".home.json.7.tmp: a temporary that nobody will complete",
        "the event log's numbers have gaps: 1 are missing",
    ]
    (state / "events.db").write_bytes(b"junk" * 1000)
    assert any("not a database" in line for line in fsck(home, home.state, code=65)["problems"])
    assert (state / "events.db").read_bytes() == b"junk" * 1000


def test_fsck_says_what_it_needs(new_home: Make) -> None:
    home = new_home()
    assert home.agentfuse("fsck").returncode == 2
    assert home.agentfuse("fsck", "--agent", "a", "--local", "/x").returncode == 2
    missing = home.agentfuse("fsck", "--local", str(home.path), "--state", str(home.state))
    assert (missing.returncode, "keeps no home that was mounted at" in missing.stderr) == (66, True)
