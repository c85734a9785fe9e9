"""Walking trees by descriptors: few of them, however deep; never through a symlink; nothing left behind."""

from __future__ import annotations

import gc
import os
import stat
import threading
from pathlib import Path

import pytest

from agentfuse.errors import BusyError, EnvironmentProblem
from agentfuse.home import walk
from agentfuse.home.walk import Cursor, clear_tree
from agentfuse.sync.workers import Workers


def descriptors() -> int:
    gc.collect()  # other tests may have left some
    return len(os.listdir("/proc/self/fd"))


def dig(root: Path, depth: int) -> bytes:
    """Make a chain of directories; returns its path."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    return b"/".join([b"d"] * depth)


def test_a_deep_walk_keeps_few_descriptors_and_comes_back(tmp_path: Path) -> None:
    bottom = dig(tmp_path, 3000)
    before = descriptors()
    with Cursor(tmp_path) as cursor:
        inode = os.fstat(cursor.enter(bottom)).st_ino
        assert descriptors() - before <= walk.MAX_OPEN + 2
        for depth in (2999, 10, 2000, 0, 3000):
            path = b"/".join([b"d"] * depth)
            fd = cursor.enter(path)
            assert os.listdir(fd) == (["d"] if depth < 3000 else [])
        assert os.fstat(fd).st_ino == inode
    assert descriptors() == before
    clear_tree(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_directory_moved_under_the_walk_is_noticed(tmp_path: Path) -> None:
    bottom = dig(tmp_path / ".", 200)
    with pytest.raises(BusyError), Cursor(tmp_path) as cursor:
        cursor.enter(bottom)
        os.mkdir(tmp_path / "elsewhere")
        os.rename(tmp_path / b"/".join([b"d"] * 100).decode(), tmp_path / "elsewhere" / "d")
        cursor.enter(b"")


def test_symlinks_are_not_entered(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "file link").symlink_to("/etc/passwd")
    with Cursor(tmp_path) as cursor:
        with pytest.raises(NotADirectoryError):
            cursor.enter(b"link")
        with pytest.raises(OSError, match="symbolic links"):
            cursor.open_file(b"file link")
        assert os.listdir(cursor.enter(b""))  # an error leaves it usable


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with Cursor(tmp_path) as cursor, pytest.raises(BusyError):
        cursor.open_file(b"pipe")


def test_clearing_does_not_follow_and_keeps_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/link").symlink_to(outside)
    os.link(outside / "precious", root / "a/hard")
    os.mkfifo(root / "a/b/pipe")
    (root / "a").chmod(0)
    clear_tree(root)
    assert list(root.iterdir()) == []
    assert (outside / "precious").read_text() == "x"


def test_clearing_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="No such file"):
        clear_tree(tmp_path / "missing")


def test_workers_keep_to_their_limit_and_follow_up_in_the_callers_thread() -> None:
    running, most, follow_ups = 0, 0, []
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return number

    with Workers(3) as workers:
        for number in range(50):
            workers.submit(
                lambda number=number: work(number), lambda n: follow_ups.append((n, threading.get_ident()))
            )
        workers.finish()
    assert sorted(number for number, _ in follow_ups) == list(range(50))
    assert {thread for _, thread in follow_ups} == {threading.get_ident()}
    assert most <= 3


def test_an_error_of_a_worker_stops_the_rest() -> None:
    started = []

    def work(number: int) -> None:
        started.append(number)
        if number == 5:
            raise ValueError("five")

    def submit_all() -> None:
        with Workers(2) as workers:
            for number in range(1000):
                workers.submit(lambda number=number: work(number), lambda _: None)
            workers.finish()

    with pytest.raises(ValueError, match="five"):
        submit_all()
    assert len(started) < 20


def test_a_mode_that_somebody_set_meanwhile_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o300)
    (tmp_path / "readable").mkdir(mode=0o555)
    monkeypatch.setattr(walk, "_is_owner", lambda found: True)
    with Cursor(tmp_path, only_looks=True) as cursor:
        cursor.enter(b"readable")
        assert stat.S_IMODE(os.stat(tmp_path / "readable").st_mode) == 0o555
        cursor.enter(b"locked")
        assert stat.S_IMODE(locked.stat().st_mode) == 0o700
        cursor.enter(b"")
        assert stat.S_IMODE(locked.stat().st_mode) == 0o300
        cursor.enter(b"locked")
        locked.chmod(0o111)
    assert stat.S_IMODE(locked.stat().st_mode) == 0o111
