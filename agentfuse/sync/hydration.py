"""Filling absent files of a mounted home when they are opened, and making durable what was filled.

Opening waits for one fetch of that content, however many open it; the rest is ``backfill``'s. Contents are
verified before anybody sees them. Knows no FUSE; the way of a file is told in ``absent``.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from io import FileIO

import trio

from agentfuse.errors import AgentfuseError, IntegrityError, ObjectNotFoundError
from agentfuse.home import marks
from agentfuse.home.walk import SETTLED_NS
from agentfuse.killpoints import passing
from agentfuse.snapshots.layout import object_key
from agentfuse.sync.absent import Absent, Item, Part, Settled, State
from agentfuse.sync.contents import read_content
from agentfuse.sync.fetch import copy_all, stream_into, write_all
from agentfuse.sync.hydrate import sync_filesystem
from agentfuse.sync.upload import SMALL_BYTES

_log = logging.getLogger(__name__)

STEP = 32
"""Files that are dealt with on the trio thread before others get their turn."""

_OPENERS = 8
_SETTLERS = 4
_SETTLE_AT = 512
"""So many files are made durable together, if they come fast; each holds a descriptor until then."""

_SETTLE_AFTER_S = 0.5
_UNSETTLED = (State.HERE, State.SETTLING)
HOPELESS = (IntegrityError, ObjectNotFoundError)
"""Errors of a content that another attempt does not help against."""


async def _at_once() -> None:
    pass


class Hydration:
    """Fills what is in ``absent``. ``passed``, once given, is awaited before a file's state changes."""

    def __init__(self, absent: Absent) -> None:
        self.absent = absent
        self.passed: Callable[[], Awaitable[None]] = _at_once
        self._openers = trio.CapacityLimiter(_OPENERS)
        self._settlers = trio.CapacityLimiter(_SETTLERS)
        self._arrived = trio.Event()
        self._is_full = trio.Event()
        self._has_room = trio.Event()
        self._is_refused = False  # by the disk, as was said already

    # Filling ----------------------------------------------------------------------------------------

    async def need(self, item: Item, opened: Callable[[], int], *, writing: bool) -> None:
        """Bring a file one step nearer to where it may be opened; the caller looks again then.

        ``opened`` opens it as ``open_to_fill`` does. Raises ``OSError`` when its content cannot be had:
        EIO, or what the local disk says.
        """
        step = item.step
        if item.state is State.ABSENT:
            await trio.lowlevel.checkpoint()
            await self.room()
            if item.emptiers:
                return  # who stopped the fill comes first, and is about to
            if item.state is State.ABSENT and self.absent.by_ino.get(item.ino) is item:
                await self._fetch(item, opened)
        elif item.state is State.HERE and writing:
            code = await self._settle([item], os.fsync)
            if code:
                raise OSError(code, "the content cannot be made durable")
        elif step is not None:
            await step.done.wait()
            if step.errno:
                raise OSError(step.errno, "the content cannot be had")

    async def _fetch(self, item: Item, opened: Callable[[], int]) -> None:
        if not self.absent.claim(item, opened()):
            self.absent.forget(item.ino)  # it has no mark: there is nothing to wait for
            return
        step = item.step
        assert step is not None
        error = await self.fill([item], partial(fetch_into, [item]), self._openers)
        if error is not None and not isinstance(error, HOPELESS):
            self.absent.blame(item, str(error), is_hopeless=False)
        if step.errno:
            raise OSError(step.errno, "the content cannot be had")

    async def stopped(self, item: Item) -> None:
        """Stop filling a file, whose content nobody needs any more."""
        item.emptiers += 1
        try:
            while item.state is State.FILLING and item.step is not None:
                item.is_abandoned = True
                await item.step.done.wait()
        finally:
            item.emptiers -= 1

    async def fill(
        self, items: list[Item], work: Callable[[], None], limiter: trio.CapacityLimiter
    ) -> Exception | None:
        """Fill claimed files by ``work``, in a thread; the error that prevented it, which all of them get."""
        error: Exception | None = None
        try:
            # Cancelled, the thread goes on by itself: the files stay FILLING, and their marks say so.
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except Exception as problem:  # noqa: BLE001  # whoever waits for these files must be answered
            error = problem
            if not isinstance(error, (AgentfuseError, OSError)):
                _log.error("unexpected error", exc_info=error)
        await self.passed()
        passing("fill.written")
        for item in items:
            if error is None or item.is_abandoned:
                self.absent.filled(item)
            else:
                if isinstance(error, HOPELESS):
                    self.absent.blame(item, str(error), is_hopeless=True)
                self.absent.failed(item, error)
        self._arrived.set()
        if len(self.absent.here) >= _SETTLE_AT:
            self.hurry()
        return error

    # Making durable ---------------------------------------------------------------------------------

    async def room(self) -> None:
        """Wait while too many files wait to be made durable: each holds a descriptor."""
        while len(self.absent.here) >= 2 * _SETTLE_AT:
            await self._has_room.wait()

    async def settled(self) -> None:
        """Wait until nothing that is here waits to be made durable."""
        self.hurry()
        while self.absent.by_ino and any(i.state in _UNSETTLED for i in self.absent.by_ino.values()):
            await self._has_room.wait()

    def hurry(self) -> None:
        """Do not wait for more files before those that are here are made durable."""
        self._is_full.set()

    async def run(self) -> None:
        """Make durable what comes, until cancelled."""
        while True:
            await self._arrived.wait()
            with trio.move_on_after(_SETTLE_AFTER_S):
                await self._is_full.wait()
            self._arrived = trio.Event()
            self._is_full = trio.Event()
            while items := list(self.absent.here.values())[: 2 * _SETTLE_AT]:
                if await self._settle(items, sync_filesystem):
                    self._arrived.set()
                    await trio.sleep(_SETTLE_AFTER_S)
                    break
            self._has_room.set()
            self._has_room = trio.Event()

    async def _settle(self, items: list[Item], sync: Callable[[int], None]) -> int:
        """Make files that are HERE durable, and then like any other. 0, or the errno of a disk's refusal."""
        for item in items:
            self.absent.settling(item)
        try:
            await self._in_thread(sync, items[0].fd)
            passing("settle.synced")
            for count, item in enumerate(items):
                if count % STEP == 0:
                    await self._turn()
                marks.remove(item.fd)
                passing("settle.unmarked")
            await self._in_thread(sync, items[0].fd)
        except OSError as error:
            if not self._is_refused:
                _log.warning("restored files cannot be made durable, and will be tried again: %s", error)
            self._is_refused = True
            for item in items:
                self.absent.unsettled(item, error.errno or errno.EIO)
            return error.errno or errno.EIO
        self._is_refused = False
        await self._release(items, with_prints=sync is sync_filesystem)
        return 0

    async def _release(self, items: list[Item], *, with_prints: bool) -> None:
        prints: dict[Part, list[Settled]] = {}
        if with_prints:
            await trio.sleep(SETTLED_NS / 1e9)
        for count, item in enumerate(items):
            if count % STEP == 0:
                await self._turn()
            if with_prints and self.absent.by_ino.get(item.ino) is item:
                prints.setdefault(item.part, []).extend(_print(item))
            self.absent.release(item)
        for part, settled in prints.items():
            try:
                await self._in_thread(part.settled, settled)
            except AgentfuseError as error:
                _log.warning("the next commit has more to read: %s", error)

    async def _turn(self) -> None:
        """Let others go on, and wait until files may change."""
        await trio.lowlevel.checkpoint()
        await self.passed()

    async def _in_thread(self, work: Callable[..., object], *arguments: object) -> None:
        await trio.to_thread.run_sync(
            partial(work, *arguments), abandon_on_cancel=True, limiter=self._settlers
        )


def fetch_into(items: list[Item]) -> None:
    """Fetch one content into the claimed files that all have it; in a thread.

    Returns early if they were abandoned meanwhile. Raises as ``read_content`` does, and ``OSError``.
    """
    first, *others = items
    entry, part = first.entry, first.part
    if not entry.object:
        raise ObjectNotFoundError(f"nothing says where the store has the content {entry.sha256}")
    with _opened(first) as file:
        if entry.size < SMALL_BYTES:
            write_all(file, memoryview(read_content(part.store, part.agent, entry)))
        else:
            key = object_key(part.agent, entry.object)
            if not stream_into(file, part.store, key, entry, lambda: first.is_abandoned):
                for other in others:
                    other.is_abandoned = True
                return
        for other in others:
            with _opened(other) as copy:
                copy_all(file, copy)


def _opened(item: Item) -> FileIO:
    return open(item.fd, "r+b", buffering=0, closefd=False)


def _print(item: Item) -> list[Settled]:
    """What the index may be told of a file that nobody could write to yet; nothing if that is not certain."""
    found = os.fstat(item.fd)
    if found.st_ctime_ns >= time.time_ns() - SETTLED_NS or os.listxattr(item.fd):
        return []
    return [Settled(item.entry.path, item.entry.sha256, found.st_ino, found.st_ctime_ns)]
