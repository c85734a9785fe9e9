"""Whose snapshot is it when an answer was lost, and the retry is refused? At radosgw, on the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memories import SILENT, Run
from s3_servers import STORES, Proxy

from agentfuse.objectstore.s3 import S3Store
from agentfuse.objectstore.s3_url import parse_s3_url
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import snapshot_key
from agentfuse.sync.fsck import Checker

KEY = snapshot_key("a", "shared", 1)


@pytest.fixture
def direct(request: pytest.FixtureRequest) -> S3Store:
    """An empty store, without faults."""
    return S3Store(parse_s3_url(STORES["radosgw"](request)))


@pytest.fixture
def store(direct: S3Store, proxied: Proxy) -> S3Store:
    """The same through the proxy."""
    location = parse_s3_url(direct.url)
    return S3Store(parse_s3_url(proxied.url(location.bucket, location.prefix)))


class FirstSnapshot:
    """While it is entered, the first attempt to write the first snapshot meets a fault; ``then`` is called
    before the second. ``answers`` are the statuses of all attempts, 0 where there was no answer."""

    def __init__(self, store: S3Store, proxied: Proxy, fault: str, then: Callable[[], object]) -> None:
        self.proxied = proxied
        self.fault = fault
        self.then = then
        self.attempts = Counter[str]()
        self.answers: list[int] = []
        self.events = store._client.meta.events

    def __enter__(self) -> FirstSnapshot:
        self.events.register("before-send.s3.PutObject", self._sent)
        self.events.register("needs-retry.s3.PutObject", self._answered)
        return self

    def __exit__(self, *_: object) -> None:
        self.events.unregister("before-send.s3.PutObject", self._sent)
        self.events.unregister("needs-retry.s3.PutObject", self._answered)
        self.proxied.set(**{self.fault: 0})

    def _sent(self, request: Any, **_: Any) -> None:
        if KEY in request.url:
            self.attempts["sent"] += 1
            if self.attempts["sent"] == 1:
                self.proxied.set(**{self.fault: 100})

    def _answered(self, request_dict: dict[str, Any], response: Any, **_: Any) -> None:
        if KEY in request_dict["url_path"]:
            self.answers.append(response[0].status_code if response else 0)
            if len(self.answers) == 1:
                self.proxied.set(**{self.fault: 0})
                self.then()


def reasons(store: S3Store) -> dict[int, str]:
    history = History(store, "a", "shared")
    assert not Checker(store, "a", SILENT).run(all_snapshots=True).lost
    return {number: history.read(number).reason for number in history.numbers()}


def test_ones_own_snapshot_is_known_when_the_retry_is_refused(
    tmp_path: Path, proxied: Proxy, store: S3Store, direct: S3Store
) -> None:
    run = Run(tmp_path, store)
    run.write("a", b"one")
    with FirstSnapshot(store, proxied, "lost", then=lambda: None) as attempts:
        assert run.commit("mine").number == 1
    assert attempts.answers == [500, 412], "written and not told, refused"
    assert reasons(direct) == {1: "mine"}
    assert run.commit().number is None


def test_the_snapshot_of_another_is_not_taken_for_ones_own(
    tmp_path: Path, proxied: Proxy, store: S3Store, direct: S3Store
) -> None:
    run, other = Run(tmp_path, store), Run(tmp_path, direct, "e2")
    run.write("a", b"one")
    other.write("b", b"two")
    with FirstSnapshot(store, proxied, "reset", then=lambda: other.commit("theirs")) as attempts:
        assert run.commit("mine").number == 2
    assert attempts.answers == [0, 412], "not written, overtaken"
    assert reasons(direct) == {1: "theirs", 2: "mine"}
    last = Run(tmp_path, direct, "e3")
    last.restore()
    assert {path.name: path.read_bytes() for path in last.root.iterdir()} == {"a": b"one", "b": b"two"}
