"""Mounts whose daemon is dead: telling them from living ones, and taking them away.

Both without ever waiting for the filesystem mounted there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from agentfuse.control.mountinfo import mounts_at
from agentfuse.errors import EnvironmentProblem, MountError

Liveness = Literal["live", "dead", "hung"]

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
# statvfs, not stat: the kernel answers stat of a dead mount's root from its cache.
_PROBE = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as e: sys.exit(e.errno)\n"


def liveness(mountpoint: Path, *, timeout_s: float = 3.0) -> Liveness:
    """Whether somebody answers for the filesystem mounted at this resolved path."""
    probe = subprocess.Popen([sys.executable, "-IS", "-c", _PROBE, mountpoint])
    try:
        return "dead" if probe.wait(timeout_s) in {errno.ENOTCONN, errno.ECONNABORTED} else "live"
    except subprocess.TimeoutExpired:
        probe.kill()  # it may be beyond signals until the filesystem answers: nobody waits for it
        return "hung"


def detach(mountpoint: Path) -> int:
    """Take every mount of ours off this resolved path, busy or not; how many there were.

    Stops at a mount that is not ours. Raises MountError when the kernel refuses.
    """
    count = 0
    while (stack := mounts_at(mountpoint)) and stack[-1].is_ours:
        _detach_top(mountpoint)
        count += 1
        if len(mounts_at(mountpoint)) >= len(stack):
            raise MountError(f"{mountpoint} stays mounted", hint=f"look at it: findmnt {mountpoint}")
    return count


def _detach_top(mountpoint: Path) -> None:
    if os.geteuid() != 0:
        _fusermount(mountpoint)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MountError(
            f"{mountpoint} cannot be unmounted: {reason}", hint="run as root, with CAP_SYS_ADMIN"
        )


def _fusermount(mountpoint: Path) -> None:
    command: list[str | Path] = ["fusermount3", "-u", "-z", "--", mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            "fusermount3 is not installed", hint="install it: apt-get install fuse3"
        ) from error
    if done.returncode != 0:
        raise MountError(
            f"{mountpoint} cannot be unmounted: {done.stderr.strip()}",
            hint="unmount it as the user that mounted it, or as root",
        )
