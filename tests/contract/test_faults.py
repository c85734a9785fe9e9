"""An agent's memory on a store whose requests fail on the wire, at radosgw behind a proxy.

A commit that raises is tried again, as the daemon does. In the end every commit is there exactly once, and
every object and hash in the store is looked at.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import invariants
import pytest
from memories import Run, picture
from s3_servers import Proxy

from agentfuse.errors import ObjectNotFoundError, StoreError
from agentfuse.objectstore.s3 import PART_BYTES, S3Store
from agentfuse.objectstore.s3_sdk import Patience
from agentfuse.objectstore.s3_url import parse_s3_url
from agentfuse.snapshots.history import History

PATIENT = Patience(connect_s=2, read_s=2, deadline_s=20, attempts=4)
FAULTS = [
    {"refused": 30},
    {"lost": 30},
    {"reset": 30},
    {"silent": 10},
    {"refused": 10, "lost": 10, "reset": 10},
]
ATTEMPTS = 20
COMMITS = 8

_numbers = itertools.count()


@pytest.fixture
def store(proxied: Proxy) -> S3Store:
    """An empty store of one test's own, through the proxy."""
    return S3Store(parse_s3_url(proxied.url("contract", f"faults/{next(_numbers)}")), PATIENT)


def named(faults: dict[str, int]) -> str:
    return " ".join(f"{name}-{percent}" for name, percent in faults.items())


def until_it_succeeds(work: Callable[[], object]) -> None:
    for _ in range(ATTEMPTS):
        try:
            work()
        except StoreError:
            continue
        return
    work()


def numbers(store: S3Store) -> list[int]:
    return list(History(store, "a", "shared").numbers())


@pytest.mark.parametrize("faults", FAULTS, ids=named)
def test_every_commit_is_there_exactly_once(
    tmp_path: Path, store: S3Store, proxied: Proxy, faults: dict[str, int]
) -> None:
    rng = random.Random(1)
    run = Run(tmp_path, store)
    failed = proxied.failed()
    with proxied.failing(**faults):
        until_it_succeeds(run.restore)
        # As many as it takes for chance to have hit one.
        for number in range(20 * COMMITS):
            if number >= COMMITS and proxied.failed() > failed:
                break
            run.write(f"new-{number}", rng.randbytes(20_000))
            run.write("changed", rng.randbytes(2_000))
            if number:
                (run.root / f"new-{number - 1}").unlink()
            until_it_succeeds(run.commit)
    assert proxied.failed() > failed
    assert numbers(store) == list(range(1, number + 1))
    assert invariants.wrong_history(store, "a") == []
    other = Run(tmp_path, store, "e2")
    other.restore()
    assert picture(other.root) == picture(run.root)


@pytest.mark.parametrize("faults", FAULTS[:3], ids=named)
def test_executions_at_once_lose_nothing(
    tmp_path: Path, store: S3Store, proxied: Proxy, faults: dict[str, int]
) -> None:
    runs = [Run(tmp_path, store, f"e{number}") for number in range(3)]
    rounds = 3

    def live(run: Run) -> None:
        for number in range(rounds):
            run.write(f"{run.execution}/{number}", f"{run.execution} {number}".encode())
            run.write("common", f"by {run.execution} in round {number}".encode())
            until_it_succeeds(run.commit)

    with proxied.failing(**faults), ThreadPoolExecutor(len(runs)) as executor:
        list(executor.map(live, runs))
    assert len(numbers(store)) == rounds * len(runs)
    assert invariants.wrong_history(store, "a") == []
    last = Run(tmp_path, store, "last")
    last.restore()
    found = {
        str(path.relative_to(last.root)): path.read_text() for path in last.root.rglob("*") if path.is_file()
    }
    for run in runs:
        for number in range(rounds):
            assert found[f"{run.execution}/{number}"] == f"{run.execution} {number}"
    versions = [text for path, text in found.items() if path.endswith("common")]
    assert all(any(f"by {run.execution} in round {rounds - 1}" in text for text in versions) for run in runs)


@pytest.mark.parametrize("faults", FAULTS, ids=named)
def test_a_restore_comes_through(
    tmp_path: Path, store: S3Store, proxied: Proxy, faults: dict[str, int]
) -> None:
    rng = random.Random(2)
    run = Run(tmp_path, store)
    run.write("large", rng.randbytes(2 * PART_BYTES + 1))
    for number in range(300):
        run.write(f"d{number % 7}/{number}", rng.randbytes(rng.randrange(100_000)))
    run.commit()
    for number in range(3):
        other = Run(tmp_path, store, f"restored-{number}")

        def restore(other: Run = other) -> None:
            for path in other.root.iterdir():  # what an attempt before has left is worthless
                (path.unlink if path.is_file() else lambda path=path: _remove(path))()
            other.restore()

        with proxied.failing(**faults):
            until_it_succeeds(restore)
        assert picture(other.root) == picture(run.root)
        assert other.commit().number is None


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def test_a_large_content_goes_up_through_faults(tmp_path: Path, store: S3Store, proxied: Proxy) -> None:
    run = Run(tmp_path, store)
    run.write("large", random.Random(3).randbytes(6 * PART_BYTES + 17))
    with proxied.failing(refused=15, lost=15, reset=15):
        until_it_succeeds(run.commit)
    assert numbers(store) == [1]
    assert invariants.wrong_history(store, "a") == []


@pytest.mark.timeout(120)
def test_an_outage_is_unknown_never_absent(tmp_path: Path, store: S3Store, proxied: Proxy) -> None:
    run = Run(tmp_path, store)
    run.write("kept", b"one")
    run.commit()
    run.write("kept", b"two")
    impatient = S3Store(parse_s3_url(store.url), Patience(deadline_s=0.5))
    history = History(impatient, "a", "shared")
    asks: list[Callable[[], object]] = [
        history.newest,
        lambda: history.read(1),
        lambda: impatient.stat("agents/a/none"),
        lambda: impatient.get("agents/a/none"),
        lambda: list(impatient.list("agents/")),
        lambda: impatient.put("agents/a/new", b"x"),
        lambda: impatient.put_if_absent("agents/a/new", b"x"),
        lambda: Run(tmp_path, impatient, "e2").restore(),
    ]
    with proxied.failing(outage=1):
        for ask in asks:
            with pytest.raises(StoreError) as caught:
                ask()
            assert not isinstance(caught.value, ObjectNotFoundError)
        run.store = impatient
        run.another_process()
        with pytest.raises(StoreError):
            run.commit()
    with pytest.raises(ObjectNotFoundError):
        impatient.get("agents/a/none")
    run.store = store
    run.another_process()
    assert run.commit().number == 2
    assert invariants.wrong_history(store, "a") == []
