"""Records of executions and of agents, on a store that fails, races and loses answers."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import ExistsError, IntegrityError, NotFoundError, StoreError, UsageError
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.executions.record import Execution, Message, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.objectstore import ObjectStore

ORGANIZATION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"
STRANGER = "3f0f9c1e-6f57-4a3e-8d5c-000000000002"


def execution(organization: str = ORGANIZATION) -> Execution:
    return Execution(
        id=str(uuid.uuid4()),
        organization=organization,
        agent="a",
        tenant="t",
        user="u",
        host="h",
        created_at=1.0,
        status=Status.STARTING,
    )


def with_message(text: str) -> Message:
    return Message(id=str(uuid.uuid4()), at=2.0, text=text, user="u")


def test_a_record_is_read_by_another_gateway_as_it_was_changed_by_the_first(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    ours, theirs, made = Records(store), Records(store), execution()
    ours.create(made)
    assert theirs.read(ORGANIZATION, made.id) == made
    changed = ours.change(ORGANIZATION, made.id, lambda each: each.with_status(Status.RUNNING, at=5.0))
    assert (changed.started_at, changed.terminal_at) == (5.0, None)
    assert theirs.read(ORGANIZATION, made.id) == changed
    ended = theirs.change(ORGANIZATION, made.id, lambda each: each.with_status(Status.FAILED, at=9.0))
    assert (ended.started_at, ended.terminal_at, ended.ends_as) == (5.0, 9.0, Status.FAILED)
    assert [each.status for each in ended.changes] == [Status.RUNNING, Status.FAILED]
    assert list(ours.list(ORGANIZATION)) == [ended]


def test_of_many_changes_at_a_time_none_is_lost(tmp_path: Path) -> None:
    store, made = local_store(tmp_path), execution()
    Records(store).create(made)

    def add(number: int) -> None:
        message = with_message(str(number))
        Records(store).change(
            ORGANIZATION,
            made.id,
            lambda each: msgspec.structs.replace(each, messages=[*each.messages, message]),
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    texts = [message.text for message in Records(store).read(ORGANIZATION, made.id).messages]
    assert sorted(texts, key=int) == [str(number) for number in range(40)]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_change_whose_answer_was_lost_is_made_once_and_one_that_failed_is_not_made(
    tmp_path: Path, fault: str
) -> None:
    inner, made = local_store(tmp_path), execution()
    Records(inner).create(made)
    store = FaultyStore(inner, lambda _, method, __: fault if method == "put_if_absent" else None)
    runs = Records(store)
    if fault == "before":
        with pytest.raises(StoreError, match="injected"):
            runs.change(ORGANIZATION, made.id, lambda each: each.with_status(Status.RUNNING))
        assert Records(inner).read(ORGANIZATION, made.id) == made
    else:
        changed = runs.change(ORGANIZATION, made.id, lambda each: each.with_status(Status.RUNNING))
        assert Records(inner).read(ORGANIZATION, made.id) == changed
        assert len(changed.changes) == 1


def test_a_record_is_there_for_its_organization_only_and_made_once(tmp_path: Path) -> None:
    records, made = Records(local_store(tmp_path)), execution()
    records.create(made)
    with pytest.raises(ExistsError):
        records.create(msgspec.structs.replace(made, agent="another"))
    for organization, name in (
        (STRANGER, made.id),
        (ORGANIZATION, str(uuid.uuid4())),
        (ORGANIZATION, "../../other"),
        (ORGANIZATION, ""),
    ):
        with pytest.raises(NotFoundError, match="Execution not found"):
            records.read(organization, name)
    assert list(records.list(STRANGER)) == []
    records.create(execution(STRANGER))
    assert list(records.organizations()) == [ORGANIZATION, STRANGER]


def test_an_unchanged_record_is_not_written_and_a_known_one_not_read(tmp_path: Path) -> None:
    store, made = CountingStore(local_store(tmp_path)), execution()
    records = Records(store)
    records.create(made)
    store.reset()
    assert records.change(ORGANIZATION, made.id, lambda each: each) == made
    assert list(records.list(ORGANIZATION)) == [made]
    assert (store.puts, store.gets, store.requests["list"]) == (0, 0, 2)


@pytest.mark.parametrize(
    ("document", "message"), [(b"{", "damaged"), (b'{"format":2}', "damaged|newer agentfuse")]
)
def test_a_damaged_record_is_an_error_not_an_absent_one(
    tmp_path: Path, document: bytes, message: str
) -> None:
    store, made = local_store(tmp_path), execution()
    Records(store).create(made)
    store.put(f"executions/{ORGANIZATION}/{made.id}/{2:020d}.json", document)
    with pytest.raises(IntegrityError, match=message):
        Records(store).read(ORGANIZATION, made.id)


def told(text: str) -> Callable[[Execution], Execution]:
    message = with_message(text)
    return lambda each: msgspec.structs.replace(each, messages=[*each.messages, message])


def ended(each: Execution) -> Execution:
    return each.with_status(Status.COMPLETED, at=9.0)


def texts(record: Execution) -> list[str]:
    return [message.text for message in record.messages]


def numbers_of(store: ObjectStore, record: Execution) -> list[int]:
    found = store.list(f"executions/{ORGANIZATION}/{record.id}/")
    return [int(each.key.rpartition("/")[2].removesuffix(".json")) for each in found]


def once(*, at: tuple[str, ...], do: Callable[[], object]) -> Callable[[int, str, str], None]:
    """Have something done just before the last of these requests, made one after the other, is."""
    left = list(at)

    def interleave(_: int, method: str, __: str) -> None:
        if left and method == left[0]:
            left.pop(0)
            if not left:
                do()

    return interleave


def age(store: Path, record: Execution, seconds: float) -> None:
    """Have all revisions that there are of a record be so old."""
    for found in (store / "executions" / ORGANIZATION / record.id).iterdir():
        at = time.time() - seconds
        os.utime(found, (at, at))


def test_only_the_newest_revision_of_what_has_ended_for_long_is_kept(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    records, over, running, recent = Records(store), execution(), execution(), execution()
    for each in (over, running, recent):
        records.create(each)
        records.change(ORGANIZATION, each.id, told("a"))
    expected = records.change(ORGANIZATION, over.id, ended)
    events = f"executions/{ORGANIZATION}/{over.id}/events.ndjson.gz"
    store.put(events, b"events")
    for each in (over, running):
        age(tmp_path / "store", each, 100)
    records.change(ORGANIZATION, recent.id, ended)
    assert records.prune(ORGANIZATION, 60.0) == 2
    assert [len(numbers_of(store, each)) for each in (running, recent)] == [2, 3]
    assert [each.key for each in store.list(f"executions/{ORGANIZATION}/{over.id}/")] == [
        f"executions/{ORGANIZATION}/{over.id}/{3:020d}.json",
        events,
    ]
    for gateway in (records, Records(store)):
        assert gateway.read(ORGANIZATION, over.id) == expected
        assert expected in gateway.list(ORGANIZATION)
        assert gateway.prune(ORGANIZATION, 60.0) == 0
    changed = Records(store).change(ORGANIZATION, over.id, told("b"))
    assert records.read(ORGANIZATION, over.id) == changed
    assert texts(changed) == ["a", "b"]


def test_a_writer_who_slept_until_his_number_was_pruned_loses_nothing_and_resurrects_nothing(
    tmp_path: Path,
) -> None:
    inner, made = local_store(tmp_path), execution()
    others = Records(inner)
    others.create(made)

    def meanwhile() -> None:
        for text in ("a", "b"):
            others.change(ORGANIZATION, made.id, told(text))
        others.change(ORGANIZATION, made.id, ended)
        assert others.prune(ORGANIZATION, 0.0) == 3

    sleeper = Records(FaultyStore(inner, once(at=("put_if_absent",), do=meanwhile)))
    changed = sleeper.change(ORGANIZATION, made.id, told("late"))
    assert (changed.status, texts(changed)) == (Status.COMPLETED, ["a", "b", "late"])
    for gateway in (others, sleeper, Records(inner)):
        assert gateway.read(ORGANIZATION, made.id) == changed
        assert list(gateway.list(ORGANIZATION)) == [changed]
    assert numbers_of(inner, made) == [2, 4, 5]
    assert others.prune(ORGANIZATION, 0.0) == 2
    assert numbers_of(inner, made) == [5]


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("fault", [None, "after"])
def test_a_change_that_others_followed_before_its_writer_looked_is_made_once(
    tmp_path: Path, is_pruned: bool, fault: str | None
) -> None:
    inner, made = local_store(tmp_path), execution()
    others = Records(inner)
    others.create(made)

    def meanwhile() -> None:
        others.change(ORGANIZATION, made.id, told("b"))
        others.change(ORGANIZATION, made.id, ended)
        if is_pruned:
            assert others.prune(ORGANIZATION, 0.0) == 3

    interleave = once(at=("put_if_absent", "list"), do=meanwhile)

    def fails(number: int, method: str, key: str) -> str | None:
        interleave(number, method, key)
        return fault if method == "put_if_absent" else None

    first = Records(FaultyStore(inner, fails))
    first.change(ORGANIZATION, made.id, told("a"))
    newest = Records(inner).read(ORGANIZATION, made.id)
    assert (newest.status, texts(newest)) == (Status.COMPLETED, ["a", "b"])
    assert first.read(ORGANIZATION, made.id) == newest


def test_who_lists_finds_what_was_changed_and_pruned_before_he_reads(tmp_path: Path) -> None:
    inner, made = local_store(tmp_path), execution()
    others = Records(inner)
    others.create(made)
    others.change(ORGANIZATION, made.id, ended)
    for text, look in (("a", Records.read), ("b", lambda records, *_: next(records.list(ORGANIZATION)))):

        def meanwhile(text: str = text) -> None:
            others.change(ORGANIZATION, made.id, told(text))
            others.prune(ORGANIZATION, 0.0)

        reader = Records(FaultyStore(inner, once(at=("get",), do=meanwhile)))
        assert texts(look(reader, ORGANIZATION, made.id))[-1] == text


def test_of_changes_beside_prunings_none_is_lost_or_made_twice(tmp_path: Path) -> None:
    store, made = local_store(tmp_path), execution()
    Records(store).create(made)
    Records(store).change(ORGANIZATION, made.id, ended)
    is_over = threading.Event()

    def prune() -> int:
        records, removed = Records(store), 0
        while not is_over.is_set():
            removed += records.prune(ORGANIZATION, 0.0)
        return removed

    gateways = [Records(store) for _ in range(3)]
    for each in gateways:
        each.read(ORGANIZATION, made.id)
    with ThreadPoolExecutor(10) as pool:
        pruners = [pool.submit(prune) for _ in range(2)]
        writers = [
            pool.submit(gateways[n % 3].change, ORGANIZATION, made.id, told(f"{n}")) for n in range(40)
        ]
        try:
            for writer in writers:
                writer.result()
        finally:
            is_over.set()
        assert sum(pruner.result() for pruner in pruners) > 0
    newest = Records(store).read(ORGANIZATION, made.id)
    assert sorted(texts(newest), key=int) == [f"{n}" for n in range(40)]
    assert newest.status is Status.COMPLETED


def test_more_records_than_a_page_are_all_listed_in_order_once_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentfuse.gateway.executions.records._PAGE", 5)
    store = CountingStore(local_store(tmp_path))
    made = sorted((execution() for _ in range(20)), key=lambda each: each.id)
    for each in made:
        Records(store).create(each)
    records = Records(store)
    assert list(records.list(ORGANIZATION)) == made
    store.reset()
    assert list(records.list(ORGANIZATION)) == made
    assert store.gets == 0


def test_what_is_held_of_records_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore(local_store(tmp_path))
    made = sorted((execution() for _ in range(8)), key=lambda each: each.id)
    for each in made:
        Records(store).create(each)
    size = next(iter(store.list(f"executions/{ORGANIZATION}/"))).size_bytes
    monkeypatch.setattr("agentfuse.gateway.executions.records._KEPT_BYTES", 3 * size)
    records = Records(store)
    assert [records.read(ORGANIZATION, each.id) for each in made] == made
    store.reset()
    assert [records.read(ORGANIZATION, each.id) for each in made[-3:]] == made[-3:]
    assert store.gets == 0
    assert records.read(ORGANIZATION, made[0].id) == made[0]
    assert store.gets == 1


def test_an_agent_belongs_to_who_claims_it_first(tmp_path: Path) -> None:
    store = local_store(tmp_path)

    def claimed(organization: str) -> str | None:
        try:
            return Agents(store, has_others=True).claim(organization, "a").organization
        except NotFoundError:
            return None

    organizations = [str(uuid.UUID(int=number)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(claimed, organizations))
    owner = next(filter(None, outcomes))
    assert outcomes == [each if each == owner else None for each in organizations]
    assert Agents(store, has_others=True).find(owner, "a").organization == owner
    with pytest.raises(NotFoundError):
        Agents(store, has_others=True).find(STRANGER, "a")
    for impossible in ("../b", "<b>", "café", "", "x" * 129):  # no home could be mounted for it
        with pytest.raises(UsageError):
            Agents(store, has_others=True).claim(owner, impossible)


def test_a_memory_that_nobody_owns_is_nobodys_where_there_are_several_organizations(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    store.put("agents/a/shared/snapshots/x", b"memory")
    for attempt in (Agents(store, has_others=True).find, Agents(store, has_others=True).claim):
        with pytest.raises(NotFoundError):
            attempt(ORGANIZATION, "a")
    assert Agents(store, has_others=False).find(ORGANIZATION, "a").organization == ORGANIZATION


def test_an_agent_is_claimed_although_the_answer_was_lost_and_not_when_the_store_fails(
    tmp_path: Path,
) -> None:
    inner = local_store(tmp_path)
    lossy = FaultyStore(inner, lambda _, method, __: "after" if method == "put_if_absent" else None)
    assert Agents(lossy, has_others=True).claim(ORGANIZATION, "a").organization == ORGANIZATION
    down = FaultyStore(inner, lambda _, method, __: "before" if method == "put_if_absent" else None)
    with pytest.raises(StoreError):
        Agents(down, has_others=True).claim(ORGANIZATION, "b")
    with pytest.raises(NotFoundError):
        Agents(inner, has_others=True).find(ORGANIZATION, "b")
