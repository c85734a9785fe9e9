"""Inboxes: files that others drop into a directory outside of the home are moved through the mount.

A file is taken when it is complete, and leaves the directory only when it is durable in its region. That it
is being taken is noted before, so that whoever dies in between makes no second copy of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from agentfuse.config import format_size
from agentfuse.door.doors import OnCollision, Put
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    EnvironmentProblem,
    QuotaExceededError,
)
from agentfuse.events import dropped
from agentfuse.events.arrivals import Operation, Refused, Seen
from agentfuse.events.bookmarks import Bookmarks, Drop
from agentfuse.events.dropped import Doorbell, NotReady
from agentfuse.events.remembered import Left, Remembered
from agentfuse.home.quota import Account
from agentfuse.killpoints import passing
from agentfuse.regions import Creator

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")

log = logging.getLogger(__name__)

RESCAN_S = 60.0
"""So often the directory is looked at though nothing rang, and what was refused is tried again."""
_GATHER_S = 0.06
_RIPEN_S = 0.25
_ROOM_S = 1.0
"""So often it is seen whether there is room for what was refused."""
_EMPTIED_S = 60.0
"""So long a directory stays whose files were taken: more may come."""
_AT_ONCE = 3
"""So many files are taken at a time; one of them is put, for others need doors, too."""
_REST = 4
"""So many times as long as a look took, none follows."""
_MOST_WATCHED = 1000
"""Of a tree with more directories only the top is watched; for the rest there is the look every minute."""
_MOST_TOLD = 20
_MOST_REMEMBERED = 10_000


class DoorOf(Protocol):
    """What an inbox needs of ``door.Doors``."""

    device: int

    async def put_fd(
        self,
        region: str,
        path: bytes,
        fd: int,
        *,
        creator: Creator,
        on_collision: OnCollision = "number",
        mode: int = 0o644,
    ) -> Put: ...


class Teller(Protocol):
    """Whom events are told; an ``EventFeed``."""

    def put(self, region: str, operation: Operation) -> None: ...


class Inbox:
    """One inbox of one mount. The trio thread's.

    ``root``: a locked descriptor of its directory, which is kept; ``account``: the region's; ``tree``: the
    region's directory in the backing tree; ``teller``: None when the region does not notify.
    """

    def __init__(
        self,
        path: Path,
        root: int,
        *,
        creator: Creator,
        tree: Path,
        doors: DoorOf,
        account: Account,
        teller: Teller | None,
        bookmarks: Bookmarks,
    ) -> None:
        self._path = path
        self._name = str(path)
        self._region = account.name
        self._creator = creator
        self._root = root
        self._doors = doors
        self._account = account
        self._teller = teller
        self._told: set[tuple[bytes, str]] = set()
        self._emptied: dict[bytes, float] = {}
        self._rung = trio.Event()
        self._is_wide = False
        self._look_s = 0.0
        self._taken = 0
        self._lines_left = _MOST_TOLD
        self._last_error: str | None = None
        self._place: str | None = None  # what was told of it
        self._is_well = False
        self._limiter = trio.CapacityLimiter(_AT_ONCE)
        self._door = trio.Lock()
        self._known = Remembered(self._name, tree, bookmarks, self._limiter)

    def as_dict(self) -> dict[str, object]:
        """``{directory, region, taken, left, last_error}``: files moved since the mount, and those that stay
        where they are because they could not be."""
        return {
            "directory": self._name,
            "region": self._region,
            "taken": self._taken,
            "left": len(self._known.left),
            "last_error": self._last_error,
        }

    def settle(self) -> None:
        """See ``Remembered.settle``. Blocking."""
        self._known.settle(self._root)

    async def run(self) -> None:
        """Take what comes, until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def ring() -> None:
            token.run_sync_soon(self._ring, idempotent=True)

        bell = await trio.to_thread.run_sync(self._hang_bell, ring)
        try:
            while True:
                self._rung = trio.Event()
                other = await self._in_thread(self._other)
                if other is not None or (bell is not None and bell.recursive == self._is_wide):
                    await trio.to_thread.run_sync(_stop, bell)
                    if other is not None:
                        os.close(self._root)
                        self._root = other
                    bell = await trio.to_thread.run_sync(self._hang_bell, ring)
                try:
                    wait_s = await self._take_all()
                    if bell is not None and self._is_well:
                        self._last_error = None
                except EnvironmentProblem as error:
                    self._tell(f"waits: {error}")
                    wait_s = RESCAN_S
                await self._wait(wait_s)
                # Who fills the directory to make looking expensive does not make the mount slow.
                await trio.sleep(max(_GATHER_S, _REST * self._look_s))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_stop, bell)

    def _hang_bell(self, ring: Callable[[], None]) -> Doorbell | None:
        try:
            return Doorbell(self._root, ring, recursive=not self._is_wide)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            self._tell(f"cannot be watched, so it is looked at every {RESCAN_S:g} s: {why}")
            return None

    def _other(self) -> int | None:
        """Another directory that is now where ours was, locked: then it is the inbox."""
        try:
            there = dropped.find(self._path, self._doors.device)
            try:
                is_ours = os.path.samestat(os.fstat(there), os.fstat(self._root))
            finally:
                os.close(there)
            other = None if is_ours else dropped.open_inbox(self._path, self._doors.device)
        except FileNotFoundError:
            return None  # for as long as there is none
        except (OSError, ValueError, BusyError) as error:
            self._tell_of_place(f"what is in its place is no inbox: {error}")
            return None
        self._tell_of_place(None if other is None else "it has been replaced by another directory")
        return other

    def _tell_of_place(self, what: str | None) -> None:
        if what is not None and what != self._place:
            self._tell(what)
        self._place = what

    def _ring(self) -> None:
        self._rung.set()

    async def _wait(self, longest_s: float) -> None:
        end = trio.current_time() + longest_s
        while not self._rung.is_set() and trio.current_time() < end:
            if any(map(self._may_try, self._known.left.values())):
                return
            with trio.move_on_at(min(end, trio.current_time() + _ROOM_S) if self._known.left else end):
                await self._rung.wait()

    def _may_try(self, left: Left) -> bool:
        return trio.current_time() >= left.retry_at and self._fits(left.size_bytes)

    def _fits(self, size_bytes: int) -> bool:
        account = self._account
        return size_bytes <= account.room() and account.files_used < account.files_quota

    # One look ----------------------------------------------------------------------------------------

    async def _take_all(self) -> float:
        """Take everything that is complete; how long may be waited before the next look."""
        begun = trio.current_time()
        found = await trio.to_thread.run_sync(
            dropped.look, self._root, limiter=self._limiter, abandon_on_cancel=True
        )
        self._look_s = trio.current_time() - begun
        self._is_wide = found.directories > _MOST_WATCHED
        self._lines_left = _MOST_TOLD
        self._tell_strange(found.strange)
        await self._known.forget_gone({path for path, _ in found.files})
        files = iter(found.files)
        ripens = found.may_ripen

        async def work() -> None:
            nonlocal ripens
            for path, st in files:
                ripens = await self._try(path, st) or ripens

        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(work)
        await self._remove_emptied()
        self._is_well = not (
            found.strange or self._known.left or self._place or self._lines_left < _MOST_TOLD
        )
        return _RIPEN_S if ripens else RESCAN_S

    async def _try(self, path: bytes, st: os.stat_result) -> bool:
        """Take a file if it is to be taken; whether time alone may make it complete."""
        left = self._known.left.get(path)
        if left is not None and left.identity == dropped.identity(st) and not self._may_try(left):
            return False
        try:
            await self._take(path)
        except NotReady as error:
            return error.soon
        except (FileNotFoundError, BusyError):  # it went, or a directory on the way did
            pass
        except EnvironmentProblem as error:  # whether it was put is not known
            self._known.left[path] = Left(dropped.identity(st), 0, trio.current_time() + RESCAN_S)
            self._tell(f"{os.fsdecode(path)!a} waits: {error}")
        except OSError as error:
            with contextlib.suppress(EnvironmentProblem):
                await self._leave(path, st, os.strerror(error.errno or 0))
        return False

    async def _take(self, path: bytes) -> None:
        # One at a time until it is put: so what came into the region after the note is this file, or came
        # after it; and what is complete when it is opened is copied at once.
        await self._door.acquire()
        fd = -1
        try:
            try:
                fd = await self._in_thread(dropped.open_complete, self._root, path)
                st = os.fstat(fd)
                if not await self._known.was_put(path, fd, st):
                    await self._known.note(path, Drop(dropped.identity(st), time.time_ns()))
                    passing("inbox.noted")
                    if not await self._put(path, fd, st):
                        return
            finally:
                self._door.release()
            passing("inbox.put")
            await self._remove(path, fd, st)
        finally:
            if fd >= 0:
                os.close(fd)

    async def _in_thread(self, work: Callable[[Unpack[_Arguments]], _T], *arguments: *_Arguments) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)

    async def _remove(self, path: bytes, fd: int, st: os.stat_result) -> None:
        """Remove what is in the region now; what cannot be removed is not put a second time."""
        self._known.kept[path] = dropped.identity(st)
        try:
            is_gone = await self._in_thread(dropped.remove, self._root, path, fd, st)
        except OSError as error:
            self._known.left[path] = Left(dropped.identity(st), 0, trio.current_time() + RESCAN_S)
            self._tell(f"{os.fsdecode(path)!a} was taken, but cannot be removed: {error.strerror}")
            return
        if is_gone:
            passing("inbox.removed")
            await self._known.note(path, None)
            self._taken += 1
            self._known.left.pop(path, None)
            del self._known.kept[path]
            if b"/" in path:
                self._emptied[path.rpartition(b"/")[0]] = trio.current_time()

    async def _put(self, path: bytes, fd: int, st: os.stat_result) -> bool:
        try:
            self._account.require(st.st_size, 1)  # before it is copied for nothing
            await self._doors.put_fd(self._region, path, fd, creator=self._creator, on_collision="number")
        except BusyError:  # an unmount that may fail, or it changed: maybe it was put, maybe not
            raise NotReady(soon=True) from None
        except EnvironmentProblem:
            raise
        except QuotaExceededError:
            what = f"there is no room for it, {format_size(st.st_size)}, in {self._region}/"
            # If there is room for the file, there is none for its directories, and nothing tells when.
            await self._leave(path, st, what, after_s=RESCAN_S if self._fits(st.st_size) else 0.0)
            return False
        except AgentfuseError as error:
            await self._leave(path, st, error.message)
            return False
        return True

    async def _leave(
        self, path: bytes, st: os.stat_result, why: str, *, after_s: float | None = None
    ) -> None:
        """It stays where it is, for now; that is told once."""
        same = dropped.identity(st)
        wait_s = RESCAN_S if after_s is None else after_s
        self._known.left[path] = Left(same, st.st_size, trio.current_time() + wait_s)
        await self._known.note(path, Drop(same, 0))
        if self._known.refused.get(path) == same:
            return
        self._known.refused[path] = same
        self._tell(f"{os.fsdecode(path)!a} stays there: {why}")
        if self._teller is not None:
            seen = Seen(st.st_ino, st.st_size, st.st_mtime_ns)
            self._teller.put(self._region, Refused(path, seen, self._creator))

    # Afterwards --------------------------------------------------------------------------------------

    async def _remove_emptied(self) -> None:
        for path, since in list(self._emptied.items()):
            if trio.current_time() - since < _EMPTIED_S:
                continue
            del self._emptied[path]
            is_gone = await self._in_thread(dropped.remove_directory, self._root, path)
            if is_gone and b"/" in path:
                self._emptied[path.rpartition(b"/")[0]] = since

    def _tell_strange(self, strange: Sequence[tuple[bytes, str]]) -> None:
        new = [each for each in strange if each not in self._told]
        if len(self._told) + len(new) > _MOST_REMEMBERED:
            return
        self._told.update(new)
        for path, what in new:
            self._tell(f"{os.fsdecode(path)!a} is {what}: it stays there")

    def _tell(self, what: str) -> None:
        """A line in the log; of one look there are not too many."""
        self._last_error = what
        self._lines_left -= 1
        if self._lines_left >= 0:
            log.warning("inbox %s: %s", self._name, what)
        elif self._lines_left == -1:
            log.warning("inbox %s: more of this look is not told of here", self._name)


def _stop(bell: Doorbell | None) -> None:
    if bell is not None:
        bell.stop()
