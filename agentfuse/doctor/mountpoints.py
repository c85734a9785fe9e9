"""One mountpoint, before a home is mounted there or while it is; and all mounts of this host.

Asks mountinfo and processes that may be left behind, never a mount itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import MountEntry, covering, mounts, mounts_at
from agentfuse.control.registry import PublishedMount, Registry
from agentfuse.doctor import Finding
from agentfuse.helped import HelpedMounter
from agentfuse.mountpoint import require_directory

_SYS_OPEN_TREE = 428
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def dead(registry: Registry) -> Iterator[Finding]:
    """Mounts that nobody answers for, here or in the registry."""
    entries = registry.list()
    gone = {Path(entry.record.mountpoint) for entry in entries if not entry.alive}
    ours = {entry.mountpoint for entry in mounts() if entry.is_ours}
    for mountpoint in sorted(gone | ours):
        state = liveness(mountpoint) if mountpoint in ours else "dead"
        if state != "live":
            pids = [entry.record.pid for entry in entries if Path(entry.record.mountpoint) == mountpoint]
            first = f"kill -9 {pids[0]}, then " if state == "hung" and pids else ""
            yield Finding(
                "dead mounts",
                "warn",
                f"{mountpoint}: its daemon is {state}",
                f"{first}agentfuse umount {mountpoint}",
            )
    if not gone and not ours:
        yield Finding("dead mounts", "ok", "none")


def hidden(registry: Registry) -> Iterator[Finding]:
    """Daemons that live and serve a mount that is not seen here."""
    for entry in registry.list():
        mountpoint = Path(entry.record.mountpoint)
        if entry.alive and not any(each.is_ours for each in mounts_at(mountpoint)):
            yield _hidden(entry, mountpoint)


def stacked() -> Iterator[Finding]:
    """Homes that are mounted on homes: each kill and mount of a careless supervisor adds one."""
    ours = [entry.mountpoint for entry in mounts() if entry.is_ours]
    for mountpoint in sorted(set(ours)):
        count = ours.count(mountpoint)
        if count > 1:
            yield Finding(
                "stacked mounts",
                "warn",
                f"{count} homes are mounted on each other at {mountpoint}: an unmount shows an older one",
                f"while umount -l {mountpoint}; do :; done; then mount it again",
            )


def propagation(mountpoint: Path) -> Iterator[Finding]:
    """Whether a mount there, made later or again, reaches the sandboxes that run already."""
    parent = mountpoint.parent
    above = covering(mountpoint, mounts())
    ours = [entry for entry in mounts_at(mountpoint) if entry.is_ours]
    if above.shared is not None:
        yield Finding("propagation", "ok", f"what is mounted in {parent} reaches the sandboxes that have it")
    elif above.master is not None:
        yield Finding("propagation", "ok", f"what the host mounts in {parent} is seen here")
    elif _came_in(above):
        yield Finding(
            "propagation",
            "warn",
            f"{parent} came in here without propagation: a home that is mounted later, or again after "
            "a crash, is not seen",
            f"give the container the directory above the mountpoint with rslave: "
            f"--volume DIR:{parent}:rslave (Kubernetes: mountPropagation: HostToContainer)",
        )
    else:
        yield Finding(
            "propagation",
            "warn",
            f"{parent} is not a shared mount: a home that is mounted later, or again after a crash, is not "
            "seen in sandboxes that run already",
            f"before they start: mount --bind {parent} {parent} && mount --make-shared {parent}"
            + (f" (after agentfuse umount {mountpoint})" if ours else ""),
        )


def below(mountpoint: Path) -> Iterator[Finding]:
    """What is under the mount: a directory that is empty, and that nobody can write to without the mount."""
    found = mounts_at(mountpoint)
    looked = _look_below(mountpoint) if found else (require_directory(mountpoint), list[str]())
    if looked is None:
        return  # only root can look below a mount
    st, names = looked
    if names:
        yield Finding(
            "below the mount",
            "warn",
            f"{len(names)} entries lie in the directory {mountpoint} under the mount, written while nothing "
            f"was mounted: {', '.join(sorted(names)[:3])}",
            f"agentfuse umount {mountpoint}, move them away, and mount again",
        )
    mode, closer = stat.S_IMODE(st.st_mode), f"chmod 0555 {mountpoint}"
    if os.geteuid() == 0 and st.st_uid != 0:
        closer = f"chown 0:0 {mountpoint} && {closer}"
    if mode & 0o222 or (os.geteuid() == 0 and st.st_uid != 0):
        yield Finding(
            "below the mount",
            "warn",
            f"the directory {mountpoint} can be written to while nothing is mounted (mode {mode:04o}, "
            f"uid {st.st_uid}): what lands there is in no home",
            f"agentfuse umount {mountpoint} and mount again, which closes it" if found else closer,
        )
    elif not names:
        yield Finding("below the mount", "ok", f"{mountpoint} is empty and closed while nothing is mounted")


def occupied(mountpoint: Path) -> Iterator[Finding]:
    """A mount of another kind at the mountpoint."""
    found = mounts_at(mountpoint)
    if found and not found[-1].is_ours:
        fstype = found[-1].fstype
        hides = "hides the home" if any(entry.is_ours for entry in found) else "is in the way"
        yield Finding(
            "mountpoint", "fail", f"a mount of type {fstype} at {mountpoint} {hides}", f"umount {mountpoint}"
        )


def through_helper(helper: Path, mountpoint: Path, registry: Registry) -> Iterator[Finding]:
    """Have the helper really mount there, where nothing is mounted, and take it away again."""
    if mounts_at(mountpoint):
        return
    lock = registry.lock(mountpoint)
    try:
        mounter = HelpedMounter(helper, mountpoint)
        require_directory(mountpoint)
        with mounter.mounting(noexec=False) as (device, _):
            os.close(int(device.rpartition("/")[2]))
            with contextlib.suppress(Exception):  # gone with its connection else
                mounter.detach(lazy=True)
    finally:
        lock.release()
    yield Finding("mounting", "ok", f"{helper} mounted at {mountpoint} and took it away again")


def _look_below(mountpoint: Path) -> tuple[os.stat_result, list[str]] | None:
    """The directory under a mount and its entries, by a copy of the mount above it that has none in it."""
    above = covering(mountpoint, mounts())
    tree = _libc.syscall(
        _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(above.mountpoint), _OPEN_TREE_CLONE | os.O_CLOEXEC
    )
    if tree < 0:
        return None
    try:
        relative = os.fspath(mountpoint.relative_to(above.mountpoint))
        directory = os.open(relative, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=tree)
        try:
            return os.fstat(directory), os.listdir(directory)
        finally:
            os.close(directory)
    finally:
        os.close(tree)


def _hidden(entry: PublishedMount, mountpoint: Path) -> Finding:
    unit = _unit_of(entry.record.pid)
    return Finding(
        "hidden mounts",
        "fail",
        f"{mountpoint} is mounted in a mount namespace of its daemon's own (pid {entry.record.pid}"
        + (f", {unit}): " if unit else "): ")
        + "nobody else sees the home",
        f"agentfuse doctor --unit {unit} names the option"
        if unit
        else "start it without a mount namespace of its own (unshare, a container without rshared)",
    )


def _unit_of(pid: int) -> str:
    """The systemd unit that a process belongs to; empty if none."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    names = [part for line in groups for part in line.split("/") if part.endswith(".service")]
    return names[-1] if names else ""


def _came_in(above: MountEntry) -> bool:
    """Whether a mount was given to the container or sandbox that this is, as far as those tell."""
    if str(above.mountpoint) in (os.sep, above.root):
        return False
    marks = ("/.dockerenv", "/run/.containerenv", "/run/host/container-manager")
    root = mounts_at(Path("/"))
    made_for_it = bool(root) and root[-1].fstype in {"tmpfs", "overlay"}
    return made_for_it or "container" in os.environ or any(os.path.exists(mark) for mark in marks)
