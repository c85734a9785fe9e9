"""Which executions an agent may have that are not terminal, on whatever host: ``gateway/live/<agent>/<id>``.

Only a hint, so that nobody has to look through all records: written before the record, removed after its end.
"""

from __future__ import annotations

from agentfuse.gateway.executions.record import Execution
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.layout import check_id

_PREFIX = "gateway/live/"


class Hints:
    """The hints of a store. Every method blocks and raises ``StoreError``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, execution: Execution) -> None:
        """It is about to be there."""
        self._store.put(_key(execution.agent, execution.id), b"")

    def remove(self, execution: Execution) -> None:
        """It is terminal."""
        self._store.delete(_key(execution.agent, execution.id))

    def of(self, agent: str) -> list[str]:
        """The ids of an agent's executions that may not be terminal yet."""
        prefix = _key(agent, "")
        return [found.key.removeprefix(prefix) for found in self._store.list(prefix)]


def _key(agent: str, execution: str) -> str:
    return f"{_PREFIX}{check_id('agent', agent)}/{execution}"
