"""``agentfuse run --sandbox bwrap``: what an agent in it can do, and what happens around it."""

from __future__ import annotations

import os
import platform
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.cli_support import Host, new_host
from mounts import eventually

from agentfuse.control.mountinfo import mounts

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")]


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as made:
        yield made
        left = [entry for entry in mounts() if str(entry.mountpoint).startswith(f"{made.base}/")]
        assert left == []
        assert os.listdir(f"{made.runtime}-sandboxes") == []


def sandboxed(host: Host, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return host.run("run", "--sandbox", "bwrap", "--agent", "a", *options, "--", *command)


def test_an_agent_has_its_home_and_nothing_else(host: Host) -> None:
    (host.base / "secret").write_text("of the host")
    host.environment["API_TOKEN"] = "secret"
    script = f"""
        id -u; pwd; grep CapEff /proc/self/status | cut -f2
        for each in / /usr /etc /home /var /run /proc; do touch $each/x 2>/dev/null && echo $each; done
        cat {host.base}/secret 2>/dev/null; env | grep secret; ls /proc | grep -c '^[0-9]'
        ls /sys/class/net 2>/dev/null; tail -n +3 /proc/net/dev | cut -d: -f1
        echo 'remember me' > shared/note; touch /tmp/x; cat debug/x 2>/dev/null; exit 7
    """
    done = sandboxed(host, "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    uid, cwd, capabilities, processes, *rest = done.stdout.split()
    assert (uid, cwd, int(capabilities, 16)) == ("1000", "/home/agent", 0)
    assert int(processes) < 10
    assert rest == ["lo"]
    script = "touch /home/x; getent hosts localhost"
    done = sandboxed(host, "sh", "-c", script)
    assert "Read-only file system" in done.stderr and "localhost" in done.stdout, done
    assert sandboxed(host, "cat", "shared/note").stdout == "remember me\n"


@pytest.mark.parametrize(
    ("command", "code"), [(("no-such-command",), 127), (("/etc",), 126), (("sh", "-c", "kill -9 $$"), 137)]
)
def test_the_exit_code_is_the_commands(host: Host, command: tuple[str, ...], code: int) -> None:
    assert sandboxed(host, *command).returncode == code


def test_what_is_shown_and_the_network_are_there_when_asked_for(host: Host) -> None:
    (host.base / "shown").write_text("hello")
    host.base.chmod(0o755)
    shown = f"{host.base}/shown"
    script = f"cat {shown}; touch {shown} 2>/dev/null && echo wrote; readlink /proc/self/ns/net"
    done = sandboxed(host, "sh", "-c", script, options=("--network", "--show", shown))
    assert done.stdout == f"hello{os.readlink('/proc/self/ns/net')}\n", done.stderr
    assert host.run("run", "--agent", "a", "--network", "true").returncode == 2


def test_a_signal_reaches_the_command(host: Host) -> None:
    script = "trap 'echo got > shared/got; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    process = host.start("run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert sandboxed(host, "cat", "shared/got").stdout == "got\n"


TERMINAL = """
import fcntl, signal, sys, termios
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
try:
    fcntl.ioctl(0, termios.TIOCSTI, b"x")
except OSError as error:
    print("typed:", error.strerror)
print("up", flush=True)
while not caught: signal.pause()
open("shared/count", "w").write(str(len(caught)))
"""


def test_ctrl_c_is_the_commands_alone_and_it_types_nothing_into_the_terminal(host: Host) -> None:
    ours, theirs = pty.openpty()
    command = ("run", "--sandbox", "bwrap", "--agent", "a", "--", "python3", "-c", TERMINAL)
    process = host.start_on_terminal(theirs, *command)
    seen = b""
    while b"up" not in seen:
        seen += os.read(ours, 65536)
    os.write(ours, b"\x03")
    assert process.wait(60) == 0
    os.close(ours)
    assert b"typed: Operation not permitted" in seen
    assert sandboxed(host, "cat", "shared/count").stdout == "1"


def test_an_interactive_shell_has_its_jobs(host: Host) -> None:
    ours, theirs = pty.openpty()
    shell = ("bash", "--norc", "-ic", "sleep 0.1 & fg && echo in front; exit 5")
    process = host.start_on_terminal(theirs, "run", "--sandbox", "bwrap", "--agent", "a", "--", *shell)
    seen = b""
    while b"in front" not in seen and b"no job control" not in seen:
        seen += os.read(ours, 65536)
    assert process.wait(60) == 5
    os.close(ours)
    assert b"no job control" not in seen


def test_a_signal_to_all_of_its_processes_leaves_the_command_time(host: Host) -> None:
    script = "trap 'sleep 0.3; echo got > shared/got; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    process = host.start(
        "run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", script, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert sandboxed(host, "cat", "shared/got").stdout == "got\n"


KEYS = """
import ctypes, os, sys
number = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
libc = ctypes.CDLL(None)
if len(sys.argv) == 2:  # in the sandbox
    print(libc.syscall(number[1], 11, int(sys.argv[1]), ctypes.create_string_buffer(9), 9))
else:
    libc.syscall(number[1], 1, None)
    key = libc.syscall(number[0], b"user", b"agentfuse-test", b"secret", 6, -3)
    assert key > 0
    os.execv(sys.executable, [sys.executable, "-m", "agentfuse", *sys.argv[2:], str(key)])
"""


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="numbers of system calls")
def test_the_keys_of_whoever_starts_it_stay_outside(host: Host) -> None:
    inside = ("run", "--sandbox", "bwrap", "--agent", "a", "--", "python3", "-c", KEYS)
    done = subprocess.run(
        [sys.executable, "-c", KEYS, "outside", *inside],
        env=host.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "-1\n"), done.stderr


def test_what_is_below_home_can_be_shown_and_what_cannot_is_refused(host: Host) -> None:
    project = Path(tempfile.mkdtemp(dir="/home"))
    try:
        project.chmod(0o755)
        (project / "code").write_text("print()")
        for path in (project, project / "code"):
            done = sandboxed(host, "cat", f"{project}/code", options=("--show", str(path)))
            assert done.stdout == "print()", done.stderr
        for path, why in (
            ("/home", "its own /home/agent"), ("/home/agent/x", "not exist"), (f"{project}/no", "not exist"),
        ):  # fmt: skip
            done = sandboxed(host, "true", options=("--show", path))
            assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    finally:
        shutil.rmtree(project)


def test_what_a_killed_run_leaves_the_next_one_removes(host: Host) -> None:
    process = host.start("run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", SAVE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (entry,) = host.registry.list()
    process.kill()
    os.kill(entry.record.pid, signal.SIGKILL)
    process.communicate()
    assert len(os.listdir(f"{host.runtime}-sandboxes")) == 1
    assert host.registry.wait_until_released(Path(entry.record.mountpoint), timeout_s=60)
    assert sandboxed(host, "cat", "shared/x").stdout == "x\n"
    assert os.listdir(f"{host.runtime}-sandboxes") == []
    assert host.registry.list() == []


SAVE = "echo x > shared/x; echo up; exec sleep 1000"


def test_a_daemon_that_is_killed_while_the_store_is_away_comes_back_with_it(host: Host) -> None:
    script = (
        "echo x > shared/x; echo up; read y;until cat /home/agent/shared/x 2>/dev/null; do sleep 0.02; done"
    )
    process = host.start("run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", script)
    assert process.stdout is not None and process.stderr is not None and process.stdin is not None
    assert process.stdout.readline() == "up\n"
    host.store.rename(host.base / "away")
    (entry,) = host.registry.list()
    os.kill(entry.record.pid, signal.SIGKILL)
    while "there and is gone" not in process.stderr.readline():
        assert process.poll() is None
    process.stdin.write("\n")
    process.stdin.flush()
    (host.base / "away").rename(host.store)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "x\n"), err


def test_a_daemon_that_is_killed_again_and_again_ends_the_command_and_nothing_is_lost(host: Host) -> None:
    process = host.start("run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", SAVE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    killed: set[int] = set()

    def is_killed_or_ended() -> bool:
        for entry in host.registry.list():
            if entry.alive and entry.record.pid not in killed:
                killed.add(entry.record.pid)
                os.kill(entry.record.pid, signal.SIGKILL)
        return process.poll() is not None

    eventually(is_killed_or_ended)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert len(killed) == 5 and "ended 5 times in 60 s" in err, err
    assert sandboxed(host, "cat", "shared/x").stdout == "x\n"


def test_a_killed_daemon_is_replaced_under_the_running_agent(host: Host) -> None:
    script = (
        "exec 3> workspace/open; echo closed > shared/closed; echo up; read x;"
        "until cat /home/agent/shared/closed 2>/dev/null; do sleep 0.02; done;"
        "echo x 2>/dev/null >&3 || echo dead; echo after > /home/agent/shared/after"
    )
    process = host.start("run", "--sandbox", "bwrap", "--agent", "a", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (entry,) = host.registry.list()
    os.kill(entry.record.pid, signal.SIGKILL)
    out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out) == (0, "closed\ndead\n"), err
    assert sandboxed(host, "cat", "shared/after").stdout == "after\n"


def test_without_bubblewrap_the_fix_is_named(host: Host, tmp_path: Path) -> None:
    host.environment["PATH"] = str(tmp_path)
    done = sandboxed(host, "true")
    (Path(f"{host.runtime}-sandboxes")).mkdir(exist_ok=True)
    assert (done.returncode, "apt-get install bubblewrap" in done.stderr) == (69, True), done.stderr
