"""``GET /executions``: which of an organization's executions are wanted, in what order, and which page.

Pure: from a query to a :class:`Wanted`, from records to a page of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from agentfuse.errors import UsageError
from agentfuse.gateway.asteroid import fields
from agentfuse.gateway.asteroid.items import outcome_of
from agentfuse.gateway.executions.record import Execution, Status

DEFAULT_PAGE_SIZE = 10
MAX_PAGE_SIZE = 1000
MAX_PAGE = 10**9
PHASES = {
    "pending": {Status.QUEUED},
    "active": {
        Status.STARTING,
        Status.RUNNING,
        Status.AWAITING_CONFIRMATION,
        Status.PAUSED,
        Status.PAUSED_BY_AGENT,
    },
    "terminal": {Status.COMPLETED, Status.CANCELLED, Status.FAILED},
}
SORT_FIELDS: dict[str, Callable[[Execution], Any]] = {
    "created_at": lambda execution: execution.created_at,
    "status": lambda execution: execution.status.value,
    "started_at": lambda execution: execution.started_at or 0.0,
}
DIRECTIONS = ("asc", "desc")
_SOURCE = "api"  # what triggers every execution here

QUERY = {
    "organizationId": "Only this organization's, which must be the key's",
    "page": "Which page, from 1",
    "pageSize": f"How many on a page, {DEFAULT_PAGE_SIZE} by default",
    "executionId": "Part of an execution's id",
    "workflowId": "The agent",
    "agentId": "The same",
    "status": "One of these; may be repeated",
    "phase": "One of these; may be repeated",
    "createdAfter": "Not created before this time",
    "createdBefore": "Not created after this time",
    "createdWithin": "Created within this long before now: 30m, 24h, 7d, 1d12h; not with createdAfter",
    "outcomeLabel": "Part of the outcome",
    "metadata": "key=value; every one that is given must match",
    "metadataKey": "With metadataValue: the same for one pair",
    "metadataValue": "With metadataKey",
    "inputsKey": "With inputsValue: an input",
    "inputsValue": "With inputsKey: part of its value",
    "profileIds": "One of these profiles; may be repeated",
    "agentProfileIds": "The same",
    "sortField": "created_at by default",
    "sortDirection": "desc by default",
    "sort": "field:direction, instead of both",
    "humanLabels": "There are no labels: none matches",
    "triggerSource": "All executions are the API's: api matches",
    "workflowVersion": "There are no numbered versions: none matches",
    "hasScriptFailures": "There are none: false matches",
    "batchId": "There are no batches: none matches",
}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 1}
_TIME = {"type": "string", "format": "date-time"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "organizationId": {"type": "string", "format": "uuid"},
    "page": _WHOLE | {"maximum": MAX_PAGE},
    "pageSize": _WHOLE | {"maximum": MAX_PAGE_SIZE},
    "workflowVersion": {"type": "integer", "minimum": 0, "maximum": MAX_PAGE},
    "hasScriptFailures": {"type": "boolean"},
    "createdAfter": _TIME,
    "createdBefore": _TIME,
    "status": {"type": "array", "items": {"enum": [status.value for status in Status]}},
    "phase": {"type": "array", "items": {"enum": sorted(PHASES)}},
    "sortField": {"enum": sorted(SORT_FIELDS)},
    "sortDirection": {"enum": list(DIRECTIONS)},
    **{
        name: {"type": "array", "items": {"type": "string"}}
        for name in ("metadata", "profileIds", "agentProfileIds", "humanLabels", "triggerSource")
    },
}

Test = Callable[[Execution], bool]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a query asks for. ``tests``: every one must be passed."""

    page: int
    page_size: int
    tests: Sequence[Test]
    key: Callable[[Execution], Any]
    is_descending: bool

    def of(self, executions: Iterable[Execution]) -> tuple[list[Execution], int]:
        """The page, and how many there are on all pages."""
        found = [execution for execution in executions if all(test(execution) for test in self.tests)]
        found.sort(key=lambda e: (self.key(e), e.created_at, e.id), reverse=self.is_descending)
        start = (self.page - 1) * self.page_size
        return found[start : start + self.page_size], len(found)


def wanted(query: Mapping[str, Sequence[str]], now: float) -> Wanted:
    """What a query asks for. Raises ``UsageError``. Whose it is was checked by then."""
    one = {name: values[-1] for name, values in query.items()}
    key, is_descending = _order(one)
    return Wanted(
        page=fields.whole(one.get("page"), "page", 1, MAX_PAGE) or 1,
        page_size=fields.whole(one.get("pageSize"), "pageSize", 1, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE,
        tests=[
            *_of_records(query, one),
            *_of_times(one, now),
            *_of_values(query, one),
            *_of_others(query, one),
        ],
        key=key,
        is_descending=is_descending,
    )


def organization_of(query: Mapping[str, Sequence[str]]) -> str | None:
    """The organization that is asked for. Raises ``UsageError``."""
    asked = query.get("organizationId")
    if asked is None:
        return None
    try:
        return str(UUID(asked[-1]))
    except ValueError:
        raise UsageError("organizationId must be a UUID") from None


def _order(one: Mapping[str, str]) -> tuple[Callable[[Execution], Any], bool]:
    field = fields.one_of(one.get("sortField"), "sortField", SORT_FIELDS)
    direction = fields.one_of(one.get("sortDirection"), "sortDirection", DIRECTIONS)
    if "sort" in one:
        if field or direction:
            raise UsageError("sort cannot be combined with sortField or sortDirection", hint="leave one out")
        field, _, direction = one["sort"].partition(":")
        fields.one_of(field, "sort", SORT_FIELDS)
        fields.one_of(direction or "desc", "sort, after the colon,", DIRECTIONS)
    return SORT_FIELDS[field or "created_at"], direction != "asc"


def _of_records(query: Mapping[str, Sequence[str]], one: Mapping[str, str]) -> Iterable[Test]:
    if "executionId" in one:
        part = one["executionId"].lower()
        yield lambda execution: part in execution.id
    agents = {one[name] for name in ("workflowId", "agentId") if name in one}
    if agents:
        yield lambda execution: agents == {execution.agent}
    statuses = {Status(each) for each in fields.all_of(query.get("status", ()), "status", Status)}
    if statuses:
        yield lambda execution: execution.status in statuses
    phases = fields.all_of(query.get("phase", ()), "phase", PHASES)
    if phases:
        in_phases = set().union(*(PHASES[phase] for phase in phases))
        yield lambda execution: execution.status in in_phases
    for name in ("profileIds", "agentProfileIds"):
        if name in query:
            yield partial(_has_profile, set(query[name]))


def _of_times(one: Mapping[str, str], now: float) -> Iterable[Test]:
    after = fields.moment(one.get("createdAfter"), "createdAfter")
    before = fields.moment(one.get("createdBefore"), "createdBefore")
    within = fields.span(one.get("createdWithin"), "createdWithin")
    if within is not None:
        if after is not None:
            raise UsageError("createdWithin cannot be combined with createdAfter", hint="leave one out")
        after = now - within
    if after is not None:
        yield lambda execution: execution.created_at >= after
    if before is not None:
        yield lambda execution: execution.created_at <= before


def _of_values(query: Mapping[str, Sequence[str]], one: Mapping[str, str]) -> Iterable[Test]:
    pairs = [each.partition("=") for each in query.get("metadata", ())]
    if any(not equals for _, equals, _ in pairs):
        raise UsageError("metadata must be key=value")
    for key, value in [(key, value) for key, _, value in pairs] + _pair(one, "metadataKey", "metadataValue"):
        yield partial(_has_metadata, key, value)
    for key, value in _pair(one, "inputsKey", "inputsValue"):
        yield partial(_has_input, key, value)
    if "outcomeLabel" in one:
        outcome = one["outcomeLabel"].casefold()
        yield lambda execution: outcome in outcome_of(execution)


def _has_profile(profiles: Collection[str], execution: Execution) -> bool:
    return execution.profile in profiles


def _has_metadata(key: str, value: str, execution: Execution) -> bool:
    return key in execution.metadata and fields.shown_value(execution.metadata[key]) == value


def _has_input(key: str, part: str, execution: Execution) -> bool:
    return key in execution.inputs and part.casefold() in fields.shown_value(execution.inputs[key]).casefold()


def _pair(one: Mapping[str, str], key: str, value: str) -> list[tuple[str, str]]:
    if (key in one) != (value in one):
        raise UsageError(f"{key} and {value} must be used together")
    return [(one[key], one[value])] if key in one else []


def _of_others(query: Mapping[str, Sequence[str]], one: Mapping[str, str]) -> Iterable[Test]:
    """Of what executions have elsewhere, and none has here."""
    fields.whole(one.get("workflowVersion"), "workflowVersion", 0, MAX_PAGE)
    has_failures = fields.one_of(one.get("hasScriptFailures"), "hasScriptFailures", ("true", "false"))
    is_none = (
        any(name in one for name in ("humanLabels", "workflowVersion", "batchId"))
        or has_failures == "true"
        or ("triggerSource" in one and _SOURCE not in query["triggerSource"])
    )
    if is_none:
        yield lambda _: False
