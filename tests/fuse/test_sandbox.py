"""An agent in a bubblewrap sandbox, as README.md shows: uid 1000, no capabilities, no network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Home

pytestmark = pytest.mark.mount

UID = 1000
SANDBOX = (
    "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
    "bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr",
    "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64",
    "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/",
)  # fmt: skip


@pytest.fixture
def parent(scratch: Path) -> Iterator[Path]:
    """A directory that is a shared mount of its own, so that what is mounted in it later is seen inside."""
    homes = scratch / "homes"
    (homes / "agent").mkdir(parents=True)
    subprocess.run(["mount", "--bind", homes, homes], check=True)
    subprocess.run(["mount", "--make-shared", homes], check=True)
    yield homes
    subprocess.run(["umount", "-l", homes], check=True)


@pytest.fixture
def home(parent: Path, new_home: Callable[..., Home]) -> Home:
    made = new_home(top=f'owner = "{UID}:{UID}"')
    made.path = parent / "agent"
    return made.start()


def sandbox(parent: Path, script: str) -> subprocess.Popen[str]:
    inside = ["--bind", str(parent), "/home", "--setenv", "HOME", "/home/agent", "sh", "-c", script]
    return subprocess.Popen(
        [*SANDBOX, *inside],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_an_agent_works_in_its_home_and_cannot_leave_it(parent: Path, home: Home) -> None:
    script = (
        "cd; id -u; pwd; echo hello > shared/greeting; cat shared/greeting; "
        "ls debug || echo no debug; touch /home/x || echo closed; chown 0:0 shared/greeting || echo no chown"
    )
    said, _ = sandbox(parent, script).communicate(timeout=60)
    lines = [line for line in said.splitlines() if ":" not in line]
    assert lines == [str(UID), "/home/agent", "hello", "no debug", "closed", "no chown"], said
    assert (home.path / "shared" / "greeting").stat().st_uid == UID
    home.umount()


def test_a_running_sandbox_follows_an_unmount_and_a_new_mount(parent: Path, home: Home) -> None:
    (home.path / "shared" / "note").write_text("kept\n")
    agent = sandbox(
        parent,
        "cat /home/agent/shared/note; read x; ls /home/agent | wc -l; read x; cat /home/agent/shared/note",
    )
    assert agent.stdin and agent.stdout
    assert agent.stdout.readline() == "kept\n"
    home.umount()
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "0\n"
    home.start(fresh=True)
    said, _ = agent.communicate("\n", timeout=60)
    assert said == "kept\n"
    assert agent.returncode == 0
    home.umount()


def test_a_killed_daemon_is_replaced_under_a_running_sandbox(parent: Path, home: Home) -> None:
    (home.path / "workspace" / "note").write_text("still here\n")
    os.chown(home.path / "workspace" / "note", UID, UID)
    agent = sandbox(
        parent,
        "cd /home/agent/workspace; echo ready; read x; ls . || echo dead; cat /home/agent/workspace/note",
    )
    assert agent.stdin and agent.stdout
    assert agent.stdout.readline() == "ready\n"
    home.kill()
    home.start()
    said, _ = agent.communicate("\n", timeout=60)
    assert "dead" in said
    assert said.endswith("still here\n")
    home.umount()
