"""Metrics: the table in the documentation, the text that Prometheus reads, and where it is published."""

from __future__ import annotations

import errno
import itertools
import os
import re
from functools import partial
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from agentfuse.metrics.exposition import render
from agentfuse.metrics.families import FAMILIES
from agentfuse.metrics.publishing import Scrapes, keep_textfile
from agentfuse.metrics.readings import Reading, of_events
from agentfuse.timings import add_to, new_timing
from agentfuse.values import Address

DOCS = Path(__file__).parents[2] / "docs/operate.md"


def test_the_documented_table_is_what_there_is() -> None:
    rows = re.findall(
        r"^\| `(agentfuse_(?!gateway_)\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCS.read_text(), re.MULTILINE
    )
    documented = [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), said) for name, kind, labels, said in rows
    ]
    assert documented == list(FAMILIES)


def test_names_follow_prometheus_conventions() -> None:
    for family in FAMILIES:
        assert family.name.endswith("_total") is (family.kind == "counter"), family.name
        assert not {"agent", "execution"} & set(family.labels)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_a_duration_is_in_the_first_bucket_that_is_as_long() -> None:
    timing = new_timing()
    for spent_ns in (1_000, 20_000, 20_000_000, 60_000_000_000):
        add_to(timing, spent_ns)
    reading = Reading("agentfuse_fuse_request_duration_seconds", ("write",), tuple(timing))
    text = render([reading], agent='a"\n', execution="e\udcff").decode()
    (family,) = [found for found in text_string_to_metric_families(text) if found.samples]
    counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert counts["8.192e-06"] == counts["1.6384e-05"] == 1
    assert counts["3.2768e-05"] == 2
    assert [n for le, n in counts.items() if 0.02 <= float(le) < 60] == [3] * 9
    assert counts["+Inf"] == 4
    values = {s.name.rpartition("_")[2]: s.value for s in family.samples if "le" not in s.labels}
    assert values == {"count": 4, "sum": pytest.approx(60.020021)}
    assert family.samples[0].labels["agent"] == 'a"\n'
    assert family.samples[0].labels["execution"] == "e?"


class Silent:
    """A feed that told of nothing, and its webhooks: one that does not answer."""

    told: ClassVar[dict[tuple[str, str], int]] = {}
    name, backlog, delivered, failed = "example.com", 3, 4, 5

    @property
    def senders(self) -> list[Silent]:
        return [self]

    def as_dict(self) -> dict[str, int]:
        return {"waiting": 0, "followers": 0}


def test_a_webhook_goes_by_its_name() -> None:
    found = {each.name: each for each in of_events(Silent(), Silent())}  # type: ignore[arg-type]
    assert found["agentfuse_webhook_backlog_events"][1:] == (("example.com",), 3)
    assert found["agentfuse_webhook_delivered_events_total"][1:] == (("example.com",), 4)
    assert found["agentfuse_webhook_failures_total"][1:] == (("example.com",), 5)


async def some_text() -> bytes:
    return b"metric 1\n"


async def test_a_scrape_gets_the_text_and_nothing_else_is_there(nursery: trio.Nursery) -> None:
    scrapes = Scrapes()
    await nursery.start(partial(scrapes.serve, Address("127.0.0.1", 0), some_text))
    assert scrapes.url is not None
    async with httpx.AsyncClient() as client:
        answer = await client.get(scrapes.url)
        assert (answer.status_code, answer.text) == (200, "metric 1\n")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert (await client.get(scrapes.url + "/v1/status")).status_code == 404
        assert (await client.post(scrapes.url)).status_code == 404


async def test_clients_that_never_ask_keep_nobody_but_themselves(nursery: trio.Nursery) -> None:
    scrapes = Scrapes()
    await nursery.start(partial(scrapes.serve, Address("127.0.0.1", 0), some_text))
    assert scrapes.url is not None
    port = httpx.URL(scrapes.url).port or 0
    idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
    for stream in idle[8:]:
        assert await stream.receive_some() == b""  # one too many
    await idle[0].aclose()
    while scrapes.open > 7:
        await trio.lowlevel.checkpoint()
    async with httpx.AsyncClient() as client:
        assert (await client.get(scrapes.url)).status_code == 200


async def test_an_address_that_is_taken_is_told_and_costs_nothing_else(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken.socket.getsockname()[1]
    scrapes = Scrapes()
    await nursery.start(partial(scrapes.serve, Address("127.0.0.1", port), some_text))
    assert scrapes.url is None
    assert f"no metrics at 127.0.0.1:{port}" in caplog.text


class Asked:
    """Metrics that differ each time they are asked for. The last time is left unanswered: then what came
    before is written, and ``reached`` is set.
    """

    def __init__(self, unanswered: int) -> None:
        self._left = unanswered
        self._numbers = itertools.count(1)
        self.reached = trio.Event()

    async def metrics(self) -> bytes:
        number = next(self._numbers)
        if number == self._left:
            self.reached.set()
            await trio.sleep_forever()
        return b"metric %d\n" % number


async def test_the_file_is_whole_readable_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "agentfuse-e.prom"
    asked = Asked(unanswered=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_textfile, path, asked.metrics, 0.0)
        await asked.reached.wait()
        assert path.read_text() == "metric 2\n"
        assert path.stat().st_mode & 0o777 == 0o644
        assert os.listdir(tmp_path) == [path.name]
        nursery.cancel_scope.cancel()
    assert os.listdir(tmp_path) == []


async def test_a_directory_that_is_not_there_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "later/agentfuse-e.prom"
    asked = Asked(unanswered=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_textfile, path, asked.metrics, 0.0)
        await asked.reached.wait()
        nursery.cancel_scope.cancel()
    (record,) = caplog.records
    assert f"metrics cannot be written to {path}: " in record.getMessage()
    assert "No such file" in record.getMessage()


async def test_metrics_that_cannot_be_read_for_a_while_end_neither_the_file_nor_the_port(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(unanswered=2)
    failures = [OSError(errno.EMFILE, "Too many open files", "/proc/self/statm")] * 3

    async def metrics() -> bytes:
        if failures:
            raise failures.pop()
        return await asked.metrics()

    scrapes = Scrapes()
    await nursery.start(partial(scrapes.serve, Address("127.0.0.1", 0), metrics))
    assert scrapes.url is not None
    async with httpx.AsyncClient() as client:
        answer = await client.get(scrapes.url)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        path = tmp_path / "agentfuse-e.prom"
        nursery.start_soon(keep_textfile, path, metrics, 0.0)
        await asked.reached.wait()
        assert path.read_text() == "metric 1\n"
        assert (await client.get(scrapes.url)).text == "metric 3\n"
    (record,) = [each for each in caplog.records if "cannot be written" in each.getMessage()]
    assert "Too many open files" in record.getMessage()


async def test_every_address_of_a_name_is_served(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[trio.SocketListener] = []

    async def listen(port: int, *, host: str) -> list[trio.SocketListener]:
        for address in ("127.0.0.1", "127.0.0.2"):  # as a name with two addresses does
            made.extend(await real(port, host=address))
        return made

    real = trio.open_tcp_listeners
    monkeypatch.setattr(trio, "open_tcp_listeners", listen)
    await nursery.start(partial(Scrapes().serve, Address("localhost", 0), some_text))
    async with httpx.AsyncClient() as client:
        for listener in made:
            host, port = listener.socket.getsockname()
            assert (await client.get(f"http://{host}:{port}/metrics")).status_code == 200
    assert len(made) == 2
