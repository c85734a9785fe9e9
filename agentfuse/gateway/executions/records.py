"""Records of executions in the store, changed by compare-and-set.

A record is a row of numbered revisions, ``executions/<organization>/<execution>/<20-digit n>.json``; the
newest one counts. To change it is to read it, and to put the next number if that is absent: of all who try
one wins, and the others look again. So it needs nothing of a store but what snapshots need, and a host that
was taken for dead and comes back finds its record changed, rather than overwriting it.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import msgspec

from agentfuse.errors import (
    ExistsError,
    IntegrityError,
    NotFoundError,
    ObjectNotFoundError,
    StoreError,
)
from agentfuse.gateway.executions.record import Execution
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.layout import DIGITS

MAX_RACES = 100
_PREFIX = "executions/"
_SUFFIX = ".json"
_KEPT = 20_000
"""So many records are held in memory: to list them all then costs one request for a thousand revisions."""


class _Revision(msgspec.Struct, frozen=True):
    """A document. ``write`` is another of every attempt, so that a writer knows its own."""

    format: int
    write: str
    execution: Execution


class Records:
    """The records of a store. Every method blocks, in any thread, and raises ``StoreError``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[int, Execution]] = OrderedDict()

    def create(self, execution: Execution) -> None:
        """The first revision. Raises ``ExistsError`` if there is a record of that id."""
        if not self._write(execution, 1):
            raise ExistsError(f"execution {execution.id} exists already")

    def read(self, organization: str, execution: str) -> Execution:
        """The newest revision. Raises ``NotFoundError`` for one that this organization does not have."""
        return self._newest(organization, execution)[1]

    def change(
        self, organization: str, execution: str, change: Callable[[Execution], Execution]
    ) -> Execution:
        """What ``change`` makes of the newest revision, which it may be called with several times.

        What it raises ends it; a record that it returns unchanged is not written. Raises ``NotFoundError``.
        """
        for _ in range(MAX_RACES):
            number, before = self._newest(organization, execution)
            after = change(before)
            if after == before or self._write(after, number + 1):
                return after
        raise StoreError(
            f"execution {execution}: lost {MAX_RACES} changes in a row to others",
            hint="ask again a little later",
        )

    def wants_files(self, organization: str, execution: str) -> bool:
        """Whether an execution is still to get the staged files that it claimed."""
        try:
            record = self.read(organization, execution)
        except NotFoundError:
            return False
        return not record.is_attached and not record.status.is_terminal

    def list(self, organization: str) -> Iterator[Execution]:
        """All records of an organization, in order of their ids. Only those that are not known are read."""
        found = self._store.list(f"{_PREFIX}{_checked(organization)}/")
        numbered = ((name, number) for name, number in map(_parsed, (each.key for each in found)) if number)
        for execution, revisions in groupby(numbered, lambda each: each[0]):
            newest = max(number for _, number in revisions)
            try:
                yield self._get(organization, execution, newest)
            except ObjectNotFoundError:
                continue  # removed while we looked

    def organizations(self) -> Iterable[str]:
        """The organizations that have records."""
        after = _PREFIX
        while True:
            found = next(self._store.list(_PREFIX, start_after=after), None)
            if found is None:
                return
            organization = found.key.removeprefix(_PREFIX).partition("/")[0]
            yield organization
            after = f"{_PREFIX}{organization}0"  # "0" follows "/"

    def _newest(self, organization: str, execution: str) -> tuple[int, Execution]:
        try:
            prefix = _prefix(organization, execution)
        except ValueError:
            raise _no_such() from None
        known = self._known.get((organization, execution))
        start_after = _key(organization, execution, known[0] - 1) if known and known[0] > 1 else ""
        keys = [found.key for found in self._store.list(prefix, start_after=start_after)]
        numbers = [number for _, number in map(_parsed, keys) if number]
        if not numbers:
            raise _no_such()
        newest = max(numbers)
        return newest, self._get(organization, execution, newest)

    def _get(self, organization: str, execution: str, number: int) -> Execution:
        known = self._known.get((organization, execution))
        if known is not None and known[0] == number:
            return known[1]
        revision = self._read(_key(organization, execution, number))
        self._know(number, revision.execution)
        return revision.execution

    def _read(self, key: str) -> _Revision:
        data = self._store.get(key)
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

    def _write(self, execution: Execution, number: int) -> bool:
        key = _key(execution.organization, execution.id, number)
        revision = _Revision(1, str(uuid.uuid4()), execution)
        try:
            won = self._store.put_if_absent(key, msgspec.json.encode(revision))
        except StoreError as failure:
            try:
                won = self._read(key).write == revision.write
            except StoreError:
                raise failure from None
        else:
            won = won or self._read(key).write == revision.write
        if won:
            self._know(number, execution)
        return won

    def _know(self, number: int, execution: Execution) -> None:
        with self._lock:
            key = (execution.organization, execution.id)
            known = self._known.get(key)
            if known is None or known[0] < number:
                self._known[key] = (number, execution)
            self._known.move_to_end(key)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)


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


def _no_such() -> NotFoundError:
    return NotFoundError("Execution not found.")


# msgspec learns a type at its first use; two threads at once would crash the process.
_REVISION = msgspec.json.Decoder(_Revision)
