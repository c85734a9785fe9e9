"""``.agentfuse/``: what the home itself tells its agent, which cannot change it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounts import READY_S, Home
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

pytestmark = pytest.mark.mount

Make = Callable[..., Home]


def lines(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.path / ".agentfuse/events.ndjson").read_bytes().splitlines()]


def status(home: Home) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((home.path / ".agentfuse/status.json").read_bytes())
    return said


class Changes(FileSystemEventHandler):
    """Hears of whatever inotify tells of a directory."""

    def __init__(self) -> None:
        self.heard = threading.Event()

    def on_any_event(self, event: FileSystemEvent) -> None:
        self.heard.set()


def wait_for(home: Home, until: Callable[[], bool]) -> None:
    """Look whether it is so whenever inotify tells of something in ``.agentfuse/``."""
    changes, observer = Changes(), Observer()
    observer.schedule(changes, str(home.path / ".agentfuse"))
    observer.start()
    try:
        while not until():
            assert changes.heard.wait(READY_S), "inotify told of nothing"
            changes.heard.clear()
    finally:
        observer.stop()
        observer.join()


def test_tail_f_shows_what_arrives(new_home: Make) -> None:
    home = new_home().start()
    with subprocess.Popen(
        ["tail", "-n", "+1", "-F", home.path / ".agentfuse/events.ndjson"], stdout=subprocess.PIPE
    ) as tail:
        assert tail.stdout is not None
        for name in ("a.csv", "b.pdf"):
            (home.path / "uploads" / name).write_text("1,2\n")
            event = json.loads(tail.stdout.readline())
            assert (event["kind"], event["region"], event["path"], event["size"]) == (
                "arrived", "uploads", name, 4,
            )  # fmt: skip
        tail.kill()


def test_a_resumed_home_begins_with_the_events_before(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "uploads" / "a").write_text("1")
    wait_for(home, lambda: len(lines(home)) == 1)
    home.kill()
    home.start()
    (home.path / "uploads" / "b").write_text("1")
    wait_for(home, lambda: len(lines(home)) == 2)
    assert [(event["seq"], event["path"]) for event in lines(home)] == [(1, "a"), (2, "b")]


def test_the_events_begin_anew_when_they_are_a_mebibyte(new_home: Make) -> None:
    home = new_home().start()
    directory = home.path / "uploads" / ("d" * 255) / ("e" * 255)
    directory.mkdir(parents=True)
    for number in range(1500):
        (directory / f"{number:0255}").touch()
    before = home.path / ".agentfuse/events.1.ndjson"
    wait_for(home, before.exists)
    wait_for(home, lambda: bool(found := lines(home)) and found[-1]["seq"] == 1500)
    earlier = [json.loads(line) for line in before.read_bytes().splitlines()]
    numbers = [event["seq"] for event in [*earlier, *lines(home)]]
    assert numbers == list(range(1, 1501))
    assert before.stat().st_size <= 1024 * 1024


def test_the_status_is_true_whenever_it_is_opened(new_home: Make) -> None:
    home = new_home().start()
    assert status(home)["regions"]["workspace"]["bytes_used"] == 0
    (home.path / "workspace" / "a").write_bytes(b"x" * 1000)
    said = status(home)
    assert said["regions"]["workspace"] | {"percent": 0, "warning": None} == said["regions"]["workspace"]
    assert said["regions"]["workspace"]["bytes_used"] == 1000
    assert (said["agent"], said["execution"]) == (home.agent, home.execution)
    assert os.stat(home.path / ".agentfuse/status.json").st_size > 500
    assert ".agentfuse" not in said["regions"]


def test_a_region_that_is_nearly_full_has_a_warning(new_home: Make) -> None:
    home = new_home(regions={"workspace": (1000, 100)}).start()
    (home.path / "workspace" / "a").write_bytes(b"x" * 799)
    assert status(home)["regions"]["workspace"]["warning"] is None
    (home.path / "workspace" / "a").write_bytes(b"x" * 800)
    assert status(home)["regions"]["workspace"]["warning"] == "80% of the quota is used"


def test_a_refusal_is_explained_with_the_largest_files(new_home: Make) -> None:
    home = new_home(regions={"workspace": (1000, 100)}).start()
    (home.path / "workspace" / "deep").mkdir()
    (home.path / "workspace" / "deep" / "large\n").write_bytes(b"x" * 700)
    (home.path / "workspace" / "small").write_bytes(b"x" * 200)
    with pytest.raises(OSError, match="quota") as refused:
        (home.path / "workspace" / "more").write_bytes(b"x" * 101)
    assert refused.value.errno == errno.EDQUOT
    told = home.path / ".agentfuse/last-error.json"
    wait_for(home, told.exists)
    said = json.loads(told.read_bytes())
    assert (said["error"], said["region"], said["bytes_quota"]) == ("EDQUOT", "workspace", 1000)
    assert said["largest"][:2] == [
        {"path": "workspace/deep/large\n", "size": 700},
        {"path": "workspace/small", "size": 200},
    ]
    assert "workspace/ had no room" in said["message"]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda own, _: own.joinpath("new").touch(),
        lambda own, _: own.joinpath("new").mkdir(),
        lambda own, _: own.joinpath("new").symlink_to("x"),
        lambda own, _: os.mkfifo(own / "new"),
        lambda own, _: own.joinpath("status.json").unlink(),
        lambda own, _: own.joinpath("incoming").rmdir(),
        lambda own, _: own.joinpath("events.ndjson").open("ab"),
        lambda own, _: os.open(own / "events.ndjson", os.O_RDONLY | os.O_TRUNC),
        lambda own, _: os.truncate(own / "events.ndjson", 0),
        lambda own, _: own.joinpath("status.json").chmod(0o666),
        lambda own, _: os.utime(own / "status.json"),
        lambda own, _: own.chmod(0o777),
        lambda own, home: own.joinpath("status.json").rename(home / "workspace" / "x"),
        lambda own, home: home.joinpath("workspace", "mine").rename(own / "status.json"),
        lambda own, home: os.link(home / "workspace" / "mine", own / "x"),
    ],
)
def test_an_agent_that_is_root_cannot_change_it(home: Home, attempt: Callable[[Path, Path], object]) -> None:
    (home.path / "workspace" / "mine").write_text("forged")
    own = home.path / ".agentfuse"
    before = sorted(os.listdir(own))
    with pytest.raises(OSError, match="not permitted"):
        attempt(own, home.path)
    assert sorted(os.listdir(own)) == before


def test_the_directory_itself_stays(home: Home) -> None:
    own = home.path / ".agentfuse"
    for attempt in (lambda: own.rename(home.path / "x"), own.rmdir):
        with pytest.raises(OSError, match="not permitted"):
            attempt()


def test_a_forged_directory_in_a_region_is_an_ordinary_one(new_home: Make) -> None:
    home = new_home().start()
    forged = home.path / "uploads" / ".agentfuse"
    forged.mkdir()
    (forged / "status.json").write_text("{}")
    assert (forged / "status.json").read_text() == "{}"
    assert status(home)["execution"] == home.execution
    (home.path / "uploads" / "real").touch()
    wait_for(home, lambda: bool(lines(home)))
    assert [event["path"] for event in lines(home)] == ["real"]


def test_what_the_platform_tells_counts_for_no_quota(home: Home) -> None:
    before = home.status()["regions"]["home"]
    (home.path / "uploads" / "count").write_text("1")
    wait_for(home, lambda: bool(lines(home)) and lines(home)[-1]["path"] == "count")
    assert home.status()["regions"]["home"] == before


def test_idle_doors_are_not_in_the_way_of_an_ordinary_umount(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "uploads" / "a").write_text("1")
    wait_for(home, lambda: bool(lines(home)))
    home.settled()
    subprocess.run(["umount", home.path], check=True)
    assert home.ended() == 0


def test_an_agent_that_opens_all_files_it_can_leaves_descriptors_to_the_daemon(new_home: Make) -> None:
    home = new_home(prefix=("prlimit", "--nofile=400")).start()
    opened: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files") as refused:
            for number in range(400):
                opened.append(os.open(home.path / "workspace" / str(number), os.O_RDWR | os.O_CREAT))
        assert refused.value.errno == errno.ENFILE
        os.close(opened.pop())
        (home.path / "uploads" / "a").write_text("1")
        wait_for(home, lambda: bool(lines(home)))
        assert [event["path"] for event in lines(home)] == ["a"]
    finally:
        for fd in opened:
            os.close(fd)
