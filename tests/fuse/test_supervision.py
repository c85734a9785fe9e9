"""A mount under a service manager: it hears when the home can be used, that it answers, how its end goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mounts
import pytest
from mounts import READY_S, Home

pytestmark = pytest.mark.mount


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(READY_S)
        yield listening


@pytest.fixture
def watched(manager: socket.socket) -> Iterator[Home]:
    environ = (f"NOTIFY_SOCKET={manager.getsockname()}", "WATCHDOG_USEC=400000")
    home = Home(mounts.base_directory(), prefix=("env", *environ))
    yield home.start()
    home.discard()
    mounts.remove_base(home.base)


def heard_until(manager: socket.socket, wanted: str) -> list[str]:
    """What is told, to the first message with a line that begins as wanted."""
    lines: list[str] = []
    while not any(line.startswith(wanted) for line in lines):
        lines += manager.recv(4096).decode().split("\n")
    return lines


def test_the_manager_hears_of_the_whole_life_of_a_mount(manager: socket.socket, watched: Home) -> None:
    before = heard_until(manager, f"STATUS=mounted at {watched.path}")
    assert "READY=1" in before and "EXTEND_TIMEOUT_USEC=30000000" in before
    with watched.counting() as requests:
        heard_until(manager, "WATCHDOG=1")
        heard_until(manager, "WATCHDOG=1")
    assert requests["statfs"] >= 1  # it is a request through the mount that was answered
    (watched.path / "shared" / "a").write_text("memory")
    assert watched.process is not None
    watched.process.terminate()
    # Heard as it comes: what a manager does not take at once is not kept for it.
    assert "EXTEND_TIMEOUT_USEC=30000000" in heard_until(manager, "STATUS=shared/: flushed")
    assert watched.ended() == 0


def refuses_root(directory: Path) -> bool:
    try:
        (directory / "file").touch()
    except PermissionError:
        return True
    (directory / "file").unlink()
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_not_even_root_writes_below_a_home_that_is_to_be_mounted_again(watched: Home) -> None:
    watched.kill(leave_stale=True)
    subprocess.run(["umount", "-l", watched.path], check=True)
    assert refuses_root(watched.path)
    watched.start()
    assert watched.signal(signal.SIGTERM) == 0  # as the manager does for a restart
    assert refuses_root(watched.path)
    watched.start()
    watched.umount()
    assert not refuses_root(watched.path)
    watched.path.rmdir()
