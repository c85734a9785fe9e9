"""Executions: begun, run and ended by a real gateway, with real mounts, and through whatever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import executing
import gateways
import httpx
import mounts
import pytest
from executing import Host, until

from agentfuse import killpoints

pytestmark = pytest.mark.mount

_ALL_STEPS = [step for step in killpoints.STEPS if step.startswith("execution.") and "launched" not in step]
STEPS = (
    _ALL_STEPS
    if os.environ.get("AGENTFUSE_KILL_STEPS")
    else ["execution.claimed", "execution.attached", "execution.flushed"]
)
"""Where gateways are killed: at every step by hand, at some of them otherwise."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with executing.host(tmp_path_factory.mktemp("executions"), gateway_settings="max_restarts = 2\n") as host:
        yield host


def test_it_begins_with_its_files_and_leaves_all_files_in_the_store(host: Host) -> None:
    assert (
        gateways.upload(host.client, {"a.csv": b"of the tenant", "plan.md": b"# plan"}, "in").status_code
        == 200
    )
    staged = host.stage(("a.csv", b"first"), ("a.csv", b"second"))
    execution = host.run(tempFiles=staged, files=["in/a.csv", "in/plan.md"], inputs={"goal": "x"})
    home = host.home(execution)
    uploads = {path.name: path.read_bytes() for path in (home / "uploads").iterdir()}
    assert uploads == {
        "a.csv": b"first", "a (1).csv": b"second", "a (2).csv": b"of the tenant", "plan.md": b"# plan"
    }  # fmt: skip
    (home / "downloads/result.pdf").write_bytes(b"%PDF")
    (home / "workspace/dir").mkdir()
    (home / "workspace/dir/notes").write_bytes(b"work")
    (home / "shared/memory.md").write_bytes(b"known")
    (home / ".bashrc").write_bytes(b"loose")
    live = host.files(execution)
    item = host.end(execution)
    assert item["executionResult"] is None or item["terminalAt"]
    assert host.files(execution) == live
    assert live["uploads/a (1).csv"] == (6, "user") and live["downloads/result.pdf"][1] == "environment"
    assert live["workspace/dir/notes"] == (4, "agent") and "shared/memory.md" in live
    assert not home.exists()
    statuses = [each["status"] for each in host.revisions(execution)]
    assert statuses.count("completed") == 1 and statuses[-1] == "completed"
    assert list(host.store.glob("temp-files/*/*")) == []
    added = host.client.get(f"/agents/v2/executions/{execution}/activities").json()
    names = {each["payload"].get("fileName") for each in added}
    assert {"a.csv", "a (1).csv", "a (2).csv", "plan.md", "result.pdf"} <= names


def test_what_cannot_begin_leaves_nothing_and_takes_nothing(host: Host) -> None:
    staged = host.stage(("a", b"a"), ("b", b"b"))
    before = sorted(host.store.glob("executions/*/*"))
    with host.gateway.client(gateways.OTHER) as other:
        foreign = other.post("/agents/v2/temp-files", files=[("files", ("c", b"c"))]).json()["tempFiles"]
    unknown = {"id": "3f0f9c1e-6f57-4a3e-8d5c-00000000abcd", "name": "x"}
    for bad in (unknown, foreign[0], {"id": "none", "name": "x"}):
        answer = host.try_to_execute(tempFiles=[*staged, bad])
        assert (answer.status_code, answer.json()["code"]) == (400, 400), answer.text
    for path in ("nowhere", "../etc/passwd", ""):
        assert host.try_to_execute(tempFiles=staged, files=[path]).status_code == 400
    gateways.upload(host.client, {f"{number}.bin": bytes(45 * 2**20) for number in range(5)}, "large")
    too_much = [f"large/{number}.bin" for number in range(5)]
    assert host.try_to_execute(tempFiles=staged, files=too_much).status_code == 507
    for agent in ("%C3%A9", "a%20b", "a" * 129):  # which a home cannot be mounted for
        assert host.try_to_execute(agent, tempFiles=staged).status_code == 400
    assert sorted(host.store.glob("executions/*/*")) == before
    assert not list(host.store.glob("temp-files/*/*.claim"))
    execution = host.run(tempFiles=staged)
    consumed = host.try_to_execute(tempFiles=staged[:1])
    assert consumed.status_code == 400
    host.end(execution, "cancelled")


def test_two_at_once_share_their_agents_memory_and_lose_none_of_it(host: Host) -> None:
    first, second = host.execute("twin"), host.execute("twin")
    for execution in (first, second):
        host.until(execution, "running")
        (host.home(execution) / "shared" / execution).write_text("mine")
        (host.home(execution) / "shared/log").write_text(f"by {execution}\n")
    for execution in (first, second):
        host.end(execution)
    kept = host.files(second)
    assert {f"shared/{first}", f"shared/{second}", "shared/log"} <= set(kept)
    third = host.run("twin")
    both = "".join(
        path.read_text() for path in (host.home(third) / "shared").rglob("*log*") if path.is_file()
    )
    assert f"by {first}" in both and f"by {second}" in both
    host.end(third)


def test_a_daemon_that_dies_is_followed_by_others_but_not_for_ever(host: Host) -> None:
    execution = host.run()
    path = host.home(execution) / "workspace/kept"
    path.write_bytes(b"kept")
    for restarts in range(1, 3):
        _kill_daemon(host, execution)
        _until_restarted(host, execution, restarts)
        until(lambda: _content(path) == b"kept")
    _kill_daemon(host, execution)
    host.until(execution, "failed")
    assert "died 3 times" in host.revisions(execution)[-1]["reason"]
    assert host.files(execution)["workspace/kept"] == (4, "agent")
    until(lambda: not host.home(execution).exists())


def _until_restarted(host: Host, execution: str, times: int) -> None:
    until(lambda: host.revisions(execution)[-1]["restarts"] == times and host.daemon(execution))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _kill_daemon(host: Host, execution: str) -> None:
    pid = until(lambda: host.daemon(execution))
    os.kill(pid, signal.SIGKILL)
    until(lambda: host.daemon(execution) != pid)


def test_an_id_in_capitals_names_the_same_execution(host: Host) -> None:
    execution = host.run()
    assert host.ask(execution.upper(), "cancelled").status_code == 200
    host.until(execution, "cancelled")
    until(lambda: not host.home(execution).exists())


def test_an_operators_unmount_ends_it_as_completed(host: Host) -> None:
    execution = host.run()
    (host.home(execution) / "downloads/x").write_bytes(b"x")
    done = host.agentfuse("umount", str(host.home(execution)))
    assert done.returncode == 0, done.stderr
    host.until(execution, "completed")
    assert host.files(execution)["downloads/x"] == (1, "environment")


def test_an_outage_of_the_store_at_the_end_loses_nothing(host: Host) -> None:
    execution = host.run()
    (host.home(execution) / "workspace/late").write_bytes(b"late")
    hidden = host.store.with_name("store-away")
    host.store.rename(hidden)
    try:
        done = host.agentfuse("umount", str(host.home(execution)), "--timeout", "0")
        assert done.returncode == 75, done.stderr
        until(lambda: any("trying again" in line for line in host.gateway.log))
    finally:
        hidden.rename(host.store)
    host.until(execution, "completed")
    assert host.files(execution)["workspace/late"] == (4, "agent")


def test_one_is_run_again_without_its_files_and_deleted_when_it_has_ended(host: Host) -> None:
    execution = host.run("purged")
    (host.home(execution) / "downloads/x").write_bytes(b"x")
    (host.home(execution) / "shared/kept").write_bytes(b"kept")
    assert host.client.delete(f"/agents/v2/executions/{execution}").status_code >= 400
    host.end(execution)
    again = host.client.post(f"/agents/v2/executions/{execution}/rerun", json={})
    assert again.status_code == 202
    rerun = again.json()["executionId"]
    item = host.until(rerun, "running")
    assert item["parentExecutionId"] == execution and host.get(execution)["hasBeenRerun"]
    host.end(rerun)
    assert host.client.delete(f"/agents/v2/executions/{execution}").status_code == 204
    assert host.client.get(f"/agents/v2/executions/{execution}").status_code == 404
    assert "shared/kept" in host.files(rerun)


def test_a_gateway_that_ends_leaves_homes_mounted_and_the_next_one_has_them(tmp_path: Path) -> None:
    with executing.host(tmp_path) as host:
        execution = host.run()
        daemon = host.daemon(execution)
        path = host.home(execution) / "workspace/x"
        path.write_bytes(b"before")
        assert host.gateway.stop() == 0
        path.write_bytes(b"meanwhile")
        host.start()
        assert host.get(execution)["status"] == "running" and host.daemon(execution) == daemon
        assert host.files(execution)["workspace/x"] == (9, "agent")
        host.kill()
        host.agentfuse("umount", str(host.home(execution)))
        host.start()
        host.until(execution, "completed")
        assert host.files(execution)["workspace/x"] == (9, "agent")
        assert not [line for line in host.gateway.log if '"level": "ERROR"' in line]


@pytest.mark.parametrize("step", STEPS)
def test_a_gateway_that_is_killed_goes_on_where_it_was(tmp_path: Path, step: str) -> None:
    with executing.host(tmp_path, kill_at=step) as host:
        staged = host.stage(("a.txt", b"attached once"))
        execution = _begin_and_be_killed(host, staged)
        assert host.gateway.wait() == -signal.SIGKILL
        host.start()
        if execution is None:
            begun = host.client.get("/agents/v2/executions").json()["items"]
            assert bool(begun) == (step == "execution.created")
            execution = begun[0]["id"] if begun else host.execute(tempFiles=staged)
        if not host.revisions(execution)[-1]["ends_as"]:
            host.until(execution, "running")
            (host.home(execution) / "workspace/x").write_bytes(b"x")
            host.ask(execution, "completed")
        host.until(execution, "completed")
        uploads = {path for path in host.files(execution) if path.startswith("uploads/")}
        assert uploads == {"uploads/a.txt"}
        assert host.files(execution)["workspace/x"] == (1, "agent")
        assert not list(host.store.glob("temp-files/*/*"))
        assert host.client.get("/agents/v2/executions").json()["total"] == 1
        assert not mounts.mountpoints_below(tmp_path)


def _begin_and_be_killed(host: Host, staged: list[dict[str, str]]) -> str | None:
    """The execution's id, if there was time to answer."""
    execution = None
    try:
        execution = host.execute(tempFiles=staged)
        host.until(execution, "running")
        (host.home(execution) / "workspace/x").write_bytes(b"x")
        host.end(execution)
    except httpx.HTTPError:
        return execution
    raise AssertionError("it was not killed")


def test_a_launcher_decides_how_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "launch.sh"
    script.write_text(
        '#!/bin/sh\ncd "$1"\ncp "$AGENTFUSE_INPUTS" workspace/inputs\n'
        "while [ ! -e workspace/stop ]; do echo x >> workspace/ticks; sleep 0.05; done\n"
        "exit $(cat workspace/stop)\n"
    )
    script.chmod(0o755)
    gateway = f'launcher = ["{script}", "{{home}}"]\nmax_executions = 2\n'
    with executing.host(tmp_path / "host", gateway_settings=gateway, top='keep_ended = "0s"\n') as host:
        good, bad = host.run(inputs={"goal": 7}), host.run()
        assert (host.home(good) / "workspace/inputs").read_text() == '{"goal": 7}\n'
        assert host.try_to_execute(onCapacityLimit="reject").status_code == 429
        queued = host.execute(onCapacityLimit="queue")
        assert host.get(queued)["status"] == "queued"
        counted = host.client.get("/metrics").text
        assert 'agentfuse_gateway_executions{phase="live"} 2.0' in counted
        assert 'agentfuse_gateway_executions{phase="waiting"} 1.0' in counted
        assert host.ask(good, "paused").status_code == 200
        ticks = (host.home(good) / "workspace/ticks").stat().st_size
        host.kill()
        (host.home(bad) / "workspace/stop").write_text("3")
        host.start()
        host.until(bad, "failed")
        assert "exit code 3" in host.revisions(bad)[-1]["reason"]
        host.until(queued, "running")
        assert host.get(good)["status"] == "paused"
        assert (host.home(good) / "workspace/ticks").stat().st_size == ticks
        assert host.ask(good, "running").status_code == 200
        (host.home(good) / "workspace/stop").write_text("0")
        host.until(good, "completed")
        (host.home(queued) / "shared/memory").write_text("kept")
        host.end(queued, "cancelled")
        assert host.files(queued)["workspace/ticks"]
        until(lambda: not any((host.base / "state/homes").iterdir()))
        until(lambda: not any((host.base / "state/gateway/executions").iterdir()))
        _are_purged_when_they_are_old(host, [good, bad, queued])


def _are_purged_when_they_are_old(host: Host, executions: list[str]) -> None:
    assert host.gateway.stop() == 0
    host.gateway_settings += 'purge_after = "1ms"\n'
    host.start()
    for execution in executions:
        until(lambda execution=execution: host.get(execution).get("purgedAt"))  # type: ignore[misc]
        until(lambda execution=execution: set(host.files(execution)) == {"shared/memory"})  # type: ignore[misc]
        assert not list(host.store.glob(f"agents/*/executions/{execution}/*/snapshots/*"))
        assert host.ask(execution, "running").status_code == 409
