"""What the home itself tells its agent, in ordinary files: ``.agentfuse/``.

``events.ndjson`` grows by a line an event (and becomes ``events.1.ndjson`` when it is long), ``status.json``
is made anew whenever somebody opens it, ``last-error.json`` says what a quota refused, and what to do. Only
doors write there once the home is mounted, so inotify tells of it. Knows no FUSE.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from agentfuse.config import count, format_size
from agentfuse.door.doors import Doors
from agentfuse.errors import AgentfuseError
from agentfuse.events.feed import EventFeed, Line
from agentfuse.home.creators import Creator
from agentfuse.home.quota import NEARLY_FULL, Account, Ledger, fraction_used
from agentfuse.home.tree import now, walk_files
from agentfuse.regions import LOOSE, PLATFORM

log = logging.getLogger(__name__)

EVENTS = b"events.ndjson"
EVENTS_BEFORE = b"events.1.ndjson"
STATUS = b"status.json"
LAST_ERROR = b"last-error.json"

MAX_EVENTS_BYTES = 1024 * 1024
"""So long may ``events.ndjson`` become, and ``events.1.ndjson`` is."""

_LARGEST = 10
_REST_S = 1.0
"""So long after telling of a refusal the next one waits: who hits a quota does it often."""
_WALKS_APART = 10
"""And so many times as long as finding the largest files took: an agent could have that done all the time."""
_RETRY_S = 1.0


class Notices:
    """The files of one mount's ``.agentfuse/``: ``prepare`` them before it is mounted, then ``run``.

    ``tree``: the backing tree. The trio thread's.
    """

    def __init__(self, feed: EventFeed, doors: Doors, ledger: Ledger, tree: Path) -> None:
        self._feed = feed
        self._doors = doors
        self._ledger = ledger
        self._tree = tree
        self._told = 0
        self._bytes = 0
        self._refused: tuple[Account, str, float] | None = None
        self._was_refused = trio.Event()
        self._walking = trio.CapacityLimiter(1)

    def prepare(self, recent: Sequence[Line]) -> None:
        """Make the files, with these events; afterwards only doors write them."""
        lines = b"".join(line.text + b"\n" for line in recent)[-MAX_EVENTS_BYTES // 2 :]
        lines = lines[lines.find(b"\n") + 1 :] if len(lines) >= MAX_EVENTS_BYTES // 2 else lines
        directory = self._tree / PLATFORM.name
        for name, content in ((EVENTS, lines), (STATUS, b"")):
            path = directory / os.fsdecode(name)
            path.write_bytes(content)
            path.chmod(0o644)
        self._told = recent[-1].seq if recent else 0
        self._bytes = len(lines)
        for account in self._ledger.accounts():
            account.on_refusal = self._note_refusal

    def status(self, about: dict[str, object]) -> bytes:
        """``status.json`` as of now; ``about``: what it begins with."""
        regions = {account.name: _use(account) for account in self._ledger.accounts()}
        return json.dumps({**about, "time": now(), "regions": regions}, indent=1).encode() + b"\n"

    async def run(self) -> None:
        """Tell until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_events)
            nursery.start_soon(self._tell_refusals)

    async def _tell_events(self) -> None:
        while True:
            try:
                async with contextlib.aclosing(
                    self._feed.subscribe(self._told, region=None, follow=True)
                ) as events:
                    async for some in events:
                        if some:
                            await self._insist(partial(self._add, some))
                            self._told = some[-1].seq
            except AgentfuseError as error:
                log.warning("%s/ misses events: %s", PLATFORM.name, error)
                self._told = self._feed.as_dict()["newest"]  # the log was damaged and is numbered anew
            else:
                return

    async def _add(self, some: Sequence[Line]) -> None:
        lines = b"".join(line.text + b"\n" for line in some)
        if self._bytes and self._bytes + len(lines) > MAX_EVENTS_BYTES:
            old, new = (PLATFORM.name, EVENTS), (PLATFORM.name, EVENTS_BEFORE)
            await self._doors.move(old, new, creator=Creator.SYSTEM, on_collision="replace")
            self._bytes = 0
        await self._doors.append(PLATFORM.name, EVENTS, lines)
        self._bytes += len(lines)

    async def _tell_refusals(self) -> None:
        while True:
            await self._was_refused.wait()
            self._was_refused = trio.Event()
            if self._refused is not None:
                account, what, when = self._refused
                begun_s = trio.current_time()
                largest = await trio.to_thread.run_sync(
                    self._largest, account, abandon_on_cancel=True, limiter=self._walking
                )
                took_s = trio.current_time() - begun_s
                content = _refusal(account, what, when, largest)
                await self._insist(partial(self._doors.replace, PLATFORM.name, LAST_ERROR, content))
                await trio.sleep(max(_REST_S, _WALKS_APART * took_s))

    async def _insist(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Try until it is told: a full disk passes, and an unmount that fails, too."""
        failures = 0
        while True:
            try:
                await tell()
            except AgentfuseError as error:
                failures += 1
                if failures == 1:
                    log.info("%s/ waits: %s", PLATFORM.name, error)
                await trio.sleep(_RETRY_S)
            else:
                return

    def _note_refusal(self, account: Account, what: str) -> None:
        self._refused = (account, what, now())
        self._was_refused.set()

    def _largest(self, account: Account) -> list[tuple[bytes, int]]:
        """The largest files of a region, by their paths from the home's root."""
        names = [account.name.encode()]
        if account is self._ledger.loose:
            names = [name for name in os.listdir(os.fsencode(self._tree)) if not self._ledger.is_root(name)]
        found: list[tuple[bytes, int]] = []
        for name in names:
            with contextlib.suppress(OSError, AgentfuseError):  # the tree lives: what can be seen is told
                sizes = ((path, st.st_size) for path, st in walk_files(self._tree, name))
                found = heapq.nlargest(_LARGEST, itertools.chain(found, sizes), key=lambda item: item[1])
        return found


def _use(account: Account) -> dict[str, object]:
    use = account.as_dict()
    used = fraction_used(use)
    warning = f"{used:.0%} of the quota is used" if used >= NEARLY_FULL else None
    return {**use, "percent": int(100 * used), "warning": warning}


def _refusal(account: Account, what: str, when: float, largest: list[tuple[bytes, int]]) -> bytes:
    where = "the home itself" if account.name == LOOSE else f"{account.name}/"
    said = {
        "error": "EDQUOT",
        "message": f"{where} had no room for {what}: it holds {format_size(account.bytes_used)} of "
        f"{format_size(account.bytes_quota)}, and {count(account.files_used, 'file')} of "
        f"{account.files_quota}",
        "hint": "remove or truncate what is not needed any more (the largest files are listed here), or move "
        "it to a region that has room (see status.json); only an operator can raise a quota",
        "time": when,
        "region": account.name,
        **account.as_dict(),
        "largest": [{"path": os.fsdecode(path), "size": size} for path, size in largest],
    }
    return json.dumps(said, indent=1).encode() + b"\n"
