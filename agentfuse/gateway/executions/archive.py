"""The events of executions that have ended: one object each, beside the record."""

from __future__ import annotations

import gzip
import json
from collections import deque
from pathlib import Path
from uuid import UUID

import msgspec

from agentfuse.control.messages import Event
from agentfuse.errors import IntegrityError, ObjectNotFoundError
from agentfuse.events.log import EventLog
from agentfuse.gateway.executions.record import Execution
from agentfuse.home.tree import Home
from agentfuse.objectstore.base import ObjectStore

_AT_ONCE = 5000

MOST_EVENTS = 20_000
"""So many are kept of an execution, the newest ones."""


class Archive:
    """Keeps events in a store. Every method blocks and raises ``StoreError``."""

    def __init__(self, store: ObjectStore, state: Path) -> None:
        self._store = store
        self._state = state

    def keep(self, execution: Execution) -> None:
        """Keep the events of a home that is not mounted any more."""
        home = Home(self._state, execution.id)
        log = EventLog(home.events, home.tree, only_looks=True)
        lines: deque[bytes] = deque(maxlen=MOST_EVENTS)
        try:
            after = 0
            while log.exists() and (some := log.read(after, _AT_ONCE)):
                lines.extend(each.to_json(execution=execution.id, agent=execution.agent) for each in some)
                after = some[-1].seq
        finally:
            log.close()
        if lines:
            self._store.put(_key(execution), gzip.compress(b"\n".join(lines), compresslevel=6, mtime=0))

    def read(self, execution: Execution) -> list[Event]:
        """The events of an ended execution."""
        try:
            data = gzip.decompress(self._store.get(_key(execution)))
            # Not msgspec's own parser: it refuses the lone surrogates of names that are no UTF-8.
            return [msgspec.convert(json.loads(line), Event) for line in data.split(b"\n")]
        except ObjectNotFoundError:
            return []
        except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
            raise IntegrityError(f"the events of execution {execution.id} are damaged: {error}") from error

    def remove(self, execution: Execution) -> None:
        """Forget them."""
        self._store.delete(_key(execution))


def _key(execution: Execution) -> str:
    return f"executions/{UUID(execution.organization)}/{UUID(execution.id)}/events.ndjson.gz"
