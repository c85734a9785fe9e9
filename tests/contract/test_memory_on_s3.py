"""An agent's memory in real S3 stores: the round trip, and what it costs in requests on the wire."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydrating import bring_all
from memories import Run, grow_nasty_tree, picture
from s3_servers import STORES, Server

from agentfuse.config import load_config
from agentfuse.errors import StoreError
from agentfuse.home.tree import Home
from agentfuse.objectstore.s3 import PART_BYTES, S3Store
from agentfuse.objectstore.s3_sdk import Patience
from agentfuse.objectstore.s3_url import parse_s3_url
from agentfuse.progress import Silent
from agentfuse.sync.keeper import HomeKeeper


class Wire:
    """Counts the HTTP requests of a store by the operation that they are for, retries included."""

    def __init__(self, store: S3Store) -> None:
        self.sent: Counter[str] = Counter()
        self.events = store._client.meta.events
        self.events.register("before-send.s3", self._count)

    def _count(self, event_name: str, **_: Any) -> None:
        self.sent[event_name.rpartition(".")[2]] += 1

    def close(self) -> None:
        self.events.unregister("before-send.s3", self._count)

    def taken(self) -> dict[str, int]:
        taken = dict(self.sent)
        self.sent.clear()
        return taken


@pytest.fixture
def store(s3: str) -> S3Store:
    return S3Store(parse_s3_url(s3))


@pytest.fixture
def wire(store: S3Store) -> Iterator[Wire]:
    wire = Wire(store)
    yield wire
    wire.close()


def test_a_nasty_tree_goes_round(tmp_path: Path, store: S3Store) -> None:
    first = Run(tmp_path, store)
    grow_nasty_tree(first.root)
    before = picture(first.root)
    assert first.commit().number == 1
    second = Run(tmp_path, store, "e2")
    second.restore()
    assert picture(second.root) == before
    assert second.commit().number is None


def test_many_small_files_cost_few_requests(tmp_path: Path, store: S3Store, wire: Wire) -> None:
    first = Run(tmp_path, store)
    assert first.restore().number is None
    assert wire.taken() == {"ListObjectsV2": 1}
    contents = random.Random(1)
    for number in range(5000):
        first.write(f"d{number % 50}/f{number}", contents.randbytes(1024))
    assert first.commit().files == 5000
    assert wire.taken() == {"PutObject": 2, "ListObjectsV2": 1}

    second = Run(tmp_path, store, "e2")
    assert second.restore().files == 5000
    assert wire.taken() == {"ListObjectsV2": 1, "GetObject": 2}
    assert picture(second.root) == picture(first.root)

    assert second.commit().number is None
    assert wire.taken() == {}
    (second.root / "d1/f1").write_bytes(b"changed")
    assert second.commit().number == 2
    assert wire.taken() == {"ListObjectsV2": 1, "PutObject": 2}


@pytest.mark.parametrize(("cache_size", "gets"), [("1GiB", 2), ("0", 5)])
def test_a_host_that_has_a_memory_fetches_only_the_snapshot(
    tmp_path: Path, store: S3Store, wire: Wire, cache_size: str, gets: int
) -> None:
    config = load_config(
        None,
        environ={},
        overrides={"state": str(tmp_path / "state"), "store": store.url, "cache_size": cache_size},
    )

    def run(execution: str) -> HomeKeeper:
        home = Home(config.state, execution)
        home.path.mkdir(parents=True)
        keeper = HomeKeeper(
            config, home, agent="a", mountpoint=Path("/nowhere"), ephemeral=False, reporter=Silent()
        )
        keeper.open()
        return keeper

    first = run("e1")
    grow_nasty_tree(first.home.tree / "shared")
    first.flush(Silent())
    first.end()
    wire.taken()
    second = run("e2")
    bring_all(second.absent)
    assert wire.taken()["GetObject"] == gets, "the probe's, the snapshot, and without a cache the contents"
    assert picture(second.home.tree / "shared") == picture(first.home.tree / "shared")


def test_a_large_file_travels_in_parts(tmp_path: Path, store: S3Store, wire: Wire) -> None:
    first = Run(tmp_path, store)
    first.restore()
    wire.taken()
    first.write("large", os.urandom(5 * PART_BYTES + 1))
    first.commit()
    sent = wire.taken()
    assert sent.pop("GetObject", 0) <= 1, "whether it is there already"
    assert sent == {
        "ListObjectsV2": 1,
        "CreateMultipartUpload": 1,
        "UploadPart": 6,
        "CompleteMultipartUpload": 1,
        "PutObject": 1,
    }
    second = Run(tmp_path, store, "e2")
    second.restore()
    assert picture(second.root) == picture(first.root)


def test_two_executions_meet_in_the_store(tmp_path: Path, store: S3Store) -> None:
    first = Run(tmp_path, store)
    first.write("base", b"1")
    first.commit()
    others = [Run(tmp_path, store, f"e{number}") for number in (2, 3)]
    for other in others:
        other.restore()
    for number, other in enumerate(others):
        other.write(f"of-{number}", b"x")
        other.commit()
    last = Run(tmp_path, store, "e4")
    last.restore()
    assert {each.name for each in last.root.iterdir()} == {"base", "of-0", "of-1"}


def test_an_outage_during_a_commit_loses_nothing(
    tmp_path: Path, radosgw: Server, request: pytest.FixtureRequest
) -> None:
    store = S3Store(parse_s3_url(STORES["radosgw"](request)), Patience(attempts=1))
    first = Run(tmp_path, store)
    first.write("a", b"one")
    first.commit()
    first.write("a", b"two")
    radosgw.outage()
    try:
        with pytest.raises(StoreError, match=r"connection (refused|broke)"):
            first.commit()
        with pytest.raises(StoreError, match=r"connection (refused|broke)"):
            Run(tmp_path, store, "e2").restore()
    finally:
        radosgw.back()
    assert first.commit().number == 2
    second = Run(tmp_path, store, "e3")
    second.restore()
    assert (second.root / "a").read_bytes() == b"two"
