"""What must hold of a home at any quiet moment, whatever was done to it. Shared by all kinds of tests."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mounts import PLAIN, REGIONS, Home

from agentfuse.objectstore import ObjectStore
from agentfuse.progress import Silent
from agentfuse.regions import PLATFORM
from agentfuse.snapshots.history import History
from agentfuse.snapshots.rebase import by_path, is_changed
from agentfuse.sync.fsck import Checker

LOOSE = "home"


@dataclass
class Truth:
    """What a region's tree on disk really holds."""

    bytes_used: int = 0
    files_used: int = 0
    inodes: set[tuple[int, int]] = field(default_factory=set)

    def add(self, st: os.stat_result) -> None:
        """Count an inode, once."""
        if (st.st_dev, st.st_ino) in self.inodes:
            return
        self.inodes.add((st.st_dev, st.st_ino))
        self.files_used += 1
        self.bytes_used += st.st_size if stat.S_ISREG(st.st_mode) else 0


_OWN = os.fsencode(PLATFORM.name)
"""The platform's own directory in a home."""


def truth_of(tree: Path, regions: tuple[str, ...] = REGIONS) -> dict[str, Truth]:
    """Usage of every region, recomputed from the backing tree alone."""
    truths = {name: Truth() for name in (*regions, LOOSE)}
    root = os.fsencode(tree)
    for name in os.listdir(root):
        if name == _OWN:
            continue  # no quota counts it
        region = os.fsdecode(name) if os.fsdecode(name) in regions else LOOSE
        top = os.path.join(root, name)
        if region == LOOSE:
            truths[LOOSE].add(os.lstat(top))
        for path in walk(top):
            truths[region].add(os.lstat(path))
    return truths


def walk(top: bytes) -> list[bytes]:
    """Every path below ``top``, without following symlinks, in order."""
    found: list[bytes] = []
    if not os.path.islink(top) and os.path.isdir(top):
        for name in sorted(os.listdir(top)):
            path = os.path.join(top, name)
            found += [path, *walk(path)]
    return found


def picture(top: Path, *, contents: bool = True) -> dict[bytes, tuple[object, ...]]:
    """What a tree looks like: of every path its mode, link count, size, mtime and content.

    Without the platform's own directory, where the daemon writes at any time.
    """
    root = os.fsencode(top)
    own = os.path.join(root, _OWN)
    seen: dict[bytes, tuple[object, ...]] = {}
    for path in walk(root):
        if path == own or path.startswith(own + b"/"):
            continue
        st = os.lstat(path)
        content = b""
        if stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(st.st_mode) and contents:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        nlink = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
        size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
        owner = (st.st_uid, st.st_gid)
        seen[path[len(root) + 1 :]] = (st.st_mode, nlink, size, st.st_mtime_ns, owner, content)
    return seen


def differences(ours: dict[bytes, tuple[object, ...]], theirs: dict[bytes, tuple[object, ...]]) -> list[str]:
    """What two pictures disagree in, a line each."""
    lines = []
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            lines.append(f"{path!r}: {ours.get(path)} but {theirs.get(path)}")
    return lines


def wrong_books(accounts: Mapping[str, Mapping[str, int]], tree: Path) -> list[str]:
    """What the books of a home's regions say that its tree does not, a line each."""
    lines = []
    for name, truth in truth_of(tree, tuple(name for name in accounts if name != LOOSE)).items():
        account = accounts[name]
        booked = (account["bytes_used"], account["files_used"])
        if booked != (truth.bytes_used, truth.files_used):
            lines.append(f"{name}: booked {booked}, on disk {truth.bytes_used, truth.files_used}")
        lines += [
            f"{name} is above its {what}"
            for what in ("bytes", "files")
            if account[f"{what}_used"] > account[f"{what}_quota"]
        ]
    return lines


def wrong_history(store: ObjectStore, agent: str, region: str = "shared") -> list[str]:
    """What is wrong with the snapshots of a region, of which none was collected, a line each.

    Every object and every hash is looked at; numbers have no gaps; no commit is there twice.
    """
    history = History(store, agent, region)
    numbers = list(history.numbers())
    if not numbers:
        return []
    lines = [] if numbers == list(range(1, len(numbers) + 1)) else [f"numbers with gaps: {numbers}"]
    report = Checker(store, agent, Silent()).run(all_snapshots=True)
    lines += [f"snapshot {loss.snapshot}: {loss.path!r}: {loss.problem}" for loss in report.lost]
    before = None
    for number in numbers:
        snapshot = history.read(number)
        if snapshot.parent != number - 1:
            lines.append(f"snapshot {number} is upon {snapshot.parent}")
        if before is not None and not is_changed(by_path(before.entries), by_path(snapshot.entries)):
            lines.append(f"snapshot {number} holds nothing new")
        before = snapshot
    return lines


def check(home: Home, *, contents: bool = True) -> None:
    """Assert that books, mount and backing tree agree and no region is above its quota."""
    if PLAIN:
        return
    wrong = wrong_books(home.settled()["regions"], home.tree)
    assert not wrong, "\n".join(wrong)
    found = differences(picture(home.path, contents=contents), picture(home.tree, contents=contents))
    assert not found, "mount and backing tree differ:\n" + "\n".join(found[:20])
