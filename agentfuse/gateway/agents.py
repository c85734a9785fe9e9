"""Whose an agent is: ``gateway/agents/<agent>.json`` in the store, made once, by put-if-absent.

An agent begins to exist, and to belong to an organization, with the first execution that one of its keys
asks for. Its memory is found by its id alone, so nobody else may ever come to it. An agent that has a memory,
but no owner, was run from the command line: it becomes an organization's only while keys of no other one are
configured.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from itertools import islice

from agentfuse.config import parse_agent_id
from agentfuse.errors import IntegrityError, NotFoundError, ObjectNotFoundError, StoreError
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.layout import agent_prefix

_PREFIX = "gateway/agents/"


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent. ``created_at``: seconds since the epoch; ``version``: its workflow version's stable id."""

    id: str
    organization: str
    version: str
    created_at: float
    claim: str


class Agents:
    """The agents of a store. Every method blocks and raises ``StoreError``; an agent that is another
    organization's is a ``NotFoundError``. ``has_others``: keys of several organizations are configured."""

    def __init__(self, store: ObjectStore, *, has_others: bool) -> None:
        self._store = store
        self._has_others = has_others
        self._known: dict[str, Agent] = {}

    def find(self, organization: str, agent: str) -> Agent:
        """An agent that exists. Raises ``NotFoundError``, ``UsageError`` for what can be no id."""
        parse_agent_id(agent)
        found = self._known.get(agent) or self._read(agent)
        if found is None:
            if self._has_memory(agent) and not self._has_others:
                return self.claim(organization, agent)
            raise _no_such(agent)
        return self._of(organization, found)

    def claim(self, organization: str, agent: str) -> Agent:
        """An agent, which begins to exist if need be."""
        parse_agent_id(agent)
        found = self._known.get(agent) or self._read(agent)
        if found is None:
            if self._has_others and self._has_memory(agent):
                raise _no_such(agent)
            found = self._make(organization, agent)
        return self._of(organization, found)

    def _make(self, organization: str, agent: str) -> Agent:
        made = Agent(agent, organization, str(uuid.uuid4()), time.time(), str(uuid.uuid4()))
        failure: StoreError | None = None
        try:
            self._store.put_if_absent(_key(agent), json.dumps(asdict(made)).encode())
        except StoreError as error:
            failure = error
        found = self._read(agent)
        if found is None:
            raise failure or StoreError(f"agent {agent}: its record is not there although it was made")
        return found

    def _read(self, agent: str) -> Agent | None:
        try:
            data = self._store.get(_key(agent))
        except ObjectNotFoundError:
            return None
        try:
            found = Agent(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"agent {agent}: its record is damaged: {error}") from error
        self._known[agent] = found
        return found

    def _has_memory(self, agent: str) -> bool:
        return any(True for _ in islice(self._store.list(agent_prefix(agent)), 1))

    def _of(self, organization: str, agent: Agent) -> Agent:
        if agent.organization != organization:
            raise _no_such(agent.id)
        return agent


def _key(agent: str) -> str:
    return f"{_PREFIX}{agent}.json"


def _no_such(agent: str) -> NotFoundError:
    return NotFoundError(f"agent {agent} does not exist")
