"""The Asteroid API's pure parts, validated by the SDK's models."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import parse_qs

import pytest
from asteroid_odyssey.models.agents_execution_activity import AgentsExecutionActivity
from asteroid_odyssey.models.agents_execution_list_item import AgentsExecutionListItem
from asteroid_odyssey.models.agents_files_agent_file import AgentsFilesAgentFile
from asteroid_odyssey.models.agents_files_file import AgentsFilesFile

from agentfuse.control.messages import Event
from agentfuse.errors import EnvironmentProblem, QuotaExceededError, UsageError
from agentfuse.gateway.asteroid import activities, fields, files, items, listing
from agentfuse.gateway.asteroid.uploads import put_all
from agentfuse.gateway.edge import problem_of
from agentfuse.gateway.executions.record import Execution, Message, Status
from agentfuse.gateway.filetree import NewFile, Node
from agentfuse.gateway.ids import file_id
from agentfuse.regions import Creator

ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
NOW = 1_790_000_000.0


def execution(number: int = 1, *, at: float = NOW, agent: str = "a", **facts: Any) -> Execution:
    return Execution(
        id=f"00000000-0000-4000-8000-{number:012x}",
        organization=ORGANIZATION,
        agent=agent,
        tenant="acme",
        user=str(uuid.uuid4()),
        host=str(uuid.uuid4()),
        created_at=at,
        **({"status": Status.RUNNING} | facts),
    )


def found(query: str, *executions: Execution) -> list[Execution]:
    return listing.wanted(parse_qs(query, keep_blank_values=True), NOW).of(executions)[0]


# -- lists


def test_a_list_is_the_newest_first_in_pages_of_ten() -> None:
    all_of_them = [execution(number, at=NOW + number) for number in range(25)]
    newest_first = all_of_them[::-1]
    assert found("", *all_of_them) == newest_first[:10]
    wanted = listing.wanted({"page": ["3"], "pageSize": ["10"]}, NOW)
    assert wanted.of(all_of_them) == (newest_first[20:], 25)
    assert found("page=4", *all_of_them) == []
    assert found("pageSize=3&sort=created_at:asc", *all_of_them) == all_of_them[:3]
    assert found("pageSize=1&sortField=created_at&sortDirection=asc", *all_of_them) == all_of_them[:1]


ONE = execution(
    0xABCDEF,
    status=Status.COMPLETED,
    terminal_at=NOW + 1,
    metadata={"env": "prod", "n": 5, "a=b": "c"},
    inputs={"city": "Berlin", "deep": {"a": [1]}},
    profile="p1",
)
OTHER = execution(2, at=NOW - 3600, agent="b", status=Status.PAUSED)


@pytest.mark.parametrize(
    "query",
    [
        "executionId=ABCDEF",
        "workflowId=a",
        "agentId=a",
        "status=completed",
        "status=completed&status=failed",
        "phase=terminal",
        "phase=terminal&phase=pending",
        "phase=active&status=completed&status=paused&workflowId=b&page=2",
        "createdAfter=2026-09-21T13:33:20.000000%2B0000",
        "createdAfter=2026-09-21T13:33:20Z",
        "createdAfter=2026-09-21T13:33:20.000000+0000",
        "createdWithin=30m",
        "createdWithin=59m&createdBefore=2036-09-21",
        "outcomeLabel=SUCC",
        "metadata=env%3Dprod",
        "metadata=env%3Dprod&metadata=n%3D5",
        "metadataKey=env&metadataValue=prod",
        "inputsKey=city&inputsValue=berl",
        "inputsKey=deep&inputsValue=a",
        "profileIds=p1&profileIds=p2",
        "agentProfileIds=p1",
        "hasScriptFailures=false&status=completed",
        "triggerSource=api&triggerSource=ui&status=completed",
    ],
)
def test_a_filter_finds_what_it_is_for(query: str) -> None:
    wanted = [] if "page=2" in query else [ONE]
    assert found(query, ONE, OTHER) == wanted


@pytest.mark.parametrize(
    "query",
    [
        "executionId=ffff",
        "workflowId=A",
        "status=failed",
        "phase=pending",
        "phase=pending&status=completed",
        "createdBefore=2020-01-01",
        "metadata=env%3Dprod&metadata=n%3D6",
        "metadata=nothing%3D",
        "inputsKey=city&inputsValue=paris",
        "outcomeLabel=fail",
        "humanLabels=x",
        "workflowVersion=1",
        "hasScriptFailures=true",
        "triggerSource=ui",
        "batchId=x",
        "profileIds=p3",
    ],
)
def test_a_filter_finds_nothing_else(query: str) -> None:
    assert found(query, ONE, OTHER) == []


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("page=0", "page must"),
        ("page=-1", "page must"),
        ("page=x", "page must"),
        ("page=٣", "page must"),
        ("pageSize=1001", "pageSize must"),
        ("pageSize=" + "9" * 5000, "pageSize must"),
        ("status=done", "status must be one of awaiting_confirmation, cancelled"),
        ("phase=over", "phase must"),
        ("createdAfter=yesterday", "createdAfter must be a time"),
        ("createdWithin=5", "createdWithin must"),
        ("createdWithin=", "createdWithin must"),
        ("page=", "page must"),
        ("createdWithin=12h1d", "createdWithin must"),
        ("createdWithin=4000d", "ten years"),
        ("createdWithin=1d&createdAfter=2026-01-01", "cannot be combined"),
        ("metadata=env", "key=value"),
        ("metadataKey=env", "together"),
        ("inputsValue=env", "together"),
        ("sort=created_at:up", "sort, after the colon"),
        ("sort=name", "sort must"),
        ("sort=status:asc&sortField=status", "cannot be combined"),
        ("sortField=name", "sortField must"),
        ("hasScriptFailures=True", "hasScriptFailures must"),
    ],
)
def test_what_a_filter_cannot_be_is_said(query: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        found(query, ONE)


# -- what records become


@pytest.mark.parametrize("status", Status)
def test_the_sdk_takes_every_execution(status: Status) -> None:
    terminal = {"terminal_at": NOW + 5, "reason": "why", "result": {"a": 1}} if status.is_terminal else {}
    record = execution(
        status=status,
        started_at=NOW + 1,
        options={"softTimeoutMins": 5},
        parent=str(uuid.uuid4()),
        **terminal,
    )
    shown = items.item(record, "v", "http://h")
    parsed = AgentsExecutionListItem.from_dict(shown)
    assert parsed is not None
    assert (parsed.status.value, parsed.workflow_id, parsed.duration) == (
        status.value,
        "a",
        4.0 if status.is_terminal else None,
    )
    has_result = status in (Status.COMPLETED, Status.FAILED)
    assert (parsed.execution_result is not None) == has_result
    if parsed.execution_result is not None:
        assert (parsed.execution_result.reasoning, parsed.execution_result.result) == ("why", {"a": 1})
    assert all(value is not None for value in shown.values())


@pytest.mark.parametrize("mtime_ns", [0, -(10**19), 10**22, 1_790_000_000_123_456_789])
@pytest.mark.parametrize("path", [b"a.TXT", b"d/\xff\xfe.png", "größe".encode(), b".hidden", b"a."])
def test_the_sdk_takes_every_file(mtime_ns: int, path: bytes) -> None:
    record = execution()
    node = Node(path, "file", 5, 0o644, mtime_ns, Creator.USER)
    shown = AgentsFilesAgentFile.from_dict(files.agent_file(record, "http://h/e", "uploads", node))
    assert shown is not None
    assert (shown.directory.value, shown.created_by.value, shown.file_size) == ("uploads", "user", 5)
    assert shown.download_url == f"http://h/e/files/{shown.id}/download"
    context = AgentsFilesFile.from_dict(files.context_file(record, "http://h/e", "uploads", node, "http://s"))
    assert context is not None
    assert context.id == shown.id == file_id(record.id, "uploads", path)
    assert context.file_path.startswith("uploads/")
    assert context.file_ext == {b"a.TXT": "txt", b"d/\xff\xfe.png": "png"}.get(path, "")
    assert context.file_type == {b"a.TXT": "text", b"d/\xff\xfe.png": "image"}.get(path, "unknown")


@pytest.mark.parametrize(
    ("media_type", "kind"),
    [
        ("image/png", "image"),
        ("application/pdf", "document"),
        ("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet", "document"),
        ("text/csv", "text"),
        ("application/json", "text"),
        ("application/zip", "unknown"),
        ("video/mp4", "unknown"),
    ],
)
def test_there_are_four_kinds_of_files(media_type: str, kind: str) -> None:
    assert files.file_type(media_type) == kind


def test_all_five_directories_are_always_there() -> None:
    assert files.agent_files({}) == {"directories": dict.fromkeys(files.DIRECTORIES, ())}


# -- activities


def event(seq: int, kind: str, path: str, *, by: Creator = Creator.USER, **facts: Any) -> Event:
    known: dict[str, Any] = {
        "region": "uploads",
        "old_path": None,
        "size": seq,
        "mime": "text/plain",
        "sha256": None,
    } | facts
    return Event(
        seq=seq,
        time=NOW + seq,
        kind=kind,  # type: ignore[arg-type]
        mask=[],
        path=path,
        created_by=by,
        execution="e",
        agent="a",
        **known,
    )


def test_a_file_that_came_is_where_it_is_now() -> None:
    came = activities.arrivals(
        [
            event(1, "arrived", "a"),
            event(2, "arrived", "b", by=Creator.ENVIRONMENT, region="downloads"),
            event(3, "arrived", "c", by=Creator.AGENT),
            event(4, "moved", "d", old_path="a"),
            event(5, "modified", "d"),
            event(6, "deleted", "c", mime=None),
            event(7, "refused", "e"),
            event(8, "arrived", "c", by=Creator.SYSTEM),
            event(9, "moved", "x", old_path="never told of", region="downloads", by=Creator.SYSTEM),
        ]
    )
    assert [(each.number, each.at - NOW, each.path, each.size, each.source) for each in came] == [
        (1, 1, b"d", 5, "upload"),
        (2, 2, b"b", 2, "download"),
        (3, 3, b"c", 3, "agent"),
        (8, 8, b"c", 8, "upload"),
        (9, 9, b"x", 9, "download"),
    ]


def test_activities_are_in_order_of_time_and_the_sdk_takes_each() -> None:
    record = execution(changes=[], messages=[Message(id=str(uuid.uuid4()), at=NOW + 2, text="hi", user="u")])
    for status, at in ((Status.STARTING, NOW), (Status.RUNNING, NOW + 1), (Status.FAILED, NOW + 9)):
        record = record.with_status(status, at=at)
    came = activities.arrivals([event(3, "arrived", "a\udcff.txt"), event(4, "arrived", "b", mime=None)])

    def shown(*, is_descending: bool = False, limit: int | None = None) -> list[str]:
        found = activities.activities(
            record, came, lambda file: f"http://h/{file.number}", is_descending=is_descending, limit=limit
        )
        for each in found:
            assert AgentsExecutionActivity.from_dict(each) is not None
            assert each["executionId"] == record.id
        assert len({each["id"] for each in found}) == len(found)
        return [each["payload"].get("status") or each["payload"]["activityType"] for each in found]

    oldest_first = ["starting", "running", "user_message_received", "file_added", "file_added", "failed"]
    assert shown() == oldest_first
    assert shown(is_descending=True) == oldest_first[::-1]
    assert shown(limit=2) == oldest_first[:2]
    assert shown(is_descending=True, limit=2) == oldest_first[:-3:-1]


# -- fields


@pytest.mark.parametrize("value", ["text", 5, [1], True])
def test_an_object_is_an_object(value: object) -> None:
    with pytest.raises(UsageError, match="inputs must be an object"):
        fields.object_of({"inputs": value}, "inputs")


@pytest.mark.parametrize("value", [{"a": "\ud800"}, {"\udcff": 1}])
def test_what_no_record_could_hold_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="inputs cannot be kept"):
        fields.object_of({"inputs": value}, "inputs")


def test_deep_nesting_is_refused_or_kept() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UsageError, match="cannot be kept"):
        fields.object_of({"inputs": {"a": deep}}, "inputs")
    assert fields.object_of({"inputs": {"a": float("nan"), "b": 10**30}}, "inputs") == {
        "a": None,
        "b": 10**30,
    }


class FailsAfterOne:
    """A live home that fails with an error once a file is there."""

    def __init__(self, error: Exception) -> None:
        self._errors = [None, error]

    async def put(self, files: list[NewFile], **_: Any) -> list[NewFile]:
        if error := self._errors.pop(0):
            raise error
        return files


@pytest.mark.parametrize(
    ("error", "status"),
    [(EnvironmentProblem("a door has died"), 503), (QuotaExceededError("no room"), 507)],
)
async def test_an_upload_that_fails_half_way_says_how_far_it_came_with_the_errors_own_status(
    error: Exception, status: int
) -> None:
    both: list[Any] = [NewFile(name, None) for name in (b"a", b"b")]  # type: ignore[arg-type]
    with pytest.raises(Exception, match="only 1 of 2 files were uploaded") as raised:
        await put_all(FailsAfterOne(error), both, on_collision="replace")  # type: ignore[arg-type]
    problem = problem_of(raised.value)
    assert problem is not None
    assert problem.status == status
