"""What systemd is told, by a socket that listens in its place."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentfuse.progress import Progress, Silent
from agentfuse.supervision import SupervisedReporter, supervisor_of


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


def heard(manager: socket.socket) -> dict[str, str]:
    lines = manager.recv(4096).decode().split("\n")
    return dict(line.split("=", 1) for line in lines)


def environ_of(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def test_a_manager_hears_of_readiness_in_one_line_whatever_the_text_holds(manager: socket.socket) -> None:
    supervisor_of(environ_of(manager)).ready("mounted at /home/a\nWATCHDOG=1")
    assert heard(manager) == {"READY": "1", "STATUS": "mounted at /home/a WATCHDOG=1"}


def test_what_goes_on_is_told_and_gets_the_time_that_it_needs(manager: socket.socket) -> None:
    reporter = SupervisedReporter(Silent(), supervisor_of(environ_of(manager)))
    reporter.say("unmounting")
    assert heard(manager) == {"STATUS": "unmounting", "EXTEND_TIMEOUT_USEC": "30000000"}
    reporter.progress(Progress("flush", 3, 10, 0, 0))
    assert heard(manager)["STATUS"] == "flush: 3 of 10 files"
    reporter.progress(Progress("flush", 4, 10, 0, 0))  # not again within a second
    reporter.say("done")
    assert heard(manager)["STATUS"] == "done"


@pytest.mark.parametrize(
    ("more", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "15000000"}, 15.0),
        ({"WATCHDOG_USEC": "15000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "15000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_answered_by_the_process_that_is_asked(
    manager: socket.socket, more: dict[str, str], watchdog_s: float | None
) -> None:
    assert supervisor_of(environ_of(manager, **more)).watchdog_s == watchdog_s


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(tmp_path: Path) -> None:
    assert supervisor_of({"WATCHDOG_USEC": "15000000"}).watchdog_s is None
    for environ in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "@gone-agentfuse"}):
        supervisor_of(environ).ready("mounted")


def test_a_manager_in_the_abstract_namespace_hears() -> None:
    name = f"agentfuse-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(10)
        supervisor_of({"NOTIFY_SOCKET": "@" + name}).alive()
        assert heard(manager) == {"WATCHDOG": "1"}


def test_readiness_is_heard_by_a_manager_that_is_behind(manager: socket.socket) -> None:
    supervisor = supervisor_of(environ_of(manager))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
        others.setblocking(False)
        others.connect(manager.getsockname())
        with pytest.raises(BlockingIOError):
            while True:
                others.send(b"STATUS=of another service")
    supervisor.alive()  # which is not worth waiting for
    telling = threading.Thread(target=supervisor.ready, args=("mounted",))
    telling.start()
    telling.join(0.2)  # whoever would not wait is back by then
    said = {}
    while "READY" not in said:
        said = heard(manager)
    telling.join()
