"""Homes on disk: their records, their locks, their layout."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from agentfuse.errors import BusyError, EnvironmentProblem, IntegrityError
from agentfuse.home.tree import Home, HomeRecord, Weight, list_homes, remove_home, weigh, write_durably
from agentfuse.regions import DEFAULT_REGIONS


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path, "e1")
    home.path.mkdir(parents=True)
    return home


RECORD = HomeRecord(agent="a", execution="e1", store="file:///s", status="live", created_at=1.5)


def test_a_record_is_read_back_as_it_was_written(home: Home) -> None:
    assert home.record() is None
    home.write_record(RECORD)
    assert home.record() == RECORD
    assert [found.execution for found in list_homes(home.path.parent.parent)] == ["e1"]
    assert os.listdir(home.path) == ["home.json"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"agent": 3}', b"\xff\xfe"])
def test_a_damaged_record_is_an_error_that_says_what_to_do(home: Home, text: bytes) -> None:
    (home.path / "home.json").write_bytes(text)
    with pytest.raises(IntegrityError, match="keep a copy"):
        home.record()


def test_a_record_that_cannot_be_written_leaves_the_old_one(home: Home) -> None:
    home.write_record(RECORD)
    (
        home.path / f".home.json.{threading.get_native_id()}.tmp"
    ).mkdir()  # whoever runs the tests, root too, cannot write to that
    with pytest.raises(EnvironmentProblem, match="--state"):
        home.write_record(RECORD)
    assert home.record() == RECORD


def test_a_home_has_one_holder(home: Home) -> None:
    assert not home.is_locked()
    with home.locked():
        assert home.is_locked()
        with pytest.raises(BusyError, match="e1"), home.locked():
            raise AssertionError
    assert not home.is_locked()


def test_a_state_directory_that_is_not_there_has_no_homes(tmp_path: Path) -> None:
    assert list_homes(tmp_path / "nothing") == []


def test_the_layout_has_every_region_and_is_made_again_where_it_is_missing(home: Home) -> None:
    home.lay_out(DEFAULT_REGIONS, None)
    (home.tree / "shared" / "kept").write_text("x")
    (home.tree / "uploads").rmdir()
    home.lay_out(DEFAULT_REGIONS, None)
    assert sorted(os.listdir(home.tree)) == ["debug", "downloads", "shared", "uploads", "workspace"]
    assert stat.S_IMODE((home.tree / "debug").stat().st_mode) == 0o700
    assert (home.tree / "shared" / "kept").read_text() == "x"


def test_regions_belong_to_the_agent_and_debug_does_not(home: Home) -> None:
    me = os.geteuid(), os.getegid()
    agent = (me[0] + 1000, me[1] + 1000) if me[0] == 0 else me
    home.lay_out(DEFAULT_REGIONS, agent)
    owners = {name: (home.tree / name).stat().st_uid for name in ("shared", "workspace", "debug", ".")}
    assert owners == {"shared": agent[0], "workspace": agent[0], "debug": me[0], ".": agent[0]}


def test_weighing_counts_each_inode_once_and_sees_links_that_leave(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "one").write_bytes(b"x" * 10)
    os.link(tmp_path / "d" / "one", tmp_path / "d" / "two")
    os.symlink("/etc", tmp_path / "d" / "link")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        weight = weigh(fd, b"d", Weight())
        assert (weight.bytes_used, weight.files_used, weight.links_leave) == (10, 3, False)
        os.link(tmp_path / "d" / "one", tmp_path / "outside")
        assert weigh(fd, b"d", Weight()).links_leave
    finally:
        os.close(fd)


def test_weighing_gets_through_a_tree_deeper_than_there_are_descriptors(tmp_path: Path) -> None:
    fds = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(1500):
        os.mkdir("d", dir_fd=fds[-1])
        fds.append(os.open("d", os.O_RDONLY, dir_fd=fds[-1]))
        if len(fds) > 2:
            os.close(fds.pop(1))
    try:
        assert weigh(fds[0], b"d", Weight()).files_used == 1500
    finally:
        for fd in fds:
            os.close(fd)
        os.system(f"rm -rf '{tmp_path}/d'")


def test_the_lock_of_a_home_that_was_removed_locks_nobody_out(tmp_path: Path) -> None:
    home = Home(tmp_path, "e")
    home.path.mkdir(parents=True)
    with home.locked():
        shutil.rmtree(home.path)
        home.path.mkdir()
        with home.locked(), pytest.raises(BusyError), home.locked():
            pytest.fail("two at once")


def test_writers_of_one_file_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    writers = 4
    begin = threading.Barrier(writers)

    def write() -> None:
        begin.wait()
        for _ in range(50):
            write_durably(tmp_path / "file", b"whole")

    with ThreadPoolExecutor(writers) as executor:
        for done in [executor.submit(write) for _ in range(writers)]:
            done.result()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_file_is_whole_although_the_disk_takes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:2])))
    write_durably(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_home_can_be_made_while_others_remove_it(tmp_path: Path) -> None:
    """As an execution that is started again at the moment in which its ended home expires."""
    home = Home(tmp_path, "e1")
    ended = threading.Event()

    def remove_again_and_again() -> None:
        while not ended.is_set():
            with suppress(BusyError, EnvironmentProblem), home.locked():
                if (record := home.record()) is not None and record.status == "clean":
                    remove_home(home)

    with ThreadPoolExecutor(2) as executor:
        removing = [executor.submit(remove_again_and_again) for _ in range(2)]
        try:
            for _ in range(100):
                with home.locked(makes=True):
                    home.tree.mkdir(exist_ok=True)
                    home.write_record(RECORD)
                    (home.tree / "file").write_bytes(b"kept")
                    assert (home.tree / "file").read_bytes() == b"kept"
                    home.write_record(msgspec.structs.replace(RECORD, status="clean"))
        finally:
            ended.set()
        for each in removing:
            each.result()
