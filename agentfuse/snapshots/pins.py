"""Pins: snapshots that the collection of garbage leaves alone. One small object for each."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import msgspec

from agentfuse.errors import ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.layout import check_owner, check_region, pin_key, pin_number, pins_prefix


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """What the object of a pin says; that it is there is what counts."""

    number: int
    time: datetime.datetime


class Pins:
    """The pins of one region of one agent. Every method raises ``StoreError`` when the store failed."""

    def __init__(self, store: ObjectStore, agent: str, region: str) -> None:
        self._store = store
        self._agent = check_owner(agent)
        self._region = check_region(region)

    def numbers(self) -> Iterator[int]:
        """The snapshots that are pinned, ascending."""
        for found in self._store.list(pins_prefix(self._agent, self._region)):
            number = pin_number(found.key)
            if number is not None:
                yield number

    def is_pinned(self, number: int) -> bool:
        """Whether a snapshot is pinned now."""
        try:
            self._store.stat(self._key(number))
        except ObjectNotFoundError:
            return False
        return True

    def add(self, number: int) -> None:
        """Pin a snapshot. The caller looks afterwards whether it is still there."""
        pin = Pin(number=number, time=datetime.datetime.now(datetime.UTC))
        self._store.put(self._key(number), msgspec.json.encode(pin) + b"\n")

    def remove(self, number: int) -> None:
        """Take a pin away; none is no error."""
        self._store.delete(self._key(number))

    def _key(self, number: int) -> str:
        return pin_key(self._agent, self._region, number)
