"""How many requests ordinary operations cost: deterministic, counted by the daemon itself.

RELEASE, RELEASEDIR and FORGET are not waited for by anybody, so they are not counted here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Home

pytestmark = pytest.mark.mount

ASYNCHRONOUS = {"release", "releasedir", "forget"}


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Iterator[Home]:
    mounted = make_home().start()
    yield mounted
    mounted.umount()


def waited_for(counted: dict[str, int]) -> dict[str, int]:
    """The requests that the program had to wait for."""
    return {name: count for name, count in counted.items() if name not in ASYNCHRONOUS}


def test_stat_of_a_known_name_asks_nothing(home: Home, work: Path) -> None:
    (work / "known").write_bytes(b"x")
    (work / "known").stat()
    with home.counting() as counted:
        for _ in range(100):
            (work / "known").stat()
    assert waited_for(counted) == {}


def test_stat_of_a_known_missing_name_asks_nothing(home: Home, work: Path) -> None:
    assert not (work / "missing").exists()
    with home.counting() as counted:
        for _ in range(100):
            assert not (work / "missing").exists()
    assert waited_for(counted) == {}


def test_attributes_stay_known_after_the_changes_that_tell_them(home: Home, work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    path.chmod(0o600)
    with home.counting() as counted:
        path.stat()
    assert sum(waited_for(counted).values()) <= 1


def test_open_read_close_of_cached_pages_asks_at_most_2(home: Home, work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 1000)
    path.read_bytes()
    with home.counting() as counted:
        handle = os.open(path, os.O_RDONLY)
        assert len(os.read(handle, 4096)) == 1000
        os.close(handle)
    assert sum(waited_for(counted).values()) <= 2, counted
    assert "read" not in counted


def test_create_write_close_asks_at_most_5(home: Home, work: Path) -> None:
    with home.counting() as counted:
        handle = os.open(work / "new", os.O_CREAT | os.O_WRONLY)
        os.write(handle, b"x" * 1024)
        os.close(handle)
    assert sum(counted.values()) <= 5, counted
    assert "getxattr" not in counted


def test_a_write_of_1_mib_is_one_request(home: Home, work: Path) -> None:
    handle = os.open(work / "big", os.O_CREAT | os.O_WRONLY)
    with home.counting() as counted:
        assert os.write(handle, bytes(1 << 20)) == 1 << 20
    os.close(handle)
    assert counted == {"write": 1}


def test_appends_ask_once_each_and_never_for_capabilities(home: Home, work: Path) -> None:
    handle = os.open(work / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(handle, b"first")
    with home.counting() as counted:
        for _ in range(50):
            os.write(handle, b"x" * 100)
    os.close(handle)
    assert 50 <= counted["write"] <= 51  # the kernel splits the one that crosses a page
    assert "getxattr" not in counted
    assert sum(waited_for(counted).values()) <= 52, counted


def test_1000_entries_are_listed_in_at_most_6_requests_and_then_known(home: Home, work: Path) -> None:
    for number in range(1000):
        (work / f"entry-{number:04}").touch()
    forget_everything()
    (work).stat()
    with home.counting() as counted:
        names = os.listdir(work)
    assert len(names) == 1000
    assert sum(waited_for(counted).values()) <= 6, counted
    with home.counting() as counted:
        for name in names:
            os.stat(work / name)
    assert waited_for(counted) == {}


def test_a_second_listing_of_an_unchanged_directory_asks_at_most_6(home: Home, work: Path) -> None:
    for number in range(1000):
        (work / f"entry-{number:04}").touch()
    os.listdir(work)
    with home.counting() as counted:
        os.listdir(work)
    assert sum(waited_for(counted).values()) <= 6, counted


def test_git_status_the_second_time_asks_nothing_per_file(home: Home, work: Path) -> None:
    tree = work / "repository"
    for directory in range(50):
        (tree / f"d{directory:02}").mkdir(parents=True)
        for number in range(100):
            (tree / f"d{directory:02}" / f"f{number:02}").write_text(f"{directory} {number}\n")

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments],
            capture_output=True, text=True, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"},
        ).stdout  # fmt: skip

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    assert git("status", "--porcelain") == ""
    with home.counting() as counted:
        assert git("status", "--porcelain") == ""
    assert counted.get("getattr", 0) <= 60, counted  # directories and git's own files, not the 5,000
    assert counted.get("lookup", 0) <= 60, counted
    assert counted.get("open", 0) + counted.get("read", 0) <= 60, counted


def test_writing_does_not_make_the_kernel_forget_the_file_s_own_pages(home: Home, work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 8192)
    path.read_bytes()
    with path.open("r+b") as handle:
        handle.write(b"y")
    with home.counting() as counted:
        assert path.read_bytes()[:2] == b"yx"
    assert counted.get("read", 0) <= 1, counted


def forget_everything() -> None:
    """Make the kernel drop names, attributes and pages."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
