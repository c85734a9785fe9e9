"""Absent files under the handlers of a mount, without a kernel: who waits for what, and what it leaves."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
from memories import SILENT, Run, picture
from mounts import base_directory, remove_base
from stores import CountingStore, local_store
from syscalls import in_child
from trio.testing import wait_all_tasks_blocked

from agentfuse.errors import StoreError
from agentfuse.fuse.filesystem import Filesystem
from agentfuse.fuse.inodes import ROOT_NODEID, InodeTable
from agentfuse.fuse.operations import Operations
from agentfuse.fuse.xattrs import Xattrs
from agentfuse.home import marks
from agentfuse.home.creators import Caller
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home, take_stock
from agentfuse.regions import LOOSE, Region, Scope
from agentfuse.snapshots.entries import Entry
from agentfuse.sync import backfill, scan
from agentfuse.sync.absent import Absent, Item, Part
from agentfuse.sync.backfill import Backfill, in_order
from agentfuse.sync.hydration import Hydration

MiB = 1024 * 1024
ME = Caller(os.geteuid(), os.getegid())
REGIONS = tuple(
    Region(name, scope, 1000 * MiB, 100_000)
    for name, scope in (("shared", Scope.AGENT), ("workspace", Scope.EXECUTION), (LOOSE, Scope.EXECUTION))
)
UID = 4242
OLD_NS = 1_400_000_000_987_654_321
NOTE = b"remember me\n" * 10
LARGE = os.urandom(3 * MiB)


CALLER = SimpleNamespace(pid=0, uid=0, gid=0)


class Lock(CountingStore):
    """A store whose reads of contents wait while it is locked, and fail while ``error`` is set."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.error: Exception | None = None
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Semaphore(0)

    def lock(self) -> None:
        self._open.clear()

    def unlock(self) -> None:
        self._open.set()

    async def arrived(self) -> None:
        """Wait until one more reader of a content waits."""
        await trio.to_thread.run_sync(self._arrived.acquire)

    def _pass(self, key: str) -> None:
        if "/objects/" in key:
            self._arrived.release()
            assert self._open.wait(60)
            if self.error is not None:
                raise self.error

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._count("get", key)
        self._pass(key)
        return self.inner.get(key, offset=offset, length=length)

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        self._count("stream", key)
        pieces = self.inner.stream(key, offset=offset, length=length)
        yield next(pieces)
        self._pass(key)  # some of it has come
        yield from pieces


class Mounted:
    """A home whose shared/ was restored without contents, and the handlers of its mount."""

    def __init__(self, base: Path, store: Lock) -> None:
        self.store = store
        self.home = Home(base, "e2")
        self.home.path.mkdir(parents=True)
        self.home.lay_out(REGIONS, None)
        self.run = Run(base / "homes", store, "e2")
        self.root = self.home.tree / "shared"
        self.run.root = self.root
        self.absent = Absent()
        self.run.another_process().restore(SILENT, self.absent)
        self.run.memory.note_restored()
        store.reset()
        self.serve()

    def serve(self) -> None:
        self.ledger = Ledger(REGIONS)
        take_stock(self.home.tree, self.ledger)
        fd = os.open(self.home.tree, os.O_PATH | os.O_DIRECTORY)
        self.inodes = InodeTable(fd, self.ledger.loose, max_directory_fds=16)
        self.fs = Filesystem(
            self.inodes, self.ledger, self.absent, gives_away=os.geteuid() == 0, allow_devices=False
        )
        self.hydration = Hydration(self.absent)
        self.backfill = Backfill(self.hydration)
        xattrs = Xattrs(self.inodes, enabled=False)
        self.ops = Operations(
            self.fs,
            xattrs,
            self.hydration,
            on_init=lambda: None,
            free_bytes=lambda: 1 << 40,
            creator_of=lambda _pid: None,
            content_of=lambda _name: None,
        )
        self.hydration.passed = self.ops.gate.passed

    def number(self, path: str) -> int:
        nodeid = ROOT_NODEID
        for name in os.fsencode(path).split(b"/"):
            entry = self.fs.lookup(nodeid, name)
            assert entry is not None, path
            nodeid = entry[0].nodeid
        return nodeid

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return (await self.ops.open(self.number(f"shared/{path}"), flags, CALLER)).fh  # type: ignore[arg-type]

    async def read(self, path: str) -> bytes:
        handle = await self.open(path)
        content = self.fs.content.read(handle, 0, 100 * MiB)
        self.fs.content.release(handle)
        return content

    async def setattr(self, path: str, **changes: int) -> None:
        attributes = pyfuse3.EntryAttributes()
        wanted = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"), False)
        for name, value in changes.items():
            wanted[name.removesuffix("_ns")] = True
            setattr(attributes, f"st_{name}", value)
        fields = SimpleNamespace(**{f"update_{name}": on for name, on in wanted.items()})
        await self.ops.setattr(self.number(f"shared/{path}"), attributes, fields, None, CALLER)  # type: ignore[arg-type]

    async def rename(self, old: str, new: str) -> None:
        parents = [(self.number(str(Path(path).parent)), Path(path).name.encode()) for path in (old, new)]
        await self.ops.rename(*parents[0], *parents[1], 0, CALLER)  # type: ignore[arg-type]

    def told(self, path: str) -> os.stat_result:
        return self.fs.getattr(self.number(f"shared/{path}"))[1]

    def mark(self, path: str) -> marks.Mark | None:
        fd = os.open(self.root / path, os.O_RDONLY)
        try:
            return marks.read(fd)
        finally:
            os.close(fd)

    @asynccontextmanager
    async def background(self) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hydration.run)
            yield
            nursery.cancel_scope.cancel()

    async def fill_all(self) -> None:
        async with self.background():
            await self.backfill.run()

    def check(self) -> None:
        """The books are those of the tree, and no descriptor but those of handles is left."""
        truth = Ledger(REGIONS)
        take_stock(self.home.tree, truth)
        for booked, true in zip(self.ledger.accounts(), truth.accounts(), strict=True):
            assert (booked.bytes_used, booked.files_used) == (true.bytes_used, true.files_used)
        assert self.absent.files == sum(
            1 for item in self.absent.by_ino.values() if item.state.name in ("ABSENT", "FILLING")
        )


@pytest.fixture
def store(tmp_path: Path) -> Lock:
    return Lock(local_store(tmp_path))


@pytest.fixture
def mounted(tmp_path: Path, store: Lock) -> Mounted:
    first = Run(tmp_path / "first", store, "e1")
    first.write("note", NOTE)
    first.write("large", LARGE)
    first.write("directory/inside", b"inside")
    first.write("directory/more", b"more")
    for name in ("note", "large", "directory/inside"):
        os.utime(first.root / name, ns=(OLD_NS, OLD_NS))
    first.commit()
    return Mounted(tmp_path, store)


async def together(*works: Callable[[], Awaitable[object]]) -> list[object]:
    """What each gave, or the OSError (FUSEError) it ended with, in order."""
    results: list[object] = [None] * len(works)

    async def one(number: int) -> None:
        try:
            results[number] = await works[number]()
        except pyfuse3.FUSEError as error:
            results[number] = errno.errorcode[error.errno]

    async with trio.open_nursery() as nursery:
        for number in range(len(works)):
            nursery.start_soon(one, number)
    return results


async def test_openers_of_one_file_share_one_fetch(mounted: Mounted) -> None:
    mounted.store.lock()
    async with trio.open_nursery() as nursery:
        found: list[object] = []

        async def open_all() -> None:
            found.extend(await together(*[lambda: mounted.read("note")] * 5))

        nursery.start_soon(open_all)
        await mounted.store.arrived()
        await wait_all_tasks_blocked()
        mounted.store.unlock()
    assert found == [NOTE] * 5
    assert mounted.store.gets == 1
    assert mounted.told("note").st_mtime_ns == OLD_NS
    mounted.check()


async def test_a_store_that_is_down_fails_them_all_once_and_works_again_later(mounted: Mounted) -> None:
    mounted.store.error = StoreError("injected: down")
    mounted.store.lock()
    async with trio.open_nursery() as nursery:
        found: list[object] = []

        async def open_all() -> None:
            found.extend(await together(*[lambda: mounted.read("large")] * 3))

        nursery.start_soon(open_all)
        await mounted.store.arrived()
        await wait_all_tasks_blocked()
        mounted.store.unlock()
    assert found == ["EIO"] * 3
    assert mounted.store.gets == 1
    assert mounted.told("large").st_mtime_ns == OLD_NS
    assert (mounted.root / "large").stat().st_mtime_ns == OLD_NS  # though half of it was written
    mounted.store.error = None
    assert await mounted.read("large") == LARGE
    mounted.check()


async def test_after_a_refused_writer_readers_are_refused_for_a_second(mounted: Mounted) -> None:
    mounted.store.error = StoreError("injected: down")
    with pytest.raises(pyfuse3.FUSEError):
        await mounted.open("note", os.O_RDWR)
    mounted.store.error = None
    with pytest.raises(pyfuse3.FUSEError):
        await mounted.open("note", os.O_RDONLY)  # as SQLite does, which would take it for read-only
    assert mounted.store.gets == 1
    (item,) = [item for item in mounted.absent.by_ino.values() if item.entry.path == b"note"]
    item.refused_at_s -= 1.0
    assert await mounted.read("note") == NOTE


async def test_a_refused_writer_may_try_again_at_once(mounted: Mounted) -> None:
    mounted.store.error = StoreError("injected: down")
    with pytest.raises(pyfuse3.FUSEError):
        await mounted.open("note", os.O_RDWR)
    mounted.store.error = None
    mounted.fs.content.release(await mounted.open("note", os.O_RDWR))
    assert await mounted.read("note") == NOTE


async def test_who_reads_leaves_the_mark_and_who_writes_has_it_gone(mounted: Mounted) -> None:
    assert await mounted.read("note") == NOTE
    assert mounted.mark("note") is not None
    handle = await mounted.open("note", os.O_RDWR)
    assert mounted.mark("note") is None
    mounted.fs.content.write(handle, 0, b"mine")
    mounted.fs.content.release(handle)
    await mounted.fill_all()
    assert await mounted.read("note") == b"mine" + NOTE[4:]
    assert mounted.backfill.as_dict()["state"] == "complete"
    mounted.check()


async def while_filled(mounted: Mounted, path: str, meanwhile: Callable[[], Awaitable[None]]) -> list[object]:
    """Do something while an opener of a file waits for its content; what that opener got."""
    mounted.store.lock()
    found: list[object] = []
    async with trio.open_nursery() as nursery:

        async def open_it() -> None:
            found.extend(await together(lambda: mounted.read(path)))

        nursery.start_soon(open_it)
        await mounted.store.arrived()
        async with trio.open_nursery() as inner:
            inner.start_soon(meanwhile)
            await wait_all_tasks_blocked()
            mounted.store.unlock()
    return found


async def test_attributes_set_while_it_is_filled_stay(mounted: Mounted) -> None:
    async def meanwhile() -> None:
        assert mounted.told("large").st_mtime_ns == OLD_NS
        assert mounted.told("large").st_blocks >= len(LARGE) // 512
        await mounted.setattr("large", mode=0o640, mtime_ns=77)
        assert mounted.told("large").st_mtime_ns == 77

    assert await while_filled(mounted, "large", meanwhile) == [LARGE]
    await mounted.fill_all()
    found = (mounted.root / "large").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o640, 77)


async def test_a_file_that_is_unlinked_while_it_is_filled_is_forgotten(mounted: Mounted) -> None:
    async def meanwhile() -> None:
        mounted.fs.unlink(mounted.number("shared"), b"large")
        assert len(mounted.absent.by_ino) == 3

    assert await while_filled(mounted, "large", meanwhile) == ["ESTALE"]
    descriptors = len(os.listdir("/proc/self/fd"))
    new = mounted.fs.create(mounted.number("shared"), b"large", stat.S_IFREG | 0o644, os.O_RDWR, ME)[2]
    mounted.fs.content.write(new, 0, b"another file, perhaps of the same number")
    mounted.fs.content.release(new)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    await mounted.fill_all()
    assert await mounted.read("large") == b"another file, perhaps of the same number"
    mounted.check()


async def test_emptying_a_file_that_is_filled_stops_that(mounted: Mounted) -> None:
    async def meanwhile() -> None:
        handle = await mounted.open("large", os.O_WRONLY | os.O_TRUNC)
        mounted.fs.content.write(handle, 0, b"new")
        mounted.fs.content.release(handle)

    assert await while_filled(mounted, "large", meanwhile) in ([b"new"], [b""])
    await mounted.fill_all()
    assert (mounted.root / "large").read_bytes() == b"new"
    assert mounted.mark("large") is None
    mounted.check()


async def test_emptying_an_absent_file_needs_no_store(mounted: Mounted) -> None:
    await mounted.setattr("large", size=0)
    handle = await mounted.open("note", os.O_WRONLY | os.O_TRUNC)
    mounted.fs.content.release(handle)
    assert mounted.store.gets == 0
    assert mounted.mark("large") is mounted.mark("note") is None
    assert mounted.absent.files == 2
    mounted.check()


async def test_replacing_an_absent_file_forgets_it(mounted: Mounted) -> None:
    handle = mounted.fs.create(mounted.number("shared"), b"new", stat.S_IFREG | 0o644, os.O_RDWR, ME)[2]
    mounted.fs.content.write(handle, 0, b"new")
    mounted.fs.content.release(handle)
    await mounted.rename("shared/new", "shared/large")
    assert mounted.absent.files == 3
    await mounted.fill_all()
    assert await mounted.read("large") == b"new"
    mounted.check()


async def test_what_goes_to_another_region_has_its_content(mounted: Mounted) -> None:
    mounted.store.error = StoreError("injected: down")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mounted.rename("shared/directory", "workspace/directory")
    assert caught.value.errno == errno.EXDEV
    mounted.store.error = None
    await mounted.rename("shared/directory", "workspace/directory")
    assert (mounted.home.tree / "workspace" / "directory" / "inside").read_bytes() == b"inside"
    assert not os.listxattr(mounted.home.tree / "workspace" / "directory" / "inside")
    assert mounted.absent.files == 2
    mounted.check()


async def test_nothing_of_a_fill_happens_while_the_home_stands_still(mounted: Mounted) -> None:
    async with trio.open_nursery() as nursery:
        with mounted.ops.gate.closed():
            nursery.start_soon(mounted.fill_all)
            await mounted.store.arrived()
            await wait_all_tasks_blocked()
            before = {item.state.name for item in mounted.absent.by_ino.values()}
    assert before == {"ABSENT"}
    assert mounted.backfill.as_dict()["state"] == "complete"


async def test_files_are_found_wherever_they_were_renamed_to(mounted: Mounted) -> None:
    await mounted.rename("shared/directory", "shared/elsewhere")
    await mounted.rename("shared/large", "shared/elsewhere/small")
    await mounted.ops.forget([(inode.nodeid, inode.lookups) for inode in mounted.inodes.known()])
    await mounted.fill_all()
    assert mounted.backfill.as_dict()["state"] == "complete"
    assert (mounted.root / "elsewhere" / "inside").read_bytes() == b"inside"
    assert (mounted.root / "elsewhere" / "small").read_bytes() == LARGE


async def test_the_background_outlasts_an_outage(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill, "FIRST_RETRY_S", 0.001)
    mounted.store.error = StoreError("injected: down")
    async with mounted.background(), trio.open_nursery() as nursery:
        nursery.start_soon(mounted.backfill.run)
        for _ in range(6):  # more than one attempt makes
            await mounted.store.arrived()
        assert mounted.backfill.as_dict()["absent_files"] == 4
        mounted.store.error = None
    assert mounted.backfill.as_dict() == {
        "absent_files": 0, "absent_bytes": 0, "failed_files": 0, "state": "complete",
    }  # fmt: skip


async def test_after_all_is_here_a_commit_reads_nothing(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mounted.fill_all()

    def no_reading(*_: object) -> None:
        raise AssertionError("a file is read again")

    monkeypatch.setattr(scan, "hash_file", no_reading)
    assert mounted.run.another_process().commit(SILENT, "end").number is None


async def test_small_contents_come_in_few_requests(tmp_path: Path, store: Lock) -> None:
    first = Run(tmp_path / "first", store, "e1")
    for number in range(5000):
        first.write(f"d{number % 50}/{number}", os.urandom(1024))
    first.commit()
    before = picture(first.root)
    mounted = Mounted(tmp_path, store)
    await mounted.fill_all()
    assert 0 < store.gets <= 20
    assert picture(mounted.root) == before
    mounted.check()


def test_packs_come_first_then_the_smaller_and_what_was_modified_lately(tmp_path: Path) -> None:
    part = Part(tmp_path, local_store(tmp_path), "a", lambda _: None)

    def item(name: str, size: int, mtime_ns: int, place: str) -> Item:
        entry = Entry(
            path=name.encode(),
            type="file",
            mode=0o644,
            mtime_ns=mtime_ns,
            size=size,
            sha256=name,
            object=place,
        )
        return Item(part, 0, entry)

    works = in_order(
        [
            item("huge and new", 40 * MiB, 9, "1"),
            item("large and old", 5 * MiB, 1, "2"),
            item("large and new", 5 * MiB, 2, "3"),
            item("small and old", 10, 1, "4"),
            item("small and new", 10, 3, "5"),
        ]
    )
    assert [work.run.contents[0].path.decode() for work in works] == [
        "small and new", "small and old", "large and new", "large and old", "huge and new",
    ]  # fmt: skip


async def test_a_killed_process_is_resumed_by_the_marks(mounted: Mounted) -> None:
    await mounted.setattr("note", size=0)
    fd = os.open(mounted.root / "note", os.O_RDWR)
    marks.write(fd, marks.Mark("0" * 64))  # killed between emptying it and removing its mark
    os.close(fd)
    fd = os.open(mounted.root / "large", os.O_RDWR)
    mark = marks.read(fd)
    assert mark is not None
    marks.write(fd, marks.Mark(mark.sha256, (OLD_NS, 0o600)))  # killed while it was written
    os.write(fd, b"worthless")
    os.close(fd)
    mounted.absent = Absent()
    mounted.run.another_process().resume(mounted.absent)
    assert mounted.absent.files == 3
    mounted.serve()
    assert mounted.told("large").st_mtime_ns == OLD_NS
    await mounted.fill_all()
    assert await mounted.read("large") == LARGE
    assert await mounted.read("note") == b""
    assert mounted.mark("note") is None
    assert mounted.told("large").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("lost", [(), ("index.db",), ("index.db", "index.base")])
async def test_contents_are_found_though_the_index_is_lost(mounted: Mounted, lost: tuple[str, ...]) -> None:
    mounted.run.index.close()
    for name in lost:
        (mounted.run.home / name).unlink()
    mounted.absent = Absent()
    mounted.run.another_process().resume(mounted.absent)
    mounted.serve()
    await mounted.fill_all()
    assert mounted.backfill.as_dict()["state"] == "complete"
    assert await mounted.read("large") == LARGE


def test_a_commit_takes_absent_files_by_their_marks(mounted: Mounted) -> None:
    (mounted.root / "large").rename(mounted.root / "moved")
    (mounted.root / "note").chmod(0o600)
    assert mounted.run.another_process().commit(SILENT, "end").number == 2
    assert (mounted.store.gets, mounted.store.puts) == (0, 1)
    later = Run(mounted.home.path, mounted.store, "e3")
    later.restore()
    assert (later.root / "moved").read_bytes() == LARGE
    assert (later.root / "note").read_bytes() == NOTE
    assert (later.root / "note").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_being_filled_is_committed_as_it_will_be(mounted: Mounted) -> None:
    with (mounted.root / "large").open("r+b") as file:
        mark = marks.read(file.fileno())
        assert mark is not None
        marks.write(file.fileno(), marks.Mark(mark.sha256, (OLD_NS, 0o644)))
        file.write(b"half of it")
    assert mounted.run.another_process().commit(SILENT, "end").number is None


def test_an_absent_content_that_nobody_else_names_is_copied_from_its_old_place(
    mounted: Mounted, tmp_path: Path
) -> None:
    other = Run(tmp_path / "other", mounted.store, "e4")
    other.restore()
    (other.root / "large").unlink()
    (other.root / "note").unlink()
    other.commit()
    (mounted.root / "large").chmod(0o600)  # what one side changes and the other removes is kept
    (mounted.root / "note").chmod(0o600)
    report = mounted.run.another_process().commit(SILENT, "end")
    assert report.number == 3
    later = Run(mounted.home.path, mounted.store, "e5")
    later.restore()
    assert (later.root / "large").read_bytes() == LARGE
    assert (later.root / "note").read_bytes() == NOTE


def test_an_absent_text_is_merged_by_what_the_store_has(mounted: Mounted, tmp_path: Path) -> None:
    other = Run(tmp_path / "other", mounted.store, "e4")
    other.restore()
    with (other.root / "note").open("ab") as file:
        file.write(b"theirs\n")
    (other.root / "note").chmod(0o640)
    other.commit()
    (mounted.root / "note").chmod(0o600)
    mounted.run.index.close()
    for name in ("index.db", "index.base"):
        (mounted.run.home / name).unlink()  # so nobody knows what it was before
    mounted.run.another_process().commit(SILENT, "end")
    later = Run(mounted.home.path, mounted.store, "e5")
    later.restore()
    kept = [path.read_bytes() for path in later.root.rglob("note*") if path.is_file()]
    assert NOTE + b"theirs\n" in kept


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_an_ordinary_user_fills_what_its_owner_may_not_touch() -> None:
    base = base_directory()
    os.chown(base, UID, UID)

    def fill() -> tuple[object, ...]:
        store = Lock(local_store(base))
        first = Run(base / "first", store, "e1")
        for name, mode in (("readonly", 0o444), ("nobody", 0), ("setid", 0o4755), ("locked/inside", 0o200)):
            first.write(name, NOTE).chmod(mode)
            os.utime(first.root / name, ns=(OLD_NS, OLD_NS))
        first.write("large setid", LARGE).chmod(0o6711)
        os.utime(first.root / "large setid", ns=(OLD_NS, OLD_NS))
        (first.root / "locked").chmod(0)
        first.commit()
        mounted = Mounted(base, store)
        absent = mounted.absent.files
        unchanged = mounted.run.another_process().commit(SILENT, "end").number
        trio.run(mounted.fill_all)
        return (
            absent,
            unchanged,
            mounted.backfill.as_dict()["state"],
            picture(mounted.root) == picture(first.root),
            mounted.run.another_process().commit(SILENT, "end").number,
        )

    assert in_child(fill, uid=UID) == (5, None, "complete", True, None)
    remove_base(base)
