"""The lives of executions, where something goes wrong that real hosts seldom show."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from executing import child

from agentfuse.errors import StoreError, UsageError
from agentfuse.gateway.executions import purging
from agentfuse.gateway.executions.journal import Journal, Note
from agentfuse.gateway.executions.launcher import Launchers
from agentfuse.gateway.executions.life import Life, Means
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.executions.service import Executions
from agentfuse.gateway.executions.whereabouts import Hints
from agentfuse.objectstore.local import LocalStore

ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"


class Mounted:
    """Mounts of which each is there until it is ended."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def path(self, _: str) -> Path:
        return self._home

    def is_served(self, _: str) -> bool:
        return True

    async def start(self, agent: str, execution: str) -> None:
        pass

    async def ended(self, _: str) -> None:
        await trio.sleep_forever()

    async def end(self, _: str) -> None:
        pass

    def remove(self, _: str) -> None:
        pass

    def remove_home(self, _: str) -> bool:
        return True


class Archived:
    """An archive that fails so many times when it is to remove something."""

    def __init__(self, failures: int = 0) -> None:
        self.removed: list[str] = []
        self._failures = failures

    def keep(self, _: Execution) -> None:
        pass

    def purge(self, execution: Execution) -> None:
        if self._failures:
            self._failures -= 1
            raise StoreError("cut off")
        self.removed.append(execution.id)


class Unhinted:
    def remove(self, _: Execution) -> None:
        pass


def means_of(tmp_path: Path, *command: str, archive: Archived | None = None) -> Means:
    """Real records, journal and launchers; nothing real of mounts."""
    limiter, journal = trio.CapacityLimiter(4), Journal(tmp_path / "state")
    made: dict[str, Any] = dict.fromkeys(each.name for each in fields(Means)) | {
        "records": Records(LocalStore(tmp_path / "store")),
        "hints": Unhinted(),
        "mounts": Mounted(tmp_path),
        "launchers": Launchers(
            command, journal=journal, starter=child(), lease=tmp_path / "lease", grace_s=1.0, limiter=limiter
        ),
        "journal": journal,
        "archive": archive or Archived(),
        "limiter": limiter,
    }
    return Means(**made)


def begun(means: Means, status: Status) -> Execution:
    record = Execution(
        id=str(uuid.uuid4()), organization=ORGANIZATION, agent="ada", tenant="acme", user="u", host="h",
        created_at=0.0, status=Status.STARTING, is_attached=True,
    ).with_status(status, at=1.0)  # fmt: skip
    means.journal.write(Note(id=record.id, organization=ORGANIZATION, agent="ada"))
    means.records.create(record)
    return record


class Told(dict[str, Life]):
    """Lives of which no more is there than their records."""

    def __init__(self, *records: Execution) -> None:
        self._records = records

    def records(self) -> Sequence[Execution]:
        return self._records


def executions_of(means: Means, *here: Execution) -> Executions:
    """Those of a host in a cluster, that has these itself."""
    return Executions(
        means,
        Told(*here),  # type: ignore[arg-type]
        hosts=SimpleNamespace(proofs=object()),  # type: ignore[arg-type]
        agents=None,  # type: ignore[arg-type]
        trees=None,  # type: ignore[arg-type]
        regions=(),
        pulse=None,  # type: ignore[arg-type]
        live_tree=None,  # type: ignore[arg-type]
    )


async def test_no_launcher_begins_of_what_others_ended_while_it_was_fenced(tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    means = means_of(tmp_path, sys.executable, "-c", f"open({str(mark)!r}, 'w')")
    record = begun(means, Status.STARTING)
    life = Life(record, means)
    await means.launchers.fence([])
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.run)
            await trio.testing.wait_all_tasks_blocked()
            means.records.change(ORGANIZATION, record.id, lambda found: found.with_status(Status.FAILED))
            await life.change(lambda found: found)
            means.launchers.unfence()
    assert life.record.status is Status.FAILED
    assert not means.launchers.has_begun(record.id)
    assert not mark.exists()


async def test_the_hint_of_an_execution_that_ended_without_its_host_is_not_looked_at_for_ever(
    tmp_path: Path,
) -> None:
    hints = Hints(LocalStore(tmp_path / "store"))
    means = replace(means_of(tmp_path), hints=hints)
    lost, runs = begun(means, Status.FAILED), begun(means, Status.RUNNING)
    for each in (lost, runs):
        hints.put(each)
    executions = executions_of(means)
    assert await executions.home_of(ORGANIZATION, "ada") == runs
    assert hints.of("ada") == [runs.id]


async def test_an_agents_home_is_that_of_the_newest_execution_that_goes_on(tmp_path: Path) -> None:
    means = replace(means_of(tmp_path), hints=Hints(LocalStore(tmp_path / "store")))
    runs = begun(means, Status.RUNNING)
    queued = msgspec.structs.replace(begun(means, Status.QUEUED), created_at=2.0)
    ends = msgspec.structs.replace(begun(means, Status.RUNNING), created_at=1.0, ends_as=Status.CANCELLED)
    assert await executions_of(means, runs, queued, ends).home_of(ORGANIZATION, "ada") == runs
    assert await executions_of(means, queued, ends).home_of(ORGANIZATION, "ada") == ends
    assert await executions_of(means, queued).home_of(ORGANIZATION, "ada") is None
    means.hints.put(runs)  # of another host's
    assert await executions_of(means, queued).home_of(ORGANIZATION, "ada") == runs


async def test_messages_do_not_make_a_record_grow_without_end(tmp_path: Path) -> None:
    means = means_of(tmp_path)
    record, text = begun(means, Status.RUNNING), "m" * 64 * 1024
    executions = executions_of(means)
    for _ in range(8):
        await executions.add_message(ORGANIZATION, record.id, text, "u")
    with pytest.raises(UsageError, match="characters"):
        await executions.add_message(ORGANIZATION, record.id, "m", "u")
    assert len(means.records.read(ORGANIZATION, record.id).messages) == 8


async def test_what_could_not_be_purged_is_purged_the_next_time_and_holds_up_no_other(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    archive = Archived(failures=1)
    means = means_of(tmp_path, archive=archive)
    records = [begun(means, Status.COMPLETED) for _ in range(2)]
    executions = executions_of(means)

    def purged() -> set[str]:
        found = means.records.list(ORGANIZATION)
        return {each.id for each in found if each.purged_at is not None}

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 24 * 3600
        nursery.start_soon(executions.purge_old, 0.0)
        while len(archive.removed) < 1 or purged() != set(archive.removed):  # noqa: ASYNC110  # threads set no event
            await trio.sleep(1)
        assert len(archive.removed) == 1
        while len(purged()) < 2:  # noqa: ASYNC110
            await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert sorted(archive.removed) == sorted(each.id for each in records)
    assert sum("was not purged: cut off" in message for message in caplog.messages) == 1


async def test_records_are_pruned_where_nothing_is_ever_purged(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purging, "_SETTLED_S", 0.0)
    means = means_of(tmp_path, archive=(archive := Archived()))
    record = begun(means, Status.COMPLETED)
    means.records.change(ORGANIZATION, record.id, lambda found: msgspec.structs.replace(found, profile="p"))
    revisions = tmp_path / "store/executions" / ORGANIZATION / record.id
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 24 * 3600
        nursery.start_soon(executions_of(means).purge_old, None)
        while len([*revisions.iterdir()]) > 1:  # noqa: ASYNC110  # threads set no event
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [each.name for each in revisions.iterdir()] == [f"{2:020d}.json"]
    assert archive.removed == []


def test_a_damaged_note_is_told_and_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    means = means_of(tmp_path)
    first, second = (begun(means, Status.RUNNING) for _ in range(2))
    (means.journal.directory(first.id) / "note.json").write_text("{")
    assert [note.id for note in means.journal.notes()] == [second.id]
    assert first.id in caplog.text and "remove the directory" in caplog.text
