"""Webhooks: each a subscriber to the log with a place of its own that survives restarts.

What an endpoint has not taken is sent again, in the same batch under the same id, less and less often,
for as long as the log keeps it; nothing is dropped in silence, and nobody waits for an endpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple, Protocol

import trio

from agentfuse.config import count
from agentfuse.errors import EnvironmentProblem, NotFoundError
from agentfuse.events.bookmarks import Bookmarks, Place
from agentfuse.events.endpoint import Answer, Endpoint
from agentfuse.events.feed import Line
from agentfuse.home.tree import now
from agentfuse.killpoints import passing

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""So long after the last event of a mount its webhooks may take to get it."""
MOST_BYTES = 64 * 1024
"""A batch ends before it is larger; one event alone may be some 50 KB."""
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 300.0
_DISK_WAIT_S = 10.0
_NOTED_EVERY = 1000
"""So many events that are not for a webhook may pass before its place is noted."""

State = Literal["idle", "sending", "waiting", "disabled"]


class Feed(Protocol):
    """Where events come from; see ``events.feed.EventFeed``."""

    def subscribe(
        self, since: int | None, *, region: str | None, follow: bool
    ) -> AsyncGenerator[list[Line], None]: ...

    def as_dict(self) -> dict[str, int]: ...


class Batch(NamedTuple):
    """Events that go together; ``upto`` is the number that is reached with them."""

    lines: Sequence[Line]
    upto: int


class Sender:
    """One webhook of one mount. ``delivered`` events and ``failed`` attempts are counted since it began."""

    def __init__(
        self, endpoint: Endpoint, feed: Feed, bookmarks: Bookmarks, *, execution: str, agent: str
    ) -> None:
        self._endpoint = endpoint
        self._hook = endpoint.hook
        self._feed = feed
        self._bookmarks = bookmarks
        self._whose = {"agent": agent, "execution": execution}
        self._state: State = "idle"
        self._knows_place = False
        self._is_lost = False
        self._reached = 0
        self._noted = 0
        self._upto: int | None = None
        self._missed = 0
        self.delivered = 0
        self.failed = 0
        self._last_error: str | None = None
        self._next_try: float | None = None
        self._noting = trio.CapacityLimiter(1)

    @property
    def name(self) -> str:
        """What stands for it, instead of its URL."""
        return self._hook.name

    @property
    def backlog(self) -> int:
        """How many events of the log have not been dealt with."""
        return max(0, self._feed.as_dict()["newest"] - self._reached)

    def as_dict(self) -> dict[str, object]:
        """``{name, state, delivered, failed, missed, backlog, last_error, next_try}``.

        ``delivered``: events, ``failed``: attempts, both since the mount; ``missed``: events that fell out of
        the log, which the endpoint has not been told of; ``next_try``: seconds since the epoch.
        """
        return {
            "name": self._hook.name,
            "state": self._state,
            "delivered": self.delivered,
            "failed": self.failed,
            "missed": self._missed,
            "backlog": self.backlog,
            "last_error": self._last_error,
            "next_try": self._next_try,
        }

    async def run(self, ended: trio.Event, *, follow: bool) -> None:
        """Deliver what comes, until there is no more. Once ``ended``, nothing is tried twice."""
        async with self._endpoint:
            while not await self._run_once(ended, follow):
                pass
            await self._note_place()
            if self._state == "disabled":
                await ended.wait()

    async def _run_once(self, ended: trio.Event, follow: bool) -> bool:
        """Deliver from where we are; False when that must begin again."""
        try:
            if not self._knows_place:
                await self._find_place()
            since = None if self._is_lost else self._reached
            async with aclosing(self._feed.subscribe(since, region=None, follow=follow)) as found:
                await self._deliver_all(found, ended)
        except NotFoundError:
            self._is_lost = True  # the log does not go back so far any more, or was numbered anew
            return False
        except EnvironmentProblem as error:
            log.warning("webhook %s waits: %s", self._hook.name, error)
            with trio.move_on_after(_DISK_WAIT_S):
                await ended.wait()
            return ended.is_set()
        return True

    async def _find_place(self) -> None:
        place = await trio.to_thread.run_sync(self._bookmarks.place, self._hook.name, limiter=self._noting)
        if place is None:  # known from now on, even to who comes after a crash
            place = Place(0)
            await trio.to_thread.run_sync(
                self._bookmarks.set_place, self._hook.name, place, limiter=self._noting
            )
        self._reached = self._noted = place.reached
        self._upto = place.upto
        self._knows_place = True

    async def _deliver_all(self, found: AsyncGenerator[list[Line], None], ended: trio.Event) -> None:
        async for lines in found:
            if not lines:
                continue
            if self._is_lost:
                self._find_gap(lines[0].seq)
            for batch in self._batches(lines):
                if batch.lines and not await self._deliver(batch, ended):
                    return
                self._reached = batch.upto
                if batch.lines or batch.upto - self._noted >= _NOTED_EVERY:
                    await self._note_place()

    def _find_gap(self, first: int) -> None:
        """After our place was not in the log: the oldest event that there is has this number."""
        if first > self._reached + 1:
            fell_out = first - self._reached - 1
            self._missed += fell_out
            told = count(fell_out, "event")
            log.warning("webhook %s: %s fell out of the log before they were taken", self._hook.name, told)
        self._reached = first - 1
        self._upto = None
        self._is_lost = False

    def _batches(self, lines: Sequence[Line]) -> Iterator[Batch]:
        """Those that this webhook is for, in batches; first the one that was under way, as it was."""
        batch: list[Line] = []
        size_bytes = 0
        for line in lines:
            is_wanted = line.region in self._hook.regions and line.kind in self._hook.kinds
            if is_wanted and batch and size_bytes + len(line.text) > MOST_BYTES and self._upto is None:
                yield Batch(batch, line.seq - 1)
                batch, size_bytes = [], 0
            if is_wanted:
                batch.append(line)
                size_bytes += len(line.text) + 1
            if line.seq == self._upto:
                self._upto = None
                yield Batch(batch, line.seq)
                batch, size_bytes = [], 0
        yield Batch(batch, lines[-1].seq)

    async def _deliver(self, batch: Batch, ended: trio.Event) -> bool:
        """Try until it is delivered; False when that is not to be any more."""
        events = b",".join(line.text for line in batch.lines)
        message_id = "msg_" + hashlib.sha256(events).hexdigest()[:32]
        await self._note_place(upto=batch.upto)
        wait_s = _FIRST_WAIT_S
        while True:
            is_last = ended.is_set()
            self._state, self._next_try = "sending", None
            answer = await self._endpoint.post(message_id, self._body(message_id, events))
            if not answer.error:
                passing("webhook.taken")
                self.delivered += len(batch.lines)
                self._missed = 0
                self._state, self._last_error = "idle", None
                return True
            self._note_failure(answer)
            if answer.is_gone or is_last:
                return False
            waiting_s = max(wait_s * random.uniform(0.5, 1.0), answer.retry_after_s)
            self._next_try = now() + waiting_s
            with trio.move_on_after(waiting_s):
                await ended.wait()
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _body(self, message_id: str, events: bytes) -> bytes:
        head = {"id": message_id, "sent_at": now(), **self._whose, "missed": self._missed}
        return json.dumps(head).encode("ascii")[:-1] + b', "events": [' + events + b"]}"

    def _note_failure(self, answer: Answer) -> None:
        self.failed += 1
        self._state = "disabled" if answer.is_gone else "waiting"
        if answer.error != self._last_error:  # once, not for every time
            log.warning("webhook %s: %s; events are kept for it", self._hook.name, answer.error)
        self._last_error = answer.error

    async def _note_place(self, *, upto: int | None = None) -> None:
        if upto is None and self._reached == self._noted:
            return
        place = Place(self._reached, upto)
        try:
            await trio.to_thread.run_sync(
                self._bookmarks.set_place, self._hook.name, place, limiter=self._noting
            )
            self._noted = place.reached
        except EnvironmentProblem as error:
            log.warning("webhook %s may get events twice: %s", self._hook.name, error)


class Webhooks:
    """All webhooks of one mount, each with one of ``senders``."""

    def __init__(
        self, endpoints: Sequence[Endpoint], feed: Feed, bookmarks: Bookmarks, *, execution: str, agent: str
    ) -> None:
        self.ended = trio.Event()
        self._bookmarks = bookmarks
        self.senders = [
            Sender(endpoint, feed, bookmarks, execution=execution, agent=agent) for endpoint in endpoints
        ]

    async def run(self, feed_ended: trio.Event, *, follow: bool = True, grace_s: float = GRACE_S) -> None:
        """Deliver until the feed has ended, and then for ``grace_s``.

        Without ``follow``, what is in the log is all that there is.
        """
        try:
            if self.senders:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._end_after, feed_ended, grace_s, nursery.cancel_scope)
                    async with trio.open_nursery() as sending:
                        for sender in self.senders:
                            sending.start_soon(self._guarded, sender, feed_ended, follow)
                    nursery.cancel_scope.cancel()
                self._tell_left()
                await trio.to_thread.run_sync(self._bookmarks.close)
        finally:
            self.ended.set()

    def as_list(self) -> list[dict[str, object]]:
        """Each one's state; see ``Sender.as_dict``."""
        return [sender.as_dict() for sender in self.senders]

    @property
    def delivered(self) -> int:
        """How many events were delivered."""
        return sum(sender.delivered for sender in self.senders)

    @property
    def has_backlog(self) -> bool:
        """Whether there is something left to deliver."""
        return any(sender.backlog for sender in self.senders)

    @staticmethod
    async def _end_after(feed_ended: trio.Event, grace_s: float, scope: trio.CancelScope) -> None:
        await feed_ended.wait()
        scope.deadline = trio.current_time() + grace_s

    @staticmethod
    async def _guarded(sender: Sender, ended: trio.Event, follow: bool) -> None:
        try:
            await sender.run(ended, follow=follow)
        except Exception:
            log.exception("a webhook ends; the next mount goes on with it")

    def _tell_left(self) -> None:
        for sender in self.senders:
            if sender.backlog:
                log.warning(
                    "webhook %s: %s left, for the next mount of this execution or agentfuse recover",
                    sender.name,
                    count(sender.backlog, "event"),
                )
