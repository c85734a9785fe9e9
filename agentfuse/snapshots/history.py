"""A region's numbered snapshots in an object store: which is newest, read one, commit the next.

Commits are fenced by put-if-absent: of all who try number n, one wins. Knows nothing of contents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import msgspec

from agentfuse.errors import IntegrityError, ObjectNotFoundError, StoreError
from agentfuse.killpoints import passing
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.document import Snapshot, decode, encode
from agentfuse.snapshots.layout import (
    check_owner,
    check_region,
    executions_prefix,
    snapshot_key,
    snapshot_number,
    snapshots_prefix,
    snapshots_region,
)

_PAGE = 1000  # how many keys one list request brings at least


class History:
    """The snapshots of one region of one agent. Remembers the newest number seen, so that asking is cheap,
    and the last one committed through it, so that the next says what it goes on from."""

    def __init__(self, store: ObjectStore, agent: str, region: str) -> None:
        self._store = store
        self._agent = check_owner(agent)
        self._region = check_region(region)
        self._known = 0
        self._own: Snapshot | None = None  # without its entries

    @property
    def store_url(self) -> str:
        """Where the snapshots are."""
        return self._store.url

    def newest(self, *, at_least: int = 0) -> int:
        """Number of the newest snapshot, 0 when there is none. One request, unless thousands are new.

        ``at_least``: a snapshot that is known to have been there. Raises ``StoreError`` when neither it
        nor a later one is: what was there and is not must not be taken for an empty history.
        """
        known = max(self._known, at_least)
        page = list(islice(self.numbers(after=max(known - 1, 0)), _PAGE))
        newest = page[-1] if page else 0
        if len(page) == _PAGE:
            newest = self._gallop(newest)
        if newest < known:
            raise StoreError(
                f"store {self._store.url}: agent {self._agent} had snapshot {known} of {self._region}, and "
                "neither it nor a later one is there now",
                hint="is this the store that the home was mounted with, and is all of it there?",
            )
        self._known = newest
        return newest

    def numbers(self, *, after: int = 0) -> Iterator[int]:
        """The numbers there are beyond ``after``, ascending; with gaps where old ones were collected."""
        prefix = snapshots_prefix(self._agent, self._region)
        start_after = snapshot_key(self._agent, self._region, after) if after else ""
        for found in self._store.list(prefix, start_after=start_after):
            number = snapshot_number(found.key)
            if number is not None:
                yield number

    def read(self, number: int) -> Snapshot:
        """One snapshot, verified. Raises ``ObjectNotFoundError`` or ``IntegrityError``."""
        key = snapshot_key(self._agent, self._region, number)
        snapshot = decode(self._store.get(key), key)
        claimed = (snapshot.agent, snapshot.region, snapshot.number)
        if claimed != (self._agent, self._region, number):
            raise IntegrityError(f"snapshot {key}: says it is {claimed}; it was put in another's place")
        return snapshot

    def newest_first(
        self, *, ends_only: bool = False, up_to: int | None = None
    ) -> Iterator[tuple[int, Snapshot | IntegrityError]]:
        """All snapshots that are there, each with its number; for a damaged one, what is wrong with it.

        ``ends_only``: only the newest of each stretch that is there, see ``Snapshot.follows``. What is
        inside a stretch is not even read. ``up_to``: from that number on.
        """
        bound = up_to
        for number in sorted(self.numbers(), reverse=True):
            if bound is not None and number > bound:
                continue
            bound = None
            try:
                snapshot = self.read(number)
            except ObjectNotFoundError:
                continue  # collected while we looked
            except IntegrityError as error:
                yield number, error
                continue
            yield number, snapshot
            bound = snapshot.follows if ends_only else None

    def stretch(self, parent: int, execution: str) -> tuple[int, int]:
        """``follows`` and ``resumes`` of a snapshot that an execution is about to commit upon ``parent``."""
        own = self._own
        if own is None or own.execution != execution:
            return parent, 0
        return (own.follows, own.resumes) if own.number == parent else (parent, own.number)

    def commit(self, snapshot: Snapshot) -> bool:
        """Write a snapshot at its number; whether it is the one that is there now.

        A write that won although its answer was lost is recognised by its commit id. Raises
        ``StoreError`` when the store failed: then the snapshot is not there, or not known to be.
        """
        key = snapshot_key(self._agent, self._region, snapshot.number)
        document = encode(snapshot)
        passing("commit.begun")
        try:
            won = self._store.put_if_absent(key, document)
        except StoreError as error:
            passing("commit.answer-lost")
            won = self._is_there_after_all(snapshot, error)
        else:
            won = won or self.read(snapshot.number).commit == snapshot.commit
        if won:
            passing("commit.won")
            self._known = max(self._known, snapshot.number)
            self._own = msgspec.structs.replace(snapshot, entries=[])
        return won

    def _is_there_after_all(self, snapshot: Snapshot, failure: StoreError) -> bool:
        try:
            return self.read(snapshot.number).commit == snapshot.commit
        except StoreError:
            raise failure from None

    def _gallop(self, low: int) -> int:
        """The newest number, ``low`` being one of many: doubling steps, then halving ones, then a page."""
        step = _PAGE
        while (found := next(self.numbers(after=low + step), None)) is not None:
            low, step = found, step * 2
        high = low + step
        while high - low > _PAGE:
            middle = (low + high) // 2
            found = next(self.numbers(after=middle), None)
            low, high = (found, high) if found is not None else (low, middle)
        return max(self.numbers(after=low), default=low)


def kept_regions(store: ObjectStore, agent: str) -> dict[str, dict[int, float]]:
    """The regions that executions of an agent kept, as ``layout`` places them in keys: when each of their
    snapshots was written.
    """
    regions: dict[str, dict[int, float]] = {}
    for found in store.list(executions_prefix(agent)):
        region = snapshots_region(found.key)
        number = snapshot_number(found.key) if region else None
        if region and number is not None:
            regions.setdefault(region, {})[number] = found.modified_at
    return regions
