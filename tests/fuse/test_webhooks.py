"""Webhooks of real mounts: over restarts and kills, and with nobody there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
import trustme
from mounts import Home
from receivers import SECRET, receiving, webhook_table

from agentfuse import killpoints

pytestmark = pytest.mark.mount

Make = Callable[..., Home]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    yield port


def with_webhook(home: Home, url: str, authority: trustme.CA) -> Home:
    home.config.write_text(home.config.read_text() + webhook_table(url, home.base, authority))
    return home


def drop(home: Home, *names: str) -> None:
    for name in names:
        (home.path / "downloads" / name).write_text(name)


def test_an_arrival_is_posted_with_its_facts_and_status_tells_so(
    new_home: Make, authority: trustme.CA
) -> None:
    with receiving(authority) as receiver:
        home = with_webhook(new_home(), receiver.url, authority).start()
        drop(home, "a.csv")
        receiver.wait_for(bool)
        event = receiver.got[0]["events"][0]
        assert (event["path"], event["kind"], event["execution"]) == ("a.csv", "arrived", home.execution)
        home.umount()
        assert home.log().count("t0ps3cret") == 0
        assert SECRET not in home.log() + "".join(home.output)


def test_what_a_killed_daemon_had_sent_is_sent_again_as_the_same_message(
    new_home: Make, authority: trustme.CA
) -> None:
    with receiving(authority) as receiver:
        home = with_webhook(new_home(), receiver.url, authority)
        with armed("webhook.taken"):
            home.start()
        with contextlib.suppress(OSError):  # it dies while we write
            drop(home, "a", "b", "c")
        assert home.ended() == -9
        before = list(receiver.got)
        home.start()
        drop(home, "z")
        receiver.wait_for(lambda _: "z" in receiver.paths())
        again = receiver.got[len(before)]
        assert (again["id"], again["events"]) == (before[-1]["id"], before[-1]["events"])
        heard = {event["seq"]: event["path"] for message in receiver.got for event in message["events"]}
        assert sorted(heard) == list(range(1, len(heard) + 1))
        home.umount()


@contextlib.contextmanager
def armed(step: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(killpoints.VARIABLE, step)
        yield


def test_a_backlog_survives_kill_9_and_comes_in_order(
    new_home: Make, authority: trustme.CA, dead_port: int
) -> None:
    home = with_webhook(new_home(), f"https://localhost:{dead_port}/", authority).start()
    drop(home, *map(str, range(300)))
    while home.status()["webhooks"][0]["backlog"] < 300 or home.status()["webhooks"][0]["failed"] == 0:
        assert home.is_mounted()
    home.kill()
    with receiving(authority, port=dead_port) as receiver:
        home.start()
        receiver.wait_for(lambda _: len(receiver.paths()) == 300)
        assert receiver.paths() == list(map(str, range(300)))
        home.umount()


def test_what_nobody_took_is_kept_though_the_run_is_over_and_recover_delivers_it(
    new_home: Make, authority: trustme.CA, dead_port: int
) -> None:
    home = with_webhook(
        new_home(top='keep_ended = "0s"'), f"https://localhost:{dead_port}/", authority
    ).start()
    drop(home, "a", "b")
    home.settled()
    said = home.agentfuse("status", str(home.path)).stdout
    assert f"WEBHOOKS    localhost:{dead_port}" in said
    assert "last error  cannot connect" in said
    home.umount()
    assert "2 events left, for the next mount of this execution or agentfuse recover" in "".join(home.output)
    recover = ("recover", "--state", str(home.state), "--config", str(home.config))
    failed = home.agentfuse(*recover)
    assert failed.returncode == 75
    assert "webhooks have not taken the events of 1 home yet" in failed.stderr
    with receiving(authority, port=dead_port) as receiver:
        done = home.agentfuse(*recover)
        assert (done.returncode, receiver.paths()) == (0, ["a", "b"])
        assert f"sent 2 events of execution {home.execution}" in done.stderr


def test_a_command_does_not_see_the_secret_in_its_environment(new_home: Make, authority: trustme.CA) -> None:
    home = new_home()
    with receiving(authority) as receiver:
        table = webhook_table(receiver.url, home.base, authority)
        table = table.replace(f'secret_file = "{home.base}/webhook.secret"', 'secret_env = "HOOK_SECRET"')
        home.config.write_text(home.config.read_text() + table)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOOK_SECRET", SECRET)
            done = home.agentfuse(
                "run", "--agent", "a", "--state", str(home.state), "--store", home.store.as_uri(),
                "--config", str(home.config), "--", "sh", "-c", "echo x > downloads/x; env",
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert receiver.paths() == ["x"]
        assert "HOOK_SECRET" not in done.stdout
