"""Inboxes without a mount: which files are complete, and what happens when removing or putting fails."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agentfuse.bindings import Inbox as Binding
from agentfuse.door.doors import OnCollision, Put
from agentfuse.errors import AgentfuseError, BusyError, ConfigError, EnvironmentProblem
from agentfuse.events import dropped
from agentfuse.events import inbox as inbox_module
from agentfuse.events.arrivals import Operation, Refused
from agentfuse.events.bookmarks import Bookmarks, Drop
from agentfuse.events.dropped import NotReady
from agentfuse.events.inbox import Inbox
from agentfuse.events.inboxes import open_inboxes
from agentfuse.events.log import EventLog
from agentfuse.home.quota import Account
from agentfuse.regions import DEFAULT_REGIONS, Creator

DOWNLOADS = next(region for region in DEFAULT_REGIONS if region.name == "downloads")


class Door:
    """Puts into a plain directory; fails first as it is told."""

    def __init__(self, region: Path) -> None:
        self.region = region
        self.device = 0
        self.errors: list[Exception] = []
        self.puts: list[bytes] = []
        self.loses_answers = False

    async def put_fd(
        self,
        region: str,
        path: bytes,
        fd: int,
        *,
        creator: Creator,
        on_collision: OnCollision = "number",
        mode: int = 0o644,
    ) -> Put:
        if self.errors and not self.loses_answers:
            raise self.errors.pop(0)
        name = os.fsdecode(path)
        while (self.region / name).exists():
            name += "+"
        (self.region / name).write_bytes(os.pread(fd, 10_000_000, 0))
        self.puts.append(os.fsencode(name))
        if self.errors:
            raise self.errors.pop(0)
        return Put(os.fsencode(name), 0)


class Bound:
    """An inbox and its region."""

    def __init__(self, base: Path) -> None:
        self.inbox_path = base / "inbox"
        self.region = base / "tree" / "downloads"
        self.inbox_path.mkdir()
        self.region.mkdir(parents=True)
        self.door = Door(self.region)
        self.account = Account(DOWNLOADS)
        self.log = EventLog(base / "events.db", base / "tree")
        self.told: list[Operation] = []
        self.inbox = self.new_inbox()

    def new_inbox(self) -> Inbox:
        """As the next mount has it."""
        return Inbox(
            self.inbox_path,
            os.open(self.inbox_path, os.O_RDONLY),
            creator=Creator.ENVIRONMENT,
            tree=self.region,
            doors=self.door,
            account=self.account,
            teller=self,
            bookmarks=Bookmarks(self.log),
        )

    def put(self, region: str, operation: Operation) -> None:
        """An event."""
        self.told.append(operation)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.inbox.run)
            yield
            nursery.cancel_scope.cancel()

    async def until(self, is_so: Callable[[], bool]) -> None:
        with trio.fail_after(30):
            while not is_so():
                await wait_all_tasks_blocked(0.005)

    def kept(self) -> list[str]:
        return sorted(os.listdir(self.inbox_path))


@pytest.fixture
def bound(tmp_path: Path) -> Bound:
    return Bound(tmp_path)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "RESCAN_S", 0.05)


def settled(path: Path) -> None:
    """Wait until a file counts as old enough."""
    root = os.open(path.parent, os.O_RDONLY)
    while True:
        try:
            os.close(dropped.open_complete(root, os.fsencode(path.name)))
        except NotReady as error:
            assert error.soon
        else:
            os.close(root)
            return


async def test_what_cannot_be_removed_is_put_once_all_the_same(
    bound: Bound, monkeypatch: pytest.MonkeyPatch, _patient: None
) -> None:
    real, failures = dropped.remove, [PermissionError(13, "Permission denied")] * 3

    def remove(root: int, path: bytes, fd: int, was: os.stat_result) -> bool:
        if failures:
            raise failures.pop()
        return real(root, path, fd, was)

    monkeypatch.setattr(dropped, "remove", remove)
    (bound.inbox_path / "a").write_text("x")
    async with bound.running():
        await bound.until(lambda: bound.kept() == [])
    assert bound.door.puts == [b"a"]


async def test_a_put_whose_answer_was_lost_is_not_repeated(bound: Bound, _patient: None) -> None:
    bound.door.loses_answers = True
    bound.door.errors = [BusyError("unmounting"), EnvironmentProblem("the door died")]
    (bound.inbox_path / "a").write_text("a")
    (bound.inbox_path / "b").write_text("b")
    async with bound.running():
        await bound.until(lambda: bound.kept() == [])
    assert sorted(bound.door.puts) == [b"a", b"b"]


async def test_an_error_is_shown_for_as_long_as_there_is_one(bound: Bound, _patient: None) -> None:
    (bound.inbox_path / "a").write_text("x")
    bound.door.errors = [AgentfuseError("no")] * 3
    async with bound.running():
        await bound.until(lambda: bool(bound.inbox.as_dict()["last_error"]))
        assert bound.inbox.as_dict()["last_error"] == "'a' stays there: no"
        await bound.until(lambda: bound.inbox.as_dict()["last_error"] is None)
        assert bound.kept() == []


async def test_an_inbox_is_not_followed_over_a_symlink_nor_onto_the_mount(
    bound: Bound, tmp_path: Path, _patient: None
) -> None:
    away, other = tmp_path / "away", tmp_path / "other"
    other.mkdir()
    (other / "theirs").write_text("x")
    async with bound.running():
        bound.inbox_path.rename(away)
        bound.inbox_path.symlink_to(other)
        await bound.until(lambda: "no inbox: [Errno 20]" in str(bound.inbox.as_dict()["last_error"]))
        bound.inbox_path.unlink()
        bound.door.device = os.stat(tmp_path).st_dev  # as if a mount of it were there
        other.rename(bound.inbox_path)
        await bound.until(lambda: "into the mount itself" in str(bound.inbox.as_dict()["last_error"]))
        (away / "ours").write_text("x")
        await bound.until(lambda: not (away / "ours").exists())
        assert bound.kept() == ["theirs"]
        bound.door.device = 0
        await bound.until(lambda: bound.kept() == [])
    assert bound.door.puts == [b"ours", b"theirs"]


async def test_what_was_refused_is_told_once_even_over_restarts(bound: Bound, _patient: None) -> None:
    (bound.inbox_path / "a").write_text("x")
    bound.door.errors = [AgentfuseError("no")] * 3
    async with bound.running():
        await bound.until(lambda: len(bound.door.errors) < 2)
    bound.inbox = bound.new_inbox()
    bound.inbox.settle()
    async with bound.running():
        await bound.until(lambda: bound.kept() == [])
    assert [type(each) for each in bound.told] == [Refused]


async def test_a_file_that_is_written_to_while_it_is_taken_stays_for_another_time(
    bound: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bound.inbox_path / "a"
    path.write_text("old")
    settled(path)
    real = bound.door.put_fd

    async def put_fd(*arguments: object, **options: object) -> Put:
        done = await real(*arguments, **options)  # type: ignore[arg-type]
        if len(bound.door.puts) == 1:
            path.write_text("new and longer")
        return done

    monkeypatch.setattr(bound.door, "put_fd", put_fd)
    async with bound.running():
        await bound.until(lambda: bound.kept() == [])
    assert [(bound.region / name).read_text() for name in ("a", "a+")] == ["old", "new and longer"]


def test_what_an_earlier_run_put_and_did_not_remove_is_removed_before_the_mount(bound: Bound) -> None:
    for name, is_put in (("put", True), ("put.txt", True), ("not-put", False), ("old", False)):
        (bound.inbox_path / name).write_text(name)
        if is_put:
            stem, suffix = os.path.splitext(name)
            shutil.copy(bound.inbox_path / name, bound.region / f"{stem} (1){suffix}")
        st = (bound.inbox_path / name).stat()
        since_ns = (bound.inbox_path / name).stat().st_ctime_ns
        Bookmarks(bound.log).set_drop(
            str(bound.inbox_path), name.encode(), Drop(dropped.identity(st), since_ns)
        )
    (bound.region / "old").write_text("OLD")  # as long, but another's
    (bound.region / "another").write_text("not-put")  # the same content, which came at the same time
    bound.inbox.settle()
    assert bound.kept() == ["not-put", "old"]
    assert Bookmarks(bound.log).drops(str(bound.inbox_path)) == {}


@pytest.mark.parametrize("how", ["write", "append", "mapping"])
def test_nobodys_file_is_complete_while_somebody_can_write_to_it(tmp_path: Path, how: str) -> None:
    path, root = tmp_path / "a", os.open(tmp_path, os.O_RDONLY)
    path.write_text("x")
    settled(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "ab" if how == "append" else "r+b"))
        if how == "mapping":
            mapped = stack.enter_context(mmap.mmap(file.fileno(), 0))
            file.close()
            assert mapped[0] == ord("x")
        with pytest.raises(NotReady) as caught:
            dropped.open_complete(root, b"a")
        assert not caught.value.soon
    settled(path)
    os.close(root)


def test_a_writer_who_comes_while_we_look_neither_fails_nor_ends_us(tmp_path: Path) -> None:
    path, root = tmp_path / "a", os.open(tmp_path, os.O_RDONLY)
    path.write_text("x")
    over = threading.Event()
    opens = 0

    def write() -> None:
        nonlocal opens
        while not over.is_set():
            os.close(os.open(path, os.O_WRONLY))
            opens += 1

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(3000):
        with contextlib.suppress(NotReady):
            os.close(dropped.open_complete(root, b"a"))
    over.set()
    writer.join()
    assert opens > 0


def test_without_leases_a_file_must_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root = tmp_path / "a", os.open(tmp_path, os.O_RDONLY)
    path.write_text("x")
    settled(path)
    monkeypatch.setattr(dropped, "_has_writers", lambda _: None)
    with pytest.raises(NotReady) as caught:
        dropped.open_complete(root, b"a")
    assert caught.value.soon
    monkeypatch.setattr(dropped, "QUIET_S", 0.0)
    settled(path)


def test_directories_that_cannot_be_inboxes_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "state/below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "state")
    paths = [
        tmp_path / "none",
        tmp_path / "file",
        tmp_path / "state/below",
        tmp_path,
        tmp_path / "link/below",
    ]
    bindings = [Binding(path, "downloads", Creator.ENVIRONMENT) for path in paths]
    with pytest.raises(ConfigError) as caught:
        open_inboxes(bindings, {"state directory": tmp_path / "state"}, agent="a", execution="e")
    found = caught.value.problems
    assert [problem.split(":")[0] for problem in found] == [f"inbox[{n}].directory" for n in range(5)]
    fixes = ["make it", "Not a directory", *["one in the other"] * 3]
    for problem, fix in zip(found, fixes, strict=True):
        assert fix in problem


def test_an_inbox_belongs_to_one_mount_and_each_run_may_have_its_own(tmp_path: Path) -> None:
    (tmp_path / "e1").mkdir()
    (tmp_path / "e2").mkdir()
    shared, own = ([Binding(tmp_path / name, "downloads", Creator.USER)] for name in ("e1", "{execution}"))
    (held,) = open_inboxes(shared, {}, agent="a", execution="e1")
    with pytest.raises(BusyError, match="belongs to another mount"):
        open_inboxes(own, {}, agent="a", execution="e1")
    assert open_inboxes(own, {}, agent="a", execution="e2")[0].path == tmp_path / "e2"
    os.close(held.fd)
    assert open_inboxes(own, {}, agent="a", execution="e1")[0].path == tmp_path / "e1"


def test_a_file_that_was_rewritten_and_given_its_old_mtime_is_not_removed(tmp_path: Path) -> None:
    dropped_file = tmp_path / "report"
    dropped_file.write_bytes(b"before")
    root, fd = os.open(tmp_path, os.O_RDONLY), os.open(dropped_file, os.O_RDONLY)
    try:
        was = os.fstat(fd)
        dropped_file.write_bytes(b"after!")
        os.utime(dropped_file, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert not dropped.remove(root, b"report", fd, was)
        assert dropped_file.read_bytes() == b"after!"
        assert dropped.remove(root, b"report", fd, os.fstat(fd))
    finally:
        os.close(root)
        os.close(fd)
