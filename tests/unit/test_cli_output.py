"""What verbs print: harmless to a terminal, once, and on the right stream."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from agentfuse.cli import tables
from agentfuse.cli.output import PlainReporter, describe, note, plain, print_error, print_json, say
from agentfuse.errors import AgentfuseError, ConfigError
from agentfuse.progress import Progress


def agentfuse(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentfuse", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_nothing_printed_can_move_the_cursor_or_fail_to_encode() -> None:
    assert plain("a\x1b[2Jb\r\udcffé\u202e") == "a\\x1b[2Jb\\r\\udcffé\\u202e"


def test_facts_go_to_stdout_and_errors_with_their_fix_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo\x07")
    print_error(AgentfuseError("it broke", hint="mend it"))
    print_error(ConfigError(["a: x", "b: y"]))
    assert capsys.readouterr() == (
        "one\ntwo\\x07\n",
        "agentfuse: it broke\n  fix: mend it\nagentfuse: the configuration has 2 mistakes\n  a: x\n  b: y\n",
    )


def test_json_keeps_names_that_are_no_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "\udcff\x1b"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"name": "\udcff\x1b"}


def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        note("anybody there?")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            closed.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 2.5, 2.6, 5.0])
    monkeypatch.setattr("agentfuse.cli.output.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    reporter = PlainReporter(say)
    for number in range(4):
        reporter.progress(Progress("flush", number, 4, number * 1024, 0))
    assert stream.getvalue() == "flushing: 1 of 4 files, 1 KiB\nflushing: 3 of 4 files, 3 KiB\n"


def test_a_moment_without_totals_is_told_without_them() -> None:
    assert describe(Progress("scan", 3, 0, 0, 0)) == "looking for changes: 3 files, 0 B"


def test_on_a_terminal_a_bar_comes_and_goes() -> None:
    program = (
        "from agentfuse.cli.output import terminal_reporter\n"
        "from agentfuse.progress import Progress\n"
        "reporter = terminal_reporter()\n"
        "reporter.progress(Progress('restore', 1, 2, 512, 1024))\n"
        "reporter.say('restored')\n"
        "reporter.progress(Progress('flush', 2, 2, 1024, 1024))\n"
        "import threading; assert threading.active_count() == 1\n"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    assert done.stdout == b"restored\n"
    assert b"restoring: 1 of 2 files" in os.read(ours, 65536)
    os.close(ours)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (59.9, "59s"), (61, "1m"), (3600, "1h0m"), (200_000, "2d7h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("used", "quota", "text"),
    [
        (0, 10, "░░░░░░░░░░   0%"),
        (5, 10, "█████░░░░░  50%"),
        (30, 10, "██████████ 300%"),
        (1, 0, "██████████ 100%"),
    ],
)
def test_a_share_is_a_bar(used: int, quota: int, text: str) -> None:
    assert tables.share(used, quota).plain == text


def test_a_table_that_is_piped_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(("A", "B"), [("x" * 300, "\x1b[2J")])
    assert capsys.readouterr().out.splitlines()[1].split() == ["x" * 300, "\\x1b[2J"]


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    text = agentfuse("--help").stdout
    for verb in ("mount", "umount", "run", "ps", "status", "df", "doctor"):
        assert f"\n  {verb} " in text
    commands = text.partition("Commands:")[2].partition("Exit codes:")[0]
    assert "..." not in commands
    assert "75  somebody else holds it, or work is not in the store yet" in text
    assert agentfuse("--version").stdout.startswith("agentfuse 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["mount"],
        ["mount", "/x"],
        ["mount", "/x", "--agent", "a", "--bogus"],
        ["umount", "/x", "--timeout", "-1"],
    ],
)
def test_a_wrong_command_line_exits_2_and_shows_the_usage(arguments: list[str]) -> None:
    done = agentfuse(*arguments)
    assert done.returncode == 2
    assert "Usage: agentfuse" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_unexpected_is_one_line_unless_debugging(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run/0.json").mkdir()  # nobody foresees a directory there
    environment = {"AGENTFUSE_RUNTIME_DIR": str(tmp_path / "run"), "AGENTFUSE_STATE": str(tmp_path)}
    done = agentfuse("ps", **environment)
    assert done.returncode == 70
    assert done.stderr.splitlines()[0].startswith("agentfuse: unexpected IsADirectoryError")
    assert "Traceback" not in done.stderr
    assert "Traceback" in agentfuse("ps", **environment, AGENTFUSE_DEBUG="1").stderr


def test_a_mount_loads_nothing_that_other_verbs_need() -> None:
    program = (
        "import sys, agentfuse.cli.mount, agentfuse.daemon\n"
        "print([name for name in ('rich', 'httpx', 'boto3', 'psutil', 'watchdog') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
