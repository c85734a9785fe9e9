"""What happened in an execution, as the API's activities: changes of status, messages, files that came.

Pure: the links of files come from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentfuse.control.messages import Event
from agentfuse.gateway.asteroid.items import part_id, timestamp
from agentfuse.gateway.executions.record import Execution
from agentfuse.gateway.ids import file_id
from agentfuse.home.mime import UNKNOWN
from agentfuse.regions import Creator

DIRECTIONS = ("asc", "desc")
MAX_LIMIT = 10**9

_SOURCES = {Creator.USER: "upload", Creator.ENVIRONMENT: "download", Creator.AGENT: "agent"}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A file that came, as it is now, or was last. ``source``: how it came."""

    number: int
    at: float
    region: str
    path: bytes
    size: int
    media_type: str
    source: str


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that happened. ``make`` says it; not before it is known that somebody wants it."""

    at: float
    order: tuple[int, int]
    id: str
    make: Callable[[], dict[str, Any]]

    def shown(self, execution: str) -> dict[str, Any]:
        """As JSON."""
        moment = timestamp(self.at)
        return {"id": self.id, "executionId": execution, "timestamp": moment, "payload": self.make()}


def arrivals(events: Iterable[Event]) -> list[Arrival]:
    """The files that came: each where it is now, if it was moved since, or where it was last."""
    found: dict[int, Arrival] = {}
    here: dict[tuple[str, bytes], int] = {}
    for event in events:
        place = (event.region, os.fsencode(event.path))
        if event.kind == "moved" and event.old_path is not None:
            number = here.pop((event.region, os.fsencode(event.old_path)), event.seq)
        elif event.kind == "arrived":
            number = event.seq
        elif event.kind == "modified":
            number = here.get(place, event.seq)
        else:
            here.pop(place, None)
            continue
        first = found.get(number)
        here[place] = number
        found[number] = Arrival(
            number,
            event.time if first is None else first.at,
            *place,
            event.size,
            event.mime or UNKNOWN,
            _source(event) if first is None else first.source,
        )
    return list(found.values())


def activities(
    execution: Execution,
    files: Iterable[Arrival],
    url_of: Callable[[Arrival], str],
    *,
    is_descending: bool,
    limit: int | None,
) -> list[dict[str, Any]]:
    """The activities, in order of time."""
    found = [*_of_record(execution), *(_of_file(execution, each, url_of) for each in files)]
    found.sort(key=lambda activity: (activity.at, activity.order), reverse=is_descending)
    return [activity.shown(execution.id) for activity in found[:limit]]


def _of_record(execution: Execution) -> Iterable[Activity]:
    for number, change in enumerate(execution.changes):
        yield Activity(
            change.at,
            (0, number),
            part_id(execution.id, f"changes/{number}"),
            partial(dict, activityType="status_changed", status=change.status),
        )
    for number, message in enumerate(execution.messages):
        yield Activity(
            message.at,
            (1, number),
            message.id,
            partial(
                dict,
                activityType="user_message_received",
                message=message.text,
                userUUID=message.user,
            ),
        )


def _of_file(execution: Execution, file: Arrival, url_of: Callable[[Arrival], str]) -> Activity:
    def payload() -> dict[str, Any]:
        return {
            "activityType": "file_added",
            "fileId": file_id(execution.id, file.region, file.path),
            "fileName": file.path.rpartition(b"/")[2].decode(errors="replace"),
            "mimeType": file.media_type,
            "fileSize": file.size,
            "source": file.source,
            "presignedUrl": url_of(file),
        }

    return Activity(file.at, (2, file.number), part_id(execution.id, f"events/{file.number}"), payload)


def _source(event: Event) -> str:
    by_region = "upload" if event.region == "uploads" else "download"
    return _SOURCES.get(event.created_by, by_region)
