"""SIGKILL of the daemon at random moments under load: what was closed is never lost.

Workers write, close, and only then record outside of the mount what they closed. After every kill the
home is mounted again, as the same execution or as a new one of the same agent, and everything on record
must be there, the books must equal the tree, and at last another host that has only the object store
must see the memory. AGENTFUSE_KILL_ROUNDS makes it look longer. The matrix kills at named steps; this one
has the real command line, several writers at once, and a region that is never synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import invariants
import pytest
from mounts import Home, base_directory, remove_base

pytestmark = pytest.mark.mount

ROUNDS = int(os.environ.get("AGENTFUSE_KILL_ROUNDS", "30"))
WORKERS = 3
NAMES = 12

# Writes files of random sizes under few names, in the ways programs do: afresh, by rename, by append,
# by unlink. What is on record after a line was written and flushed has been closed before.
WORKER = """
import json, os, random, sys
directory, journal, seed, names = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
record = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(**what):
    os.write(record, json.dumps(what).encode() + b"\\n")
print("started", flush=True)
try:
    while True:
        name = f"{rng.randrange(names)}"
        path = os.path.join(directory, name)
        size = rng.choice([0, 1, 100, 4096, 30_000])
        byte = rng.randrange(256)
        how = rng.choice(["write", "write", "rename", "append", "unlink"])
        note(doing=how, name=name, byte=byte, size=size)
        if how == "unlink":
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        elif how == "rename":
            with open(path + ".tmp", "wb") as file:
                file.write(bytes([byte]) * size)
            os.rename(path + ".tmp", path)
        else:
            with open(path, "ab" if how == "append" else "wb") as file:
                file.write(bytes([byte]) * size)
        note(done=how, name=name, byte=byte, size=size)
except OSError:
    pass
"""


def recorded(journal: Path, before: dict[str, bytes]) -> tuple[dict[str, bytes | None], set[str]]:
    """What each name must hold (None: it must not exist), and the names that were in flight."""
    state: dict[str, bytes | None] = dict(before)
    flying: set[str] = set()
    for line in journal.read_text().splitlines():
        step = json.loads(line)
        name, data = step["name"], bytes([step["byte"]]) * step["size"]
        if "doing" in step:
            flying.add(name)
            continue
        flying.discard(name)
        if step["done"] == "unlink":
            state[name] = None
        elif step["done"] == "append":
            state[name] = (state.get(name) or b"") + data
        else:
            state[name] = data
    return state, flying


def held(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".tmp"}


def verify(directory: Path, journal: Path, before: dict[str, bytes]) -> None:
    """Everything that was closed is there, byte for byte; what was in flight may be old, new or part."""
    expected, flying = recorded(journal, before)
    found = held(directory)
    for name, data in expected.items():
        if name not in flying:
            kept = found.get(name)
            assert kept == data, (
                f"{directory.name}/{name}: {kept and len(kept)} bytes instead of {data and len(data)}"
            )


def digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.timeout(600)
def test_nothing_closed_is_lost_over_many_kills(new_home: Callable[..., Home], scratch: Path) -> None:
    seed = int(os.environ.get("AGENTFUSE_KILL_SEED", random.randrange(2**32)))
    logging.getLogger(__name__).warning("AGENTFUSE_KILL_SEED=%d plays the same moments again", seed)
    rng = random.Random(seed)
    home = new_home().start()
    for round_number in range(ROUNDS):
        # Memory is the agent's, so it is expected of any execution; the workspace only of the same one.
        region = "shared" if round_number % 2 else "workspace"
        directories = [home.path / region / f"worker{number}" for number in range(WORKERS)]
        for directory in directories:
            directory.mkdir(exist_ok=True)
        before = [held(directory) for directory in directories]
        journals = [scratch / f"{round_number}-{number}" for number in range(WORKERS)]
        workers = []
        for directory, journal in zip(directories, journals, strict=True):
            command = [sys.executable, "-S", "-c", WORKER, directory, journal, rng.randrange(2**32), NAMES]
            workers.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE))
        for worker in workers:
            assert worker.stdout
            worker.stdout.readline()
        # Not a wait for something to happen, but the random moment itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            workers[0].wait(rng.uniform(0.01, 0.3))
        home.kill()
        for worker in workers:
            worker.wait(30)
            assert worker.stdout
            worker.stdout.close()
        home.start(fresh=region == "shared" and rng.random() < 0.3)
        for directory, journal, content in zip(directories, journals, before, strict=True):
            verify(directory, journal, content)
        invariants.check(home)
    memory = digest(home.path / "shared")
    home.umount()

    elsewhere = Home(base_directory(), agent=home.agent)
    elsewhere.store = home.store
    try:
        elsewhere.start()
        assert digest(elsewhere.path / "shared") == memory
        elsewhere.umount()
    finally:
        elsewhere.discard()
        remove_base(elsewhere.base)
