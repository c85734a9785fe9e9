"""The control server and its client, over real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from agentfuse.control import client as client_module
from agentfuse.control import server as control_server
from agentfuse.control import transport
from agentfuse.control.client import ControlClient
from agentfuse.control.eventstream import EventLine
from agentfuse.control.feeds import Feed
from agentfuse.control.mount_routes import DEFAULT_SYNC_S
from agentfuse.errors import AgentfuseError, BusyError, NotFoundError, UnflushedError
from agentfuse.flush import Watchers


class FakeFiles:
    """Takes what is put, as it comes."""

    def __init__(self) -> None:
        self.received = b""
        self.problem: BaseException | None = None
        self.begun = trio.Event()

    async def put(
        self, region: str, path: bytes, content: AsyncIterator[bytes], **details: object
    ) -> tuple[bytes, int]:
        self.begun.set()
        try:
            async for piece in content:
                self.received += piece
        except BaseException as problem:
            self.problem = problem
            raise
        return path, len(self.received)


class FakeMount:
    """A mount whose unmount the test steps through."""

    def __init__(self, lines: list[dict[str, object]] | None = None) -> None:
        self.lines = lines if lines is not None else [{"say": "flushing"}, {"done": {"snapshot": 3}}]
        self.gate = trio.Event()
        self.gate.set()
        self.finished = trio.Event()
        self.lazy: bool | None = None
        self.timeout_s: float | None = None
        self.error: Exception | None = None
        self.files = FakeFiles()

    def status(self) -> dict[str, object]:
        if self.error:
            raise self.error
        return {"pid": 1, "mountpoint": "/home/\udcff"}

    async def events(
        self, *, since: int | None, region: str | None, follow: bool
    ) -> AsyncGenerator[list[EventLine], None]:
        while True:
            yield []
            await trio.sleep_forever()

    async def sync(self, *, timeout_s: float) -> AsyncGenerator[dict[str, object], None]:
        self.timeout_s = timeout_s
        yield {"done": {}}

    async def unmount(
        self, *, lazy: bool, timeout_s: float | None
    ) -> AsyncGenerator[dict[str, object], None]:
        self.lazy, self.timeout_s = lazy, timeout_s
        for line in self.lines:
            yield line
        await self.gate.wait()
        if self.error:
            raise self.error
        self.finished.set()


@asynccontextmanager
async def serving(path: Path, mount: FakeMount) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        await nursery.start(control_server.serve, path, mount)
        yield nursery
        nursery.cancel_scope.cancel()


async def ask(path: Path, data: bytes) -> bytes:
    """Everything that the server answers to these bytes."""
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(data)
        return await read_all(stream)


async def read_all(stream: trio.SocketStream) -> bytes:
    answer = b""
    try:
        while chunk := await stream.receive_some(65536):
            answer += chunk
    except trio.BrokenResourceError:  # it closed while we were still sending
        pass
    return answer


def request(method: str, target: str, body: bytes = b"") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def body_of(answer: bytes) -> dict[str, object]:
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))


async def test_status_is_one_object_and_keeps_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path, FakeMount()):
        answer = await trio.to_thread.run_sync(ControlClient(path).status)
    assert answer == {"pid": 1, "mountpoint": "/home/\udcff"}


async def test_the_socket_is_for_its_owner_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path, FakeMount()):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    async with serving(path, FakeMount()):
        assert (await trio.to_thread.run_sync(ControlClient(path).status))["pid"] == 1


async def test_a_socket_path_longer_than_the_kernel_takes_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    path = directory / "s"
    async with serving(path, FakeMount()):
        assert (await trio.to_thread.run_sync(ControlClient(path).status))["pid"] == 1


async def test_unmount_streams_its_account_to_the_end(tmp_path: Path) -> None:
    mount = FakeMount()
    async with serving(tmp_path / "s", mount):
        lines = await trio.to_thread.run_sync(lambda: list(ControlClient(tmp_path / "s").unmount(lazy=True)))
    assert lines == [{"say": "flushing"}, {"done": {"snapshot": 3}}]
    assert mount.lazy is True


async def test_the_time_that_a_client_gives_reaches_the_mount(tmp_path: Path) -> None:
    mount = FakeMount()
    mount.gate.set()
    async with serving(tmp_path / "s", mount) as nursery:
        client = ControlClient(tmp_path / "s")
        await trio.to_thread.run_sync(lambda: list(client.sync(timeout_s=7)))
        assert mount.timeout_s == 7
        await trio.to_thread.run_sync(lambda: list(client.sync()))
        assert mount.timeout_s == DEFAULT_SYNC_S
        await trio.to_thread.run_sync(lambda: list(client.unmount(timeout_s=3)))
        assert (mount.lazy, mount.timeout_s) == (False, 3)
        nursery.cancel_scope.cancel()


async def test_unmount_reports_the_daemons_own_error_and_exit_code(tmp_path: Path) -> None:
    mount = FakeMount(lines=[{"say": "flushing"}])
    mount.error = UnflushedError("the store is away", hint="try again")
    async with serving(tmp_path / "s", mount):
        with pytest.raises(AgentfuseError) as caught:
            await trio.to_thread.run_sync(lambda: list(ControlClient(tmp_path / "s").unmount()))
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (
        "the store is away",
        "try again",
        75,
    )


async def test_a_client_that_leaves_does_not_stop_the_unmount(tmp_path: Path) -> None:
    mount = FakeMount(lines=[{"say": "flushing"}])
    mount.gate = trio.Event()
    async with serving(tmp_path / "s", mount):
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        await stream.send_all(request("POST", "/v1/unmount"))
        assert b"HTTP/1.1 200" in await stream.receive_some(65536)
        await stream.aclose()
        mount.gate.set()
        with trio.fail_after(10):
            await mount.finished.wait()


async def test_the_last_line_arrives_though_the_server_is_cancelled_at_once(tmp_path: Path) -> None:
    mount = FakeMount()
    answer = b""
    with trio.fail_after(10):
        async with trio.open_nursery() as outer:

            async def client() -> None:
                nonlocal answer
                answer = await ask(tmp_path / "s", request("POST", "/v1/unmount"))

            async with serving(tmp_path / "s", mount):
                outer.start_soon(client)
                await mount.finished.wait()
    assert b'{"done":{"snapshot":3}}' in answer


async def test_a_cancelled_server_does_not_wait_for_idle_clients(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path / "s", FakeMount()):
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
    assert trio.current_time() == before
    await stream.aclose()


async def test_of_a_flood_of_progress_an_unread_client_costs_one_line() -> None:
    feed = Feed()
    for number in range(100_000):
        feed.put({"progress": {"done_files": number}})
    feed.put({"done": {}})
    feed.close()
    text = b"".join([chunk async for chunk in feed.chunks()])
    assert text == b'{"progress":{"done_files":99999}}\n{"done":{}}\n'


async def test_a_silent_unmount_sends_heartbeats(autojump_clock: trio.testing.MockClock) -> None:
    chunks = Feed().chunks()
    assert [await anext(chunks), await anext(chunks)] == [b"\n", b"\n"]
    await chunks.aclose()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("GET", "/nothing"), 404),
        (request("GET", "/v1/unmount"), 405),
        (request("DELETE", "/v1/status"), 405),
        (request("POST", "/v1/unmount", b"{"), 400),
        (request("POST", "/v1/unmount", b'["lazy"]'), 400),
        (request("POST", "/v1/unmount", b'{"lazy": 1}'), 400),
        (request("POST", "/v1/unmount", b'{"force": true}'), 400),
        (request("POST", "/v1/unmount", b'{"timeout_s": -1}'), 400),
        (request("POST", "/v1/unmount", b'{"timeout_s": Infinity}'), 400),
        (request("POST", "/v1/unmount", b'{"timeout_s": NaN}'), 400),
        (request("POST", "/v1/unmount", b'{"timeout_s": 1e999}'), 400),
        (request("GET", "/v1/trace?for_s=inf"), 400),
        (request("PUT", "/v1/content/uploads/" + "d/" * 2048 + "x", b"x"), 400),
        (request("POST", "/v1/move", json.dumps({"from": "a/b", "to": "a/" + "d/" * 2048}).encode()), 400),
        (request("GET", "/v1/sync"), 405),
        (request("POST", "/v1/sync", b'{"timeout_s": "60"}'), 400),
        (request("POST", "/v1/unmount", b"[" * 60_000), 400),
        (request("POST", "/v1/unmount", b" " * 65_537), 413),
        (request("PUT", "/v1/content/uploads/%2e%2e/x", b"x"), 400),
        (request("PUT", "/v1/content/uploads/a?as=root", b"x"), 400),
        (request("PUT", "/v1/content/uploads/a?mode=rwx", b"x"), 400),
        (request("PUT", "/v1/content/uploads", b"x"), 404),
        (request("POST", "/v1/content/uploads/a", b"x"), 405),
        (request("PATCH", "/v1/regions/uploads", b'{"bytes_quota": "1"}'), 400),
        (request("PUT", "/v1/log-level", b"{}"), 400),
        (b"GET /v1/status HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000, 431),
    ],
)
async def test_bad_requests_are_answered_in_json_and_harm_nothing(
    tmp_path: Path, data: bytes, status: int
) -> None:
    mount = FakeMount()
    async with serving(tmp_path / "s", mount):
        answer = await ask(tmp_path / "s", data)
        assert status_of(answer) == status
        assert set(body_of(answer)) == {"code", "message", "hint"}
        assert mount.lazy is None
        assert status_of(await ask(tmp_path / "s", request("GET", "/v1/status?x=1"))) == 200


async def test_a_slow_loris_is_shown_the_door(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(tmp_path / "s", FakeMount()):
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        await stream.send_all(b"GET /v1/sta")
        assert status_of(await read_all(stream)) == 408
        assert trio.current_time() >= control_server.REQUEST_DEADLINE_S


async def test_a_content_may_come_slowly_but_not_stall(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    mount = FakeMount()
    head = b"PUT /v1/content/uploads/a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    async with serving(tmp_path / "s", mount):
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        await stream.send_all(head)
        for _ in range(5):
            await trio.sleep(transport.STALL_DEADLINE_S - 1)
            await stream.send_all(b"x")
        assert status_of(await read_all(stream)) == 408
    assert mount.files.received == b"xxxxx"
    assert mount.files.problem is not None


async def test_a_put_under_way_ends_with_the_server_and_is_told(tmp_path: Path) -> None:
    mount = FakeMount()
    head = b"PUT /v1/content/uploads/a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with trio.fail_after(10):
        async with serving(tmp_path / "s", mount):
            stream = await trio.open_unix_socket(str(tmp_path / "s"))
            await stream.send_all(head)
            await mount.files.begun.wait()
        assert status_of(await read_all(stream)) == 503
    assert isinstance(mount.files.problem, trio.Cancelled)


async def test_a_content_is_not_bounded_as_other_bodies_are(tmp_path: Path) -> None:
    mount = FakeMount()
    async with serving(tmp_path / "s", mount):
        answer = await ask(tmp_path / "s", request("PUT", "/v1/content/uploads/a%20b", b"x" * 1_000_000))
    assert status_of(answer) == 201
    assert body_of(answer) == {"region": "uploads", "path": "a b", "size": 1_000_000}


async def test_too_many_unfinished_requests_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", FakeMount()):
        idle = []
        for _ in range(control_server.MAX_CONNECTIONS):
            idle.append(await trio.open_unix_socket(str(tmp_path / "s")))
            await trio.testing.wait_all_tasks_blocked()
        assert status_of(await ask(tmp_path / "s", request("GET", "/v1/status"))) == 503
        for stream in idle:
            await stream.aclose()


async def test_followers_beyond_the_limit_are_refused_and_whoever_wants_an_answer_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "MAX_FOLLOWERS", 2)
    path = tmp_path / "s"
    async with serving(path, FakeMount()):
        following = []
        for _ in range(2):
            following.append(await trio.open_unix_socket(str(path)))
            await following[-1].send_all(request("GET", "/v1/events?follow=1"))
            assert status_of(await following[-1].receive_some(65536)) == 200
        refused = await ask(path, request("GET", "/v1/events?follow=1"))
        assert (status_of(refused), body_of(refused)["code"]) == (503, "busy")
        assert status_of(await ask(path, request("GET", "/v1/status"))) == 200
        for stream in following:
            await stream.aclose()


async def test_connections_count_while_they_are_answered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "MAX_CONNECTIONS", 1)
    path = tmp_path / "s"
    async with serving(path, FakeMount()):
        following = await trio.open_unix_socket(str(path))
        await following.send_all(request("GET", "/v1/events?follow=1"))
        assert status_of(await following.receive_some(65536)) == 200
        assert status_of(await ask(path, request("GET", "/v1/status"))) == 503
        await following.aclose()


async def test_who_waits_for_the_end_and_reads_late_hears_of_it() -> None:
    watchers = Watchers()
    async with watchers.watching() as lines:
        for number in range(1000):
            watchers.tell({"progress": {"done_files": number}})
        watchers.tell({"done": {}})
        watchers.close()
        heard = [line async for line in lines]
    assert heard[-1] == {"done": {}}
    assert len(heard) < 1000


async def test_a_status_that_fails_is_one_logged_500(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = FakeMount()
    mount.error = RuntimeError("bug")
    async with serving(tmp_path / "s", mount):
        answer = await ask(tmp_path / "s", request("GET", "/v1/status"))
    assert status_of(answer) == 500
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
async def test_another_uid_is_refused_even_where_it_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = (
        "import os, socket, sys\n"
        "directory = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setuid(65534)\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.connect(f'/proc/self/fd/{directory}')\n"
        "print(client.recv(65536).decode())\n"
    )
    async with serving(path, FakeMount()):
        path.chmod(0o666)
        done = await trio.run_process([sys.executable, "-c", program, str(path)], capture_stdout=True)
    assert done.stdout.startswith(b"HTTP/1.1 403 ")


# --- the client against daemons that misbehave


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


def answer_once(listener: socket.socket, answer: bytes) -> threading.Thread:
    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_no_socket_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no daemon answers"):
        ControlClient(tmp_path / "s").status()


def test_a_socket_without_a_daemon_is_not_found(tmp_path: Path, listener: socket.socket) -> None:
    listener.close()
    with pytest.raises(NotFoundError, match="no daemon answers"):
        list(ControlClient(tmp_path / "s").unmount())


def test_a_hung_daemon_is_busy(tmp_path: Path, listener: socket.socket) -> None:
    with pytest.raises(BusyError, match="does not answer"):
        ControlClient(tmp_path / "s", deadline_s=0.05).status()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot json\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"say":"x"}\n',
    ],
)
def test_a_daemon_that_dies_while_unmounting_is_never_taken_for_success(
    tmp_path: Path, listener: socket.socket, answer: bytes
) -> None:
    thread = answer_once(listener, answer)
    with pytest.raises(UnflushedError):
        list(ControlClient(tmp_path / "s").unmount())
    thread.join()


def test_an_unmount_far_beyond_its_timeout_is_busy(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "OVERTIME_S", 0)
    body = b'{"say":"x"}\n{"say":"y"}\n'
    thread = answer_once(listener, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    with pytest.raises(BusyError, match="did not end within 0 s"):
        list(ControlClient(tmp_path / "s").unmount(timeout_s=0))
    thread.join()


def test_the_server_costs_a_mount_no_http_client() -> None:
    program = (
        "import sys, agentfuse.control.server\n"
        "print([name for name in ('httpx', 'rich', 'typer') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
