"""Where homes and snapshots are kept: the state directory, the object store, and what is not there yet."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agentfuse.config import Config, format_size
from agentfuse.control.mountinfo import MountEntry, covering, mounts
from agentfuse.doctor import Finding
from agentfuse.errors import EnvironmentProblem
from agentfuse.home.tree import list_homes
from agentfuse.objectstore import open_store, probe

_MIN_FREE_BYTES = 64 * 1024 * 1024
_IN_MEMORY = {"tmpfs", "ramfs"}
_IN_A_CONTAINER = {"overlay", "aufs", "fuse.fuse-overlayfs"}
_SHARED = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "glusterfs",
    "lustre",
    "afs",
    "gfs2",
    "ocfs2",
    "virtiofs",
}


def state(settings: Config) -> Iterator[Finding]:
    """The state directory; makes it if it is missing."""
    path = settings.state
    lies_in = covering(path / "homes", mounts())
    if lies_in.is_ours:  # looked at first: its daemon may hang
        yield Finding(
            "state",
            "fail",
            f"{path} is in the home that is mounted at {lies_in.mountpoint}: a home cannot be kept in a home",
            "choose a directory outside of every home with --state",
        )
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"agentfuse")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written: {error.strerror}",
            hint="it must be a writable directory on a local disk; choose another with --state",
        ) from error
    yield Finding("state", "ok", f"{path} is writable")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("state", "warn", f"{path} is open to other users", f"chmod 0700 {path}")
    yield from _filesystem(path.resolve())
    yield _free_space(settings)


def store(settings: Config) -> Iterator[Finding]:
    """The object store, by the questions that a mount asks."""
    probe(open_store(settings.store))
    yield Finding("object store", "ok", f"{settings.store} works and honours put-if-absent")


def unflushed(settings: Config) -> Iterator[Finding]:
    """Homes whose daemon is gone, with work that no snapshot has."""
    left = [
        record
        for home in list_homes(settings.state)
        if (record := home.record()) and record.status == "live" and not home.is_locked()
    ]
    for record in left:
        yield Finding(
            "unflushed homes",
            "warn",
            f"execution {record.execution} of agent {record.agent} is not in the store yet",
            f"agentfuse recover --state {settings.state} (agentfuse-recover.timer does it), "
            f"or mount agent {record.agent} on this host",
        )
    if not left:
        yield Finding("unflushed homes", "ok", "none")


def _filesystem(path: Path) -> Iterator[Finding]:
    lies_in = covering(path / "homes", mounts())
    told = _lost_with(lies_in)
    if told:
        yield Finding("state", "warn", f"{path} is on {lies_in.fstype}: {told[0]}", told[1])


def _lost_with(lies_in: MountEntry) -> tuple[str, str] | None:
    """What is wrong with a filesystem for a state, and the fix."""
    if lies_in.fstype in _IN_MEMORY:
        return (
            "what is not in the store yet is lost when the machine ends",
            "choose a directory on a local disk with --state; in a container, a volume",
        )
    if lies_in.fstype in _IN_A_CONTAINER:
        return (
            "what is not in the store yet is lost with the container",
            "give the container a volume for it: --volume /var/lib/agentfuse:/var/lib/agentfuse",
        )
    if lies_in.fstype in _SHARED or (lies_in.fstype.startswith("fuse.") and lies_in.major == 0):
        return (
            "it is not a local disk: two hosts could use it at once, and its locks and databases need one",
            "choose a directory on a local disk of this host alone with --state",
        )
    return None


def _free_space(settings: Config) -> Finding:
    disk = os.statvfs(settings.state)
    free, wanted = disk.f_bavail * disk.f_frsize, sum(region.bytes_quota for region in settings.regions)
    found = f"{format_size(free)} free, a full home takes {format_size(wanted)}"
    fix = "free some space, or choose another --state"
    if free < _MIN_FREE_BYTES:
        return Finding("free space", "fail", found, fix)
    if disk.f_files and disk.f_favail < 1000:
        return Finding("free space", "fail", f"{found}, but only {disk.f_favail} inodes", fix)
    if free < wanted:
        return Finding("free space", "warn", f"{found}: writes may fail with ENOSPC before a quota does", fix)
    return Finding("free space", "ok", found)
