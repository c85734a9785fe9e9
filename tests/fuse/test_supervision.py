"""A mount under a service manager: it hears when the home can be used, that it answers, how its end goes."""

from __future__ import annotations

import socket
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
