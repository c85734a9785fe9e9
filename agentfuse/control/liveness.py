"""Whether anybody answers for a mounted filesystem, without ever waiting for it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Literal

Liveness = Literal["live", "dead", "hung"]

# statvfs, not stat: the kernel answers stat of a dead mount's root from its cache.
_PROBE = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as e: sys.exit(e.errno)\n"


def liveness(mountpoint: Path, *, timeout_s: float = 3.0) -> Liveness:
    """What is behind the mount at this resolved path: a daemon, a dead one, or one that does not answer."""
    probe = subprocess.Popen([sys.executable, "-IS", "-c", _PROBE, mountpoint])
    try:
        return "dead" if probe.wait(timeout_s) in {errno.ENOTCONN, errno.ECONNABORTED} else "live"
    except subprocess.TimeoutExpired:
        probe.kill()  # it may be beyond signals until the filesystem answers: nobody waits for it
        return "hung"
