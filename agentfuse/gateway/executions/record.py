"""The record of an execution: what all gateways know of it. Values only."""

from __future__ import annotations

import enum
import time
from typing import Any

import msgspec


class Status(enum.StrEnum):
    """How an execution stands; the words are the Asteroid contract's."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    AWAITING_CONFIRMATION = "awaiting_confirmation"
    PAUSED_BY_AGENT = "paused_by_agent"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Whether it stays so."""
        return self in (Status.COMPLETED, Status.CANCELLED, Status.FAILED)


class StagedFile(msgspec.Struct, frozen=True):
    """A staged file that the execution begins with; the name is the staged record's."""

    id: str
    name: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a user told the agent. ``at`` is in seconds since the epoch."""

    id: str
    at: float
    text: str
    user: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The status that an execution came to have at a time (seconds since the epoch)."""

    at: float
    status: Status


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """An execution. ``*_at`` are seconds since the epoch.

    ``ends_as`` is the status that it will have once its home is in the store; it is set when the end has
    begun, and cannot be changed by then. ``host`` is the id of the gateway's host that owns it: nobody
    else changes the record, but for what is said in ``executions.records``. ``epoch`` is the host's when it
    began or adopted it (``hosts.identity``): who takes the host of that epoch for dead may fail it.
    ``staged`` are files that are claimed for it, ``files`` paths of the tenant's store; ``is_attached``:
    they are in the home.
    """

    id: str
    organization: str
    agent: str
    tenant: str
    user: str
    host: str
    epoch: int = 0
    created_at: float
    status: Status
    ends_as: Status | None = None
    started_at: float | None = None
    terminal_at: float | None = None
    reason: str = ""
    result: dict[str, Any] | None = None
    inputs: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    options: dict[str, Any] = {}
    profile: str | None = None
    staged: list[StagedFile] = []
    files: list[str] = []
    is_attached: bool = False
    parent: str | None = None
    has_been_rerun: bool = False
    messages: list[Message] = []
    changes: list[Change] = []
    restarts: int = 0
    deleted_at: float | None = None
    purged_at: float | None = None

    def with_status(self, status: Status, *, at: float | None = None) -> Execution:
        """The record with another status, and with the times that this makes known."""
        at = time.time() if at is None else at
        changes: dict[str, Any] = {
            "status": status,
            "changes": [*self.changes, Change(at=at, status=status)],
        }
        if status is Status.RUNNING and self.started_at is None:
            changes["started_at"] = at
        if status.is_terminal:
            changes |= {"terminal_at": at, "ends_as": status}
        return msgspec.structs.replace(self, **changes)
