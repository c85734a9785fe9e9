"""Inboxes of real mounts: what lands in a directory outside comes into its region, whole, once, or stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Home

from agentfuse import killpoints
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry

pytestmark = pytest.mark.mount

Make = Callable[..., Home]
Event = dict[str, Any]

SMALL = 1_000_000


def with_inbox(home: Home, region: str = "downloads", *lines: str) -> Path:
    """Give a home that is not mounted yet an inbox."""
    inbox = home.base / f"inbox-{region}"
    inbox.mkdir()
    table = [f'[[inbox]]\ndirectory = "{inbox}"\nregion = "{region}"', *lines]
    home.config.write_text(home.config.read_text() + "\n".join(table) + "\n")
    return inbox


@pytest.fixture(scope="module")
def bound(make_home: Make) -> Iterator[Home]:
    """A mount with an inbox for downloads/, and one for a small region."""
    home = make_home(regions={"uploads": (SMALL, 50)})
    with_inbox(home)
    with_inbox(home, "uploads", 'creator = "system"')
    home.start()
    yield home
    home.umount()


@pytest.fixture
def inbox(bound: Home) -> Path:
    return bound.base / "inbox-downloads"


def events(home: Home, since: int) -> Iterator[Event]:
    client = ControlClient(Registry(home.runtime).find(home.path).socket)
    return (event for event in client.events(since=since, region=None, follow=True) if event)


def newest(home: Home) -> int:
    return int(home.status()["events"]["newest"])


def until(home: Home, since: int, path: str, kind: str = "arrived") -> list[Event]:
    """The events up to the one that is waited for."""
    found = []
    for event in events(home, since):
        found.append(event)
        if (event["path"], event["kind"]) == (path, kind):
            break
    return found


def gone(directory: Path, name: str, home: Home) -> None:
    """Wait until a file has left the inbox; the event comes a moment before that."""
    while (directory / name).exists():
        assert home.status()["state"] == "live"


def test_a_dropped_file_is_moved_into_the_region_as_the_environments(bound: Home, inbox: Path) -> None:
    since = newest(bound)
    (inbox / "a.csv").write_text("a,b\n1,2\n")
    (event,) = until(bound, since, "a.csv")
    assert (event["region"], event["size"], event["mime"]) == ("downloads", 8, "text/csv")
    assert event["created_by"] == "environment"
    assert (bound.path / "downloads/a.csv").read_text() == "a,b\n1,2\n"
    gone(inbox, "a.csv", bound)


def test_a_file_that_is_still_growing_waits_for_its_last_writer(bound: Home, inbox: Path) -> None:
    since = newest(bound)
    with open(inbox / "growing.bin", "wb", buffering=0) as file:
        file.write(bytes(1000))
        (inbox / "other").write_text("x")
        assert [event["path"] for event in until(bound, since, "other")] == ["other"]
        file.write(bytes(1000))
    assert until(bound, since + 1, "growing.bin")[-1]["size"] == 2000


def test_a_browsers_download_comes_when_it_has_its_final_name(bound: Home, inbox: Path) -> None:
    since = newest(bound)
    (inbox / "Unconfirmed 7.crdownload").write_bytes(b"%PDF-1.7" + bytes(100))
    (inbox / "firefox.pdf").touch()  # reserves the name
    (inbox / "firefox.Xy12.pdf.part").write_bytes(b"%PDF-1.7" + bytes(50))
    (inbox / "mark").write_text("x")
    assert [event["path"] for event in until(bound, since, "mark")] == ["mark"]
    os.rename(inbox / "Unconfirmed 7.crdownload", inbox / "b.pdf")
    os.rename(inbox / "firefox.Xy12.pdf.part", inbox / "firefox.pdf")
    found = {event["path"]: event["size"] for event in until(bound, since + 1, "firefox.pdf")}
    while "b.pdf" not in found:
        found |= {event["path"]: event["size"] for event in until(bound, since + 1, "b.pdf")}
    assert found == {"b.pdf": 108, "firefox.pdf": 58}


def test_names_that_are_taken_get_numbers_and_any_bytes_are_a_name(bound: Home, inbox: Path) -> None:
    (bound.path / "downloads/same.tar.gz").write_text("agent's")
    since = newest(bound)
    for text in ("first", "second"):
        (inbox / "same.tar.gz").write_text(text)
        gone(inbox, "same.tar.gz", bound)
    odd = os.fsdecode(b"new\nline\xff.txt")
    (inbox / odd).write_text("odd")
    until(bound, since, odd)
    found = {path.name: path.read_text() for path in (bound.path / "downloads").glob("same*")}
    assert found == {
        "same.tar.gz": "agent's",
        "same.tar (1).gz": "first",
        "same.tar (2).gz": "second",
    }


def test_directories_moved_in_are_taken_as_trees_but_for_what_is_hidden(
    bound: Home, inbox: Path, scratch: Path
) -> None:
    since = newest(bound)
    tree = scratch / "site"
    for path in ("index.html", "images/deep/x.png", ".git/config", "images/.DS_Store/y", "last"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(path)
    os.rename(tree, inbox / "site")
    found = set()
    for event in events(bound, since):
        found.add(event["path"])
        if len(found) == 3:
            break
    assert found == {"site/index.html", "site/images/deep/x.png", "site/last"}
    gone(inbox, "site/last", bound)
    assert (inbox / "site/.git/config").exists()


def test_whatever_is_no_regular_file_of_its_own_stays_and_is_named_once(
    bound: Home, inbox: Path, scratch: Path
) -> None:
    secret = scratch / "shadow"
    secret.write_text("root's")
    inbox.chmod(0o777)
    since = newest(bound)
    (inbox / "link.txt").symlink_to(secret)
    (inbox / "dirlink").symlink_to(scratch)
    os.mkfifo(inbox / "fifo")
    os.mknod(inbox / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    (inbox / "hard.txt").hardlink_to(secret)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(inbox / "socket"))
    for name in ("mark-1", "mark-2"):
        (inbox / name).write_text("x")
        assert [event["path"] for event in until(bound, since, name)][-1] == name
        gone(inbox, name, bound)
    kept = {"link.txt", "dirlink", "fifo", "zero", "hard.txt", "socket"}
    assert kept <= set(os.listdir(inbox))
    assert not kept & set(os.listdir(bound.path / "downloads"))
    said = "\n".join(bound.output) + bound.log()
    for name, what in {
        "link.txt": "a symbolic link", "dirlink": "a symbolic link", "fifo": "a FIFO", "zero": "a device",
        "socket": "a socket", "hard.txt": "a hard link",
    }.items():  # fmt: skip
        assert said.count(f"'{name}' is {what}") == 1
    inbox.chmod(0o755)  # now nobody but the owner can have linked it
    (inbox / "mark-3").write_text("x")
    until(bound, since, "hard.txt")
    assert secret.read_text() == "root's"
    for name in kept - {"hard.txt"}:
        (inbox / name).unlink()


def test_over_quota_a_file_stays_with_an_event_and_comes_when_there_is_room(bound: Home) -> None:
    inbox, uploads = bound.base / "inbox-uploads", bound.path / "uploads"
    since = newest(bound)
    (uploads / "big").write_bytes(bytes(SMALL - 10))
    (inbox / "too-big.bin").write_bytes(b"x" * 11)
    refused = until(bound, since, "too-big.bin", "refused")[-1]
    assert (refused["size"], refused["mask"], refused["mime"]) == (11, [], None)
    assert refused["created_by"] == "system"  # as the inbox has it
    (inbox / "fits").write_bytes(b"x" * 10)
    until(bound, since, "fits")
    assert (inbox / "too-big.bin").exists()
    assert bound.status()["inboxes"][1]["left"] == 1
    assert "'too-big.bin' stays there: there is no room for it, 11 B, in uploads/" in "".join(bound.output)
    assert json.loads((bound.path / ".agentfuse/last-error.json").read_bytes())["region"] == "uploads"
    (uploads / "big").unlink()
    found = [event for event in until(bound, since, "too-big.bin") if event["path"] == "too-big.bin"]
    assert [(event["kind"], event["created_by"]) for event in found] == [
        ("refused", "system"),
        ("arrived", "system"),
    ]
    gone(inbox, "too-big.bin", bound)
    while bound.status()["inboxes"][1]["left"]:  # counted anew when it has left
        assert bound.status()["state"] == "live"


def test_a_forged_platform_directory_and_an_agents_symlink_lead_nowhere(bound: Home, inbox: Path) -> None:
    outside = bound.base / "outside"
    outside.mkdir()
    (bound.path / "downloads/trap").symlink_to(outside)
    since = newest(bound)
    (inbox / ".agentfuse").mkdir()
    (inbox / ".agentfuse/events.ndjson").write_text("{}")
    (inbox / "trap").mkdir()
    (inbox / "trap/x").write_text("x")
    until(bound, since, "trap/x", "refused")
    assert list(outside.iterdir()) == []
    assert (inbox / "trap/x").exists()
    assert (inbox / ".agentfuse/events.ndjson").exists()
    assert "'trap/x' stays there: downloads/trap/x" in "".join(bound.output)


def test_what_the_kernels_queue_had_no_room_for_is_found_all_the_same(bound: Home, inbox: Path) -> None:
    since = newest(bound)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    pid = bound.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, pid, os.WSTOPPED)  # a busy machine takes its time
        for _ in range(limit // 2 + 100):
            for name in ("one.part", "two.part"):
                os.close(os.open(inbox / name, os.O_WRONLY | os.O_CREAT))
        (inbox / "unheard").write_text("x")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [event["path"] for event in until(bound, since, "unheard")] == ["unheard"]
    while "queue overflowed" not in "".join(bound.output):  # told when the queue has been read to its end
        assert bound.status()["state"] == "live"


def test_another_directory_in_the_inboxs_place_is_the_inbox(new_home: Make) -> None:
    home = new_home()
    inbox = with_inbox(home)
    home.start()
    inbox.rename(home.base / "away")
    inbox.mkdir()
    (home.base / "away" / "rings").write_text("x")  # the bell hangs there still
    (inbox / "new").write_text("x")
    until(home, 0, "new")
    (inbox / "newer").write_text("x")
    until(home, 0, "newer")
    home.umount()


def test_a_symlink_into_the_mount_in_the_inboxs_place_makes_no_agents_file_the_environments(
    new_home: Make,
) -> None:
    home = new_home()
    above, away = home.base / "above", home.base / "away"
    inbox = above / "inbox"
    inbox.mkdir(parents=True)
    home.config.write_text(
        home.config.read_text() + f'[[inbox]]\ndirectory = "{inbox}"\nregion = "downloads"\n'
    )
    home.start()
    (home.path / "workspace/inbox").mkdir()
    (home.path / "workspace/inbox/agents").write_text("x")
    above.rename(away)
    above.symlink_to(home.path / "workspace")
    for number, name in enumerate(("rings", "rings again")):
        (away / "inbox" / name).write_text("x")  # the bell hangs there still
        assert next(events(home, number))["path"] == name
        gone(away / "inbox", name, home)
    assert (home.path / "workspace/inbox/agents").exists()
    assert "what is in its place is no inbox" in home.status()["inboxes"][0]["last_error"]
    home.umount()


def test_kills_between_any_two_steps_make_no_second_copy_and_lose_nothing(new_home: Make) -> None:
    home = new_home()
    inbox = with_inbox(home)
    steps = ("inbox.noted", "inbox.put", "inbox.removed")
    for step in steps:
        (inbox / f"{step} before").write_text("it was there before the mount")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(killpoints.VARIABLE, f"{step}:2")
            with contextlib.suppress(AssertionError):  # it may die before it is ready
                home.start()
            (inbox / f"{step} during").write_bytes(step.encode() * 10_000)
            assert home.ended() == -9
    home.start()
    names = sorted(f"{step} {when}" for step in steps for when in ("before", "during"))
    for name in names:
        gone(inbox, name, home)
    (inbox / "mark").write_text("x")
    found = [event["path"] for event in until(home, 0, "mark")]
    gone(inbox, "mark", home)
    names.append("mark")
    names.sort()
    assert sorted(os.listdir(home.path / "downloads")) == names
    for step in steps:
        assert (home.path / f"downloads/{step} during").read_bytes() == step.encode() * 10_000
    assert os.listdir(inbox) == []
    assert sorted(found) == names
    home.umount()


def test_an_inbox_in_the_mount_itself_is_a_mistake_of_the_configuration(new_home: Make) -> None:
    home = new_home()
    home.config.write_text(f'[[inbox]]\ndirectory = "{home.path}/downloads"\nregion = "downloads"\n')
    done = home.agentfuse(*home.mount_command()[1:])
    assert done.returncode == 78
    assert "inbox[0].directory" in done.stderr
    assert f"the mountpoint {home.path} and this are one in the other" in done.stderr
