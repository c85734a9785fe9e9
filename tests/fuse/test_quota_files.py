"""The quota of files: every inode with a name counts one, whatever makes it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import invariants
import pytest
from mounts import Home
from syscalls import refused

pytestmark = pytest.mark.mount

FILES = 10
MiB = 1024 * 1024


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Iterator[Home]:
    mounted = make_home(
        regions=dict.fromkeys(("workspace", "downloads", "shared", "home"), (MiB, FILES))
    ).start()
    yield mounted
    mounted.umount()


@pytest.fixture(autouse=True)
def _books_are_true(home: Home) -> Iterator[None]:
    yield
    invariants.check(home)
    for region in ("workspace", "downloads"):
        for path in (home.path / region).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        assert home.usage(region) == (0, 0)


@pytest.fixture
def space(home: Home) -> Path:
    return home.path / "workspace"


def files(home: Home, region: str = "workspace") -> int:
    return home.usage(region)[1]


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


MAKERS: dict[str, Callable[[Path], object]] = {
    "create": lambda path: path.touch(),
    "mkdir": lambda path: path.mkdir(),
    "symlink": lambda path: path.symlink_to("x"),
    "mkfifo": os.mkfifo,
    "socket": bind,
    "mknod": os.mknod,
}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_everything_with_an_inode_counts_and_one_too_many_is_refused(
    home: Home, space: Path, kind: str
) -> None:
    for number in range(FILES):
        MAKERS[kind](space / str(number))
        assert files(home) == number + 1
    with refused(errno.EDQUOT):
        MAKERS[kind](space / "one more")
    assert len(os.listdir(space)) == FILES


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_refused_name_does_not_exist_afterwards(home: Home, space: Path, kind: str) -> None:
    for number in range(FILES):
        (space / str(number)).touch()
    assert not (space / "refused").exists()
    with refused(errno.EDQUOT):
        MAKERS[kind](space / "refused")
    assert not os.path.lexists(space / "refused")
    (space / "0").unlink()
    MAKERS[kind](space / "refused")
    assert files(home) == FILES


def test_making_what_exists_is_eexist_even_in_a_full_region(space: Path) -> None:
    for number in range(FILES):
        (space / str(number)).touch()
    with refused(errno.EEXIST):
        (space / "0").mkdir()
    with refused(errno.EEXIST):
        os.open(space / "0", os.O_CREAT | os.O_EXCL)
    os.close(os.open(space / "0", os.O_CREAT | os.O_WRONLY))


def test_a_further_hard_link_costs_no_file(home: Home, space: Path) -> None:
    for number in range(FILES):
        (space / str(number)).touch()
    os.link(space / "0", space / "link")
    assert files(home) == FILES
    (space / "0").unlink()
    assert files(home) == FILES
    (space / "link").unlink()
    assert files(home) == FILES - 1


def test_rename_within_a_full_region_is_free(home: Home, space: Path) -> None:
    for number in range(FILES):
        (space / str(number)).touch()
    os.rename(space / "0", space / "renamed")
    os.rename(space / "1", space / "2")
    assert files(home) == FILES - 1


def test_a_subtree_with_too_many_files_is_not_let_in(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    for number in range(FILES - 3):
        (downloads / str(number)).touch()
    (space / "tree").mkdir()
    for number in range(3):
        (space / "tree" / str(number)).touch()
    with refused(errno.EDQUOT):
        os.rename(space / "tree", downloads / "tree")
    (space / "tree" / "0").unlink()
    os.rename(space / "tree", downloads / "tree")
    assert (files(home), files(home, "downloads")) == (0, FILES)


def test_replacing_a_file_in_a_full_region_from_elsewhere_needs_no_room(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    for number in range(FILES):
        (downloads / str(number)).touch()
    (space / "new").touch()
    os.rename(space / "new", downloads / "0")
    assert (files(home), files(home, "downloads")) == (0, FILES)


def test_an_empty_directory_replaced_by_a_subtree_gives_its_place(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (downloads / "tree").mkdir()
    for number in range(FILES - 2):
        (downloads / str(number)).touch()
    (space / "tree").mkdir()
    (space / "tree" / "leaf").touch()
    os.rename(space / "tree", downloads / "tree")
    assert files(home, "downloads") == FILES


def test_region_roots_themselves_count_nothing(home: Home) -> None:
    for region in ("workspace", "downloads", "shared", "home"):
        assert home.usage(region) == (0, 0)


def test_loose_directories_and_their_contents_count_as_loose(home: Home) -> None:
    (home.path / ".config" / "tool").mkdir(parents=True)
    (home.path / ".config" / "tool" / "settings").write_bytes(b"12345")
    assert home.usage("home") == (5, 3)
    shutil.rmtree(home.path / ".config")
    assert home.usage("home") == (0, 0)
