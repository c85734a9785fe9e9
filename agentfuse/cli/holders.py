"""Which processes keep a mount busy, found in /proc without touching the mount."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentfuse.control.mountinfo import MountEntry, mounts, mounts_at
from agentfuse.errors import EnvironmentProblem


@dataclass(frozen=True, slots=True)
class Holder:
    """A process and how it holds the mount: ``working directory``, ``root``, ``program``, ``open file``."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.how})"


def holders_of(mountpoint: Path) -> list[Holder]:
    """The processes of this host that hold the mount on top at a resolved path, by pid.

    Mount namespaces are followed: the same mount is known by its device. What belongs to other users
    is seen only by root.
    """
    stack = mounts_at(mountpoint)
    if not stack:
        return []
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        process = Path("/proc", str(pid))
        try:
            how = _how(process, stack[-1])
            name = (process / "comm").read_text(errors="backslashreplace").strip() if how else ""
        except (OSError, EnvironmentProblem):  # it ended meanwhile, or is not ours to look at
            continue
        if how:
            found.append(Holder(pid, name, how))
    return found


def _how(process: Path, mount: MountEntry) -> str | None:
    there = [
        entry
        for entry in mounts(process / "mountinfo")
        if (entry.major, entry.minor) == (mount.major, mount.minor)
    ]
    # In another namespace it may be mounted elsewhere. A process whose root it is calls it "/", which says
    # nothing of paths as we see them.
    prefixes = tuple({str(entry.mountpoint) for entry in there} - {"/"} | {str(mount.mountpoint)})
    for link, how in (("cwd", "working directory"), ("root", "root"), ("exe", "program")):
        if _is_below(os.readlink(process / link) if (process / "exe").is_symlink() else "", prefixes):
            return how
    if set(_mount_ids(process)) & {entry.mount_id for entry in there}:
        return "open file"
    device = f"{mount.major:02x}:{mount.minor:02x}"
    maps = (process / "maps").read_text(errors="surrogateescape")
    return "mapped file" if re.search(rf"^\S+ \S+ \S+ {device} ", maps, re.MULTILINE) else None


def _mount_ids(process: Path) -> Iterator[int]:
    """The mount of each open file. fdinfo tells it; stat of /proc/PID/fd/N would ask the filesystem."""
    for name in os.listdir(process / "fdinfo"):
        try:
            info = (process / "fdinfo" / name).read_text()
        except OSError:  # closed meanwhile
            continue
        if match := re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE):
            yield int(match[1])


def _is_below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)
