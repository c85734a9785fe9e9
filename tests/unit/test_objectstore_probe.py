"""The probe against stores that do not keep their promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import StoreError
from agentfuse.objectstore import ObjectStat, probe


class IgnoresTheCondition(CountingStore):
    def put_if_absent(self, key: str, body: bytes) -> bool:
        self.inner.put(key, body)
        return True


class AnswersExistsToEverything(CountingStore):
    def put_if_absent(self, key: str, body: bytes) -> bool:
        return False


class LosesTheFirstAnswer(CountingStore):
    def put_if_absent(self, key: str, body: bytes) -> bool:
        return super().put_if_absent(key, body) and self.requests["put_if_absent"] > 1


class ClaimsToHaveLostButWrites(CountingStore):
    def put_if_absent(self, key: str, body: bytes) -> bool:
        return self.inner.put_if_absent(key, body) or bool(self.inner.put(key, body))


class GivesOtherBytes(CountingStore):
    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return b"something else"


class ListsLate(CountingStore):
    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        return iter(())


@pytest.mark.parametrize(
    ("wrapper", "complaint"),
    [
        (IgnoresTheCondition, "ignores put-if-absent"),
        (AnswersExistsToEverything, "answers 'exists'"),
        (ClaimsToHaveLostButWrites, "ignores put-if-absent"),
        (GivesOtherBytes, "other bytes"),
        (ListsLate, "does not list"),
    ],
)
def test_a_store_that_breaks_its_promise_is_refused(
    tmp_path: Path, wrapper: type[CountingStore], complaint: str
) -> None:
    store = wrapper(local_store(tmp_path))
    with pytest.raises(StoreError, match=complaint):
        probe(store)
    assert list(store.inner.list("")) == []


def test_a_probe_costs_few_requests(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    probe(store)
    assert store.requests == {"put_if_absent": 2, "get": 1, "list": 1, "delete": 1}


@pytest.mark.parametrize("number", range(5))
def test_an_unreachable_store_fails_the_probe(tmp_path: Path, number: int) -> None:
    store = FaultyStore(local_store(tmp_path), lambda n, *_: "before" if n == number else None)
    with pytest.raises(StoreError, match="injected"):
        probe(store)


def test_a_lost_answer_is_no_broken_promise(tmp_path: Path) -> None:
    probe(LosesTheFirstAnswer(local_store(tmp_path)))
