"""Daemons that answer, that hang, and that answer again."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from agentfuse.control.registry import NoDaemonError, Registry
from agentfuse.errors import UnflushedError
from agentfuse.gateway.executions import pulse as pulses
from agentfuse.gateway.executions.pulse import Pulse

HOME = Path("/home")


class Daemon:
    """A control socket that takes connections; it answers while ``hangs`` is False."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hangs = False
        self.asked = 0
        self._listener = trio.socket.socket(socket.AF_UNIX)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._listener.bind(str(self.path))
        self._listener.listen(64)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await self._listener.accept()
                nursery.start_soon(self._answer, connection)

    async def _answer(self, connection: trio.socket.SocketType) -> None:
        self.asked += 1
        with connection:
            await connection.recv(4096)
            if self.hangs:
                await trio.sleep_forever()
            await connection.send(b"HTTP/1.1 503 x\r\nContent-Length: 40\r\nConnection: close\r\n\r\n")
            await connection.send(b'{"code":"busy","message":"m","hint":""}   ')


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with trio.open_nursery() as nursery:
        daemon = Daemon(tmp_path / "s")
        await nursery.start(daemon.serve)
        yield daemon
        nursery.cancel_scope.cancel()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    found = SimpleNamespace(socket=tmp_path / "s")
    yield cast(Registry, SimpleNamespace(find_live=lambda _: found))


async def test_who_answers_is_asked_once_for_all_who_want_to_know(
    daemon: Daemon, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulses, "TRUSTED_S", 3600.0)
    pulse = Pulse(registry, deadline_s=30)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(pulse.require, HOME)
    assert daemon.asked == 1


async def test_who_hangs_is_found_out_once_refused_at_once_and_taken_back_when_he_answers(
    daemon: Daemon, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulses, "_AGAIN_S", 3600.0)
    pulse, refused = Pulse(registry, deadline_s=0.2), []
    daemon.hangs = True

    async def ask() -> None:
        with pytest.raises(UnflushedError):
            await pulse.require(HOME)
        refused.append(None)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask)
    assert (len(refused), daemon.asked) == (8, 1)
    await ask()
    assert daemon.asked == 1
    daemon.hangs = False
    await ask()
    monkeypatch.setattr(pulses, "_AGAIN_S", 0.0)
    await pulse.require(HOME)
    assert daemon.asked == 2


async def test_what_is_known_of_homes_that_nobody_asks_for_is_forgotten(
    daemon: Daemon, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulse, others = Pulse(registry, deadline_s=30), [Path(f"/home/{number}") for number in range(3)]
    for each in others:
        await pulse.require(each)
    assert [*pulse._homes] == others
    monkeypatch.setattr(pulses, "_KEPT_S", 0.0)
    await pulse.require(HOME)
    assert [*pulse._homes] == [HOME]


async def test_a_home_without_a_daemon_is_for_others_to_judge() -> None:
    def find_live(_: Path) -> Any:
        raise NoDaemonError("none")

    await Pulse(cast(Registry, SimpleNamespace(find_live=find_live))).require(HOME)
