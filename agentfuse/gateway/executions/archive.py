"""What stays of executions that have ended, beside their records: the events, one object each, and files."""

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
from agentfuse.snapshots.layout import execution_prefix

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

    def purge(self, execution: Execution) -> None:
        """Remove them, and all snapshots of what the execution kept."""
        for found in list(self._store.list(execution_prefix(execution.agent, execution.id))):
            self._store.delete(found.key)
        self._store.delete(_key(execution))


def _key(execution: Execution) -> str:
    return f"executions/{UUID(execution.organization)}/{UUID(execution.id)}/events.ndjson.gz"


# msgspec learns a type at its first use; two threads at once would crash the process.
_EVENT = msgspec.json.Decoder(Event)
