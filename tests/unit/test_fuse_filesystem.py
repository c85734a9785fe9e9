"""The filesystem without a kernel: inodes, names and charges on a real local tree."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentfuse.errors import QuotaExceededError
from agentfuse.fuse.filesystem import Change, Filesystem
from agentfuse.fuse.handles import Listing
from agentfuse.fuse.inodes import ROOT_NODEID, InodeTable
from agentfuse.fuse.names import RENAME_EXCHANGE, RENAME_NOREPLACE
from agentfuse.home import marks
from agentfuse.home.creators import Caller, Creator
from agentfuse.home.quota import Account, Ledger
from agentfuse.home.tree import Home, take_stock
from agentfuse.regions import LOOSE, Region, Scope

ME = Caller(os.geteuid(), os.getegid())
REGIONS = (
    Region("shared", Scope.AGENT, 1000, 10),
    Region("workspace", Scope.EXECUTION, 5000, 40),
    Region(LOOSE, Scope.EXECUTION, 2000, 20),
)


class Kernel:
    """Calls the filesystem by path, as the kernel does by number, and checks the books whenever asked."""

    def __init__(self, home: Home, *, max_directory_fds: int = 4) -> None:
        self.home = home
        self.ledger = Ledger(REGIONS)
        fd = os.open(home.tree, os.O_PATH | os.O_DIRECTORY)
        self.inodes = InodeTable(fd, self.ledger.loose, max_directory_fds=max_directory_fds)
        self.fs = Filesystem(self.inodes, self.ledger, gives_away=os.geteuid() == 0, allow_devices=False)

    def number(self, path: str | bytes) -> int:
        nodeid = ROOT_NODEID
        for name in os.fsencode(path).split(b"/"):
            if name:
                entry = self.fs.lookup(nodeid, name)
                if entry is None:
                    raise FileNotFoundError(path)
                nodeid = entry[0].nodeid
        return nodeid

    def split(self, path: str) -> tuple[int, bytes]:
        parent, _, name = path.rpartition("/")
        return self.number(parent), os.fsencode(name)

    def create(self, path: str, data: bytes = b"", flags: int = 0) -> int:
        parent, name = self.split(path)
        _, _, handle = self.fs.create(parent, name, stat.S_IFREG | 0o644, os.O_RDWR | flags, ME)
        if data:
            assert self.fs.content.write(handle, 0, data) == len(data)
        return handle

    def write_file(self, path: str, data: bytes) -> int:
        self.fs.content.release(self.create(path, data))
        return self.number(path)

    def mkdir(self, path: str) -> int:
        return self.fs.mkdir(*self.split(path), 0o755, ME)[0].nodeid

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        self.fs.rename(*self.split(old), *self.split(new), flags)

    def unlink(self, path: str) -> None:
        self.fs.unlink(*self.split(path))

    def forget_everything(self) -> None:
        for inode in self.inodes.known():
            if inode is not self.inodes.root:
                self.inodes.forget(inode.nodeid, inode.lookups)

    def account(self, name: str) -> Account:
        return next(account for account in self.ledger.accounts() if account.name == name)

    def check_books(self) -> None:
        truth = Ledger(REGIONS)
        take_stock(self.home.tree, truth)
        for booked, true in zip(self.ledger.accounts(), truth.accounts(), strict=True):
            assert (booked.name, booked.bytes_used, booked.files_used) == (
                true.name,
                true.bytes_used,
                true.files_used,
            )


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    home = Home(tmp_path, "e")
    home.path.mkdir(parents=True)
    home.lay_out(REGIONS, None)
    kernel = Kernel(home)
    yield kernel
    kernel.fs.content.close()
    kernel.inodes.close()


def raises(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def test_a_write_gets_what_is_left_and_then_nothing(kernel: Kernel) -> None:
    handle = kernel.create("shared/a")
    assert kernel.fs.content.write(handle, 0, b"x" * 600) == 600
    assert kernel.fs.content.write(handle, 600, b"x" * 600) == 400
    with pytest.raises(QuotaExceededError):
        kernel.fs.content.write(handle, 1000, b"x")
    kernel.check_books()


def test_overwriting_a_full_region_is_no_growth(kernel: Kernel) -> None:
    handle = kernel.create("shared/a", b"x" * 1000)
    assert kernel.fs.content.write(handle, 0, b"y" * 1000) == 1000
    kernel.check_books()


def test_a_hole_beyond_the_quota_is_refused_whole(kernel: Kernel) -> None:
    handle = kernel.create("shared/a")
    with pytest.raises(QuotaExceededError):
        kernel.fs.content.write(handle, 1000, b"x")
    assert kernel.fs.content.write(handle, 999, b"xy") == 1
    kernel.check_books()


def test_growing_by_truncate_is_charged_and_shrinking_gives_back(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"x" * 10)
    kernel.fs.setattr(nodeid, Change(size=1000))
    with pytest.raises(QuotaExceededError):
        kernel.fs.setattr(nodeid, Change(size=1001))
    assert kernel.account("shared").bytes_used == 1000
    kernel.fs.setattr(nodeid, Change(size=3))
    kernel.check_books()


def test_an_absurd_size_is_too_big_rather_than_over_quota(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"")
    with raises(errno.EFBIG):
        kernel.fs.setattr(nodeid, Change(size=1 << 50))


def test_the_file_count_is_a_quota_of_its_own(kernel: Kernel) -> None:
    for number in range(10):
        kernel.write_file(f"shared/{number}", b"")
    for attempt in (
        lambda: kernel.create("shared/more"),
        lambda: kernel.mkdir("shared/more"),
        lambda: kernel.fs.symlink(*kernel.split("shared/more"), b"target", ME),
        lambda: kernel.fs.mknod(*kernel.split("shared/more"), stat.S_IFIFO | 0o600, 0, ME),
    ):
        with pytest.raises(QuotaExceededError):
            attempt()
    kernel.fs.link(kernel.number("shared/0"), *kernel.split("shared/link"))
    kernel.unlink("shared/1")
    kernel.mkdir("shared/more")
    kernel.check_books()


def test_what_cannot_be_marked_as_its_creators_is_not_made(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: marks.File, creator: Creator) -> None:
        raise OSError(errno.ENOSPC, "no room for the attribute")

    kernel.account("workspace").creator = Creator.USER
    monkeypatch.setattr(marks, "write_creator", refuse)
    handles = kernel.fs.content.open_count()
    with pytest.raises(OSError, match="no room"):
        kernel.create("workspace/file")
    with pytest.raises(OSError, match="no room"):
        kernel.mkdir("workspace/directory")
    with pytest.raises(OSError, match="no room"):
        kernel.fs.mknod(*kernel.split("workspace/node"), stat.S_IFREG | 0o600, 0, ME)
    assert os.listdir(kernel.home.tree / "workspace") == []
    assert kernel.fs.content.open_count() == handles
    kernel.check_books()


def test_an_unlinked_file_counts_until_its_last_close(kernel: Kernel) -> None:
    handle = kernel.create("shared/a", b"x" * 900)
    nodeid = kernel.number("shared/a")
    second = kernel.fs.content.open(kernel.inodes.get(nodeid), os.O_RDWR)
    kernel.unlink("shared/a")
    kernel.fs.content.release(handle)
    assert kernel.account("shared").bytes_used == 900
    assert kernel.fs.content.write(second, 900, b"x" * 200) == 100
    assert kernel.fs.getattr(nodeid)[1].st_nlink == 0
    kernel.fs.content.release(second)
    kernel.check_books()


def test_a_direct_write_that_does_not_fit_is_refused_whole(kernel: Kernel) -> None:
    handle = kernel.create("shared/a", b"x" * 900, os.O_DIRECT)
    with pytest.raises(QuotaExceededError):
        kernel.fs.content.write(handle, 900, b"x" * 101)
    assert kernel.fs.content.write(handle, 900, b"x" * 100) == 100
    kernel.check_books()


def test_a_removed_inode_still_answers_getattr_until_forgotten(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"hello")
    kernel.unlink("shared/a")
    st = kernel.fs.getattr(nodeid)[1]
    assert (st.st_nlink, st.st_size, st.st_mtime_ns > 0, st.st_blksize > 0) == (0, 5, True, True)
    kernel.inodes.forget(nodeid, kernel.inodes.get(nodeid).lookups)
    with raises(errno.ESTALE):
        kernel.fs.getattr(nodeid)


def test_a_number_is_not_reused_while_the_kernel_knows_it(kernel: Kernel) -> None:
    first = kernel.write_file("shared/a", b"")
    ino = kernel.inodes.get(first).ino
    kernel.unlink("shared/a")
    for number in range(200):  # ext4 hands a freed inode out again at once
        again = kernel.write_file(f"workspace/{number % 30}", b"")
        assert again != first
        if kernel.inodes.get(again).ino == ino:
            assert kernel.number(f"workspace/{number % 30}") == again
        kernel.unlink(f"workspace/{number % 30}")
    kernel.check_books()


def test_rename_across_regions_moves_the_charge_of_a_whole_subtree(kernel: Kernel) -> None:
    kernel.mkdir("workspace/d")
    kernel.mkdir("workspace/d/e")
    kernel.write_file("workspace/d/e/f", b"x" * 300)
    handle = kernel.create("workspace/d/open", b"y" * 200)
    kernel.rename("workspace/d", "shared/d")
    kernel.check_books()
    assert kernel.account("shared").bytes_used == 500
    assert kernel.fs.content.write(handle, 200, b"y" * 600) == 500
    kernel.check_books()


def test_a_subtree_that_does_not_fit_stays_where_it_is(kernel: Kernel) -> None:
    kernel.mkdir("workspace/d")
    kernel.write_file("workspace/d/f", b"x" * 1001)
    with pytest.raises(QuotaExceededError):
        kernel.rename("workspace/d", "shared/d")
    assert kernel.number("workspace/d/f")
    kernel.check_books()


def test_replacing_a_file_makes_room_for_what_replaces_it(kernel: Kernel) -> None:
    kernel.write_file("shared/a", b"x" * 900)
    kernel.write_file("workspace/b", b"y" * 1000)
    kernel.rename("workspace/b", "shared/a")
    assert kernel.account("shared").bytes_used == 1000
    kernel.check_books()


def test_replacing_an_open_file_keeps_its_charge_until_it_closes(kernel: Kernel) -> None:
    handle = kernel.create("shared/a", b"x" * 900)
    kernel.write_file("workspace/b", b"y" * 200)
    with pytest.raises(QuotaExceededError):
        kernel.rename("workspace/b", "shared/a")
    kernel.write_file("workspace/c", b"z" * 100)
    kernel.rename("workspace/c", "shared/a")
    assert kernel.account("shared").bytes_used == 1000
    assert kernel.fs.content.read(handle, 0, 3) == b"xxx"
    kernel.fs.content.release(handle)
    kernel.check_books()


def test_exchange_across_regions_swaps_both_charges(kernel: Kernel) -> None:
    kernel.write_file("shared/a", b"x" * 900)
    kernel.mkdir("workspace/d")
    kernel.write_file("workspace/d/f", b"y" * 1000)
    kernel.rename("shared/a", "workspace/d", RENAME_EXCHANGE)
    assert kernel.account("shared").bytes_used == 1000
    assert kernel.number("shared/a/f")
    kernel.check_books()


def test_noreplace_and_exchange_say_what_is_wrong(kernel: Kernel) -> None:
    kernel.write_file("shared/a", b"1")
    kernel.write_file("shared/b", b"2")
    with raises(errno.EEXIST):
        kernel.rename("shared/a", "shared/b", RENAME_NOREPLACE)
    with raises(errno.ENOENT):
        kernel.rename("shared/a", "shared/c", RENAME_EXCHANGE)
    with raises(errno.EINVAL):
        kernel.rename("shared/a", "shared/c", 4)


def test_hard_links_do_not_cross_regions_by_any_way(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"x")
    with raises(errno.EXDEV):
        kernel.fs.link(nodeid, *kernel.split("workspace/a"))
    kernel.mkdir("shared/d")
    kernel.fs.link(nodeid, *kernel.split("shared/d/b"))
    for path in ("shared/a", "shared/d"):
        with raises(errno.EXDEV):
            kernel.rename(path, "workspace/moved")
    kernel.rename("shared/a", "shared/d/a")  # now all its names are in d, and d may go
    kernel.rename("shared/d", "workspace/moved")
    kernel.check_books()


def test_region_roots_stay_where_they_are(kernel: Kernel) -> None:
    kernel.mkdir("d")
    for attempt in (
        lambda: kernel.fs.rmdir(ROOT_NODEID, b"shared"),
        lambda: kernel.rename("shared", "d/shared"),
        lambda: kernel.rename("d", "shared"),
        lambda: kernel.rename("d", "workspace", RENAME_EXCHANGE),
        lambda: kernel.unlink("shared"),
    ):
        with raises(errno.EBUSY):
            attempt()


def test_a_renamed_directory_takes_what_is_known_below_it_along(kernel: Kernel) -> None:
    kernel.mkdir("workspace/a")
    kernel.mkdir("workspace/a/b")
    deep = kernel.write_file("workspace/a/b/c", b"deep")
    kernel.rename("workspace/a", "workspace/z")
    kernel.mkdir("workspace/a")
    kernel.mkdir("workspace/a/b")
    kernel.write_file("workspace/a/b/c", b"other")
    assert kernel.fs.getattr(deep)[1].st_size == 4
    assert kernel.number("workspace/z/b/c") == deep


def test_paths_longer_than_the_descriptor_cache_are_walked(kernel: Kernel) -> None:
    path = "workspace"
    for _ in range(30):
        path += "/d"
        kernel.mkdir(path)
    kernel.write_file(path + "/f", b"x")
    kernel.rename(path + "/f", "workspace/f")
    kernel.rename("workspace/f", path + "/g")
    assert kernel.fs.getattr(kernel.number(path + "/g"))[1].st_size == 1
    kernel.check_books()


def test_a_file_found_again_by_its_other_name_is_the_same_inode(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"x")
    kernel.fs.link(nodeid, *kernel.split("shared/b"))
    kernel.forget_everything()
    handle = kernel.number("shared/a")
    kernel.unlink("shared/a")  # its only known name; shared/b is not known yet
    assert kernel.fs.getattr(handle)[1].st_nlink == 1
    assert kernel.number("shared/b") == handle
    kernel.unlink("shared/b")
    kernel.check_books()


def test_what_is_forgotten_leaves_nothing_behind(kernel: Kernel) -> None:
    kernel.mkdir("workspace/d")
    kernel.write_file("workspace/d/f", b"x")
    kernel.fs.link(kernel.number("workspace/d/f"), *kernel.split("workspace/g"))
    before = len(os.listdir("/proc/self/fd"))
    kernel.forget_everything()
    assert len(kernel.inodes) == 1
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_listing_keeps_its_names_while_the_directory_changes(kernel: Kernel) -> None:
    for number in range(5):
        kernel.write_file(f"workspace/{number}", b"")
    listing = Listing(kernel.inodes.get(kernel.number("workspace")))
    kernel.fs.rewind(listing)
    kernel.unlink("workspace/3")
    kernel.write_file("workspace/late", b"")
    found = {name for name in listing.names if kernel.fs.peek(listing, name)}
    assert found == {b"0", b"1", b"2", b"4"}
    kernel.fs.rewind(listing)
    assert set(listing.names) == {b"0", b"1", b"2", b"4", b"late"}


def test_many_openers_share_one_descriptor(kernel: Kernel) -> None:
    nodeid = kernel.write_file("workspace/f", b"x")
    inode = kernel.inodes.get(nodeid)
    kernel.fs.content.open(inode, os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(500):
        kernel.fs.content.open(inode, os.O_RDONLY)
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_have_at_most_255_bytes(kernel: Kernel) -> None:
    kernel.write_file("workspace/" + "n" * 255, b"")
    for attempt in (
        lambda: kernel.fs.lookup(ROOT_NODEID, b"n" * 256),
        lambda: kernel.create("workspace/" + "n" * 256),
        lambda: kernel.rename("workspace/" + "n" * 255, "workspace/" + "m" * 256),
    ):
        with raises(errno.ENAMETOOLONG):
            attempt()


def test_devices_need_a_mount_that_allows_them(kernel: Kernel) -> None:
    with raises(errno.EPERM):
        kernel.fs.mknod(*kernel.split("workspace/null"), stat.S_IFCHR | 0o666, os.makedev(1, 3), ME)
    kernel.check_books()


def test_use_is_counted_afresh_from_the_tree(kernel: Kernel) -> None:
    kernel.mkdir("workspace/d")
    nodeid = kernel.write_file("workspace/d/f", b"x" * 100)
    kernel.fs.link(nodeid, *kernel.split("workspace/d/g"))
    kernel.fs.symlink(*kernel.split("workspace/s"), b"/etc/passwd", ME)
    kernel.write_file(".bashrc", b"loose")
    fresh = Ledger(REGIONS)
    take_stock(kernel.home.tree, fresh)
    use = {account.name: (account.bytes_used, account.files_used) for account in fresh.accounts()}
    assert use == {"shared": (0, 0), "workspace": (100, 3), LOOSE: (5, 1)}
    kernel.check_books()


def test_an_unlinked_open_file_can_be_opened_for_more_and_truncated(kernel: Kernel) -> None:
    nodeid = kernel.write_file("shared/a", b"hello")
    inode = kernel.inodes.get(nodeid)
    reader = kernel.fs.content.open(inode, os.O_RDONLY)
    kernel.unlink("shared/a")
    writer = kernel.fs.content.open(inode, os.O_RDWR)  # as through /proc/self/fd
    kernel.fs.content.write(writer, 5, b" world")
    kernel.fs.setattr(nodeid, Change(size=8))
    assert kernel.fs.content.read(reader, 0, 100) == b"hello wo"
    kernel.fs.content.release(writer)
    kernel.fs.content.release(reader)
    kernel.check_books()


def test_a_listing_tells_what_changed_since_it_was_last_told(kernel: Kernel) -> None:
    from agentfuse.fuse.operations import attributes  # noqa: PLC0415  the only test here that speaks FUSE

    nodeid = kernel.write_file("workspace/f", b"x")
    inode = kernel.inodes.get(nodeid)
    changes = [
        lambda: kernel.fs.setattr(nodeid, Change(mode=0o600)),
        lambda: kernel.fs.setattr(nodeid, Change(size=3)),
        lambda: kernel.fs.link(nodeid, *kernel.split("workspace/g")),
        lambda: kernel.rename("workspace/f", "workspace/h"),
        lambda: kernel.unlink("workspace/g"),
        lambda: kernel.fs.content.release(kernel.fs.content.open(inode, os.O_RDWR | os.O_TRUNC)),
        lambda: kernel.fs.content.write(kernel.fs.content.open(inode, os.O_RDWR), 0, b"more"),
    ]
    for change in changes:
        told = attributes(*kernel.fs.getattr(nodeid))
        assert inode.answer is told
        change()
        assert inode.answer is None
