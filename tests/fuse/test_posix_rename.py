"""rename(2) and renameat2(2) in all their forms."""

import errno
import os
from pathlib import Path

import pytest
from mounts import Home
from syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, refused, renameat2


def test_rename_over_open_file_keeps_old_bytes_for_the_reader(work: Path) -> None:
    (work / "old").write_bytes(b"old")
    (work / "new").write_bytes(b"new")
    with (work / "old").open("rb") as reader:
        os.rename(work / "new", work / "old")
        assert reader.read() == b"old"
        assert os.fstat(reader.fileno()).st_nlink == 0
    assert (work / "old").read_bytes() == b"new"
    assert os.listdir(work) == ["old"]


def test_rename_of_an_open_file_keeps_the_handle_writing_to_it(work: Path) -> None:
    with (work / "a").open("wb") as writer:
        writer.write(b"1")
        writer.flush()
        os.rename(work / "a", work / "b")
        writer.write(b"2")
    assert (work / "b").read_bytes() == b"12"


def test_noreplace_refuses_an_existing_target(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    with refused(errno.EEXIST):
        renameat2(work / "a", work / "b", RENAME_NOREPLACE)
    assert ((work / "a").read_bytes(), (work / "b").read_bytes()) == (b"a", b"b")


def test_noreplace_moves_to_a_free_name(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    renameat2(work / "a", work / "b", RENAME_NOREPLACE)
    assert os.listdir(work) == ["b"]


def test_exchange_swaps_two_files(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    renameat2(work / "a", work / "b", RENAME_EXCHANGE)
    assert ((work / "a").read_bytes(), (work / "b").read_bytes()) == (b"b", b"a")


def test_exchange_swaps_a_file_and_a_full_directory(work: Path) -> None:
    (work / "file").write_bytes(b"x")
    (work / "directory" / "deep").mkdir(parents=True)
    (work / "directory" / "deep" / "leaf").write_bytes(b"leaf")
    renameat2(work / "file", work / "directory", RENAME_EXCHANGE)
    assert (work / "directory").read_bytes() == b"x"
    assert (work / "file" / "deep" / "leaf").read_bytes() == b"leaf"
    (work / "file" / "deep" / "more").write_bytes(b"more")
    assert sorted(os.listdir(work / "file" / "deep")) == ["leaf", "more"]


def test_exchange_with_a_missing_name_is_enoent(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    with refused(errno.ENOENT):
        renameat2(work / "a", work / "b", RENAME_EXCHANGE)


def test_exchange_of_a_directory_with_what_is_inside_it_is_einval(work: Path) -> None:
    (work / "a" / "b").mkdir(parents=True)
    with refused(errno.EINVAL):
        renameat2(work / "a", work / "a" / "b", RENAME_EXCHANGE)


def test_rename_into_itself_is_einval(work: Path) -> None:
    (work / "a" / "b").mkdir(parents=True)
    with refused(errno.EINVAL):
        os.rename(work / "a", work / "a" / "b" / "c")


@pytest.mark.parametrize(
    ("source", "target", "code"),
    [
        ("file", "directory", errno.EISDIR),
        ("directory", "file", errno.ENOTDIR),
        ("directory", "full", errno.ENOTEMPTY),
        ("missing", "file", errno.ENOENT),
        ("file", "missing/name", errno.ENOENT),
        ("file", "file/name", errno.ENOTDIR),
    ],
)
def test_rename_between_kinds_is_refused(work: Path, source: str, target: str, code: int) -> None:
    (work / "file").touch()
    (work / "directory").mkdir()
    (work / "full" / "inside").mkdir(parents=True)
    with refused(code):
        os.rename(work / source, work / target)


def test_directory_replaces_an_empty_directory(work: Path) -> None:
    (work / "a").mkdir()
    (work / "a" / "leaf").write_bytes(b"leaf")
    (work / "b").mkdir()
    os.rename(work / "a", work / "b")
    assert (work / "b" / "leaf").read_bytes() == b"leaf"
    assert not (work / "a").exists()


def test_rename_between_two_names_of_one_file_does_nothing(work: Path) -> None:
    (work / "a").write_bytes(b"x")
    os.link(work / "a", work / "b")
    os.rename(work / "a", work / "b")
    assert sorted(os.listdir(work)) == ["a", "b"]
    assert (work / "a").stat().st_nlink == 2


def test_directory_moves_under_open_files_and_working_directories(work: Path) -> None:
    (work / "a" / "deep").mkdir(parents=True)
    descriptor = os.open(work / "a" / "deep", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (work / "a" / "deep" / "file").open("wb") as writer:
            os.rename(work / "a", work / "b")
            writer.write(b"after")
        made = os.open("made", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor)
        os.close(made)
    finally:
        os.close(descriptor)
    assert (work / "b" / "deep" / "file").read_bytes() == b"after"
    assert (work / "b" / "deep" / "made").exists()


def test_what_was_cached_below_a_renamed_directory_is_found_under_the_new_name_only(work: Path) -> None:
    (work / "a" / "x").mkdir(parents=True)
    (work / "a" / "x" / "file").write_bytes(b"1")
    assert (work / "a" / "x" / "file").stat().st_size == 1
    os.rename(work / "a", work / "b")
    assert not (work / "a" / "x" / "file").exists()
    assert (work / "b" / "x" / "file").read_bytes() == b"1"


def test_dotdot_follows_a_directory_to_its_new_parent(work: Path) -> None:
    (work / "one" / "child").mkdir(parents=True)
    (work / "two").mkdir()
    (work / "two" / "here").touch()
    os.rename(work / "one" / "child", work / "two" / "child")
    assert "here" in os.listdir(work / "two" / "child" / "..")


@pytest.mark.mount
def test_rename_across_regions_keeps_the_inode_and_is_seen_at_once(home: Home) -> None:
    source, target = home.path / "workspace" / "moving", home.path / "downloads" / "moved"
    source.write_bytes(b"payload")
    inode = source.stat().st_ino
    os.rename(source, target)
    assert not source.exists()
    assert target.stat().st_ino == inode
    assert target.read_bytes() == b"payload"
    target.unlink()


@pytest.mark.mount
@pytest.mark.parametrize("region", ["shared", "workspace", "downloads", "uploads", "debug"])
def test_region_roots_stay_where_they_are(home: Home, region: str) -> None:
    root = home.path / region
    spare = home.path / "spare"
    spare.mkdir()
    with refused(errno.EBUSY, errno.EPERM):
        os.rename(root, home.path / "elsewhere")
    with refused(errno.EBUSY, errno.EPERM):
        os.rename(spare, root)
    with refused(errno.EBUSY, errno.EPERM):
        renameat2(spare, root, RENAME_EXCHANGE)
    with refused(errno.EBUSY, errno.EPERM, errno.ENOTEMPTY):
        root.rmdir()
    spare.rmdir()
    assert root.is_dir()
