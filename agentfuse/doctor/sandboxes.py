"""Sandboxes and containers that run on this host, seen from it: what each has of the homes.

By the mount tables of their processes. One that was given the mountpoint itself keeps the mount of then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import MountEntry, covering, mounts
from agentfuse.doctor import Finding
from agentfuse.errors import EnvironmentProblem

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Another mount namespace with a root of its own, by the first of its processes."""

    pid: int
    name: str
    entries: list[MountEntry]

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


@dataclass(frozen=True, slots=True)
class Place:
    """A mountpoint of this host: the mount that it lies in, and where its directory is in that filesystem."""

    mountpoint: Path
    above: MountEntry
    parent: str
    directory: str
    mounted: MountEntry | None

    @classmethod
    def of(cls, mountpoint: Path, entries: list[MountEntry]) -> Place:
        """The place at a resolved path."""
        above = covering(mountpoint, entries)
        ours = [entry for entry in entries if entry.mountpoint == mountpoint and entry.is_ours]
        directory = above.path_of(mountpoint)
        return cls(mountpoint, above, os.path.dirname(directory), directory, ours[-1] if ours else None)


def sandboxes() -> Iterator[Sandbox]:
    """Those that this user may look into."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    own = _root_of(mounts())
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            entries = mounts(Path(f"/proc/{pid}/mountinfo"))
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, EnvironmentProblem):  # it ended, or is another user's
            continue
        if _root_of(entries) != own:  # else a copy of this namespace, as services have it
            yield Sandbox(pid, name, entries)


def sandboxes_of(mountpoints: list[Path], state: Path) -> Iterator[Finding]:
    """What is wrong with what sandboxes have of these homes (resolved mountpoints), and of the state."""
    entries = mounts()
    places = [Place.of(mountpoint, entries) for mountpoint in mountpoints]
    here = {entry.device for entry in entries if entry.is_ours}
    tree = covering(state / "homes", entries).path_of(state / "homes")
    device = covering(state / "homes", entries).device
    found = False
    for sandbox in sandboxes():
        findings = [
            *(finding for place in places for finding in _of_place(sandbox, place)),
            *_dead_in(sandbox, here),
            *(
                Finding(
                    "sandboxes",
                    "fail",
                    f"{sandbox} has {entry.root} of the state at {entry.mountpoint}: what it does there "
                    "is not counted, told or kept",
                    "end it, and give it the directory above the mountpoint instead",
                )
                for entry in sandbox.entries
                if entry.device == device and entry.root.startswith(f"{tree}/")
            ),
        ]
        found = found or bool(findings)
        yield from findings
    if not found:
        yield Finding("sandboxes", "ok", "each has the homes that it was given")


def _of_place(sandbox: Sandbox, place: Place) -> Iterator[Finding]:
    given = [
        entry
        for entry in sandbox.entries
        if entry.device == place.above.device
        and entry.mountpoint != _ROOT
        and _is_in(place.parent, entry.root)
    ]
    shown = place.mounted and next(
        (entry for entry in sandbox.entries if entry.device == place.mounted.device), None
    )
    direct = any(
        entry.device == place.above.device and entry.root == place.directory for entry in sandbox.entries
    )
    fix = _fix(place)
    if any(_follows(entry, place.above) for entry in given):
        if place.mounted and not shown:
            yield Finding(
                "sandboxes",
                "warn",
                f"{sandbox} has {place.mountpoint.parent}, but not the home that is mounted in it",
                f"end it, and give it the directory with what is mounted in it (rbind, rslave): {fix}",
            )
    elif given:
        yield Finding(
            "sandboxes",
            "warn",
            f"{sandbox} has {place.mountpoint.parent} without propagation: a home that is mounted later, or "
            "again after a crash, is not seen in it",
            f"end it, and start it again with {fix}",
        )
    elif shown or direct:
        yield Finding(
            "sandboxes",
            "warn",
            f"{sandbox} was given {place.mountpoint} itself: it keeps what was there when it began, also "
            "after a crash of the daemon",
            f"end it, and give it the directory above instead: {fix}",
        )


def _fix(place: Place) -> str:
    parent = place.mountpoint.parent
    how = f"--volume {parent}:/home:rslave, or --bind {parent} /home of bwrap"
    if place.above.shared is None:
        how = (
            f"{parent} as a shared mount (mount --bind {parent} {parent} && mount --make-shared {parent}) "
            f"and {how}"
        )
    return how


def _dead_in(sandbox: Sandbox, here: set[tuple[int, int]]) -> Iterator[Finding]:
    for entry in sandbox.entries:
        if not entry.is_ours or entry.device in here:
            continue
        inside = Path(f"/proc/{sandbox.pid}/root{entry.mountpoint}")
        if liveness(inside) == "dead":
            yield Finding(
                "sandboxes",
                "warn",
                f"{sandbox} keeps a dead mount at {entry.mountpoint}",
                "end it, and give it the directory above the mountpoint with rslave, not the mountpoint",
            )


def _follows(entry: MountEntry, above: MountEntry) -> bool:
    """Whether what is mounted in ``above`` is mounted in ``entry``, too."""
    if above.shared is None:
        return False
    return above.shared in (entry.shared, entry.master) or entry.master is not None


def _is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _root_of(entries: list[MountEntry]) -> tuple[tuple[int, int], str] | None:
    root = [entry for entry in entries if entry.mountpoint == _ROOT]
    return (root[-1].device, root[-1].root) if root else None
