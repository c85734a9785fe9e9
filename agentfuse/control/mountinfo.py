"""What is mounted where, from /proc/self/mountinfo alone.

Never touches a mountpoint: one whose daemon is dead answers ENOTCONN, one whose daemon hangs does
not answer at all.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from agentfuse.errors import EnvironmentProblem, MountError

FSTYPE = "fuse.agentfuse"
_MOUNTINFO = Path("/proc/self/mountinfo")
_MAX_SYMLINKS = 40  # as the kernel does


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo. ``minor`` is, for a FUSE mount, its connection's number in /sys/fs/fuse.

    ``root`` is the directory of the filesystem that is mounted there. What is mounted in a mount reaches
    all of its ``shared`` group, and those whose ``master`` the group is; None: of no group.
    """

    mountpoint: Path
    fstype: str
    source: str
    options: str
    mount_id: int
    parent_id: int
    major: int
    minor: int
    root: str
    shared: int | None = None
    master: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether agentfuse made this mount, dead or alive."""
        return self.fstype == FSTYPE

    @property
    def device(self) -> tuple[int, int]:
        """The filesystem: the same wherever it is mounted."""
        return self.major, self.minor

    def path_of(self, path: Path) -> str:
        """Where a path at or below the mountpoint is in the filesystem itself."""
        return os.path.normpath(os.path.join(self.root, path.relative_to(self.mountpoint)))


def mounts(mountinfo: Path = _MOUNTINFO) -> list[MountEntry]:
    """All mounts of this process's namespace, those below before those stacked on top of them."""
    try:
        lines = mountinfo.read_bytes().split(b"\n")  # not splitlines: the kernel leaves \r in a name as it is
    except OSError as error:
        raise EnvironmentProblem(
            f"{mountinfo} cannot be read: {error.strerror}", hint="mount proc: mount -t proc proc /proc"
        ) from error
    return [_parse(line) for line in lines if line]


def mounts_at(path: Path, mountinfo: Path = _MOUNTINFO) -> list[MountEntry]:
    """The stack of mounts at a resolved path; the last one is what a process there sees."""
    return [entry for entry in mounts(mountinfo) if entry.mountpoint == path]


def covering(path: Path, entries: list[MountEntry]) -> MountEntry:
    """The mount that an absolute path lies in, by names alone. A mountpoint lies in what it is mounted on."""
    above = [entry for entry in entries if path != entry.mountpoint and path.is_relative_to(entry.mountpoint)]
    if not above:
        raise EnvironmentProblem(f"{path} is in no mount", hint="mount proc: mount -t proc proc /proc")
    return max(reversed(above), key=lambda entry: len(entry.mountpoint.parts))


def resolve_mountpoint(path: str | Path) -> Path:
    """The absolute path without symlinks, without asking a filesystem mounted at it.

    Only the parent is resolved; the last component is followed only when it is no mount.
    The path need not exist.
    """
    for _ in range(_MAX_SYMLINKS):
        parent, name = os.path.split(os.path.abspath(path))
        resolved = Path(os.path.realpath(parent)) / name
        if not name or mounts_at(resolved):
            return resolved
        try:
            target = os.readlink(resolved)
        except OSError:  # not a symlink, or nothing there: whoever uses the path will say so better
            return resolved
        path = resolved.parent / target
    raise MountError(f"{path} is a loop of symlinks", hint="give the directory's own path")


def _parse(line: bytes) -> MountEntry:
    # proc_pid_mountinfo(5): "36 35 98:0 /root /mountpoint options optional-fields - fstype source options"
    before, _, after = line.partition(b" - ")
    mount_id, parent_id, device, root, mountpoint, options, *groups = before.split(b" ")
    group = dict(each.split(b":") for each in groups if b":" in each)
    fstype, source = [*after.split(b" "), b""][:2]
    major, _, minor = device.partition(b":")
    return MountEntry(
        mountpoint=Path(_unescape(mountpoint)),
        fstype=_unescape(fstype),
        source=_unescape(source),
        options=_unescape(options),
        mount_id=int(mount_id),
        parent_id=int(parent_id),
        major=int(major),
        minor=int(minor),
        root=_unescape(root),
        shared=int(group[b"shared"]) if b"shared" in group else None,
        master=int(group[b"master"]) if b"master" in group else None,
    )


def _unescape(field: bytes) -> str:
    r"""The kernel writes space, tab, newline, backslash and # as ``\`` and three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))
