"""What restoring and committing take of this machine's memory does not grow with what they move."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from memories import Run
from stores import local_store

from agentfuse.objectstore.cache import CachedStore
from agentfuse.snapshots.layout import is_object_key

base, verb, execution = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = CachedStore(local_store(base), base / ("cache of " + execution), 2**30, is_kept=is_object_key)
run = Run(base, store, execution)
report = getattr(run, verb)()
assert report.number == 1, report
peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak_kb)
"""


def peak_mb(base: Path, verb: str, execution: str) -> float:
    """Highest resident memory of a process that did it."""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(base), verb, execution]
    return int(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.parametrize(("files", "size_bytes"), [(180, 1_000_000), (2, 90_000_000)])
def test_peaks_stay_far_below_what_is_moved(tmp_path: Path, files: int, size_bytes: int) -> None:
    root = tmp_path / "e1" / "shared"
    root.mkdir(parents=True)
    for number in range(files):
        (root / str(number)).write_bytes(os.urandom(size_bytes))
    assert peak_mb(tmp_path, "commit", "e1") < 110
    assert peak_mb(tmp_path, "restore", "e2") < 110
