"""An agent's history for tests of what looks into it, and the real command line on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from memories import Run

from agentfuse.objectstore import ObjectStore


def command(
    store: ObjectStore, *arguments: str | bytes, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """``agentfuse`` on a store, which must exit with ``code`` and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "agentfuse", *arguments, "--store", store.url],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done


def told(store: ObjectStore, *arguments: str | bytes, code: int = 0) -> Any:
    """What a verb says with ``--json``."""
    return json.loads(command(store, *arguments, "--json", code=code).stdout)


def lived(tmp_path: Path, store: ObjectStore) -> Run:
    """Agent "a" of three runs: e1 made some files, e2 changed them twice, e3 went on from there."""
    one = Run(tmp_path, store, "e1")
    one.write("notes.md", b"# Notes\n- e1\n")
    one.write("d/small", b"small")
    one.write("d/old", b"old")
    one.write("large", b"0123456789abcdef" * 100_000)
    os.symlink("d/small", one.root / "link")
    with open(os.fsencode(one.root) + b"/\xff name", "wb") as file:
        file.write(b"not utf-8")
    one.commit("end")
    two = Run(tmp_path, store, "e2")
    two.restore()
    append(two, "- e2\n")
    two.write("d/new", b"new of e2")
    two.commit("checkpoint")
    (two.root / "d/old").unlink()
    two.write("d/small", b"changed by e2")
    two.commit("end")
    three = Run(tmp_path, store, "e3")
    three.restore()
    append(three, "- e3\n")
    three.write("later", b"of e3")
    three.commit("end")
    return three


def take_turns(tmp_path: Path, store: ObjectStore, turns: str) -> None:
    """Agent "a" of executions named by a letter each, which commit in this order. The first commit is there
    before the others begin; from then on they run at once.

    Each time they write a line of notes, and a file of its own; both name the snapshot that it comes into.
    """
    runs = {turns[0]: Run(tmp_path, store, turns[0])}
    for number, execution in enumerate(turns, 1):
        if number == 2:
            for name in sorted(set(turns) - {turns[0]}):
                runs[name] = Run(tmp_path, store, name)
                runs[name].restore()
        run = runs[execution]
        append(run, f"- {execution} {number}\n")
        run.write(f"{execution} {number}", b"%d" % number)
        assert run.commit("checkpoint").number == number


def append(run: Run, text: str) -> None:
    """A line more in the notes."""
    with (run.root / "notes.md").open("a") as notes:
        notes.write(text)
