"""Numbered snapshots: finding the newest, racing for the next, and answers that get lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from listings import directory, file, listing, snapshot
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import IntegrityError, ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore import ObjectStat, ObjectStore
from agentfuse.snapshots.document import encode
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import check_id, snapshot_key

LISTING = listing(directory(b"d"), file(b"d/x", b"1"))


def history(store: ObjectStore) -> History:
    return History(store, "a", "shared")


def commit(store: ObjectStore, number: int, commit_id: str = "c") -> bool:
    return history(store).commit(snapshot(LISTING.values(), number, commit=commit_id))


def key(number: int) -> str:
    return snapshot_key("a", "shared", number)


def test_keys_are_numbered_with_twenty_digits() -> None:
    assert key(12) == "agents/a/shared/snapshots/00000000000000000012.json.gz"


def test_snapshots_are_found_and_read(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    assert history(store).newest() == 0
    for number in (1, 2, 3):
        assert commit(store, number)
    assert history(store).newest() == 3
    assert list(history(store).numbers()) == [1, 2, 3]
    assert list(history(store).numbers(after=2)) == [3]
    assert history(store).read(2) == snapshot(LISTING.values(), 2, commit="c")
    with pytest.raises(ObjectNotFoundError):
        history(store).read(4)


def test_a_number_is_won_once(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    assert commit(store, 1, "winner")
    assert not commit(store, 1, "loser")
    assert history(store).read(1).commit == "winner"


def test_of_many_commits_at_once_each_number_has_one_winner(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    wins: list[tuple[int, int]] = []

    def race(me: int) -> None:
        mine = history(store)
        while mine.newest() < 20:
            number = mine.newest() + 1
            if mine.commit(snapshot(LISTING.values(), number, commit=f"{me}-{number}")):
                wins.append((number, me))

    threads = [threading.Thread(target=race, args=(me,)) for me in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in wins) == list(range(1, len(wins) + 1))
    assert all(history(store).read(number).commit == f"{me}-{number}" for number, me in wins)


def test_a_commit_whose_answer_got_lost_is_recognised(tmp_path: Path) -> None:
    lost = FaultyStore(
        local_store(tmp_path), lambda n, method, _: "after" if method == "put_if_absent" else None
    )
    assert commit(lost, 1, "mine")
    assert not commit(lost, 1, "other")


def test_a_retry_inside_the_store_that_answers_exists_is_recognised(tmp_path: Path) -> None:
    class RetriesItself(CountingStore):
        def put_if_absent(self, key: str, body: bytes) -> bool:
            self.inner.put_if_absent(key, body)
            return self.inner.put_if_absent(key, body)

    assert commit(RetriesItself(local_store(tmp_path)), 1)


def test_a_commit_that_failed_or_may_have_is_an_error(tmp_path: Path) -> None:
    failing = FaultyStore(
        local_store(tmp_path), lambda n, method, _: "before" if method == "put_if_absent" else None
    )
    with pytest.raises(StoreError, match="injected: put_if_absent"):
        commit(failing, 1)
    down = FaultyStore(
        local_store(tmp_path), lambda n, method, _: "after" if method == "put_if_absent" else "before"
    )
    with pytest.raises(StoreError, match="answer got lost"):
        commit(down, 1)


def test_finding_the_newest_costs_one_request(tmp_path: Path) -> None:
    inner = local_store(tmp_path)
    for number in range(1, 8):
        commit(inner, number)
    store = CountingStore(inner)
    known = history(store)
    assert known.newest() == 7
    commit(inner, 8)
    assert known.newest() == 8
    assert known.newest() == 8
    assert store.requests == {"list": 3}


class Numbers(CountingStore):
    """A store of which only the numbers matter."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        super().__init__(self)

    def list(self, prefix: str, *, start_after: str = ""):  # type: ignore[no-untyped-def]
        self._count("list", prefix)
        first = int(start_after[-28:-8]) + 1 if start_after else 1
        for drawn, number in enumerate(self.numbers[max(0, first - self.numbers.start) :]):
            if drawn and drawn % 1000 == 0:
                self._count("list", prefix)
            yield ObjectStat(key(number), 1, 0.0)


@pytest.mark.parametrize("first", [1, 4321])
@pytest.mark.parametrize("count", [999, 1000, 1001, 1999, 2000, 2001, 5000, 123_456])
def test_a_long_history_costs_few_requests_even_at_first_sight(count: int, first: int) -> None:
    store = Numbers(range(first, first + count))
    assert history(store).newest() == first + count - 1
    assert store.requests["list"] <= 20


def test_a_history_that_lost_what_was_known_is_an_error(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    commit(store, 1)
    commit(store, 2)
    mine = history(store)
    assert mine.newest(at_least=2) == 2
    with pytest.raises(StoreError, match="had snapshot 3"):
        history(store).newest(at_least=3)
    store.delete(key(2))
    with pytest.raises(StoreError, match=r"had snapshot 2.*the store that the home was mounted with"):
        mine.newest()


def test_gaps_that_collection_left_are_no_loss(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    for number in (1, 2, 3, 4):
        commit(store, number)
    store.delete(key(1))
    store.delete(key(3))
    assert history(store).newest(at_least=3) == 4
    assert list(history(store).numbers()) == [2, 4]


def test_an_unreachable_store_is_unknown_not_empty(tmp_path: Path) -> None:
    down = FaultyStore(local_store(tmp_path), lambda *_: "before")
    with pytest.raises(StoreError, match="injected") as caught:
        history(down).newest()
    assert not isinstance(caught.value, ObjectNotFoundError)


def test_a_document_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    for wrong in (snapshot(LISTING.values(), 2), snapshot(LISTING.values(), 1, agent="b")):
        store.put(key(1), encode(wrong))
        with pytest.raises(IntegrityError, match="another's place"):
            history(store).read(1)


def test_numbered_documents_in_an_unknown_form_are_not_overlooked(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    commit(store, 1)
    store.put("agents/a/shared/snapshots/notes.txt", b"")
    assert history(store).newest() == 1
    store.put(key(2).replace(".gz", ".zst"), b"")
    with pytest.raises(IntegrityError, match="a newer agentfuse wrote it"):
        history(store).newest()


@pytest.mark.parametrize("bad", ["", "a/b", "..", ".hidden", "a\0", "a\n", "x" * 201, "\udcff"])
def test_ids_that_cannot_be_part_of_a_key_are_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UsageError, match="no valid id"):
        History(local_store(tmp_path), bad, "shared")


def test_ids_may_have_spaces_and_any_letters() -> None:
    for good in ("Agent 7", "ünï", "x" * 200, "a..b"):
        assert check_id("agent", good) == good
