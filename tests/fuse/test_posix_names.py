"""Names, paths and directories: any bytes, any length POSIX allows, stable listings."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from syscalls import Directory, refused


@pytest.mark.parametrize(
    "name",
    [
        b"plain",
        "naïve ☃".encode(),
        b"\xff\xfe not utf-8 \x80",
        b"new\nline\ttab",
        b"-rf *",
        b" ",
        b"\x01",
        b"...",
    ],
)
def test_names_of_any_bytes_survive(work: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(work), name)
    with open(path, "wb") as file:
        file.write(name)
    assert os.listdir(os.fsencode(work)) == [name]
    with open(path, "rb") as file:
        assert file.read() == name
    os.rename(path, path + b"2")
    assert os.listdir(os.fsencode(work)) == [name + b"2"]
    os.unlink(path + b"2")


@pytest.mark.parametrize("make", ["open", "mkdir", "symlink", "link", "rename", "mkfifo"])
def test_255_bytes_are_a_name_and_256_are_too_many(work: Path, make: str) -> None:
    source = work / "source"
    source.touch()
    makers = {
        "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
        "mkdir": os.mkdir,
        "symlink": lambda path: os.symlink("x", path),
        "link": lambda path: os.link(source, path),
        "rename": lambda path: os.rename(source, path),
        "mkfifo": os.mkfifo,
    }
    with refused(errno.ENAMETOOLONG):
        makers[make](work / ("n" * 256))
    makers[make](work / ("n" * 255))
    assert "n" * 255 in os.listdir(work)


@pytest.mark.parametrize("look", [os.stat, os.unlink, os.rmdir, os.readlink, os.listdir])
def test_looking_for_a_name_of_256_bytes_is_enametoolong(work: Path, look: object) -> None:
    with refused(errno.ENAMETOOLONG):
        look(work / ("n" * 256))  # type: ignore[operator]


def test_statfs_says_255(work: Path) -> None:
    assert os.statvfs(work).f_namemax == 255
    assert os.pathconf(work, "PC_NAME_MAX") == 255


def test_trees_deeper_than_path_max_can_be_made_and_removed(work: Path) -> None:
    start = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    here = os.dup(start)
    for level in range(40):
        name = f"{level:03}" + "d" * 200
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    handle = os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(handle, b"deep")
    os.close(handle)
    os.rename("leaf", "renamed", src_dir_fd=here, dst_dir_fd=here)
    assert os.stat("renamed", dir_fd=here).st_size == 4
    os.close(here)
    os.rename("000" + "d" * 200, "moved", src_dir_fd=start, dst_dir_fd=start)
    os.close(start)
    shutil.rmtree(work / "moved")
    assert os.listdir(work) == []


def test_a_path_near_path_max_can_be_opened_by_name(work: Path) -> None:
    path = str(work)
    while len(path) < 4095 - 202:
        path += "/" + "p" * 200
        os.mkdir(path)
    path += "/" + "f" * (4095 - len(path) - 1)
    assert len(path) == 4095
    Path(path).write_bytes(b"long")
    assert Path(path).read_bytes() == b"long"
    with refused(errno.ENAMETOOLONG):
        os.stat(path + "x")


def test_symlinks_keep_any_target_and_loops_are_eloop(work: Path) -> None:
    for number, target in enumerate((b"x", b"\xff/\x80", b"/absolute", b"t" * 4000)):
        os.symlink(target, os.fsencode(work) + b"/%d" % number)
        assert os.readlink(os.fsencode(work) + b"/%d" % number) == target
        assert os.lstat(work / str(number)).st_size == len(target)
    os.symlink("loop", work / "loop")
    with refused(errno.ELOOP):
        os.stat(work / "loop")


def test_missing_names_appear_as_soon_as_they_are_made(work: Path) -> None:
    for _ in range(3):
        assert not (work / "late").exists()
        (work / "late").touch()
        assert (work / "late").exists()
        (work / "late").unlink()
        assert not (work / "late").exists()


def test_listing_is_complete_and_has_dot_entries(work: Path) -> None:
    (work / "file").touch()
    (work / "directory").mkdir()
    directory = Directory(work)
    names = []
    while (name := directory.read()) is not None:
        names.append(name)
    directory.close()
    assert sorted(names) == [b".", b"..", b"directory", b"file"]


def test_listing_tells_each_entry_s_kind(work: Path) -> None:
    (work / "file").touch()
    (work / "directory").mkdir()
    (work / "link").symlink_to("file")
    os.mkfifo(work / "fifo")
    kinds = {entry.name: (entry.is_file(follow_symlinks=False), entry.is_dir(), entry.is_symlink())
             for entry in os.scandir(work)}  # fmt: skip
    assert kinds == {
        "file": (True, False, False),
        "directory": (False, True, False),
        "link": (False, False, True),
        "fifo": (False, False, False),
    }


def test_listing_stays_sound_while_10000_names_come_and_go(work: Path) -> None:
    kept = {f"kept{number:05}" for number in range(5000)}
    for name in kept:
        (work / name).touch()
    for number in range(5000):
        (work / f"gone{number:05}").touch()
    seen: list[str] = []
    with os.scandir(work) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count < 5000:
                (work / f"gone{count:05}").unlink()
                (work / f"new{count:05}").touch()
    assert len(seen) == len(set(seen)), "a name was listed twice"
    assert kept <= set(seen), "a name that was there all the time was not listed"
    assert len(os.listdir(work)) == 10_000


def test_removing_everything_while_listing_leaves_nothing(work: Path) -> None:
    for number in range(3000):
        (work / f"{number}").touch()
    with os.scandir(work) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(work) == []


def test_a_directory_position_can_be_returned_to(work: Path) -> None:
    for number in range(500):
        (work / f"{number:03}").touch()
    directory = Directory(work)
    for _ in range(250):
        directory.read()
    position = directory.tell()
    rest = []
    while (name := directory.read()) is not None:
        rest.append(name)
    directory.seek(position)
    again = []
    while (name := directory.read()) is not None:
        again.append(name)
    assert rest == again
    assert len(rest) == 252
    directory.close()


def test_rewinding_a_directory_shows_what_came_meanwhile(work: Path) -> None:
    (work / "first").touch()
    directory = Directory(work)
    while directory.read() is not None:
        pass
    (work / "second").touch()
    directory.rewind()
    names = set()
    while (name := directory.read()) is not None:
        names.add(name)
    directory.close()
    assert names == {b".", b"..", b"first", b"second"}


def test_a_removed_directory_lists_empty_and_takes_no_more_names(work: Path) -> None:
    (work / "doomed").mkdir()
    descriptor = os.open(work / "doomed", os.O_RDONLY | os.O_DIRECTORY)
    (work / "doomed").rmdir()
    assert os.listdir(descriptor) == []
    with refused(errno.ENOENT):
        os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor)
    os.close(descriptor)


def test_rmdir_of_a_full_directory_is_enotempty_and_of_a_file_enotdir(work: Path) -> None:
    (work / "full" / "inside").mkdir(parents=True)
    (work / "file").touch()
    with refused(errno.ENOTEMPTY):
        (work / "full").rmdir()
    with refused(errno.ENOTDIR):
        os.rmdir(work / "file")
    with refused(errno.EISDIR):
        os.unlink(work / "full")


def test_30000_files_are_opened_and_closed(work: Path) -> None:
    for number in range(30_000):
        os.close(os.open(work / f"{number}", os.O_CREAT | os.O_WRONLY))
    assert sum(1 for _ in os.scandir(work)) == 30_000
