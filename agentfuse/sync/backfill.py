"""Filling absent files in the background: packs first, then large contents from the smaller to the larger,
and among these what was modified lately before the rest.

Never ends by an error, waits while the store is down, and may be cancelled at any moment: what is absent
then stays so. Knows no FUSE.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from agentfuse.errors import AgentfuseError, IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.home.walk import Cursor, join, open_to_fill
from agentfuse.snapshots.entries import Entry
from agentfuse.snapshots.layout import object_key
from agentfuse.sync.absent import Absent, Item, Part, State
from agentfuse.sync.fetch import Run, content_of, plan, read_run, write_all
from agentfuse.sync.hydration import HOPELESS, STEP, Hydration, fetch_into
from agentfuse.sync.upload import SMALL_BYTES

_log = logging.getLogger(__name__)

FETCHES = 4
"""Requests at a time; each may hold a pack in memory."""

_MOVED = (errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_MAX_COPIES = 8
_MAX_SEARCHES = 3
_SEARCH_STEP_S = 0.001
FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0


class _Work(NamedTuple):
    """A run, and the files that want its contents, by hash."""

    part: Part
    run: Run
    files: dict[str, list[Item]]


class Backfill:
    """Fills everything there is to fill, once: :meth:`run`. ``state`` tells how far it is:

    idle, fetching, waiting (for the store, or for room on the disk), incomplete (what is still absent
    cannot be fetched) or complete.
    """

    def __init__(self, hydration: Hydration) -> None:
        self._hydration = hydration
        self._absent = hydration.absent
        self._limiter = trio.CapacityLimiter(FETCHES)
        self._state = "idle"
        self._outage: Exception | None = None

    def as_dict(self) -> dict[str, object]:
        """``{absent_files, absent_bytes, failed_files, state}``; failed are those that nobody can have."""
        absent = self._absent
        return {
            "absent_files": absent.files,
            "absent_bytes": absent.bytes,
            "failed_files": absent.hopeless_files,
            "state": self._state if absent.files else "complete",
        }

    async def run(self) -> None:
        """Fill until nothing is left that can be, and all that came is durable; ``Hydration.run`` runs, too.

        Waits and tries again as long as that may help.
        """
        retry_s = FIRST_RETRY_S
        searches = 0
        while True:
            todo = [item for item in self._absent.by_ino.values() if not item.is_hopeless]
            here = [item for item in todo if item.state is State.ABSENT and not item.is_astray]
            if here:
                self._state = "fetching"
                await self._pass(here)
                if self._outage is None:
                    retry_s = FIRST_RETRY_S
                else:
                    self._state = "waiting"
                    await trio.sleep(retry_s)
                    retry_s = min(2 * retry_s, _LAST_RETRY_S)
            elif steps := [item.step for item in todo if item.state is State.FILLING and item.step]:
                await steps[0].done.wait()
            elif any(item.is_astray for item in todo) and searches < _MAX_SEARCHES:
                searches += 1
                await self._search({item.ino: item for item in todo if item.is_astray})
            else:
                break
        self._state = "incomplete"
        await self._hydration.settled()

    async def _pass(self, items: list[Item]) -> None:
        """Try once to fill all these files; ``_outage`` tells whether that ended early."""
        had_outage = self._outage is not None
        self._outage = None
        works = iter(await trio.to_thread.run_sync(in_order, items, limiter=self._limiter))
        async with trio.open_nursery() as nursery:
            for _ in range(FETCHES):
                nursery.start_soon(self._work_off, works)
        if self._outage is None and had_outage:
            _log.info("contents arrive again")
        elif self._outage is not None and not had_outage:
            _log.warning("contents cannot be fetched now, trying again: %s", self._outage)

    async def _work_off(self, works: Iterator[_Work]) -> None:
        for work in works:
            for now in _still_wanted(work, self._absent):
                if self._outage is not None:
                    return
                if now.run.end - now.run.offset >= SMALL_BYTES and len(now.run.contents) == 1:
                    await self._large(now)
                else:
                    await self._small(now)

    async def _large(self, work: _Work) -> None:
        (items,) = work.files.values()
        for start in range(0, len(items), _MAX_COPIES):
            await self._hydration.passed()
            claimed = self._claim(work.part, items[start : start + _MAX_COPIES])
            if claimed:
                self._judge(await self._hydration.fill(claimed, partial(fetch_into, claimed), self._limiter))

    async def _small(self, work: _Work) -> None:
        try:
            found = await trio.to_thread.run_sync(
                _read, work.part, work.run, abandon_on_cancel=True, limiter=self._limiter
            )
        except Exception as error:  # noqa: BLE001  # the other runs may fare better
            self._judge(error)
            if isinstance(error, ObjectNotFoundError):
                self._blame(work, work.run.contents, error)
            return
        good = []
        for entry, content in found:
            if isinstance(content, AgentfuseError):
                self._blame(work, [entry], content)
            else:
                good += [(item, content) for item in work.files[entry.sha256]]
        for start in range(0, len(good), STEP):
            await self._hydration.room()
            await trio.lowlevel.checkpoint()
            await self._hydration.passed()
            contents = dict(good[start : start + STEP])
            claimed = self._claim(work.part, contents)
            if claimed:
                write = partial(_write, [(item, contents[item]) for item in claimed])
                self._judge(await self._hydration.fill(claimed, write, self._limiter))

    def _judge(self, error: Exception | None) -> None:
        """Take an error for an outage, unless it is one of a content or of nothing that will pass."""
        if isinstance(error, (StoreError, OSError)) and not isinstance(error, HOPELESS):
            self._outage = error
        elif error is not None and not isinstance(error, AgentfuseError):
            _log.error("unexpected error", exc_info=error)
            self._outage = error

    def _blame(self, work: _Work, entries: Iterable[Entry], error: Exception) -> None:
        for entry in entries:
            for item in work.files[entry.sha256]:
                if item.state is State.ABSENT:
                    self._absent.blame(item, str(error), is_hopeless=True)

    # Finding files ----------------------------------------------------------------------------------

    def _claim(self, part: Part, items: Iterable[Item]) -> list[Item]:
        """Claim those of the files that are where they once were and that nobody else has claimed."""
        claimed: list[Item] = []
        try:
            with Cursor(part.root) as cursor:
                claimed += (item for item in items if self._claim_one(cursor, item))
        except (OSError, AgentfuseError) as error:
            self._outage = error  # the root itself
        return claimed

    def _claim_one(self, cursor: Cursor, item: Item) -> bool:
        if item.state is not State.ABSENT or self._absent.by_ino.get(item.ino) is not item:
            return False
        try:
            directory_fd, name = cursor.parent(item.entry.path)
            if self._absent.claim(item, open_to_fill(name, directory_fd)):
                return True
            self._absent.forget(item.ino)  # it has no mark: nothing to do
        except AgentfuseError:
            item.is_astray = True
        except OSError as error:
            item.is_astray = error.errno in _MOVED
            if not item.is_astray:
                self._absent.blame(item, os.strerror(error.errno or 0), is_hopeless=True)
        return False

    async def _search(self, wanted: dict[int, Item]) -> None:
        """Find where files are that were renamed."""
        for part in {item.part for item in wanted.values()}:
            pending = [b""]
            while pending and wanted:
                await trio.lowlevel.checkpoint()
                until = time.monotonic() + _SEARCH_STEP_S
                with Cursor(part.root) as cursor:
                    while pending and time.monotonic() < until:
                        _look(cursor, pending, wanted)


def _look(cursor: Cursor, pending: list[bytes], wanted: dict[int, Item]) -> None:
    path = pending.pop()
    try:
        with os.scandir(cursor.enter(path)) as found:
            for each in found:
                below = join(path, os.fsencode(each.name))
                if each.is_dir(follow_symlinks=False):
                    pending.append(below)
                elif item := wanted.pop(each.inode(), None):
                    item.entry = msgspec.structs.replace(item.entry, path=below)
                    item.is_astray = False
    except (OSError, AgentfuseError):
        return  # gone or moved since; the next search finds it


def in_order(items: list[Item]) -> list[_Work]:
    """All runs of contents that these files want, in the order in which they are fetched."""
    works = []
    for part in {item.part for item in items}:
        files: dict[str, list[Item]] = {}
        for item in items:
            if item.part is part:
                files.setdefault(item.entry.sha256, []).append(item)
        runs = plan(wanting[0].entry for wanting in files.values())
        works += [_Work(part, run, {e.sha256: files[e.sha256] for e in run.contents}) for run in runs]
    return sorted(works, key=_rank)


def _rank(work: _Work) -> tuple[int, int]:
    contents = work.run.contents
    is_large = len(contents) == 1 and contents[0].size >= SMALL_BYTES
    return contents[0].size.bit_length() if is_large else 0, -max(entry.mtime_ns for entry in contents)


def _still_wanted(work: _Work, absent: Absent) -> list[_Work]:
    """What is left of a run: openers may have fetched some of it meanwhile."""
    files = {
        sha256: left
        for sha256, items in work.files.items()
        if (left := [i for i in items if i.state is State.ABSENT and absent.by_ino.get(i.ino) is i])
    }
    if len(files) == len(work.files):
        return [_Work(work.part, work.run, files)]
    runs = plan(entry for entry in work.run.contents if entry.sha256 in files)
    return [_Work(work.part, run, {e.sha256: files[e.sha256] for e in run.contents}) for run in runs]


def _read(part: Part, run: Run) -> list[tuple[Entry, memoryview | AgentfuseError]]:
    """The contents of a run, each verified or its own error; in a thread."""
    if not run.object:
        raise ObjectNotFoundError("nothing says where the store has this content")
    key = object_key(part.agent, run.object)
    data = read_run(part.store, key, run)
    found: list[tuple[Entry, memoryview | AgentfuseError]] = []
    for entry in run.contents:
        try:
            found.append((entry, content_of(part.store, key, run, data, entry)))
        except IntegrityError as error:
            found.append((entry, error))
    return found


def _write(contents: list[tuple[Item, memoryview]]) -> None:
    """Write contents to claimed files; in a thread."""
    for item, content in contents:
        with open(item.fd, "r+b", buffering=0, closefd=False) as file:
            write_all(file, content)
