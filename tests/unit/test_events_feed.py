"""From the filesystem to the subscribers: nothing is lost, nobody waits for anybody."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agentfuse.errors import EnvironmentProblem, NotFoundError
from agentfuse.events import feed as feed_module
from agentfuse.events.arrivals import Replaced
from agentfuse.events.feed import EventFeed, Line, RegionObserver
from agentfuse.events.log import Event, EventLog, Happened
from agentfuse.home.observer import Found
from agentfuse.home.tree import regular_files


class FailingLog(EventLog):
    """A log whose disk is full for a while."""

    failures = 0
    error: Exception = EnvironmentProblem("disk is full")

    def append(self, batch: Sequence[Happened], *, silently: bool = False) -> list[Event]:
        if self.failures:
            self.failures -= 1
            raise self.error
        return super().append(batch, silently=silently)


class Downloads:
    """A region on disk and its observer, as the filesystem calls it."""

    def __init__(self, base: Path, *, kept: int = 100_000) -> None:
        self.path = base / "tree" / "downloads"
        self.path.mkdir(parents=True, exist_ok=True)
        self.log = FailingLog(base / "events.db", base / "tree", kept=kept)
        self.feed = EventFeed(self.log, execution="e", agent="a")
        self.observer: RegionObserver = self.feed.observer("downloads", self.look)

    def look(self) -> Found:
        return [(path[10:], st) for path, st in regular_files(self.path.parent, b"downloads")]

    def write(self, name: str) -> None:
        (self.path / name).write_text(name)
        self.observer.completed(os.fsencode(name), (self.path / name).stat(), "IN_CLOSE_WRITE")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.feed.run)
            yield
            self.feed.stop()
            await self.feed.ended.wait()

    async def heard(self, since: int | None = None) -> list[str]:
        lines = [
            line async for some in self.feed.subscribe(since, region=None, follow=False) for line in some
        ]
        return [json.loads(line.text)["path"] for line in lines]


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path)


async def test_what_is_in_the_log_already_but_not_told_yet_breaks_off_nobody(tmp_path: Path) -> None:
    first, written = Downloads(tmp_path), Downloads(tmp_path)
    async with first.running():
        first.write("one")
    behind = Downloads(tmp_path)
    async with written.running():
        written.write("two")
    assert await behind.heard() == ["one"]


async def test_what_is_put_before_the_end_is_in_the_log_at_the_end(downloads: Downloads) -> None:
    async with downloads.running():
        for number in range(2000):
            downloads.write(str(number))
    assert await downloads.heard() == [str(number) for number in range(2000)]
    assert await downloads.heard(1990) == [str(number) for number in range(1990, 2000)]
    assert [event.seq for event in downloads.log.read(0, 5000)] == list(range(1, 2001))


async def test_a_region_without_events_opens_no_database(downloads: Downloads) -> None:
    downloads.feed.compare("downloads", [])
    async with downloads.running():
        pass
    assert not downloads.log.exists()


async def test_a_follower_gets_what_comes_then_that_this_was_all_then_the_end(downloads: Downloads) -> None:
    got: list[list[Line]] = []
    quiet = trio.Event()

    async def follow() -> None:
        feed = downloads.feed
        async for some in feed.subscribe(None, region="downloads", follow=True, heartbeats=True):
            got.append(some)
            if not some:
                quiet.set()

    async with trio.open_nursery() as nursery, downloads.running():
        nursery.start_soon(follow)
        await quiet.wait()
        assert got == [[]]
        quiet = trio.Event()
        downloads.write("a")
        await quiet.wait()
        assert [len(some) for some in got] == [0, 1, 0]
        downloads.write("b")
    assert [line.seq for some in got for line in some] == [1, 2]
    assert downloads.feed.as_dict()["followers"] == 0


async def test_one_who_comes_late_or_lags_reads_from_the_database(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_RECENT", 10)
    monkeypatch.setattr(feed_module, "_BATCH", 20)
    async with downloads.running():
        slow = downloads.feed.subscribe(None, region=None, follow=True, heartbeats=True)
        downloads.write("first")
        seen = [line.seq for line in await anext(slow)] if (await anext(slow)) == [] else []
        for number in range(300):
            downloads.write(str(number))
            if number % 50 == 0:
                await trio.testing.wait_all_tasks_blocked(0.01)
    seen += [line.seq async for some in slow for line in some]
    assert seen == list(range(1, 302))
    assert await downloads.heard() == ["first", *map(str, range(300))]


async def test_a_cursor_beyond_the_log_or_before_what_is_kept_is_an_error(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, kept=10)
    async with downloads.running():
        for number in range(100):
            downloads.write(str(number))
    again = Downloads(tmp_path, kept=10)
    with pytest.raises(NotFoundError, match="newest event is number 100, not 101"):
        await again.heard(101)
    async with again.running():
        again.write("one more")
    late = Downloads(tmp_path, kept=10)
    with pytest.raises(NotFoundError, match=r"events before number \d+ are not kept"):
        await late.heard(5)
    assert (await late.heard())[-1] == "one more"
    with pytest.raises(NotFoundError, match="no region 'shared' notifies"):
        await anext(late.feed.subscribe(None, region="shared", follow=False))


async def test_a_full_disk_delays_events_and_loses_none(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed_module, "_RETRY_S", 0.001)
    downloads.log.failures = 5
    async with downloads.running():
        downloads.write("a")
        downloads.write("b")
        follower = downloads.feed.subscribe(None, region=None, follow=True, heartbeats=True)
        while not (await anext(follower)):
            pass
        await follower.aclose()
    assert await downloads.heard() == ["a", "b"]
    assert len([record for record in caplog.records if "disk is full" in record.message]) == 1


async def test_a_disk_that_stays_full_does_not_hold_the_end_up_and_the_next_start_tells(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feed_module, "_RETRY_S", 0.001)
    downloads.log.failures = 1_000_000
    async with downloads.running():
        downloads.write("a")
    assert await downloads.heard() == []
    again = Downloads(tmp_path)
    again.feed.compare("downloads", again.look())
    async with again.running():
        pass
    assert await again.heard() == ["a"]


async def test_more_than_may_wait_is_found_by_looking_again(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MOST_WAITING", 50)
    async with downloads.running():
        for number in range(500):
            downloads.write(str(number))
        (downloads.path / "7").unlink()
        downloads.observer.replaced(b"7", [], came="", went="IN_DELETE")
    heard = await downloads.heard()
    assert sorted(set(heard)) == sorted(map(str, range(500)))
    assert [line for line in heard if heard.count(line) > 1] == ["7", "7"]


async def test_an_unexpected_error_is_logged_and_ends_nothing(
    downloads: Downloads, caplog: pytest.LogCaptureFixture
) -> None:
    downloads.log.failures, downloads.log.error = 1, OSError(errno.EIO, "odd")
    async with downloads.running():
        downloads.write("a")
        await trio.testing.wait_all_tasks_blocked(0.05)
        downloads.write("b")
    assert await downloads.heard() == ["a", "b"]
    assert caplog.text.count("unexpected error") == 1


async def test_an_error_that_stays_is_met_twice_and_the_next_start_tells(
    downloads: Downloads, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    downloads.log.failures, downloads.log.error = 1_000_000, OSError(errno.EIO, "odd")
    async with downloads.running():
        downloads.write("a")
        await downloads.feed.caught_up()
    assert caplog.text.count("unexpected error") == 2
    again = Downloads(tmp_path)
    again.feed.compare("downloads", again.look())
    async with again.running():
        pass
    assert await again.heard() == ["a"]


async def test_the_same_file_completed_twice_before_it_was_told_of_is_told_once(downloads: Downloads) -> None:
    async with downloads.running():
        downloads.write("a")
        downloads.write("a")
        downloads.write("b")
        downloads.write("a")
    assert await downloads.heard() == ["a", "b", "a"]


async def test_who_is_behind_at_the_end_leaves_the_rest_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Downloads):
        def look(self) -> Found:
            raise OSError(errno.ENOTCONN, "not mounted")

    monkeypatch.setattr(feed_module, "_MOST_WAITING", 50)
    ended = Ended(tmp_path)
    async with ended.running():
        for number in range(100):
            ended.write(str(number))
    assert len(await ended.heard()) == 50
    again = Downloads(tmp_path)
    again.feed.compare("downloads", again.look())
    async with again.running():
        pass
    assert sorted(await again.heard()) == sorted(map(str, range(100)))


async def test_a_look_that_fails_for_want_of_descriptors_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Short(Downloads):
        failures = 3

        def look(self) -> Found:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().look()

    monkeypatch.setattr(feed_module, "_RETRY_S", 0.001)
    monkeypatch.setattr(feed_module, "_MOST_WAITING", 50)
    downloads = Short(tmp_path)
    async with downloads.running():
        for number in range(100):
            downloads.write(str(number))
        with trio.fail_after(30):
            await downloads.feed.caught_up()
    assert sorted(await downloads.heard()) == sorted(map(str, range(100)))
    assert caplog.text.count("Too many open files") == 1


async def test_trees_that_come_and_go_weigh_as_much_as_their_files(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MOST_WAITING", 500)
    batches: list[list[int]] = []
    real = downloads.log.append

    def append(batch: Sequence[Happened], *, silently: bool = False) -> list[Event]:
        batches.append([len(each.operation.files) for each in batch if isinstance(each.operation, Replaced)])
        return real(batch, silently=silently)

    monkeypatch.setattr(downloads.log, "append", append)
    monkeypatch.setattr(feed_module, "_BATCH", 150)
    tree, away = downloads.path / "tree", downloads.path.parent / "away"
    tree.mkdir()
    for number in range(100):
        (tree / str(number)).write_text("x")
    found = [(b"tree/" + path.rpartition(b"/")[2], st) for path, st in downloads.look()]
    async with downloads.running():
        for _ in range(100):
            downloads.observer.replaced(b"tree", found, came="IN_MOVED_TO", went="IN_DELETE")
            downloads.observer.replaced(b"tree", [], came="", went="IN_MOVED_FROM")
        tree.rename(away)
        assert downloads.feed.as_dict()["waiting"] < 10
        await downloads.feed.caught_up()
    assert batches[0] == [100, 0]
    assert batches[-1] == [0]
    kinds = [event.kind for event in downloads.log.read(0, 5000)]
    assert kinds.count("arrived") == kinds.count("deleted") >= 100


async def test_a_subscriber_who_leaves_does_not_wait_for_a_long_transaction(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with downloads.running():
        downloads.write("a")
    late = Downloads(tmp_path)
    begun, asked, over = threading.Event(), trio.Event(), threading.Event()
    was_released: list[bool] = []
    real = late.log.read

    def hold(_: object) -> None:
        begun.set()
        was_released.append(over.wait(20))

    def read(after: int, limit: int) -> list[Event]:
        trio.from_thread.run_sync(asked.set)
        return real(after, limit)

    monkeypatch.setattr(late.log, "read", read)
    async with trio.open_nursery() as writing:
        writing.start_soon(trio.to_thread.run_sync, late.log.use, hold)
        await trio.to_thread.run_sync(begun.wait)
        async with trio.open_nursery() as subscribers:
            subscribers.start_soon(late.heard)
            await asked.wait()
            subscribers.cancel_scope.cancel()
        over.set()
    assert was_released == [True]
