"""Tracing: what handlers tell, what a reader gets, what an interval sums up to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import trio

from agentfuse.control.contract import Wanted
from agentfuse.errors import UsageError
from agentfuse.fuse.tracing import Listener, Traced
from agentfuse.processes import Process, Processes
from agentfuse.tracing import _MOST_WAITING, trace
from agentfuse.watching import Summary, watch


class FakeTracer:
    """Stands for a mount's handlers: ``tell`` is a request."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def tell(self, **facts: Any) -> None:
        for listener in self.listeners:
            listener(request(**facts))


def request(**facts: Any) -> Traced:
    usual: dict[str, Any] = {
        "at": 1.5,
        "operation": "write",
        "process": Process(7, "sh"),
        "region": "downloads",
        "path": "downloads/a.csv",
        "to": None,
        "offset": 0,
        "size": 10,
        "errno": 0,
        "spent_ns": 1000,
    }
    return Traced(**usual | facts)


async def heard(wanted: Wanted, *requests: dict[str, Any]) -> list[dict[str, object]]:
    tracer = FakeTracer()
    found: list[dict[str, object]] = []
    async with aclosing(trace(tracer, wanted, for_s=0.001, ended=trio.Event())) as lines:  # type: ignore[arg-type]
        assert await anext(lines) == []
        for facts in requests:
            tracer.tell(**facts)
        async for some in lines:
            found += some
    assert not tracer.listeners
    return found


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), [0, 1, 2, 3]),
        (Wanted(operations=frozenset({"write", "rename"})), [0, 2]),
        (Wanted(path="*.csv"), [0, 2]),
        (Wanted(path="uploads/*"), [1, 2]),
        (Wanted(pid=8), [1]),
        (Wanted(region="home"), [3]),
        (Wanted(errors=True), [1]),
        (Wanted(errors=True, pid=7), []),
    ],
)
async def test_a_reader_gets_what_it_wants(wanted: Wanted, expected: list[int]) -> None:
    requests: list[dict[str, Any]] = [
        {},
        {"operation": "create", "path": "uploads/b", "process": Process(8, "cp"), "errno": 122},
        {"operation": "rename", "to": "uploads/c"},
        {"operation": "statfs", "path": None, "region": "home"},
    ]
    found = await heard(wanted, *[each | {"offset": n} for n, each in enumerate(requests)])
    assert [each["offset"] for each in found] == expected


async def test_a_request_is_told_in_json_values() -> None:
    (found,) = await heard(Wanted(), {"errno": 122, "path": "a\udcff", "spent_ns": 53_120})
    assert found == {
        "time": 1.5,
        "operation": "write",
        "pid": 7,
        "process": "sh",
        "region": "downloads",
        "path": "a\udcff",
        "to": None,
        "offset": 0,
        "size": 10,
        "errno": "EDQUOT",
        "duration_us": 53.1,
    }


async def test_a_slow_reader_loses_requests_and_is_told_how_many() -> None:
    found = await heard(Wanted(), *[{"offset": n} for n in range(_MOST_WAITING + 5)])
    assert [each.get("offset") for each in found[:-1]] == list(range(_MOST_WAITING))
    assert found[-1] == {"lost": 5}


async def test_an_operation_that_there_is_none_of_is_named() -> None:
    with pytest.raises(UsageError, match="no operation 'wriet' is traced"):
        await heard(Wanted(operations=frozenset({"wriet"})))


async def test_a_reader_that_leaves_is_told_no_more() -> None:
    tracer = FakeTracer()
    async with aclosing(trace(tracer, Wanted(), for_s=None, ended=trio.Event())) as lines:  # type: ignore[arg-type]
        await anext(lines)
        assert len(tracer.listeners) == 1
    assert not tracer.listeners


async def test_with_the_mount_ends_who_reads_and_who_watches() -> None:
    tracer, ended = FakeTracer(), trio.Event()
    ended.set()
    lines = trace(tracer, Wanted(), for_s=None, ended=ended)  # type: ignore[arg-type]
    assert [some async for some in lines] == [[]]
    frames = watch(tracer, dict, interval_s=60, frames=None, ended=ended)  # type: ignore[arg-type]
    assert [frame async for frame in frames] == []
    assert not tracer.listeners


def test_an_interval_sums_up_by_operation_file_and_process() -> None:
    summary = Summary()
    for spent_us in range(1, 101):
        summary.hear(request(spent_ns=spent_us * 1000))
    summary.hear(request(operation="read", path="shared/b", process=Process(8, "cat"), size=500))
    summary.hear(request(errno=122, process=Process(0, "")))
    now: dict[str, Any] = summary.as_dict(2.0)
    assert (now["requests_per_s"], now["errors_per_s"]) == (51.0, 0.5)
    assert (now["written_bytes_per_s"], now["read_bytes_per_s"]) == (500, 250)
    assert 49 <= now["p50_us"] <= 49 * 1.25
    assert 99 <= now["p99_us"] <= 99 * 1.25
    assert [each["operation"] for each in now["operations"]] == ["write", "read"]
    assert [each["path"] for each in now["files"]] == ["downloads/a.csv", "shared/b"]
    assert [(each["pid"], each["process"]) for each in now["processes"]] == [(7, "sh"), (8, "cat")]


def test_a_quiet_interval_has_no_latency() -> None:
    now = Summary().as_dict(1.0)
    assert (now["requests_per_s"], now["p50_us"], now["p99_us"], now["files"]) == (0.0, None, None, [])


async def test_each_interval_is_summed_up_by_itself(autojump_clock: object) -> None:
    tracer = FakeTracer()
    frames = watch(
        tracer, lambda: {"status": {"state": "live"}}, interval_s=2.0, frames=2, ended=trio.Event()
    )  # type: ignore[arg-type]
    found: list[dict[str, Any]] = []

    async def draw() -> None:
        async with aclosing(frames):
            async for frame in frames:
                found.append(frame)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(draw)
        await trio.sleep(1)
        tracer.tell()
    assert [frame["activity"]["requests_per_s"] for frame in found] == [0.5, 0.0]
    assert found[0]["status"] == {"state": "live"}
    assert not tracer.listeners


def test_a_thread_is_known_by_its_process_and_for_a_moment_after_its_end() -> None:
    moment = [0.0]
    processes = Processes(lambda: moment[0])
    own = processes.of(os.getpid())
    assert own.pid == os.getpid()
    assert own.name
    assert processes.of(0) == Process(0, "")
    child = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    assert processes.of(child).pid == child
    os.kill(child, 9)
    os.waitpid(child, 0)
    moment[0] = 10.0
    assert processes.of(child).name
