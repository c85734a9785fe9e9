"""What is ordered by the bodies of requests: to execute, to rerun, to change a status."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentfuse.errors import UsageError
from agentfuse.gateway.asteroid import fields
from agentfuse.gateway.executions.record import Status
from agentfuse.gateway.executions.service import ExecuteBody
from agentfuse.gateway.filetree import clean

_WHEN_FULL = ("queue", "reject")
_MAX_FILES = 1000
_MAX_MINUTES = 10**6
_STATUSES = (Status.RUNNING, Status.PAUSED, Status.CANCELLED, Status.COMPLETED, Status.FAILED)


@dataclass(frozen=True, slots=True)
class StatusOrder:
    """Another status, why, and what came of the execution."""

    status: Status
    reason: str
    result: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class RerunOrder:
    """What replaces that of the original; None: nothing does."""

    inputs: dict[str, Any] | None
    profile: str | None


def execute_order(body: Mapping[str, Any]) -> ExecuteBody:
    """What an execution is to begin with. Raises ``UsageError``."""
    profile = fields.text_or_none(body, "profileId", "agentProfileId")
    group = fields.text_or_none(body, "profileGroupId", "agentProfilePoolId")
    if profile and group:
        raise UsageError("profileId and profileGroupId exclude each other", hint="leave one out")
    version = fields.whole_or_none(body, "version", 0, 2**31 - 1)
    if fields.flag_of(body, "head") and version is not None:
        raise UsageError("head and version exclude each other", hint="leave one out")
    when_full = fields.one_of(fields.text_or_none(body, "onCapacityLimit"), "onCapacityLimit", _WHEN_FULL)
    inputs = fields.object_of(body, "inputs")
    if inputs is None:
        inputs = fields.object_of(body, "dynamicData")
    return ExecuteBody(
        inputs=inputs or {},
        metadata=fields.object_of(body, "metadata") or {},
        options=_options(body),
        profile=profile or group,
        staged=_staged(body),
        files=_files(body),
        queues=when_full == "queue",
    )


def rerun_order(body: Mapping[str, Any]) -> RerunOrder:
    """What a rerun does otherwise. Raises ``UsageError``."""
    profile = fields.text_or_none(body, "profileId", "agentProfileId")
    return RerunOrder(fields.object_of(body, "inputs"), profile)


def status_order(body: Mapping[str, Any]) -> StatusOrder:
    """Raises ``UsageError``."""
    status = fields.one_of(fields.text_or_none(body, "status"), "status", [each.value for each in _STATUSES])
    if status is None:
        raise UsageError("status is missing", hint="running, paused, cancelled, completed or failed")
    reason = fields.text_or_none(body, "reason") or ""
    return StatusOrder(Status(status), reason, fields.object_of(body, "result"))


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Those that clients know are of the type that they insist on when they get them back."""
    options = fields.object_of(body, "executionOptions") or {}
    fields.text_or_none(options, "variantKey")
    fields.text_or_none(options, "sharedStorageKey")
    fields.whole_or_none(options, "softTimeoutMins", 1, _MAX_MINUTES)
    return options


def _staged(body: Mapping[str, Any]) -> list[str]:
    """The ids of staged files; the names are those that they were staged with."""
    files = _list(body, "tempFiles")
    ids = []
    for file in files:
        if not isinstance(file, dict):
            raise UsageError(
                "tempFiles must be what staging answered", hint='write [{"id": "…", "name": "…"}]'
            )
        found = fields.text_or_none(file, "id")
        if found is None:
            raise UsageError("a file of tempFiles has no id")
        ids.append(found.lower())
    if len(set(ids)) < len(ids):
        raise UsageError("a file of tempFiles is there twice", hint="stage it twice")
    return ids


def _files(body: Mapping[str, Any]) -> list[str]:
    """Paths in the tenant's store."""
    found = []
    for file in _list(body, "files"):
        path = clean(file) if isinstance(file, str) else b""
        if not path:
            raise UsageError("files must be paths of the tenant's file store")
        found.append(os.fsdecode(path))
    return found


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{name} must be a list")
    if len(value) > _MAX_FILES:
        raise UsageError(f"{name} may hold {_MAX_FILES} at most")
    return value
