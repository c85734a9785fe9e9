"""Records of executions and of agents, on a store that fails, races and loses answers."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import ExistsError, IntegrityError, NotFoundError, StoreError, UsageError
from agentfuse.gateway.agents import Agents
from agentfuse.gateway.executions.record import Execution, Message, Status
from agentfuse.gateway.executions.records import Records

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
