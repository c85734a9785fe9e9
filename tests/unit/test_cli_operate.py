"""``agentfuse dump`` of a daemon whose loop hangs, without a mount."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_a_daemon_whose_loop_hangs_is_asked_by_a_signal_and_shows_where(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    with (tmp_path / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-c", _HANGS, str(tmp_path), str(runtime)], stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        done = subprocess.run(
            [sys.executable, "-m", "agentfuse", "dump", str(tmp_path)],
            env={**os.environ, "AGENTFUSE_RUNTIME_DIR": str(runtime)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        daemon.kill()
        daemon.communicate()
    assert done.returncode == 0, done.stderr
    assert "in the_culprit" in done.stdout
    assert f"pid {daemon.pid}: State S (sleeping)" in done.stdout
