"""What must hold of a home at any quiet moment, whatever was done to it. Shared by all kinds of tests."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from mounts import PLAIN, REGIONS, Home

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


def truth_of(tree: Path, regions: tuple[str, ...] = REGIONS) -> dict[str, Truth]:
    """Usage of every region, recomputed from the backing tree alone."""
    truths = {name: Truth() for name in (*regions, LOOSE)}
    root = os.fsencode(tree)
    for name in os.listdir(root):
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
    """What a tree looks like: of every path its mode, link count, size, mtime and content."""
    root = os.fsencode(top)
    seen: dict[bytes, tuple[object, ...]] = {}
    for path in walk(root):
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


def check(home: Home, *, contents: bool = True) -> None:
    """Assert that books, mount and backing tree agree and no region is above its quota."""
    if PLAIN:
        return
    accounts = home.settled()["regions"]
    regions = tuple(name for name in accounts if name != LOOSE)
    for name, truth in truth_of(home.tree, regions).items():
        account = accounts[name]
        booked = (account["bytes_used"], account["files_used"])
        assert booked == (truth.bytes_used, truth.files_used), f"{name}: booked {booked}, on disk {truth}"
        assert account["bytes_used"] <= account["bytes_quota"], f"{name} is above its bytes"
        assert account["files_used"] <= account["files_quota"], f"{name} is above its files"
    found = differences(picture(home.path, contents=contents), picture(home.tree, contents=contents))
    assert not found, "mount and backing tree differ:\n" + "\n".join(found[:20])
