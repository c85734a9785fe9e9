"""The hosts' own records in the store, ``gateway/hosts/<host>.json``: written by that host only, by plain
put.

A record changes with every beat; that it changed is all that others conclude from it. Its times are for
people.
"""

from __future__ import annotations

import logging
import uuid
from typing import Literal

import msgspec

from agentfuse.admission import OnHostLost
from agentfuse.errors import ObjectNotFoundError
from agentfuse.objectstore.base import ObjectStore

_LOG = logging.getLogger(__name__)

_PREFIX = "gateway/hosts/"
_SUFFIX = ".json"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A host as it says of itself.

    ``incarnation`` is another for every process and epoch, ``beat`` counts its renewals. ``lease_s``:
    unchanged for so long it is dead, and ``on_host_lost`` is what then becomes of its executions.
    ``executions`` is how many it has, ``executes`` whether it begins any, ``at`` its time in seconds since
    the epoch.
    """

    format: Literal[1] = 1
    id: str
    epoch: int
    incarnation: str
    beat: int
    url: str
    lease_s: float
    on_host_lost: OnHostLost
    executes: bool
    executions: int
    at: float


class Roster:
    """The records of a store. Every method blocks and raises ``StoreError``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, host: Host) -> None:
        """Replace a host's record."""
        self._store.put(_key(host.id), msgspec.json.encode(host))

    def get(self, host: str) -> Host | None:
        """A host's record; None if it has none, or one that cannot be read."""
        try:
            return _decoded(_key(host), self._store.get(_key(host)))
        except ObjectNotFoundError:
            return None

    def all(self) -> list[Host]:
        """The records of all hosts."""
        names = [found.key.removeprefix(_PREFIX).removesuffix(_SUFFIX) for found in self._store.list(_PREFIX)]
        return [host for host in map(self.get, filter(is_uuid, names)) if host is not None]

    def remove(self, host: str) -> None:
        """A host that will not come back, or is in no cluster any more."""
        self._store.delete(_key(host))


def _key(host: str) -> str:
    return f"{_PREFIX}{uuid.UUID(host)}{_SUFFIX}"


def _decoded(key: str, data: bytes) -> Host | None:
    try:
        host = _HOST.decode(data)
    except msgspec.DecodeError as error:
        _LOG.warning("%s: not a host's record that this version reads: %s", key, error)
        return None
    return host if _key(host.id) == key else None


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID, in the one form that keys have."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


# msgspec learns a type at its first use; two threads at once would crash the process.
_HOST = msgspec.json.Decoder(Host)
