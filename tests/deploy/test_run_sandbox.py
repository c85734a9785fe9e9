"""``agentfuse run --sandbox bwrap``: what an agent in it can do, and what happens around it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.cli_support import Host, new_host

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
