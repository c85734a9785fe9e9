"""``agentfuse dump`` of a daemon whose loop hangs, without a mount."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Serves a control socket, as a daemon does, and then never gets back to it.
_HANGS = """
import faulthandler, os, signal, sys, time
from pathlib import Path
import trio
from agentfuse.control import server
from agentfuse.control.registry import MountRecord, Registry

mountpoint = Path(sys.argv[1])
registry = Registry(Path(sys.argv[2]))
lock = registry.lock(mountpoint)
faulthandler.register(signal.SIGUSR1)
registry.publish(MountRecord(str(mountpoint), "e", "a", os.getpid(), "/state", "file:///store", 0.0))

def the_culprit():
    print("ready", flush=True)
    time.sleep(600)

async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, registry.socket_path(mountpoint), None)
        the_culprit()

trio.run(main)
"""


@contextlib.contextmanager
def hanging_daemon(base: Path, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    runtime = base / "run"
    runtime.mkdir(mode=0o700)
    command = [sys.executable, "-c", _HANGS, str(base), str(runtime)]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        yield daemon
    finally:
        daemon.kill()
        daemon.communicate()


def dump(base: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentfuse", "dump", str(base)],
        env={**os.environ, "AGENTFUSE_RUNTIME_DIR": str(base / "run")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_daemon_whose_loop_hangs_is_asked_by_a_signal_and_shows_where(tmp_path: Path) -> None:
    with (tmp_path / "daemon.log").open("wb") as log, hanging_daemon(tmp_path, log.fileno()) as daemon:
        done = dump(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in the_culprit" in done.stdout
    assert f"pid {daemon.pid}: State S (sleeping)" in done.stdout


def test_where_the_stacks_go_to_somebody_else_that_is_said(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()  # as journald's is
    with ours, theirs, hanging_daemon(tmp_path, theirs.fileno()):
        done = dump(tmp_path)
        assert b"in the_culprit" in ours.recv(65536)
    assert "where its stderr goes: socket:" in done.stdout
