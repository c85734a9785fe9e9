"""Staged files: uploaded before the execution that they are for, and consumed by one.

In the store each is a content, ``temp-files/<org>/<id>``, and a record, ``….json``; the record comes last, so
who finds it finds the content. An execution *claims* a file (``….claim``, by put-if-absent) before it takes
it, so that of two that want it one fails. The sweeper goes by the ages of these objects: a file all of whose
objects are old enough is removed, unless an execution that has claimed it is still to get it, which may be
queued for long, or wait for its host. That can be done twice, at the same time, and by any number of
gateways; a claim makes the file young again, so it has its execution's record before it is old.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from agentfuse.errors import IntegrityError, NotFoundError, ObjectNotFoundError, StoreError
from agentfuse.gateway.filetree import Body
from agentfuse.objectstore.base import ObjectStore

EXPIRES_S = 60 * 60.0
SWEPT_S = EXPIRES_S + 5 * 60.0
"""Clocks of gateways and of the store may differ by the five minutes."""

_PREFIX = "temp-files/"


@dataclass(frozen=True, slots=True)
class Staged:
    """A staged file. ``name`` is as it was sent, bytes that are not UTF-8 being lone surrogates."""

    id: str
    organization: str
    name: str
    media_type: str
    size: int
    sha256: str
    expires_at: float


class Staging:
    """The staged files of a store. Every method blocks, and raises ``StoreError`` when the store failed."""

    def __init__(self, store: ObjectStore, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now

    def stage(self, organization: str, files: list[tuple[str, str, Body]]) -> list[Staged]:
        """Keep files, each a name, a media type and a content; all of them, or none that anybody finds."""
        staged = [
            Staged(
                str(uuid.uuid4()), organization, name, kind, body.size, body.sha256, self._now() + EXPIRES_S
            )
            for name, kind, body in files
        ]
        try:
            for each, (_, _, body) in zip(staged, files, strict=True):
                self._store.put(self._key(organization, each.id), body.open(), size_bytes=body.size)
            for each in staged:
                self._store.put(self._key(organization, each.id, ".json"), _record(each))
        except StoreError:
            with suppress(StoreError):  # what is left is swept in an hour
                for each in staged:
                    self.remove(each)
            raise
        return staged

    def find(self, organization: str, file_id: str) -> Staged:
        """A file that can be claimed. Raises ``NotFoundError`` for one that is not there, not of this
        organization, expired or consumed."""
        staged = self._read(organization, file_id)
        with suppress(ObjectNotFoundError):
            self._store.stat(self._key(organization, staged.id, ".claim"))
            raise _no_such(file_id)
        return staged

    def claim(self, organization: str, file_id: str, execution: str) -> Staged:
        """Take a file for an execution; again for the same one is no mistake. Raises ``NotFoundError``."""
        staged = self._read(organization, file_id)
        key = self._key(organization, staged.id, ".claim")
        claim = json.dumps({"execution": execution, "attempt": str(uuid.uuid4())}).encode()
        if not self._store.put_if_absent(key, claim) and self._holder(staged) != execution:
            raise _no_such(file_id)
        return staged

    def claimed(self, organization: str, file_id: str, execution: str) -> Staged:
        """A file that was claimed for an execution, expired or not. Raises ``NotFoundError``."""
        staged = self._read(organization, file_id, even_expired=True)
        if self._holder(staged) != execution:
            raise _no_such(file_id)
        return staged

    def give_back(self, organization: str, file_id: str, execution: str) -> None:
        """Undo the claim for an execution that did not begin. Raises ``NotFoundError`` if there is none."""
        self.release(self.claimed(organization, file_id, execution))

    def release(self, staged: Staged) -> None:
        """Give back what was claimed for an execution that did not begin; only who claimed it may."""
        self._store.delete(self._key(staged.organization, staged.id, ".claim"))

    def pieces(self, staged: Staged) -> Iterator[bytes]:
        """The content."""
        return self._store.stream(self._key(staged.organization, staged.id))

    def remove(self, staged: Staged) -> None:
        """It is consumed. The record goes first, so nobody finds a file without its content, and the claim
        last, so nobody takes it twice."""
        for suffix in (".json", "", ".claim"):
            self._store.delete(self._key(staged.organization, staged.id, suffix))

    def sweep(self, is_wanted_by: Callable[[str, str], bool]) -> int:
        """Remove what has expired, and what broken-off requests left; how many files that were.

        ``is_wanted_by``: whether an organization's execution is still to get what it claimed.
        """
        limit = self._now() - SWEPT_S
        swept = 0
        for _, group in groupby(self._store.list(_PREFIX), lambda found: _file_of(found.key)):
            objects = list(group)
            if all(found.modified_at < limit for found in objects):
                claim = next((found.key for found in objects if found.key.endswith(".claim")), None)
                if claim is not None:
                    holder = self._holder_in(claim)
                    if holder is not None and is_wanted_by(claim.split("/")[1], holder):
                        continue
                for found in sorted(objects, key=lambda found: not found.key.endswith(".json")):
                    self._store.delete(found.key)
                swept += 1
        return swept

    def _holder(self, staged: Staged) -> str | None:
        """The execution that a file is claimed for."""
        return self._holder_in(self._key(staged.organization, staged.id, ".claim"))

    def _holder_in(self, claim: str) -> str | None:
        try:
            return str(json.loads(self._store.get(claim))["execution"])
        except ObjectNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{claim}: the claim of a staged file is damaged: {error}") from error

    def _read(self, organization: str, file_id: str, *, even_expired: bool = False) -> Staged:
        try:
            uuid.UUID(file_id)
            data = self._store.get(self._key(organization, file_id.lower(), ".json"))
        except (ValueError, ObjectNotFoundError):
            raise _no_such(file_id) from None
        try:
            staged = Staged(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"staged file {file_id}: its record is damaged: {error}") from error
        if staged.expires_at <= self._now() and not even_expired:
            raise _no_such(file_id)
        return staged

    def _key(self, organization: str, file_id: str, suffix: str = "") -> str:
        return f"{_PREFIX}{organization}/{file_id}{suffix}"


def _record(staged: Staged) -> bytes:
    return json.dumps({name: getattr(staged, name) for name in Staged.__slots__}).encode()


def _file_of(key: str) -> str:
    """What the keys of one file have in common: an id has no dot."""
    directory, slash, name = key.rpartition("/")
    return directory + slash + name.partition(".")[0]


def _no_such(file_id: str) -> NotFoundError:
    return NotFoundError(
        f"temp file {file_id} does not exist, has expired or is consumed", hint="stage it again"
    )
