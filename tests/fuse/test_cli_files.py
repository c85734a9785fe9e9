"""``agentfuse put``, ``get``, ``quota``, ``log-level`` and ``dump``, on a real mount."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from mounts import AGENTFUSE, Home

pytestmark = pytest.mark.mount


def run(home: Home, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [AGENTFUSE, *map(os.fsencode, map(str, arguments))]
    return subprocess.run(
        command, env=home.environment, input=stdin, capture_output=True, timeout=60, check=False
    )


def test_files_are_put_under_their_own_names_and_got_back(home: Home, scratch: Path) -> None:
    (scratch / "a.csv").write_text("a,b\n")
    odd = scratch / "new\nline \udcff"
    odd.write_bytes(b"odd")
    done = run(home, "put", home.path, scratch / "a.csv", odd, "uploads/in/")
    assert (done.returncode, done.stdout) == (
        0,
        b"uploads/in/a.csv  4 B\nuploads/in/new\\nline \\udcff  3 B\n",
    ), done.stderr
    assert (home.path / "uploads/in/a.csv").read_text() == "a,b\n"
    assert (home.path / "uploads/in" / odd.name).read_bytes() == b"odd"
    (scratch / "out").mkdir()
    for name in ("a.csv", odd.name):
        done = run(home, "get", home.path, f"uploads/in/{name}", scratch / "out")
        assert done.returncode == 0, done.stderr
    assert (scratch / "out/a.csv").read_text() == "a,b\n"
    assert (scratch / "out" / odd.name).read_bytes() == b"odd"
    assert run(home, "get", home.path, "uploads/in/a.csv", "-").stdout == b"a,b\n"


def test_stdin_is_put_and_told_as_json(home: Home) -> None:
    done = run(home, "put", home.path, "-", "uploads/stdin.bin", "--as", "system", "--json", stdin=b"x" * 10)
    assert json.loads(done.stdout) == [{"region": "uploads", "path": "stdin.bin", "size": 10}]
    assert (home.path / "uploads/stdin.bin").stat().st_size == 10


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("put", "{home}", "uploads/"), 2, "Missing argument"),
        (("put", "{home}", "a", "b", "uploads/c"), 2, "end it with a slash"),
        (("put", "{home}", "a", "uploads"), 2, "write uploads/"),
        (("put", "{home}", "nope", "uploads/"), 66, "cannot be read"),
        (("put", "{home}", "/", "uploads/x"), 2, "cannot be read"),
        (("put", "{home}", "-", "uploads/"), 2, "end it with the file's name"),
        (("put", "{home}", "-", "nowhere/a"), 66, "there are shared, workspace"),
        (("put", "{home}", "-", "uploads/../a"), 2, "not a path in a region"),
        (("put", "{home}", "-", "uploads/a", "--as", "root"), 2, "root"),
        (("put", "/nonexistent", "-", "uploads/a"), 66, "no agentfuse mount"),
        (("get", "{home}", "uploads/nope"), 66, "there is no"),
        (("get", "{home}", "uploads", "-"), 2, "is a dir, not a file"),
        (("get", "{home}", "uploads/"), 2, "is a dir, not a file"),
        (("log-level", "{home}", "loud"), 2, "fix: name one of debug, info, warning, error"),
        (("quota", "{home}", "nowhere"), 66, "there are shared"),
        (("quota", "{home}", "uploads", "--bytes", "much"), 2, "500MiB"),
    ],
)
def test_mistakes_are_told_with_their_fix(
    home: Home, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run(home, *(each.replace("{home}", str(home.path)) for each in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr.decode()


def test_a_failed_get_leaves_what_was_there(home: Home, scratch: Path) -> None:
    (scratch / "kept").write_text("kept")
    assert run(home, "get", home.path, "uploads/nope", scratch / "kept").returncode == 66
    run(home, "put", home.path, "-", "uploads/a", stdin=b"new")
    assert run(home, "get", home.path, "uploads/a", scratch / "no/such/directory").returncode == 69
    done = run(home, "get", home.path, "uploads/a", scratch / "kept")
    assert (done.returncode, b"--force" in done.stderr) == (73, True)
    assert os.listdir(scratch) == ["kept"]
    assert (scratch / "kept").read_text() == "kept"
    assert run(home, "get", home.path, "uploads/a", scratch / "kept", "--force").returncode == 0
    assert (scratch / "kept").read_text() == "new"


def test_a_quota_is_shown_and_changed_and_a_put_above_it_exits_with_73(home: Home) -> None:
    shown = run(home, "quota", home.path, "debug").stdout.decode()
    assert shown == "debug: 0 B of 100 MiB, 0 of 50000 files\n"
    done = run(home, "quota", home.path, "debug", "--bytes", "10", "--json")
    assert json.loads(done.stdout)["bytes_quota"] == 10
    done = run(home, "put", home.path, "-", "debug/a", stdin=b"x" * 11)
    assert done.returncode == 73
    assert b"agentfuse quota" in done.stderr
    assert os.listdir(home.path / "debug") == []


def test_the_log_level_is_changed(home: Home) -> None:
    assert run(home, "log-level", home.path, "debug").returncode == 0
    run(home, "log-level", home.path, "info")


def test_a_dump_of_a_daemon_that_answers_has_its_tasks(home: Home) -> None:
    said = run(home, "dump", home.path).stdout.decode()
    assert "task " in said
    assert "thread MainThread" in said


def test_a_dump_of_a_daemon_that_is_stopped_says_so_and_where_it_waits(home: Home) -> None:
    pid = home.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        done = run(home, "dump", home.path)
    finally:
        os.kill(pid, signal.SIGCONT)
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "does not answer" in done.stderr.decode()
    assert "T (stopped)" in said
    assert f"thread {pid}" in said
