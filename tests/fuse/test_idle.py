"""A home in which nothing happens costs no processor: nothing of it asks, again and again, for news."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3_servers
import trustme
from mounts import Home
from receivers import receiving, webhook_table

pytestmark = pytest.mark.mount

Make = Callable[..., Home]

QUIET_S = 6.0
"""Longer than any interval at which a part of a mount might ask, but for the look at an inbox each minute."""

PATIENCE_S = 60.0
"""Others may ask on this machine (df asks every mount), and what was used comes to rest by and by."""

VARIANTS = ("unused", "used", "with a webhook", "with an inbox", "retained", "on S3")


def processes_of(home: Home) -> list[int]:
    """The daemon of a home, and the doors it has now."""
    pid = home.process.pid if home.process else 0
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            children += map(int, (task / "children").read_text().split())
    return [pid, *children]


def wakings(home: Home) -> dict[tuple[int, int], int]:
    """How often each thread of a home's processes has slept so far, that is, was woken."""
    slept: dict[tuple[int, int], int] = {}
    for pid in processes_of(home):
        for task in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # threads end when they were not needed for a while
                found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", task.read_text(), re.MULTILINE)
                assert found is not None
                slept[pid, int(task.parent.name)] = int(found[1])
    return slept


def never_rests(homes: dict[str, Home]) -> dict[str, object]:
    """Watch until no thread of any of them was woken for QUIET_S; those that do not come to that, and how
    often their threads woke in the last stretch."""
    begun = time.monotonic()
    since = {name: (begun, wakings(home)) for name, home in homes.items()}
    woken: dict[str, object] = {}
    while since and time.monotonic() < begun + PATIENCE_S:
        time.sleep(0.1)  # what is to be seen is that nothing happens
        for name, (when, before) in list(since.items()):
            after = wakings(homes[name])
            more = {thread: count - before.get(thread, 0) for thread, count in after.items()}
            if any(more.values()):
                woken[name] = more
                since[name] = (time.monotonic(), after)
            elif time.monotonic() - when >= QUIET_S:
                del since[name]
    return {name: woken.get(name) for name in since}


@pytest.fixture
def store_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3_servers.ENVIRON.items():
        monkeypatch.setenv(name, value)
    with s3_servers.ministack(tmp_path) as server:
        yield server.url(server.make_bucket("idle"))


def use(home: Home) -> None:
    """A burst in every region, and until all of it is in the store."""
    for region in ("shared", "downloads", "uploads", "workspace"):
        for number in range(10):
            (home.path / region / f"file{number}").write_text(f"{region} {number}")
    done = home.agentfuse("sync", str(home.path))
    assert done.returncode == 0, done.stderr


def test_a_home_at_rest_wakes_nobody(new_home: Make, store_on_s3: str) -> None:
    authority = trustme.CA()
    with receiving(authority) as receiver:
        homes = {name: new_home() for name in VARIANTS}
        hooked, dropped = homes["with a webhook"], homes["with an inbox"]
        with hooked.config.open("a") as config:
            config.write(webhook_table(receiver.url, hooked.base, authority))
        inbox = dropped.base / "inbox"
        inbox.mkdir()
        with dropped.config.open("a") as config:
            config.write(f'[[inbox]]\ndirectory = "{inbox}"\nregion = "downloads"\n')
        homes["on S3"].store_url = store_on_s3
        for name, home in homes.items():
            home.start(flags=("--retain",) if name == "retained" else ())
            if name != "unused":
                use(home)
        (inbox / "letter").write_text("taken")
        receiver.wait_for(lambda _: len(receiver.paths()) >= 20)
        assert never_rests(homes) == {}
        assert (dropped.path / "downloads/letter").read_text() == "taken"
        assert [len(processes_of(home)) for home in homes.values()] == [1] * len(homes)  # and no door is left
        for home in homes.values():
            assert home.process is not None
            home.process.terminate()
        assert [home.ended() for home in homes.values()] == [0] * len(homes)
