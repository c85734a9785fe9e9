"""``run``: a command in a home of its own, its signals, its exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.cli_support import Host, new_host

from agentfuse.control.mountinfo import mounts

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")]

PYTHON = sys.executable


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as made:
        yield made
        left = [entry for entry in mounts() if str(entry.mountpoint).startswith(f"{made.base}/")]
        assert left == []


def private_directories(host: Host) -> list[str]:
    return os.listdir(host.runtime / "run")


def test_the_command_runs_in_the_home_and_stdout_is_its_own(host: Host) -> None:
    program = (
        "import os; home = os.environ['AGENTFUSE_HOME'];"
        "assert os.getcwd() == os.environ['HOME'] == os.environ['PWD'] == home;"
        "print(os.environ['AGENTFUSE_AGENT'], os.environ['AGENTFUSE_EXECUTION'], *sorted(os.listdir()))"
    )
    done = host.run("run", "--agent", "a", "--execution", "e1", "--", PYTHON, "-c", program)
    assert (done.returncode, done.stdout) == (
        0,
        "a e1 .agentfuse debug downloads shared uploads workspace\n",
    ), done.stderr
    assert private_directories(host) == []


def test_what_one_run_remembers_the_next_one_finds(host: Host) -> None:
    for expected in ("", "x\n", "x\nx\n"):
        done = host.run(
            "run",
            "--agent",
            "a",
            "sh",
            "-c",
            "cat shared/n workspace/n; echo x | tee -a workspace/n >> shared/n",
        )
        assert done.stdout == expected
        assert done.returncode == 0


def test_the_commands_own_options_are_not_ours(host: Host) -> None:
    assert host.run("run", "--agent", "a", "echo", "--agent", "-h").stdout == "--agent -h\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -TERM $$"), 128 + 15),
        (("no-such-command-anywhere",), 127),
        (("./shared",), 126),
    ],
)
def test_the_exit_code_is_the_commands(host: Host, command: tuple[str, ...], code: int) -> None:
    done = host.run("run", "--agent", "a", "--", *command)
    assert done.returncode == code, done.stderr
    assert private_directories(host) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command_and_what_it_then_writes_is_kept(
    host: Host, number: signal.Signals
) -> None:
    program = f"trap 'echo got > shared/got; exit 3' {number.name[3:]}; echo up; while :; do sleep 0.05; done"
    process = host.start("run", "--agent", "a", "--", "sh", "-c", program)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert host.run("run", "--agent", "a", "cat", "shared/got").stdout == "got\n"


def test_ctrl_c_on_a_terminal_reaches_the_command_once_and_not_the_daemon(host: Host) -> None:
    ours, theirs = pty.openpty()
    program = (
        "import signal, sys\n"
        "caught = []\n"
        "signal.signal(signal.SIGINT, lambda *_: caught.append(1))\n"
        "print('up', flush=True)\n"
        "while not caught: signal.pause()\n"
        "signal.sigtimedwait([signal.SIGALRM], 0.5)\n"
        "open('shared/count', 'w').write(str(len(caught)))\n"
    )
    process = host.start_on_terminal(theirs, "run", "--agent", "a", "--", PYTHON, "-c", program)
    seen = b""
    while b"up" not in seen:
        seen += os.read(ours, 65536)
    os.write(ours, b"\x03")
    assert process.wait(60) == 0
    os.close(ours)
    assert host.run("run", "--agent", "a", "cat", "shared/count").stdout == "1"


def test_processes_that_the_command_leaves_behind_lose_the_home_but_nothing_written(host: Host) -> None:
    program = "echo x > shared/x; sleep 1000 > /dev/null 2>&1 & echo $!"
    done = host.run("run", "--agent", "a", "--", "sh", "-c", program)
    try:
        assert done.returncode == 0, done.stderr
        assert f"taken from them: sleep (pid {done.stdout.strip()}, working directory)" in done.stderr
        assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "x\n"
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize(("own", "code"), [(0, 75), (3, 3)])
def test_a_failed_flush_is_told_and_wins_over_success_only(host: Host, own: int, code: int) -> None:
    program = f"echo x > shared/x; mv {host.store} {host.base}/away; touch {host.store}; exit {own}"
    done = host.run("run", "--agent", "a", "--execution", "e1", "--", "sh", "-c", program)
    assert done.returncode == code, done.stderr
    assert "not in the store yet" in done.stderr
    host.store.unlink()
    (host.base / "away").rename(host.store)
    assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "x\n"


def test_an_interrupted_flush_keeps_the_work_on_this_host(host: Host) -> None:
    (host.base / "config.toml").write_text('flush_timeout = "1h"\n')
    program = f"echo x > shared/x; mv {host.store} {host.base}/away"
    process = host.start("run", "--agent", "a", "--execution", "e1", "--", "sh", "-c", program)
    while not any(row["state"] == "flushing" for row in json.loads(host.run("ps", "--json").stdout)):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "interrupted while flushing: execution e1" in err
    assert private_directories(host) == []
    (host.base / "away").rename(host.store)
    assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "x\n"


def test_a_daemon_that_dies_under_the_command_is_replaced(host: Host) -> None:
    program = f"echo x > shared/x; {PYTHON} -m agentfuse ps --json"
    process = host.start(
        "run", "--agent", "a", "--execution", "e1", "--", "sh", "-c", f"{program}; cat > /dev/null"
    )
    assert process.stdout is not None
    while '"pid"' not in (line := process.stdout.readline()):
        pass
    os.kill(int(line.split(":")[1].strip(" ,\n")), signal.SIGKILL)
    _, err = process.communicate("", timeout=60)
    assert process.returncode == 0, err
    assert "ended by SIGKILL\n" in err and "the home is mounted again" in err
    assert private_directories(host) == []
    assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "x\n"


def test_a_run_that_is_killed_has_its_daemon_flush(host: Host) -> None:
    process = host.start(
        "run", "--agent", "a", "--", "sh", "-c", "echo x > shared/x; echo up; exec sleep 1000"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (entry,) = host.registry.list()
    sleeper = next(
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal()
        and Path(f"/proc/{pid}/status").exists()
        and _parent(int(pid)) == process.pid
        and int(pid) != entry.record.pid
    )
    process.kill()
    process.wait()
    try:
        assert host.registry.wait_until_released(Path(entry.record.mountpoint), timeout_s=60)
    finally:
        os.kill(sleeper, signal.SIGKILL)
    assert host.run("run", "--agent", "a", "cat", "shared/x").stdout == "x\n"


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_what_cannot_be_mounted_runs_nothing(host: Host) -> None:
    done = host.run("run", "--agent", "a", "--store", "gopher://x/y", "--", "touch", host.base / "ran")
    assert done.returncode == 2
    assert not (host.base / "ran").exists()
    assert private_directories(host) == []


def test_a_missing_command_is_a_usage_error(host: Host) -> None:
    assert host.run("run", "--agent", "a").returncode == 2
    done = subprocess.run(
        [PYTHON, "-m", "agentfuse", "run", "--", "true"],
        env=host.environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
