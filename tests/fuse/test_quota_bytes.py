"""The quota of bytes: exact to the byte at the write that breaks it, and never leaking."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import invariants
import pytest
from mounts import Home
from syscalls import RENAME_EXCHANGE, in_child, refused, renameat2

pytestmark = pytest.mark.mount

QUOTA = 1_000_003  # no multiple of any block size
SMALL = 100_000
REGIONS = {
    "workspace": (QUOTA, 200),
    "downloads": (SMALL, 200),
    "uploads": (SMALL, 200),
    "shared": (SMALL, 200),
    "home": (SMALL, 200),
}


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Iterator[Home]:
    mounted = make_home(regions=REGIONS).start()
    yield mounted
    mounted.umount()


@pytest.fixture(autouse=True)
def _books_are_true(home: Home) -> Iterator[None]:
    """After each test the books equal the tree; after removing everything they are at zero."""
    yield
    invariants.check(home)
    for region in ("workspace", "downloads", "uploads", "shared"):
        for path in (home.path / region).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        assert home.usage(region) == (0, 0)
    for path in home.path.glob(".*"):
        if path.name != ".agentfuse":
            path.unlink()
    assert home.usage("home") == (0, 0)


@pytest.fixture
def space(home: Home) -> Path:
    return home.path / "workspace"


def fill(path: Path, leave: int, quota: int = QUOTA) -> None:
    """Write a file that leaves exactly ``leave`` bytes of an empty region."""
    path.write_bytes(b"f" * (quota - leave))


def used(home: Home, region: str = "workspace") -> int:
    return home.usage(region)[0]


def test_dd_writes_precisely_what_is_left_then_gets_edquot(home: Home, space: Path) -> None:
    done = subprocess.run(
        ["dd", "if=/dev/zero", f"of={space / 'full'}", "bs=64k"],
        capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Disk quota exceeded" in done.stderr
    assert (space / "full").stat().st_size == QUOTA
    assert used(home) == QUOTA


@pytest.mark.parametrize("block", [1, 777, 4096, 1_000_003, 5_000_000])
def test_writes_of_any_size_fill_the_region_to_the_byte(home: Home, space: Path, block: int) -> None:
    leave = min(block * 3 + block // 2, QUOTA)
    fill(space / "filler", leave)
    handle = os.open(space / "file", os.O_CREAT | os.O_WRONLY)
    written = 0
    with refused(errno.EDQUOT):
        while True:
            written += os.write(handle, b"x" * block)
    os.close(handle)
    assert written == leave
    assert used(home) == QUOTA


def test_a_full_region_takes_no_byte_but_every_overwrite(home: Home, space: Path) -> None:
    fill(space / "file", 0)
    handle = os.open(space / "file", os.O_RDWR)
    with refused(errno.EDQUOT):
        os.pwrite(handle, b"x", QUOTA)
    assert os.pwrite(handle, b"y" * 1000, QUOTA - 1000) == 1000
    assert os.pwrite(handle, b"z" * 1000, QUOTA - 10) == 10
    os.close(handle)
    assert used(home) == QUOTA


def test_removing_gives_the_bytes_back(home: Home, space: Path) -> None:
    fill(space / "file", 0)
    (space / "file").unlink()
    assert used(home) == 0
    fill(space / "again", 0)


def test_truncate_up_is_charged_and_refused_one_byte_beyond(home: Home, space: Path) -> None:
    (space / "file").touch()
    with refused(errno.EDQUOT):
        os.truncate(space / "file", QUOTA + 1)
    assert (space / "file").stat().st_size == 0
    os.truncate(space / "file", QUOTA)
    assert used(home) == QUOTA
    os.truncate(space / "file", 10)
    assert used(home) == 10


def test_ftruncate_of_an_open_file_is_charged(home: Home, space: Path) -> None:
    with (space / "file").open("wb") as handle:
        handle.truncate(QUOTA)
        assert used(home) == QUOTA
        with refused(errno.EDQUOT):
            handle.truncate(QUOTA + 1)
        handle.truncate(0)
        assert used(home) == 0


def test_opening_with_trunc_gives_everything_back(home: Home, space: Path) -> None:
    fill(space / "file", 0)
    with (space / "file").open("wb"):
        assert used(home) == 0


def test_sparse_files_count_their_logical_size(home: Home, space: Path) -> None:
    handle = os.open(space / "sparse", os.O_CREAT | os.O_RDWR)
    os.pwrite(handle, b"x", 500_000)
    assert used(home) == 500_001
    with refused(errno.EDQUOT):
        os.pwrite(handle, b"x", QUOTA)
    assert os.pwrite(handle, b"xyz", QUOTA - 1) == 1
    assert used(home) == QUOTA
    os.pwrite(handle, b"into the hole", 1000)
    assert used(home) == QUOTA
    os.close(handle)


def test_a_refused_write_leaves_nothing_behind(home: Home, space: Path) -> None:
    fill(space / "filler", 0)
    with refused(errno.EDQUOT):
        (space / "file").write_bytes(b"x")
    assert (space / "file").stat().st_size == 0
    assert used(home) == QUOTA


def test_append_stops_at_the_byte(home: Home, space: Path) -> None:
    fill(space / "filler", 15)
    handle = os.open(space / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert os.write(handle, b"0123456789") == 10
    assert os.write(handle, b"0123456789") == 5
    with refused(errno.EDQUOT):
        os.write(handle, b"0")
    os.close(handle)
    assert (space / "log").read_bytes() == b"012345678901234"


def test_an_unlinked_open_file_counts_until_its_last_close(home: Home, space: Path) -> None:
    first = os.open(space / "file", os.O_CREAT | os.O_RDWR)
    second = os.open(space / "file", os.O_RDONLY)
    os.write(first, b"x" * 600_000)
    (space / "file").unlink()
    assert used(home) == 600_000
    with refused(errno.EDQUOT):
        os.truncate(first, QUOTA + 1)
    assert os.write(first, b"x" * 500_000) == QUOTA - 600_000
    with refused(errno.EDQUOT):
        (space / "other").write_bytes(b"x")
    os.close(first)
    assert used(home) == QUOTA
    os.close(second)
    assert home.usage("workspace") == (0, 1)


def test_a_file_renamed_over_while_open_counts_until_its_last_close(home: Home, space: Path) -> None:
    (space / "old").write_bytes(b"o" * 600_000)
    (space / "new").write_bytes(b"n" * 100_000)
    with (space / "old").open("rb"):
        os.rename(space / "new", space / "old")
        assert used(home) == 700_000
    assert used(home) == 100_000


def test_hard_links_are_charged_once(home: Home, space: Path) -> None:
    fill(space / "file", 0)
    os.link(space / "file", space / "second")
    assert used(home) == QUOTA
    (space / "file").unlink()
    assert used(home) == QUOTA
    (space / "second").unlink()
    assert used(home) == 0


def test_hard_links_across_regions_are_exdev(home: Home, space: Path) -> None:
    (space / "file").write_bytes(b"x")
    with refused(errno.EXDEV):
        os.link(space / "file", home.path / "downloads" / "file")
    with refused(errno.EXDEV):
        os.link(space / "file", home.path / ".file")


def test_rename_across_regions_moves_the_charge(home: Home, space: Path) -> None:
    (space / "file").write_bytes(b"x" * SMALL)
    os.rename(space / "file", home.path / "downloads" / "file")
    assert (used(home), used(home, "downloads")) == (0, SMALL)
    os.rename(home.path / "downloads" / "file", home.path / ".file")
    assert (used(home, "downloads"), used(home, "home")) == (0, SMALL)


def test_rename_into_a_region_without_room_is_refused_and_nothing_moves(home: Home, space: Path) -> None:
    (space / "file").write_bytes(b"x" * (SMALL + 1))
    with refused(errno.EDQUOT):
        os.rename(space / "file", home.path / "downloads" / "file")
    assert os.listdir(home.path / "downloads") == []
    assert used(home) == SMALL + 1


def test_a_whole_subtree_moves_with_its_charge(home: Home, space: Path) -> None:
    (space / "tree" / "deep" / "deeper").mkdir(parents=True)
    (space / "tree" / "a").write_bytes(b"a" * 40_000)
    (space / "tree" / "deep" / "deeper" / "b").write_bytes(b"b" * 60_000)
    os.rename(space / "tree", home.path / "downloads" / "tree")
    assert home.usage("downloads") == (SMALL, 5)
    assert home.usage("workspace") == (0, 0)
    (home.path / "downloads" / "tree" / "a").write_bytes(b"smaller")
    assert used(home, "downloads") == 60_007
    os.rename(home.path / "downloads" / "tree", space / "tree")
    assert home.usage("workspace") == (60_007, 5)


def test_a_subtree_one_byte_too_large_is_refused(home: Home, space: Path) -> None:
    (space / "tree").mkdir()
    (space / "tree" / "a").write_bytes(b"a" * 60_000)
    (space / "tree" / "b").write_bytes(b"b" * 40_001)
    with refused(errno.EDQUOT):
        os.rename(space / "tree", home.path / "downloads" / "tree")
    assert home.usage("downloads") == (0, 0)


def test_renaming_over_a_target_in_another_region_frees_the_target(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (downloads / "file").write_bytes(b"o" * 90_000)
    (space / "file").write_bytes(b"n" * SMALL)
    os.rename(space / "file", downloads / "file")
    assert home.usage("downloads") == (SMALL, 1)
    assert home.usage("workspace") == (0, 0)


def test_renaming_over_an_open_target_in_another_region_needs_room_for_both(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (downloads / "file").write_bytes(b"o" * 60_000)
    (space / "file").write_bytes(b"n" * 60_000)
    with (downloads / "file").open("rb"), refused(errno.EDQUOT):
        os.rename(space / "file", downloads / "file")
    os.rename(space / "file", downloads / "file")
    assert home.usage("downloads") == (60_000, 1)


def test_a_file_moved_while_open_is_charged_where_it_is(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    handle = os.open(space / "file", os.O_CREAT | os.O_WRONLY)
    os.write(handle, b"x" * 50_000)
    os.rename(space / "file", downloads / "file")
    assert (used(home), used(home, "downloads")) == (0, 50_000)
    assert os.write(handle, b"y" * 60_000) == 50_000
    with refused(errno.EDQUOT):
        os.write(handle, b"z")
    (downloads / "file").unlink()
    assert used(home, "downloads") == SMALL
    os.close(handle)
    assert home.usage("downloads") == (0, 0)


def test_a_file_open_deep_in_a_moved_subtree_is_charged_where_it_is(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (space / "tree" / "deep").mkdir(parents=True)
    with (space / "tree" / "deep" / "file").open("wb", buffering=0) as handle:
        handle.write(b"x" * 1000)
        os.rename(space / "tree", downloads / "tree")
        handle.write(b"x" * 1000)
        assert (used(home), used(home, "downloads")) == (0, 2000)


def test_an_unlinked_open_file_stays_charged_to_its_region_when_its_directory_moves(
    home: Home, space: Path
) -> None:
    (space / "tree").mkdir()
    with (space / "tree" / "file").open("wb", buffering=0) as handle:
        handle.write(b"x" * 1000)
        (space / "tree" / "file").unlink()
        os.rename(space / "tree", home.path / "downloads" / "tree")
        assert used(home) + used(home, "downloads") == 1000
    assert (used(home), used(home, "downloads")) == (0, 0)


def test_exchange_across_regions_swaps_the_charges(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (space / "file").write_bytes(b"x" * 70_000)
    (downloads / "tree").mkdir()
    (downloads / "tree" / "inner").write_bytes(b"y" * 10_000)
    renameat2(space / "file", downloads / "tree", RENAME_EXCHANGE)
    assert home.usage("workspace") == (10_000, 2)
    assert home.usage("downloads") == (70_000, 1)


def test_exchange_without_room_on_one_side_is_refused(home: Home, space: Path) -> None:
    downloads = home.path / "downloads"
    (space / "big").write_bytes(b"x" * (SMALL + 1))
    (downloads / "small").write_bytes(b"y")
    with refused(errno.EDQUOT):
        renameat2(space / "big", downloads / "small", RENAME_EXCHANGE)
    assert (downloads / "small").read_bytes() == b"y"
    assert (used(home), used(home, "downloads")) == (SMALL + 1, 1)


def test_moving_one_name_of_a_linked_file_to_another_region_is_exdev(home: Home, space: Path) -> None:
    (space / "one").write_bytes(b"x" * 1000)
    os.link(space / "one", space / "two")
    with refused(errno.EXDEV):
        os.rename(space / "one", home.path / "downloads" / "one")
    (space / "tree").mkdir()
    os.rename(space / "two", space / "tree" / "two")
    with refused(errno.EXDEV):
        os.rename(space / "tree", home.path / "downloads" / "tree")
    os.rename(space / "one", space / "tree" / "one")
    os.rename(space / "tree", home.path / "downloads" / "tree")
    assert home.usage("downloads") == (1000, 2)


def test_loose_files_have_a_quota_of_their_own(home: Home) -> None:
    handle = os.open(home.path / ".cache", os.O_CREAT | os.O_WRONLY)
    assert os.write(handle, b"x" * (SMALL + 5)) == SMALL
    with refused(errno.EDQUOT):
        os.write(handle, b"x")
    os.close(handle)
    assert used(home) == 0


def test_regions_do_not_take_each_other_s_room(home: Home, space: Path) -> None:
    fill(space / "file", 0)
    (home.path / "downloads" / "file").write_bytes(b"x" * SMALL)
    (home.path / "shared" / "file").write_bytes(b"x" * SMALL)


def test_many_writers_together_never_exceed_the_quota(home: Home, space: Path) -> None:
    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            handle = os.open(space / str(number), os.O_CREAT | os.O_WRONLY)
            with contextlib.suppress(OSError):
                while True:
                    os.write(handle, b"x" * 1237)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert used(home) == QUOTA
    assert sum(path.stat().st_size for path in space.iterdir()) == QUOTA


def test_a_direct_write_that_does_not_fit_is_refused_whole(home: Home, space: Path) -> None:
    # The kernel makes EIO of a short direct write, so there is no writing up to the last byte here.
    fill(space / "filler", 5000)
    buffer = mmap.mmap(-1, 8192)
    handle = os.open(space / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    with refused(errno.EDQUOT):
        os.write(handle, buffer)
    assert used(home) == QUOTA - 5000
    assert os.write(handle, memoryview(buffer)[:4096]) == 4096
    os.close(handle)
    assert used(home) == QUOTA - 904


def test_mappings_cannot_grow_a_file(home: Home, space: Path) -> None:
    fill(space / "filler", 100)
    (space / "mapped").write_bytes(b"x" * 100)

    def child() -> None:
        with (space / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
            mapping[0:100] = b"y" * 100
            mapping.flush()

    with contextlib.suppress(AssertionError):  # python refuses a mapping beyond the end, C would not
        in_child(child)
    assert (space / "mapped").stat().st_size == 100
    assert used(home) == QUOTA


def test_copy_file_range_and_sendfile_are_charged(home: Home, space: Path) -> None:
    fill(space / "source", 1000)
    with (space / "source").open("rb") as source, (space / "copy").open("wb") as target:
        with refused(errno.EDQUOT):
            while os.copy_file_range(source.fileno(), target.fileno(), 4096):
                pass
        assert os.fstat(target.fileno()).st_size == 1000
    with (
        (space / "source").open("rb") as source,
        (space / "copy2").open("wb") as target,
        refused(errno.EDQUOT),
    ):
        os.sendfile(target.fileno(), source.fileno(), 0, 4096)
    assert used(home) == QUOTA


def test_df_shows_what_is_left(home: Home, space: Path) -> None:
    before = os.statvfs(home.path)
    (space / "file").write_bytes(b"x" * 409_600)
    after = os.statvfs(home.path)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize == 409_600
    assert before.f_ffree - after.f_ffree == 1


def test_usage_is_true_after_a_clean_restart_of_the_execution(home: Home, space: Path) -> None:
    (space / "file").write_bytes(b"x" * 12_345)
    (home.path / "shared" / "file").write_bytes(b"x" * 999)
    home.umount()
    home.start()
    assert home.usage("workspace") == (12_345, 1)
    assert home.usage("shared") == (999, 1)


def test_usage_is_true_after_a_crash_with_unlinked_open_files(home: Home, space: Path) -> None:
    (space / "kept").write_bytes(b"x" * 1000)
    handle = os.open(space / "gone", os.O_CREAT | os.O_WRONLY)
    os.write(handle, b"x" * 5000)
    (space / "gone").unlink()
    assert home.usage("workspace") == (6000, 2)
    home.kill()
    with contextlib.suppress(OSError):
        os.close(handle)
    home.start()
    assert home.usage("workspace") == (1000, 1)
