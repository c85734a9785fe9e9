"""Webhooks, to real HTTPS servers that answer well, badly, late or never."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import receivers
import trio
import trustme
from receivers import SECRET, Receiver, answers, hangs_until, never_ends, receiving, sends, webhook_table
from trio.testing import wait_all_tasks_blocked

from agentfuse.config import load_config
from agentfuse.errors import ConfigError
from agentfuse.events import endpoint as endpoint_module
from agentfuse.events import webhooks as webhooks_module
from agentfuse.events.arrivals import Completed, Seen
from agentfuse.events.bookmarks import Bookmarks
from agentfuse.events.endpoint import open_endpoints
from agentfuse.events.feed import EventFeed
from agentfuse.events.log import EventLog
from agentfuse.events.webhooks import Webhooks

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks_module, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(webhooks_module, "_LONGEST_WAIT_S", 0.02)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Mount:
    """The events of a mount and its webhooks, without the mount."""

    def __init__(self, base: Path, table: str, *, kept: int = 100_000) -> None:
        config = base / "config.toml"
        config.write_text(table)
        (base / "tree" / "downloads").mkdir(parents=True, exist_ok=True)
        (base / "tree" / "uploads").mkdir(exist_ok=True)
        hooks = load_config(config, environ={"HOME": str(base)}, overrides={}).webhooks
        log = EventLog(base / "events.db", base / "tree", kept=kept)
        self.feed = EventFeed(log, execution="run-1", agent="bot")
        self.webhooks = Webhooks(
            open_endpoints(hooks, {}), self.feed, Bookmarks(log), execution="run-1", agent="bot"
        )

    def close_file(self, path: str, region: str = "downloads") -> None:
        """A file was written and closed."""
        self.feed.put(region, Completed(os.fsencode(path), Seen(1, 2, 3), "IN_CLOSE_WRITE"))

    @property
    def state(self) -> dict[str, Any]:
        return self.webhooks.as_list()[0]

    async def until(self, is_so: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for a state."""
        with trio.fail_after(30):
            while not is_so(self.state):
                await wait_all_tasks_blocked(0.005)

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.feed.run)
            nursery.start_soon(self.webhooks.run, self.feed.ended)
            yield
            self.feed.stop()
            with trio.fail_after(30):
                await self.webhooks.ended.wait()


@pytest.fixture
def start(tmp_path: Path, authority: trustme.CA) -> Iterator[Callable[..., tuple[Mount, Receiver]]]:
    with ExitStack() as stack:

        def make(*behaviours: receivers.Behaviour, lines: str = "") -> tuple[Mount, Receiver]:
            receiver = stack.enter_context(receiving(authority, *behaviours))
            return Mount(tmp_path, webhook_table(receiver.url, tmp_path, authority, lines)), receiver

        yield make


Start = Callable[..., tuple[Mount, Receiver]]


async def test_events_are_posted_signed_with_the_facts(start: Start) -> None:
    mount, receiver = start()
    async with mount.living():
        mount.close_file("a.csv")
        await mount.until(lambda state: state["delivered"] == 1)
        assert mount.state == {
            "name": f"localhost:{receiver.port}",
            "state": "idle",
            "delivered": 1,
            "failed": 0,
            "missed": 0,
            "backlog": 0,
            "last_error": None,
            "next_try": None,
        }
    (message,) = receiver.got
    assert set(message) == {"id", "sent_at", "agent", "execution", "missed", "events"}
    assert (message["agent"], message["execution"], message["missed"]) == ("bot", "run-1", 0)
    assert (message["events"][0]["seq"], message["events"][0]["path"]) == (1, "a.csv")
    assert receiver.headers[0]["content-type"] == "application/json"
    assert mount.webhooks.has_backlog is False


async def test_the_documentations_own_code_verifies_what_is_sent(start: Start) -> None:
    mount, _ = start()
    bodies: list[tuple[dict[str, str], bytes]] = []
    real_sign = endpoint_module.sign

    def note(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
        signature = real_sign(key, message_id, timestamp, body)
        headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
        bodies.append(({**headers, "webhook-signature": signature}, body))
        return signature

    endpoint_module.sign = note
    try:
        async with mount.living():
            mount.close_file("a")
    finally:
        endpoint_module.sign = real_sign
    ((headers, body),) = bodies
    text = (DOCS / "events.md").read_text()
    (code,) = re.findall(r"```python\n(import base64.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["verified"](SECRET, headers, body)["events"][0]["path"] == "a"
    for broken in (body + b" ", body.replace(b"bot", b"tob")):
        with pytest.raises(ValueError, match="signature"):
            scope["verified"](SECRET, headers, broken)
    with pytest.raises(ValueError, match="old"):
        scope["verified"](SECRET, {**headers, "webhook-timestamp": "1"}, body)


async def test_ten_thousand_events_come_in_order_in_batches_each_once(start: Start) -> None:
    mount, receiver = start()
    async with mount.living():
        for number in range(10_000):
            mount.close_file(f"{number}.txt")
        await mount.until(lambda state: state["delivered"] == 10_000)
    assert receiver.paths() == [f"{number}.txt" for number in range(10_000)]
    assert len(receiver.got) < 200
    assert all(int(headers["content-length"]) < 70_000 for headers in receiver.headers)
    assert len({message["id"] for message in receiver.got}) == len(receiver.got)


async def test_only_the_wanted_regions_and_kinds_are_sent_and_nothing_lags_behind(start: Start) -> None:
    mount, receiver = start(lines='regions = ["uploads"]\nkinds = ["modified"]')
    async with mount.living():
        for _ in range(2):
            mount.close_file("no", "downloads")
            mount.close_file("yes", "uploads")
            mount.close_file("no", "downloads")
        await mount.until(lambda state: state["delivered"] == 1 and state["backlog"] == 0)
    assert [(e["path"], e["kind"]) for m in receiver.got for e in m["events"]] == [("yes", "modified")]


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (answers(500), "500 Internal Server Error"),
        (answers(400, b"x" * 200_000), "400 Bad Request"),
        (answers(429, retry_after="0"), "429 Too Many Requests"),
        (answers(302, location="https://localhost:1/elsewhere"), "redirects are not followed; set url"),
        (sends(b"\x00\xff garbage\r\n\r\n"), "not HTTP"),
        (sends(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000), "not HTTP"),
        (sends(b""), "not HTTP"),
    ],
    ids=["500", "400", "429", "redirect", "garbage", "endless-headers", "hangs-up"],
)
async def test_what_was_not_taken_is_sent_again_under_the_same_id(
    start: Start, behaviour: receivers.Behaviour, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    mount, receiver = start(behaviour, behaviour)
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["delivered"] == 1)
    assert mount.state["failed"] == 2
    assert len({message["id"] for message in receiver.got}) == 1
    assert [message["events"] for message in receiver.got] == 3 * [receiver.got[0]["events"]]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told in line


async def test_an_endpoint_that_hangs_is_left_and_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "ANSWER_S", 0.2)
    over = threading.Event()
    mount, receiver = start(hangs_until(over))
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["delivered"] == 1)
        over.set()
    assert receiver.paths() == ["a", "a"]


async def test_an_answer_without_end_is_as_good_as_its_status(start: Start) -> None:
    over = threading.Event()
    mount, receiver = start(never_ends(over))
    async with mount.living():
        mount.close_file("a")
        mount.close_file("b")
        await mount.until(lambda state: state["delivered"] == 2)
        over.set()
    assert receiver.paths() == ["a", "b"]
    assert mount.state["failed"] == 0


async def test_an_endpoint_that_wants_no_more_is_asked_again_at_the_next_mount_only(
    start: Start, tmp_path: Path, authority: trustme.CA
) -> None:
    mount, receiver = start(answers(410))
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["state"] == "disabled")
        mount.close_file("b")
        await mount.until(lambda state: state["backlog"] == 2)
    assert receiver.paths() == ["a"]
    again = Mount(tmp_path, webhook_table(receiver.url, tmp_path, authority))
    async with again.living():
        await again.until(lambda state: state["delivered"] == 2)
    assert receiver.paths() == ["a", "a", "b"]
    assert receiver.got[0]["id"] == receiver.got[1]["id"]


async def test_what_a_dead_endpoint_missed_comes_when_it_lives_and_the_mount_ends_at_once(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    table = webhook_table(f"https://localhost:{port}/", tmp_path, authority)
    mount = Mount(tmp_path, table)
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["failed"] >= 3)
        mount.close_file("b")
    assert mount.state["backlog"] == 2
    assert "2 events left, for the next mount" in caplog.text
    with receiving(authority, port=port) as receiver:
        again = Mount(tmp_path, table)
        async with again.living():
            pass
    assert receiver.paths() == ["a", "b"]


async def test_events_are_not_lost_in_silence_when_the_log_outgrows_a_dead_endpoint(
    start: Start, tmp_path: Path, authority: trustme.CA
) -> None:
    mount, receiver = start(answers(500))
    async with mount.living():
        mount.close_file("first")
        await mount.until(lambda state: state["failed"] == 1)
    receiver.behaviours = [answers(500)] * 1000
    small = Mount(tmp_path, webhook_table(receiver.url, tmp_path, authority), kept=100)
    async with small.living():
        for number in range(1200):
            small.close_file(str(number))
        await small.until(lambda state: state["backlog"] > 1000)
    receiver.behaviours.clear()
    receiver.got.clear()
    again = Mount(tmp_path, webhook_table(receiver.url, tmp_path, authority))
    async with again.living():
        await again.until(lambda state: state["backlog"] == 0)
    oldest = receiver.got[0]["events"][0]["seq"]
    assert receiver.got[0]["missed"] == oldest - 2 > 500  # the first was delivered after all
    assert receivers.seqs(receiver.got[-1])[-1] == 1201
    assert all(message["missed"] == 0 for message in receiver.got[1:])


async def test_a_stranger_with_another_certificate_gets_nothing(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, receiver = start()
    mount = Mount(tmp_path, webhook_table(receiver.url, tmp_path, trustme.CA()))
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["failed"] > 0)
    assert receiver.got == []
    assert "certificate verify failed" in mount.state["last_error"]


async def test_the_secret_and_the_url_are_in_no_log(
    start: Start, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    logging.getLogger("httpcore").setLevel(logging.NOTSET)
    mount, _ = start(answers(500), answers(302), sends(b"t0ps3cret"), answers(500, b"t0ps3cret"))
    async with mount.living():
        mount.close_file("a")
        await mount.until(lambda state: state["delivered"] == 1)
    ours = [record for record in caplog.records if not record.name.startswith(("trio", "asyncio"))]
    assert len(ours) >= 3
    said = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in ours) + str(mount.state)
    assert "t0ps3cret" not in said
    assert SECRET.removeprefix("whsec_") not in said
    assert "/hook" not in said


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("99999", 3600), ("-1", 0), ("soon", 0), ("", 0), ("9" * 5000, 0), (formatdate(0), 0)],
)
def test_the_other_sides_wish_to_wait_is_bounded(value: str, seconds: float) -> None:
    assert endpoint_module._retry_after_s(value) == seconds


def test_bad_secrets_and_authorities_are_reported_together_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("whsec_c2hvcnQ=")
    (tmp_path / "text").write_text("correct horse battery staple")
    (tmp_path / "good").write_text(SECRET)
    lines = [
        'name = "a"\nsecret_file = "{0}/none"',
        'name = "b"\nsecret_file = "{0}/short"',
        'name = "c"\nsecret_file = "{0}/text"',
        'name = "d"\nsecret_env = "NO_SUCH_SECRET"',
        'name = "e"\nsecret_file = "{0}/good"\nca_file = "{0}/good"',
    ]
    text = "".join(f'[[webhooks]]\nurl = "https://x.example"\n{line.format(tmp_path)}\n' for line in lines)
    (tmp_path / "config.toml").write_text(text)
    hooks = load_config(tmp_path / "config.toml", environ={"HOME": "/root"}, overrides={}).webhooks
    with pytest.raises(ConfigError) as caught:
        open_endpoints(hooks, {})
    found = caught.value.problems
    assert [problem[:11] for problem in found] == [f"webhooks {name}:" for name in "abcde"]
    for problem, fix in zip(
        found, ["correct the path", "openssl rand", "openssl rand", "is not set", "PEM certificates"],
        strict=True,
    ):  # fmt: skip
        assert fix in problem
    assert not {"c2hvcnQ", "horse", SECRET} & set(re.split(r"\W+", "".join(found)))
