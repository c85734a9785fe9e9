"""From what happens in the regions that notify to whoever listens, through the log.

The filesystem's handlers only put what happened into a queue; a task brings it to the log in batches,
in a thread, and then wakes the subscribers. Each reads from its own place in the log, so one that is
slow or dead keeps nobody, and what is in the log is there for whoever comes later. The trio thread's.
"""

from __future__ import annotations

import collections
import logging
import math
import os
import stat
from collections.abc import AsyncGenerator, Iterable
from typing import NamedTuple

import trio

from agentfuse.errors import EnvironmentProblem, NotFoundError
from agentfuse.events.arrivals import (
    Completed,
    Moved,
    Operation,
    Replaced,
    Seen,
    Touched,
    is_hidden,
    is_temporary,
)
from agentfuse.events.log import Event, EventLog, Happened
from agentfuse.events.placeholders import Placeholders
from agentfuse.events.waiting import Waiting
from agentfuse.home.observer import Found, Look
from agentfuse.home.tree import now
from agentfuse.killpoints import passing

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
QUIET_S = 0.25
"""So soon after the last event a subscriber hears that this was all for now."""

_GATHER_S = 0.005
"""Waiting so little makes one transaction, and one awakening of all subscribers, of a burst."""
_BATCH = 500
"""So many files are in one transaction, or one operation: readers and marks wait for no longer."""
_RECENT = 4000
"""So many of the newest events are kept in memory, for the subscribers who keep up."""
_MOST_WAITING = 50_000
"""So many files may wait for the log; if it cannot keep up with more, looking again finds what there is."""
_RETRY_S = 1.0
_LAST_TRIES = 3


class Line(NamedTuple):
    """An event as subscribers get it; ``text`` is its JSON, without an end of line."""

    seq: int
    kind: str
    region: str
    text: bytes


class EventFeed:
    """The events of one mount: give its observers to the regions' accounts, and ``run`` it.

    ``told`` counts the events since the mount began, by region and kind.
    """

    def __init__(self, events: EventLog, *, execution: str, agent: str) -> None:
        self.ended = trio.Event()
        self._log = events
        self._execution = execution
        self._agent = agent
        self._queue = Waiting()
        self._held = Placeholders(events.tree)
        self._is_writing_batch = False
        self._looks: dict[str, Look] = {}
        self._is_behind = False
        self._look_at = -math.inf  # by trio's clock, when behind
        self._woken = trio.Event()
        self._stopping = False
        self._newest = events.newest()
        self._recent: list[Line] = []
        self._changed = trio.Event()
        self._followers = 0
        self.told: collections.Counter[tuple[str, str]] = collections.Counter()
        self._writing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(2)

    def last(self, limit: int) -> list[Line]:
        """The newest events, in order. Blocking."""
        return self._read(max(0, self._newest - limit), limit) if self._newest else []

    def recent(self, limit: int) -> list[Line]:
        """The newest events of this mount, in order, as far as they are in memory."""
        return self._recent[-limit:]

    # What happens ----------------------------------------------------------------------------------

    def observer(self, region: str, look: Look) -> RegionObserver:
        """Who hears of the region's files; ``look`` finds all that it holds while the mount lives."""
        self._looks[region] = look
        return RegionObserver(self, region)

    def compare(self, region: str, files: Found, *, silently: bool = False) -> None:
        """Tell of what is in the region and was not told of, and of what is gone: all that was missed.

        ``silently``: only note what is there, at once; it did not arrive, it was restored.
        """
        if not files and not self._log.exists():
            return
        if silently:
            self._log.append([Happened(region, now(), _everything(files))], silently=True)
        else:
            self._put_all(region, files)

    def _put_all(self, region: str, files: Found) -> None:
        """However many they are: by looking again there would be no fewer."""
        happened = Happened(region, now(), _everything(files))
        self._held.note(happened)
        self._queue.add(happened)
        self._woken.set()

    def put(self, region: str, operation: Operation) -> None:
        """Something happened: this is all that it costs the one who did it."""
        happened = Happened(region, now(), operation)
        if self._held:
            self._queue.extend(self._held.note(happened))
        if not self._held.hold(happened) and not self._queue.add(happened, most=_MOST_WAITING):
            self._is_behind = True
        self._woken.set()

    async def run(self) -> None:
        """Bring everything into the log until ``stop``, and then what is still to be brought."""
        try:
            while self._queue or self._is_behind or not self._stopping:
                next_look = self._look_at if self._is_behind else math.inf
                with trio.move_on_at(min(self._held.next_due, next_look)):
                    await self._woken.wait()
                if not self._stopping:
                    self._woken = trio.Event()
                    await trio.sleep(_GATHER_S)
                    self._queue.extend(await self._held.ripe())
                await self._bring()
            await trio.to_thread.run_sync(self._log.close, limiter=self._writing)
        finally:
            self.ended.set()
            self._changed.set()

    async def _bring(self) -> None:
        """What waits into the log, and what there is when more happened than could wait."""
        while self._queue or self._may_look():
            if self._queue:
                self._is_writing_batch = True
                lines = await self._append(self._queue.take(_BATCH))
                self._is_writing_batch = False
                self._publish(lines)
            if self._may_look():
                self._look_again()

    def _may_look(self) -> bool:
        return self._is_behind and (self._stopping or trio.current_time() >= self._look_at)

    def _look_again(self) -> None:
        """Instead of what is waiting, what there is: nothing can happen while this looks."""
        try:
            found = {region: look() for region, look in self._looks.items()}
        except OSError as error:
            if self._stopping:  # it is not mounted any more
                self._is_behind = False
                log.warning("what was not told is left for the next start: %s", error.strerror)
                return
            if self._look_at == -math.inf:
                log.warning("what was not told cannot be looked for now: %s", error.strerror)
            self._look_at = trio.current_time() + _RETRY_S
            return
        self._is_behind, self._look_at = False, -math.inf
        self._queue.clear()
        self._held.take_all()
        for region, files in found.items():
            self._put_all(region, files)

    def stop(self) -> None:
        """Nothing happens any more."""
        self._stopping = True
        self._queue.extend(self._held.take_all())
        self._woken.set()

    async def _append(self, batch: list[Happened]) -> list[Line]:
        """The batch in the log, tried until it is there: a full disk must not lose what was announced."""
        failures = 0
        while True:
            try:
                return await trio.to_thread.run_sync(self._write, batch, limiter=self._writing)
            except EnvironmentProblem as error:
                failures += 1
                if failures == 1:
                    log.warning("events wait: %s", error)
                if self._stopping and failures >= _LAST_TRIES:
                    log.warning("%d events are left for the next start, which finds them again", len(batch))
                    return []
                await trio.sleep(_RETRY_S)
            except Exception:
                log.exception("unexpected error; what was not told is found by looking again")
                # Once: if that fails as well, the next start tries.
                operations = [happened.operation for happened in batch]
                self._is_behind = not any(isinstance(each, Replaced) and not each.path for each in operations)
                return []

    def _publish(self, lines: Iterable[Line]) -> None:
        for line in lines:
            if line.seq != self._newest + 1:
                self._recent = []  # the log was damaged, and begins anew
            self._recent.append(line)
            self._newest = line.seq
            self.told[line.region, line.kind] += 1
        if len(self._recent) > 2 * _RECENT:
            del self._recent[:-_RECENT]
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        passing("announce.told")

    async def caught_up(self) -> set[tuple[str, bytes]]:
        """Wait until all that happened is in the log; return what is held back, by region and path."""
        while (self._queue or self._is_writing_batch or self._is_behind) and not self.ended.is_set():
            await self._changed.wait()
        return self._held.paths()

    # Who listens -----------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, int]:
        """``{newest, waiting, followers}``: the newest number, what is not in the log yet, who listens."""
        return {"newest": self._newest, "waiting": len(self._queue), "followers": self._followers}

    async def subscribe(
        self, since: int | None, *, region: str | None, follow: bool, heartbeats: bool = False
    ) -> AsyncGenerator[list[Line], None]:
        """Events numbered higher than ``since`` (None: all that are kept), and with ``follow`` those to come.

        Ends when there are no more to come. With ``heartbeats`` an empty list says that this was all for
        now, and then that the mount lives; without, nothing wakes while nothing happens. Raises
        ``NotFoundError`` for a number that no event has yet, or one whose successors are not all kept.
        """
        if region is not None and region not in self._looks:
            there_are = ", ".join(self._looks) or "none"
            raise NotFoundError(f"no region {region!r} notifies", hint=f"those that do: {there_are}")
        self._followers += follow
        try:
            after = since
            wait_s = 0.0
            while True:
                changed, has_ended = self._changed, self.ended.is_set()
                some = await self._after(after)
                if some:
                    after = some[-1].seq
                    lines = [line for line in some if region is None or line.region == region]
                    if lines:
                        wait_s = QUIET_S
                        yield lines
                elif has_ended or not follow:
                    return
                else:
                    with trio.move_on_after(wait_s if heartbeats else math.inf) as waiting:
                        await changed.wait()
                    if waiting.cancelled_caught:
                        wait_s = HEARTBEAT_S
                        yield []
        finally:
            self._followers -= follow

    async def _after(self, after: int | None) -> list[Line]:
        """Some of the events after this one, without a gap; none when there are none yet."""
        if after is not None and after > self._newest:
            raise NotFoundError(
                f"the newest event is number {self._newest}, not {after}",
                hint="the number is another execution's, or the log was damaged: leave since out",
            )
        begin = after or 0
        if begin == self._newest:
            return []
        if self._recent and self._recent[0].seq <= begin + 1:
            skipped = begin + 1 - self._recent[0].seq
            return self._recent[skipped : skipped + _BATCH]
        # Whoever is not waited for any more does not wait for the log, either.
        lines = await trio.to_thread.run_sync(
            self._read, begin, _BATCH, limiter=self._reading, abandon_on_cancel=True
        )
        if after is not None and lines and lines[0].seq > after + 1:
            raise NotFoundError(
                f"events before number {lines[0].seq} are not kept any more",
                hint="leave since out to get the others",
            )
        # What is being written just now may be in the log already: it is told when that is known.
        return [line for line in lines if line.seq <= self._newest]

    # In threads: ten thousand events take a tenth of a second to encode.

    def _write(self, batch: list[Happened]) -> list[Line]:
        return [self._line(event) for event in self._log.append(batch)]

    def _read(self, after: int, limit: int) -> list[Line]:
        return [self._line(event) for event in self._log.read(after, limit)]

    def _line(self, event: Event) -> Line:
        text = event.to_json(execution=self._execution, agent=self._agent)
        return Line(event.seq, event.kind, event.region, text)


class RegionObserver:
    """Hears of the files of one region; see ``home.observer``."""

    def __init__(self, feed: EventFeed, region: str) -> None:
        self._feed = feed
        self._region = region

    def completed(self, path: bytes, st: os.stat_result, how: str) -> None:
        # A name more changes nothing of the others.
        self._put(Completed(path, _seen(st), how, st.st_nlink > 1 and how != "IN_CREATE"))

    def touched(self, path: bytes, st: os.stat_result) -> None:
        self._put(Touched(path, _seen(st), st.st_nlink > 1))

    def replaced(self, path: bytes, found: Found, *, came: str, went: str) -> None:
        self._put(Replaced(path, _listing(found), came, went))

    def moved(self, old: bytes, new: bytes, st: os.stat_result, look: Look) -> None:
        if not stat.S_ISDIR(st.st_mode) and not stat.S_ISREG(st.st_mode):
            self.replaced(new, [], came="", went="IN_DELETE")
            return
        is_untold = is_hidden if stat.S_ISDIR(st.st_mode) else is_temporary
        was_untold, will_be = is_untold(old), is_untold(new)
        if not was_untold and not will_be:
            self._put(Moved(old, new, self._whole(look()) if stat.S_ISREG(st.st_mode) else None))
        elif not was_untold:
            self.replaced(old, [], came="", went="IN_MOVED_FROM")
        elif not will_be:
            self.replaced(new, look(), came="IN_MOVED_TO", went="IN_DELETE")

    @staticmethod
    def _whole(found: Found) -> Seen | None:
        return next((_seen(st) for _, st in found if st is not None), None)

    def _put(self, operation: Operation) -> None:
        self._feed.put(self._region, operation)


def _seen(st: os.stat_result) -> Seen:
    return Seen(st.st_ino, st.st_size, st.st_mtime_ns)


def _everything(found: Found) -> Replaced:
    """All that a region holds, the oldest first."""
    files = sorted(_listing(found), key=lambda item: item[1].mtime_ns if item[1] else 0)
    return Replaced(b"", files, came="IN_CLOSE_WRITE", went="IN_DELETE")


def _listing(found: Found) -> list[tuple[bytes, Seen | None]]:
    return [(path, None if st is None else _seen(st)) for path, st in found]
