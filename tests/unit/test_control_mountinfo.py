"""What is mounted where, read from a table of our own and from the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentfuse.control.mountinfo import mounts, mounts_at, resolve_mountpoint
from agentfuse.errors import EnvironmentProblem, MountError

TABLE = rb"""22 28 0:21 / /proc rw,relatime shared:14 - proc proc rw
28 1 254:1 / / rw,relatime shared:1 master:2 propagate_from:3 - ext4 /dev/vda1 rw,discard
90 28 0:60 / /mnt/a\040b\134c\011d\012e rw,nosuid,nodev - fuse.agentfuse agentfuse rw,user_id=0
91 90 0:61 / /mnt/a\040b\134c\011d\012e rw - tmpfs none rw
92 28 0:62 / /mnt/%b rw - fuse.other /dev/x - rw
93 28 0:63 / /mnt/empty rw - tmpfs  rw
""".replace(b"%b", b"caf\xe9\r")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    return path


def test_escapes_and_names_that_are_no_utf8_are_read(table: Path) -> None:
    assert [str(entry.mountpoint) for entry in mounts(table)] == [
        "/proc",
        "/",
        "/mnt/a b\\c\td\ne",
        "/mnt/a b\\c\td\ne",
        "/mnt/caf\udce9\r",
        "/mnt/empty",
    ]


def test_stacked_mounts_come_in_their_order(table: Path) -> None:
    stack = mounts_at(Path("/mnt/a b\\c\td\ne"), table)
    assert [(entry.fstype, entry.minor, entry.is_ours) for entry in stack] == [
        ("fuse.agentfuse", 60, True),
        ("tmpfs", 61, False),
    ]
    assert mounts_at(Path("/mnt"), table) == []


def test_an_empty_source_is_empty(table: Path) -> None:
    assert mounts(table)[-1].source == ""


def test_the_kernels_own_table_is_understood() -> None:
    assert any(entry.fstype == "proc" for entry in mounts_at(Path("/proc")))


def test_without_proc_the_fix_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        mounts(tmp_path / "none")
    assert "mount -t proc" in caught.value.hint


def test_a_path_is_resolved_through_links_whether_it_exists_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "parent").symlink_to("real")
    (tmp_path / "link").symlink_to("parent/home")
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "real/home"
    assert resolve_mountpoint("parent/home") == home
    assert resolve_mountpoint("link") == home
    home.mkdir()
    assert resolve_mountpoint(f"{tmp_path}/./link/") == home
    monkeypatch.chdir(home)
    assert resolve_mountpoint(".") == home
    assert resolve_mountpoint("/") == Path("/")


def test_a_link_to_a_mount_is_followed_to_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert resolve_mountpoint(tmp_path / "link") == Path("/proc")


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MountError, match="loop"):
        resolve_mountpoint(tmp_path / "a")
