"""``docs/format.md`` says how to read a memory back with ordinary tools; this does what it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from memories import Run, picture
from stores import local_store

PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def script() -> str:
    (found,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


def read_back(tmp_path: Path, out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    environ = {"PATH": os.environ["PATH"], "STORE": str(tmp_path / "store"), "AGENT": "a", "OUT": str(out)}
    return subprocess.run(["sh", "-c", script()], env=environ, capture_output=True, text=True, check=False)


def test_a_memory_is_read_back_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path, local_store(tmp_path))
    for number in range(20):
        run.write(f"d{number % 3}/some file {number}", b"%d" % number * 5000)
    run.write("empty", b"")
    run.write("large", os.urandom(3_000_000))
    run.write("an earlier content", b"old")
    run.commit()
    run.write("an earlier content", b"new").chmod(0o4750)
    os.utime(run.root / "large", ns=(0, -1_500_000_001))
    os.symlink("/etc/passwd", run.root / "d0/link")
    (run.root / "d1").chmod(0o1711)
    run.commit()
    done = read_back(tmp_path, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    expected, found = picture(run.root), picture(tmp_path / "out")
    for link in (expected.pop(b"d0/link"), found.pop(b"d0/link")):
        assert link[3] == b"/etc/passwd"
    assert {**found, b"": 0} == {**expected, b"": 0}


def test_damage_is_found_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path, local_store(tmp_path))
    run.write("file", b"content")
    run.commit()
    (path,) = (tmp_path / "store/agents/a/objects").glob("*/*")
    path.write_bytes(b"cantent")
    done = read_back(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert "FAILED" in done.stdout
