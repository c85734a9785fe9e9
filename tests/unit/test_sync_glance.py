"""A glance at a region that others change meanwhile: what it takes for unchanged, what does not stop it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from memories import SILENT, grow_nasty_tree

from agentfuse.errors import EnvironmentProblem
from agentfuse.snapshots.changes import changes
from agentfuse.snapshots.entries import Entry
from agentfuse.sync import glance as module
from agentfuse.sync.glance import glance
from agentfuse.sync.reports import Meter
from agentfuse.sync.scan import scan

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "shared"
    root.mkdir()
    return root


def listing(root: Path) -> dict[bytes, Entry]:
    return scan(root, {}, {}, Meter(SILENT, "scan")).entries


def differs(before: dict[bytes, Entry], after: dict[bytes, Entry]) -> dict[bytes, str]:
    return {change.path: change.kind for change in changes(before, after)}


class Moving(dict[bytes, Entry]):
    """What is known, and what others do at the moment when a path's turn has come."""

    def __init__(self, known: dict[bytes, Entry], **at: Callable[[], object]) -> None:
        super().__init__(known)
        self.at = {os.fsencode(path): action for path, action in at.items()}

    def get(self, path: bytes, default: Entry | None = None) -> Entry | None:  # type: ignore[override]
        if action := self.at.pop(path, None):
            action()
        return super().get(path, default)


def test_it_is_what_a_scan_finds(root: Path) -> None:
    grow_nasty_tree(root)
    known = listing(root)
    for start in ({}, known):
        found = glance(root, start)
        assert list(found) == list(known)
        assert differs(found, known) == {}


def test_only_files_of_another_size_time_or_mode_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("same", "size", "time", "mode", "silent", "new"):
        (root / name).write_bytes(b"before")
        os.utime(root / name, ns=(0, 1_700_000_000_123_456_789))
    known = listing(root)
    del known[b"new"]
    (root / "size").write_bytes(b"longer than before")
    os.utime(root / "time")
    (root / "mode").chmod(0o600)
    (root / "silent").write_bytes(b"BEFORE")
    os.utime(root / "silent", ns=(0, 1_700_000_000_123_456_789))
    read = []
    hash_file = module.hash_file
    monkeypatch.setattr(module, "hash_file", lambda file: (read.append(1), hash_file(file))[1])
    found = glance(root, known)
    assert len(read) == 4
    assert differs(known, found) == {
        b"size": "changed",
        b"time": "changed",
        b"mode": "changed",
        b"new": "added",
    }
    assert found[b"size"].sha256 == hashlib.sha256(b"longer than before").hexdigest()
    assert found[b"mode"].sha256 == known[b"mode"].sha256


def test_what_vanishes_is_left_out(root: Path) -> None:
    for name in ("a", "b", "d/e/f", "d/g", "h", "i"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    known = listing(root)
    moving = Moving(
        known,
        b=(root / "b").unlink,
        **{"d/e": lambda: shutil.rmtree(root / "d")},
        i=(root / "i").unlink,
    )
    assert set(glance(root, moving)) == {b"", b"a", b"d", b"h"}


def test_what_becomes_something_else_is_what_it_became_or_left_out(root: Path) -> None:
    names = ("to dir", "to fifo", "to file", "to link")
    for name in names:
        (root / name).write_bytes(b"x")
    (root / "to file").unlink()
    (root / "to file").mkdir()
    (root / "to file" / "inside").write_bytes(b"x")

    def becomes(name: str, make: Callable[[Path], object]) -> Callable[[], None]:
        def change() -> None:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            make(path)

        return change

    makes: dict[str, Callable[[Path], object]] = {
        "to dir": Path.mkdir,
        "to fifo": os.mkfifo,
        "to file": lambda path: path.write_bytes(b"y"),
        "to link": lambda path: path.symlink_to("/etc/passwd"),
    }
    found = glance(root, Moving({}, **{name: becomes(name, make) for name, make in makes.items()}))
    assert {path: entry.type for path, entry in found.items()} == {
        b"": "dir",
        b"to dir": "dir",
        b"to fifo": "fifo",
        b"to file": "file",
        b"to link": "symlink",
    }


def test_a_file_that_becomes_a_link_under_its_reader_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").write_bytes(b"x")
    opened = module.Cursor.open_file

    def swap(cursor: object, path: bytes) -> int:
        (root / "a").unlink()
        (root / "a").symlink_to("/etc/passwd")
        return opened(cursor, path)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Cursor, "open_file", swap)
    assert glance(root, {})[b"a"].type == "symlink"


def test_a_move_of_a_directory_does_not_hide_what_is_elsewhere(root: Path) -> None:
    deep = root / "/".join(["d"] * 100)
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"x")
    (root / "d" / "y").write_bytes(b"x")
    (root / "z").write_bytes(b"x")
    at = str(deep.relative_to(root) / "bottom")
    found = glance(root, Moving({}, **{at: lambda: (root / "d/d/d").rename(root / "moved")}))
    assert {b"d", b"d/d", b"d/y", b"z"} <= found.keys()


def test_trees_far_deeper_than_a_path_may_be_are_listed(root: Path) -> None:
    grow_nasty_tree(root)
    before = len(os.listdir("/proc/self/fd"))
    assert max(path.count(b"/") for path in glance(root, {})) > 30
    assert len(os.listdir("/proc/self/fd")) <= before  # earlier leftovers may be collected meanwhile


@as_root
def test_nobody_gets_in_where_modes_keep_them_out_and_no_mode_is_changed(scratch: Path) -> None:
    root = scratch / "shared"
    root.mkdir()
    for name in ("locked", "open"):
        (root / name).write_bytes(name.encode())
    known = listing(root)
    (root / "locked").chmod(0)
    for path in (root, *root.iterdir()):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        before = (root / "locked").stat().st_ctime_ns
        found = glance(root, known)
        assert differs(known, found) == {b"locked": "changed"}
        assert (found[b"locked"].sha256, found[b"locked"].size) == ("", 6)
        assert (root / "locked").stat().st_ctime_ns == before
        (root / "dir").mkdir()
        (root / "dir").chmod(0)
        with pytest.raises(EnvironmentProblem, match=r"dir.*Permission denied"):
            glance(root, known)
        assert (root / "dir").stat().st_mode & 0o777 == 0
    finally:
        os.seteuid(0)


def test_a_mount_that_fails_is_an_error_and_not_an_empty_listing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").write_bytes(b"x")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with pytest.raises(EnvironmentProblem, match="No such file"):
        glance(root, Moving({}, a=lambda: shutil.rmtree(root)))
    root.mkdir()
    (root / "a").write_bytes(b"x")
    monkeypatch.setattr(module, "hash_file", fail)
    with pytest.raises(EnvironmentProblem, match="not connected"):
        glance(root, {})
