"""Launchers under their supervisor: real processes, begun once, ended for good, known afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from executing import child

from agentfuse.gateway.executions import supervisor
from agentfuse.gateway.executions.journal import Journal, Note
from agentfuse.gateway.executions.launcher import Exit, Launchers
from agentfuse.gateway.executions.record import Execution, Status

ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
DEADLINE_S = 30


class Host:
    """A state directory with launchers; ``run`` begins one."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.journal = Journal(base / "state")
        self.lease = base / "lease"
        self.home = base / "home"
        self.home.mkdir()

    def launchers(self, *command: str, grace_s: float = 20.0) -> Launchers:
        return Launchers(
            command,
            journal=self.journal,
            starter=child(),
            lease=self.lease,
            grace_s=grace_s,
            limiter=trio.CapacityLimiter(4),
        )

    def execution(self, inputs: dict[str, object] | None = None) -> Execution:
        record = Execution(
            id=str(uuid.uuid4()), organization=ORGANIZATION, agent="ada", tenant="acme", user="u", host="h",
            created_at=0.0, status=Status.STARTING, inputs=inputs or {},
        )  # fmt: skip
        self.journal.write(Note(id=record.id, organization=ORGANIZATION, agent="ada"))
        return record

    def directory(self, record: Execution) -> Path:
        return self.journal.directory(record.id) / "launcher"

    def output(self, record: Execution) -> str:
        return (self.directory(record) / "output.log").read_text()

    def supervisor(self, record: Execution) -> int:
        return int(json.loads((self.directory(record) / "begun").read_text())["pid"])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    for begun in tmp_path.glob("state/gateway/executions/*/launcher/begun"):
        if not (begun.parent / "exit").exists():
            try:
                os.kill(json.loads(begun.read_text())["pid"], signal.SIGQUIT)
            except ProcessLookupError:
                continue


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # what another process does
            await trio.sleep(0.01)


@pytest.mark.parametrize("code", [0, 3])
async def test_its_exit_code_is_known_to_who_was_not_there(host: Host, code: int) -> None:
    record = host.execution()
    await host.launchers("sh", "-c", f"echo done; exit {code}").start(record, host.home)
    with trio.fail_after(DEADLINE_S):
        assert await host.launchers().ended(record.id) == Exit(code)
    assert host.output(record) == "done\n"


async def test_it_is_told_whose_it_is_and_its_inputs_and_no_secret(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("AGENTFUSE_DEV_KEY", "sesame-sesame")
    record = host.execution({"goal": "größer"})
    launchers = host.launchers(
        "sh", "-c", 'cat; cat "$AGENTFUSE_INPUTS"; env; pwd; echo "$0" "$1"', "{agent}", "{home}/x"
    )
    await launchers.start(record, host.home)
    with trio.fail_after(DEADLINE_S):
        assert await launchers.ended(record.id) == Exit(0)
    said = host.output(record)
    assert said.count(json.dumps({"goal": "größer"})) == 2
    assert "sesame" not in said
    assert f"AGENTFUSE_EXECUTION={record.id}\n" in said and "AGENTFUSE_AGENT=ada\n" in said
    assert f"AGENTFUSE_HOME={host.home}\n" in said and f"PWD={host.home}\n" in said
    assert f"ada {host.home}/x\n" in said


async def test_it_never_begins_twice(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", f"echo once >> {host.base}/runs; sleep 0.2")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_try_to_start, launchers, record, host.home)
    with trio.fail_after(DEADLINE_S):
        assert await launchers.ended(record.id) == Exit(0)
    await launchers.start(record, host.home)
    assert (host.base / "runs").read_text() == "once\n"


async def _try_to_start(launchers: Launchers, record: Execution, home: Path) -> None:
    try:
        await launchers.start(record, home)
    except Exception as error:  # noqa: BLE001  # another was faster
        assert "supervisor" in str(error)


async def test_what_cannot_be_started_failed(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("/nowhere/at-all")
    await launchers.start(record, host.home)
    with trio.fail_after(DEADLINE_S):
        found = await launchers.ended(record.id)
    assert found.code == 127 and "No such file" in found.why


_TICKS = "(setsid sh -c 'while :; do echo x >> ticks; sleep 0.01; done' &) ; sleep 1000"


async def test_pausing_stops_all_its_processes_and_resuming_has_them_go_on(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", _TICKS)
    await launchers.start(record, host.home)
    ticks = host.home / "ticks"
    await until(ticks.exists)
    await launchers.pause(record.id, paused=True)
    stopped = _states(host.supervisor(record))
    assert "T" in stopped and set(stopped) <= {"T", "Z", "D"}  # D: its child of a vfork stands still
    size = ticks.stat().st_size
    await launchers.pause(record.id, paused=True)
    assert ticks.stat().st_size == size
    await host.launchers().pause(record.id, paused=False)
    await until(lambda: ticks.stat().st_size > size)
    await launchers.stop(record.id)


async def test_ending_one_that_is_paused_and_does_not_want_to_kills_all_of_it(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", f"trap '' TERM; {_TICKS}", grace_s=0.1)
    await launchers.start(record, host.home)
    await until((host.home / "ticks").exists)
    supervisor = host.supervisor(record)
    await launchers.pause(record.id, paused=True)
    below = _below(supervisor)
    with trio.fail_after(DEADLINE_S):
        await launchers.stop(record.id)
    assert await launchers.ended(record.id) == Exit(-signal.SIGKILL, "told to end")
    assert len(below) >= 2 and not any(_is_running(pid) for pid in below)


async def test_one_that_ends_when_it_is_told_to_is_not_killed(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", "trap 'exit 0' TERM; echo ready; sleep 1000 & wait")
    await launchers.start(record, host.home)
    await until(lambda: "ready" in host.output(record))
    await launchers.stop(record.id)
    assert await launchers.ended(record.id) == Exit(0, "told to end")


async def test_without_its_supervisor_it_ends_and_nobody_knows_how(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", "setsid sleep 1000 & sleep 1000")
    await launchers.start(record, host.home)
    supervisor = host.supervisor(record)
    await until(lambda: len(_below(supervisor)) == 3)
    pids = _below(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    with trio.fail_after(DEADLINE_S):
        found = await launchers.ended(record.id)
    assert found.code is None
    await until(lambda: not any(map(_is_running, pids)))


async def test_it_ends_with_the_lease_of_its_host_although_the_gateway_is_gone(host: Host) -> None:
    host.lease.write_text(f"{time.clock_gettime(time.CLOCK_BOOTTIME) + 0.3}\n")
    record = host.execution()
    launchers = host.launchers("sleep", "1000")
    await launchers.start(record, host.home)
    with trio.fail_after(DEADLINE_S):
        assert await launchers.ended(record.id) == Exit(-signal.SIGKILL, "the host lost its lease")


async def test_a_fence_kills_them_and_none_begins_until_it_is_gone(host: Host) -> None:
    first, second = host.execution(), host.execution()
    launchers = host.launchers("sleep", "1000")
    await launchers.start(first, host.home)
    with trio.fail_after(DEADLINE_S):
        await launchers.fence([first.id])
    assert (await launchers.ended(first.id)).code == -signal.SIGKILL
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_begin, launchers, second, host.home)
        await trio.testing.wait_all_tasks_blocked()
        assert not (host.directory(second) / "begun").exists()
        launchers.unfence()
    await launchers.stop(second.id)


def test_a_process_of_another_users_does_not_end_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(supervisor, "_descendants", lambda: [1])
    monkeypatch.setattr(os, "kill", refuse)
    assert supervisor._signal_all(signal.SIGTERM) == [1]


async def _begin(launchers: Launchers, record: Execution, home: Path) -> None:
    await launchers.may_begin()
    await launchers.start(record, home)


async def test_its_output_cannot_fill_the_disk(host: Host) -> None:
    record = host.execution()
    launchers = host.launchers("sh", "-c", "head -c 20000000 /dev/zero; echo last words")
    await launchers.start(record, host.home)
    with trio.fail_after(DEADLINE_S):
        assert await launchers.ended(record.id) == Exit(0)
    logs = list(host.directory(record).glob("output.log*"))
    assert sum(log.stat().st_size for log in logs) < 5 * 1024 * 1024
    assert host.output(record).endswith("last words\n")


def _below(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found[1:]


def _states(pid: int) -> list[str]:
    return [Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2][0] for each in _below(pid)]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
