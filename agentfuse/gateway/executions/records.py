"""Records of executions in the store, changed by compare-and-set.

A record is a row of numbered revisions, ``executions/<organization>/<execution>/<20-digit n>.json``; the
newest one counts. To change it is to read it, and to put the next number if that is absent: of all who try
one wins, and the others look again. So it needs nothing of a store but what snapshots need, and a host that
was taken for dead and comes back finds its record changed, rather than overwriting it.

Of ended executions the older revisions are pruned, never the newest. So who slept between reading and
putting may find his number free again: he counts as the winner only if nothing newer is there, or what is
newest says that it follows from his revision (``follows``). docs/format.md has the whole argument.
"""

from __future__ import annotations

import secrets
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec

from agentfuse.errors import (
    ExistsError,
    IntegrityError,
    NotFoundError,
    ObjectNotFoundError,
    StoreError,
)
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.hosts.roster import is_uuid
from agentfuse.objectstore.base import ObjectStat, ObjectStore
from agentfuse.snapshots.layout import DIGITS

MAX_RACES = 100
_BLIND = 2
"""So often a list may miss what was there: it is no snapshot where it runs beside changes and a pruning."""
_PREFIX = "executions/"
_SUFFIX = ".json"
_KEPT_BYTES = 48 * 1024 * 1024
"""So much of records is held in memory, some 60,000 of them: to list these costs a list of their keys."""

_PAGE = 1000
_SHARES = "0123456789abcdef"
_AT_ONCE = 16
"""Beyond a page keys are listed by the first digit of ids, and unknown records read, so many at a time."""


class _Revision(msgspec.Struct, frozen=True):
    """A document. ``write`` is another of every attempt, so that a writer knows its own; ``follows`` are
    those of all revisions before it."""

    format: int
    write: str
    execution: Execution
    follows: tuple[str, ...] = ()


class Records:
    """The records of a store. Every method blocks, in any thread, and raises ``StoreError``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[int, bytes]] = OrderedDict()  # as it is stored
        self._known_bytes = 0
        self._pool = ThreadPoolExecutor(_AT_ONCE, "records")  # has no threads until it is asked

    def create(self, execution: Execution) -> None:
        """The first revision. Raises ``ExistsError`` if there is a record of that id."""
        if not self._write(execution, 1, ()):
            raise ExistsError(f"execution {execution.id} exists already")

    def read(self, organization: str, execution: str) -> Execution:
        """The newest revision. Raises ``NotFoundError`` for one that this organization does not have."""
        return self._newest(organization, execution)[1].execution

    def change(
        self, organization: str, execution: str, change: Callable[[Execution], Execution]
    ) -> Execution:
        """What ``change`` makes of the newest revision, which it may be called with several times.

        What it raises ends it; a record that it returns unchanged is not written. Raises ``NotFoundError``.
        """
        for _ in range(MAX_RACES):
            number, before = self._newest(organization, execution)
            after = change(before.execution)
            if after == before.execution:
                return after
            if self._write(after, number + 1, (*before.follows, before.write)):
                return after
        raise _lost(execution)

    def wants_files(self, organization: str, execution: str) -> bool:
        """Whether an execution is still to get the staged files that it claimed."""
        try:
            record = self.read(organization, execution)
        except NotFoundError:
            return False
        return not record.is_attached and not record.status.is_terminal

    def list(self, organization: str) -> Iterator[Execution]:
        """All records of an organization, in order of their ids. Only those that are not known are read."""
        newest = [(execution, max(row)) for execution, row in self._rows(organization).items()]
        asked = {
            execution: self._pool.submit(self._get_or_newer, organization, execution, number)
            for execution, number in newest
            if not self._knows(organization, execution, number)
        }
        for execution, number in newest:
            reading = asked.pop(execution, None)
            found = reading.result() if reading else self._get_or_newer(organization, execution, number)
            if found is not None:
                yield found.execution

    def prune(self, organization: str, settled_s: float) -> int:
        """Remove all but the newest revisions of ended executions; how many went.

        Only where the newest is so much older than the latest in the store, by its clock. So a list that is
        being made meanwhile, and which may miss both what comes and what goes, had begun after it came.
        """
        rows = self._rows(organization)
        latest = max((each.modified_at for row in rows.values() for each in row.values()), default=0.0)
        removed = 0
        for execution, row in rows.items():
            newest = max(row)
            if len(row) == 1 or row[newest].modified_at > latest - settled_s:
                continue
            found = self._get_or_newer(organization, execution, newest)
            if found is None or not found.execution.status.is_terminal:
                continue
            for number in sorted(row.keys() - {newest}):
                self._store.delete(row[number].key)
                removed += 1
        return removed

    def organizations(self) -> Iterable[str]:
        """The organizations that have records."""
        after = _PREFIX
        while True:
            found = next(self._store.list(_PREFIX, start_after=after), None)
            if found is None:
                return
            organization = found.key.removeprefix(_PREFIX).partition("/")[0]
            if is_uuid(organization):  # what else lies there is not ours
                yield organization
            after = f"{_PREFIX}{organization}0"  # "0" follows "/"

    def _rows(self, organization: str) -> dict[str, dict[int, ObjectStat]]:
        """The revisions that there are of each execution of an organization, in order of their ids."""
        prefix = f"{_PREFIX}{_checked(organization)}/"
        found = [*islice(self._store.list(prefix), _PAGE)]
        if len(found) == _PAGE:
            shares = self._pool.map(lambda digit: [*self._store.list(prefix + digit)], _SHARES)
            found = [each for share in shares for each in share]
        rows: dict[str, dict[int, ObjectStat]] = {}
        for each in found:
            execution, number = _parsed(each.key)
            if number:
                rows.setdefault(execution, {})[number] = each
        return rows

    def _newest(self, organization: str, execution: str) -> tuple[int, _Revision]:
        try:
            prefix = _prefix(organization, execution)
        except ValueError:
            raise _no_such() from None
        for attempt in range(MAX_RACES):
            known = self._known.get((organization, execution))
            start_after = _key(organization, execution, known[0] - 1) if known and known[0] > 1 else ""
            keys = [found.key for found in self._store.list(prefix, start_after=start_after)]
            numbers = [number for _, number in map(_parsed, keys) if number]
            if not numbers:
                if known is None or attempt == _BLIND:
                    raise _no_such()
                continue
            newest = max(numbers)
            try:
                return newest, self._get(organization, execution, newest)
            except ObjectNotFoundError:
                continue  # it is not the newest any more, and was pruned
        raise _lost(execution)

    def _get_or_newer(self, organization: str, execution: str, number: int) -> _Revision | None:
        """A revision that was the newest, or what is that by now; None if there is none any more."""
        try:
            return self._get(organization, execution, number)
        except ObjectNotFoundError:
            pass
        try:
            return self._newest(organization, execution)[1]
        except NotFoundError:
            return None

    def _get(self, organization: str, execution: str, number: int) -> _Revision:
        key = _key(organization, execution, number)
        known = self._known.get((organization, execution))
        if known is not None and known[0] == number:
            return _decoded(key, known[1])
        data = self._store.get(key)
        revision = _decoded(key, data)
        self._know(revision.execution, number, data)
        return revision

    def _knows(self, organization: str, execution: str, number: int) -> bool:
        known = self._known.get((organization, execution))
        return known is not None and known[0] == number

    def _write(self, execution: Execution, number: int, follows: tuple[str, ...]) -> bool:
        """Whether this is the revision of that number, or was, and others followed it."""
        key = _key(execution.organization, execution.id, number)
        revision = _Revision(1, secrets.token_hex(8), execution, follows)
        data = msgspec.json.encode(revision)
        try:
            is_put = self._store.put_if_absent(key, data)
        except StoreError as failure:
            try:
                won = self._stands(revision, number, is_put=False)
            except StoreError:
                raise failure from None
        else:
            won = self._stands(revision, number, is_put=is_put)
        if won:
            self._know(execution, number, data)
        return won

    def _stands(self, revision: _Revision, number: int, *, is_put: bool) -> bool:
        """Whether a revision came to be. Raises ``StoreError`` if there is none of its number or newer."""
        record = revision.execution
        if number == 1 and is_put:  # its id is nobody else's
            return True
        before = _key(record.organization, record.id, number - 1)
        for attempt in range(MAX_RACES):
            listed = self._store.list(_prefix(record.organization, record.id), start_after=before)
            newest = max((found for _, found in map(_parsed, (each.key for each in listed))), default=0)
            if newest == number and is_put:
                return True
            if not newest:
                if attempt == _BLIND:
                    raise StoreError(f"execution {record.id}: a change did not arrive", hint="ask again")
                continue
            key = _key(record.organization, record.id, newest)
            try:
                found = _decoded(key, self._store.get(key))
            except ObjectNotFoundError:
                continue  # pruned: there is a newer one
            return revision.write in (found.write, *found.follows)
        raise _lost(record.id)

    def _know(self, execution: Execution, number: int, data: bytes) -> None:
        with self._lock:
            key = (execution.organization, execution.id)
            known = self._known.get(key)
            if known is None or known[0] < number:
                self._known_bytes += len(data) - len(known[1] if known else b"")
                self._known[key] = (number, data)
            self._known.move_to_end(key)
            while self._known_bytes > _KEPT_BYTES:
                self._known_bytes -= len(self._known.popitem(last=False)[1][1])


def _decoded(key: str, data: bytes) -> _Revision:
    try:
        revision = _REVISION.decode(data)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"record {key} is damaged: {error}") from error
    if revision.format != 1:
        raise IntegrityError(
            f"record {key} is of format {revision.format}",
            hint="a newer agentfuse wrote it; install that one",
        )
    return revision


def _checked(organization: str) -> str:
    return str(uuid.UUID(organization))


def _prefix(organization: str, execution: str) -> str:
    return f"{_PREFIX}{_checked(organization)}/{uuid.UUID(execution)}/"


def _key(organization: str, execution: str, number: int) -> str:
    return f"{_prefix(organization, execution)}{number:0{DIGITS}d}{_SUFFIX}"


def _parsed(key: str) -> tuple[str, int]:
    """The execution of a key and the number of the revision, 0 if it is no revision's."""
    directory, _, name = key.rpartition("/")
    digits = name.removesuffix(_SUFFIX)
    number = int(digits) if len(digits) == DIGITS and digits.isdecimal() else 0
    return directory.rpartition("/")[2], number


def _lost(execution: str) -> StoreError:
    return StoreError(
        f"execution {execution}: lost {MAX_RACES} changes in a row to others", hint="ask again a little later"
    )


def _no_such() -> NotFoundError:
    return NotFoundError("Execution not found.")


# msgspec learns a type at its first use; two threads at once would crash the process.
_REVISION = msgspec.json.Decoder(_Revision)
