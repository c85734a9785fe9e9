"""What the API says of executions: records as JSON. Pure functions."""

from __future__ import annotations

import datetime
from typing import Any
from uuid import UUID, uuid5

from agentfuse.gateway.downloads import calendar_seconds
from agentfuse.gateway.executions.record import Execution, Status

UPDATABLE = (Status.RUNNING, Status.PAUSED, Status.CANCELLED)
"""What the API's clients understand as the answer to a change of status."""


def timestamp(at_s: float) -> str:
    """``2026-01-31T12:00:00.123456Z``; what a file's times may be beyond the calendar is its end."""
    moment = datetime.datetime.fromtimestamp(calendar_seconds(at_s), datetime.UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="microseconds") + "Z"


def part_id(execution: str, part: str) -> str:
    """A stable id of something that belongs to an execution."""
    return str(uuid5(UUID(execution), part))


def item(execution: Execution, version: str, base_url: str) -> dict[str, Any]:
    """An ExecutionItem. ``version`` is the id of the agent's version."""
    found: dict[str, Any] = {
        "id": execution.id,
        "agentId": execution.agent,
        "workflowId": execution.agent,
        "workflowVersionId": version,
        "status": execution.status,
        "createdAt": timestamp(execution.created_at),
        "organizationId": execution.organization,
        "agentName": execution.agent,
        "workflowName": execution.agent,
        "humanLabels": [],
        "comments": [],
        "hasBeenRerun": execution.has_been_rerun,
        "inputs": execution.inputs,
        "metadata": execution.metadata,
        "platformUrl": f"{base_url}/ui/executions/{execution.id}",
    }
    if execution.options:
        found["executionOptions"] = execution.options
    if execution.started_at is not None:
        found["startedAt"] = timestamp(execution.started_at)
    if execution.terminal_at is not None:
        found["terminalAt"] = timestamp(execution.terminal_at)
        found["duration"] = max(0.0, execution.terminal_at - (execution.started_at or execution.created_at))
    if execution.profile is not None:
        found |= {"profileId": execution.profile, "agentProfileId": execution.profile}
    if execution.parent is not None:
        found["parentExecutionId"] = execution.parent
    if execution.purged_at is not None:
        found["purgedAt"] = timestamp(execution.purged_at)
    outcome = result(execution)
    if outcome is not None:
        found["executionResult"] = outcome
    return found


def result(execution: Execution) -> dict[str, Any] | None:
    """The ExecutionResult of one that completed or failed; None of others."""
    if execution.status not in (Status.COMPLETED, Status.FAILED) or execution.terminal_at is None:
        return None
    found: dict[str, Any] = {
        "id": part_id(execution.id, "result"),
        "executionId": execution.id,
        "outcome": outcome_of(execution),
        "reasoning": execution.reason,
        "createdAt": timestamp(execution.terminal_at),
    }
    if execution.result is not None:
        found["result"] = execution.result
    return found


def outcome_of(execution: Execution) -> str:
    """``success`` or ``failure``, or nothing yet."""
    return {Status.COMPLETED: "success", Status.FAILED: "failure"}.get(execution.status, "")


def waited(execution: Execution) -> dict[str, Any]:
    """The answer to who waits for an end."""
    found: dict[str, Any] = {"executionId": execution.id, "status": execution.status}
    outcome = result(execution)
    return found if outcome is None else found | {"executionResult": outcome}
