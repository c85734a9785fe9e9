"""Events of real mounts: what programs do becomes one event per complete file, heard by everybody."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import AGENTFUSE, Home

from agentfuse import killpoints
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry

pytestmark = pytest.mark.mount

Make = Callable[..., Home]
Event = dict[str, Any]

_marks = itertools.count()


def client(home: Home) -> ControlClient:
    return ControlClient(Registry(home.runtime).find(home.path).socket)


def newest(home: Home) -> int:
    return int(home.status()["events"]["newest"])


def follow(home: Home, since: int, region: str | None = None) -> Iterator[Event]:
    return (event for event in client(home).events(since=since, region=region, follow=True) if event)


def told(home: Home, since: int = 0) -> list[Event]:
    """All events after ``since`` of what was done before now: those before a mark's."""
    home.settled()
    mark = f"mark-{next(_marks)}"
    (home.path / "downloads" / mark).write_text("not empty, which would be held back")
    events = []
    for event in follow(home, since):
        if event["path"] == mark:
            break
        if not event["path"].startswith("mark-"):
            events.append(event)
    return events


def brief(events: list[Event]) -> list[tuple[str, str]]:
    return [(event["kind"], event["path"]) for event in events]


@pytest.fixture
def since(home: Home) -> int:
    told(home)
    return newest(home)


@pytest.fixture
def downloads(home: Home, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory in downloads/."""
    path = home.path / "downloads" / f"t{abs(hash(request.node.nodeid)) % 10**8}"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)
    (home.path / "downloads" / path).mkdir(exist_ok=True)
    path.rmdir()


def names(events: list[Event], directory: Path) -> list[tuple[str, str]]:
    """Kinds, and paths below the test's own directory."""
    return [(kind, os.path.relpath(path, directory.name)) for kind, path in brief(events)]


# What programs do ----------------------------------------------------------------------------------------


def test_a_file_that_is_written_and_closed_arrives_once_with_the_facts(
    home: Home, downloads: Path, since: int
) -> None:
    (downloads / "a.csv").write_text("a,b\n1,2\n")
    (event,) = told(home, since)
    assert event.pop("time") == pytest.approx((downloads / "a.csv").stat().st_mtime, abs=5)
    assert event == {
        "seq": since + 1,
        "kind": "arrived",
        "mask": ["IN_CLOSE_WRITE"],
        "region": "downloads",
        "path": f"{downloads.name}/a.csv",
        "old_path": None,
        "size": 8,
        "mime": "text/csv",
        "sha256": hashlib.sha256(b"a,b\n1,2\n").hexdigest(),
        "created_by": "environment",
        "execution": home.execution,
        "agent": home.agent,
    }


def test_a_browser_s_download_arrives_once_under_its_final_name(
    home: Home, downloads: Path, since: int
) -> None:
    with open(downloads / "Unconfirmed 77.crdownload", "wb") as file:
        for _ in range(20):
            file.write(b"%PDF-1.7" + bytes(10_000))
    os.rename(downloads / "Unconfirmed 77.crdownload", downloads / "b.pdf")
    (event,) = told(home, since)
    assert (event["kind"], event["path"], event["size"], event["mime"]) == (
        "arrived", f"{downloads.name}/b.pdf", 200_160, "application/pdf",
    )  # fmt: skip


def test_a_browser_s_empty_placeholder_is_not_an_arrival_of_its_own(
    home: Home, downloads: Path, since: int
) -> None:
    """As Firefox does it: an empty file under the final name, the content beside it, a rename over it."""
    for name in ("a.pdf", "plain"):
        (downloads / name).touch()
    with open(downloads / "xY7_wq12.pdf.part", "wb") as file:
        file.write(b"%PDF-1.7")
        events = follow(home, since)
        assert next(events)["path"].endswith("/plain")
        file.write(bytes(1000))
    home.settled()
    os.rename(downloads / "xY7_wq12.pdf.part", downloads / "a.pdf")
    rest = told(home, since + 1)
    assert [(e["kind"], e["path"][-5:], e["size"], e["mask"]) for e in rest] == [
        ("arrived", "a.pdf", 1008, ["IN_MOVED_TO"])
    ]


def test_an_empty_file_that_is_held_back_is_told_of_once_over_kill_and_end(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "downloads" / "a").touch()
    home.kill(leave_stale=False)
    home.start()
    (home.path / "downloads" / "b").touch()
    (home.path / "downloads" / "gone").touch()
    (home.path / "downloads" / "gone").unlink()
    home.umount()
    home.start()
    assert brief(told(home)) == [("arrived", "a"), ("arrived", "b")]
    home.umount()


def test_names_of_one_file_are_told_of_alike_over_a_restart(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "downloads" / "a").write_text("a")
    os.link(home.path / "downloads" / "a", home.path / "downloads" / "b")
    home.umount()
    home.start()
    os.utime(home.path / "downloads" / "a", (1, 1))
    home.umount()
    home.start()
    since = len(told(home)) + 1
    (home.path / "downloads" / "a").write_text("changed")
    home.umount()
    home.start()
    assert brief(told(home)[:2]) == [("arrived", "a"), ("arrived", "b")]
    assert sorted(brief(told(home, since))) == [("modified", "a"), ("modified", "b")]
    home.umount()


def test_a_file_is_told_of_only_when_its_last_writer_has_closed_it(
    home: Home, downloads: Path, since: int
) -> None:
    one = os.open(downloads / "slow", os.O_WRONLY | os.O_CREAT)
    os.write(one, b"first ")
    two = os.open(downloads / "slow", os.O_WRONLY | os.O_APPEND)
    reader = os.open(downloads / "slow", os.O_RDONLY)
    os.close(one)
    assert told(home, since) == []
    os.rename(downloads / "slow", downloads / "renamed while written")
    assert told(home, since) == []
    os.write(two, b"second")
    os.close(two)
    assert names(told(home, since), downloads) == [("arrived", "renamed while written")]
    os.close(reader)
    assert len(told(home, since)) == 1


def test_what_is_only_read_or_touched_makes_no_event(home: Home, downloads: Path, since: int) -> None:
    path = downloads / "a"
    path.write_text("x")
    path.read_text()
    os.close(os.open(path, os.O_RDWR))
    path.touch()
    path.chmod(0o600)
    (downloads / "link").symlink_to("a")
    os.mkfifo(downloads / "pipe")
    (downloads / "directory").mkdir()
    assert names(told(home, since), downloads) == [("arrived", "a")]


def test_rewritten_truncated_renamed_and_removed_are_kinds_of_their_own(
    home: Home, downloads: Path, since: int
) -> None:
    (downloads / "a").write_text("one")
    told(home)
    (downloads / "a").write_text("two")
    told(home)
    os.truncate(downloads / "a", 1)
    (downloads / "a").rename(downloads / "b")
    (downloads / "b").unlink()
    events = told(home, since)
    assert names(events, downloads) == [
        ("arrived", "a"), ("modified", "a"), ("modified", "a"), ("moved", "b"), ("deleted", "b"),
    ]  # fmt: skip
    assert [event["size"] for event in events] == [3, 3, 1, 1, 1]
    assert events[3]["old_path"] == f"{downloads.name}/a"


def test_an_editor_s_way_of_saving_is_a_modification(home: Home, downloads: Path, since: int) -> None:
    (downloads / "a").write_text("one")
    home.settled()
    (downloads / ".a.Xy12Zw").write_text("two")
    home.settled()
    (downloads / ".a.Xy12Zw").replace(downloads / "a")
    assert names(told(home, since), downloads) == [("arrived", "a"), ("modified", "a")]


def test_a_hard_link_into_place_arrives(home: Home, downloads: Path, since: int) -> None:
    (downloads / "a.part").write_text("whole")
    home.settled()
    os.link(downloads / "a.part", downloads / "a")
    (downloads / "a.part").unlink()
    (event,) = told(home, since)
    assert (event["kind"], event["mask"], event["size"]) == ("arrived", ["IN_CREATE"], 5)


def test_real_programs_make_one_event_per_file(
    home: Home, downloads: Path, since: int, scratch: Path
) -> None:
    (scratch / "tree" / "sub").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/three"):
        (scratch / "tree" / name).write_text(name)
    subprocess.run(["cp", "-a", scratch / "tree", downloads / "cp"], check=True)
    subprocess.run(["rsync", "-a", f"{scratch}/tree/", downloads / "rsync"], check=True)
    subprocess.run(["tar", "-C", scratch, "-czf", downloads / "a.tgz", "tree"], check=True)
    (downloads / "tar").mkdir()
    subprocess.run(["tar", "-C", downloads / "tar", "-xzf", downloads / "a.tgz"], check=True)
    subprocess.run(["mv", scratch / "tree", downloads / "mv"], check=True)
    events = told(home, since)
    assert {event["kind"] for event in events} == {"arrived"}
    files = ("one", "sub/two", "sub/three")
    expected = [f"{how}/{name}" for how in ("cp", "rsync", "tar/tree", "mv") for name in files]
    assert sorted(path for _, path in names(events, downloads)) == sorted([*expected, "a.tgz"])


def test_a_tree_that_is_moved_in_announces_each_file_and_moved_out_each_again(
    home: Home, downloads: Path, work: Path, since: int
) -> None:
    (work / "tree" / "sub").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/half.part", ".hidden.Xy12Zw"):
        (work / "tree" / name).write_text(name)
    writer = os.open(work / "tree" / "sub" / "unfinished", os.O_WRONLY | os.O_CREAT)
    os.write(writer, b"x")
    os.rename(work / "tree", downloads / "in")
    events = told(home, since)
    assert sorted(names(events, downloads)) == [("arrived", "in/one"), ("arrived", "in/sub/two")]
    assert {event["mask"][0] for event in events} == {"IN_MOVED_TO"}
    os.close(writer)
    os.rename(downloads / "in", downloads / "renamed")
    os.rename(downloads / "renamed", work / "out")
    assert sorted(names(told(home, since)[2:], downloads)) == sorted([
        ("arrived", "in/sub/unfinished"),
        *(("moved", f"renamed/{name}") for name in ("one", "sub/two", "sub/unfinished")),
        *(("deleted", f"renamed/{name}") for name in ("one", "sub/two", "sub/unfinished")),
    ])  # fmt: skip


def test_a_tree_prepared_under_a_temporary_name_arrives_when_it_is_renamed(
    home: Home, downloads: Path, since: int
) -> None:
    (downloads / "new.tmp").mkdir()
    (downloads / "new.tmp" / "a").write_text("a")
    home.settled()
    os.rename(downloads / "new.tmp", downloads / "new")
    assert names(told(home, since), downloads) == [("arrived", "new/a")]


def test_git_clone_announces_the_files_that_were_checked_out(
    home: Home, downloads: Path, since: int, scratch: Path
) -> None:
    def git(*arguments: str | Path) -> None:
        environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env=environ)

    source = scratch / "source"
    git("init", "-q", source)
    for number in range(200):
        (source / f"file{number}.txt").write_text(str(number))
    git("-C", source, "add", ".")
    git("-C", source, "commit", "-qm", "all")
    git("clone", "-q", source, downloads / "clone")
    assert Counter(names(told(home, since), downloads)) == Counter(
        ("arrived", f"clone/file{number}.txt") for number in range(200)
    )


def test_exchanged_files_are_both_modified(home: Home, downloads: Path, since: int) -> None:
    (downloads / "a").write_text("a")
    (downloads / "b").write_text("bb")
    home.settled()
    script = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None); one, two = map(os.fsencode, sys.argv[1:]);"
        "sys.exit(libc.renameat2(-100, one, -100, two, 2))"
    )
    subprocess.run([sys.executable, "-c", script, downloads / "a", downloads / "b"], check=True)
    events = told(home, since)[2:]
    assert sorted(names(events, downloads)) == [("modified", "a"), ("modified", "b")]
    assert {event["path"][-1]: event["size"] for event in events} == {"a": 2, "b": 1}


def test_regions_that_do_not_notify_say_nothing(home: Home, work: Path, since: int) -> None:
    (work / "a").write_text("a")
    (home.path / "shared" / "a").write_text("a")
    (home.path / ".profile").write_text("a")
    (home.path / "shared" / "a").unlink()
    (home.path / ".profile").unlink()
    assert told(home, since) == []


def test_from_one_region_to_another_it_goes_there_and_comes_here(
    home: Home, downloads: Path, since: int
) -> None:
    (downloads / "a").write_text("a")
    home.settled()
    (downloads / "a").rename(home.path / "uploads" / "a")
    (home.path / "uploads" / "a").unlink()
    found = [(event["kind"], event["region"]) for event in told(home, since)]
    assert found == [
        ("arrived", "downloads"), ("deleted", "downloads"), ("arrived", "uploads"), ("deleted", "uploads"),
    ]  # fmt: skip


def test_hostile_names_come_back_as_they_were(home: Home, downloads: Path, since: int) -> None:
    hostile = [
        b"line\nbreak",
        b"tab\t",
        b'quo"te',
        b"\xff\xfe",
        b"n" * 255,
        b"\x1b[2J",
        "\u2028".encode(),
        b"\\n",
    ]
    for name in hostile:
        with open(os.path.join(os.fsencode(downloads), name), "wb") as file:
            file.write(b"x")
    found = [os.fsencode(event["path"]).partition(b"/")[2] for event in told(home, since)]
    assert found == hostile
    printed = home.agentfuse("events", str(home.path), "--since", str(since)).stdout
    assert len(printed.splitlines()) >= len(hostile)
    assert "\x1b" not in printed
    assert all(line.split()[0].isdigit() for line in printed.splitlines())


# Who listens ---------------------------------------------------------------------------------------------


def test_a_thousand_times_ten_files_are_as_many_events_in_order(new_home: Make) -> None:
    home = new_home().start()
    directory = home.path / "downloads"
    for number in range(10_000):
        with open(directory / f"{number}", "wb", buffering=0) as file:
            file.write(b"x")
    events = told(home)
    assert [event["seq"] for event in events] == list(range(1, 10_001))
    assert brief(events) == [("arrived", str(number)) for number in range(10_000)]
    assert next(client(home).events(since=9_990, region="downloads"))["seq"] == 9_991
    home.umount()


def raw_subscriber(home: Home, accept: str = "*/*", query: str = "follow=1") -> socket.socket:
    """A subscriber that has asked and reads only when it is told to."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(Registry(home.runtime).find(home.path).socket))
    connection.sendall(f"GET /v1/events?{query} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    return connection


def test_200_subscribers_hear_all_and_those_who_never_read_keep_nobody(new_home: Make) -> None:
    home = new_home().start()
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(raw_subscriber(home))
        heard: list[list[int]] = []

        def listen() -> None:
            sequence = itertools.takewhile(lambda event: event["path"] != "end", follow(home, 0))
            heard.append([event["seq"] for event in sequence])

        listeners = [threading.Thread(target=listen) for _ in range(160)]
        for listener in listeners:
            listener.start()
        for number in range(500):
            (home.path / "downloads" / f"{number}").write_text("x")
        (home.path / "downloads" / "end").write_text("x")
        for listener in listeners:
            listener.join(60)
        assert heard == [list(range(1, 501))] * 160
        assert home.status()["events"]["followers"] >= 40
    home.umount()


def test_server_sent_events_have_ids_and_go_on_where_the_last_one_was(
    home: Home, downloads: Path, since: int
) -> None:
    (downloads / "a").write_text("a")
    (downloads / "b").write_text("b")
    told(home, since)
    with raw_subscriber(home, "text/event-stream", f"since={since}") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert "text/event-stream" in answer
    assert f"id: {since + 1}\nevent: arrived\ndata: {{" in answer
    with raw_subscriber(home, f"text/event-stream\r\nLast-Event-ID: {since + 1}", "") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert f"id: {since + 1}\n" not in answer
    assert f"id: {since + 2}\n" in answer


def test_what_is_asked_wrongly_is_refused(home: Home) -> None:
    for query in ("since=-1", "since=x", "nonsense=1", "follow=perhaps"):
        with raw_subscriber(home, query=query) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    failed = home.agentfuse("events", str(home.path), "--since", "1000000")
    assert (failed.returncode, "newest event is number" in failed.stderr) == (66, True)
    failed = home.agentfuse("events", str(home.path), "--region", "shared")
    assert (failed.returncode, "those that do: downloads, uploads" in failed.stderr) == (66, True)


def test_the_prompt_is_one_line_a_region(new_home: Make) -> None:
    home = new_home().start()
    (home.path / "uploads" / "a.csv").write_bytes(bytes(1234))
    (home.path / "uploads" / "b.pdf").write_bytes(bytes(300_000))
    told(home)
    printed = home.agentfuse("events", str(home.path), "--format", "prompt", "--region", "uploads").stdout
    assert printed == "New files in uploads/: a.csv (1.2 KB), b.pdf (300 KB)\n"
    home.umount()


def test_whoever_follows_hears_the_last_event_and_then_the_end(new_home: Make) -> None:
    home = new_home().start()
    following = subprocess.Popen(
        [AGENTFUSE, "events", str(home.path), "--follow", "--format", "json"],
        env=home.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert following.stdout is not None
    (home.path / "downloads" / "first").write_text("x")
    assert json.loads(following.stdout.readline())["path"] == "first"
    for number in range(100):
        (home.path / "downloads" / f"{number}").touch()
    home.umount()
    rest = [json.loads(line)["path"] for line in following.stdout]
    assert rest == [str(number) for number in range(100)]
    assert following.wait(30) == 0


def test_the_events_of_a_run_that_has_ended_are_read_from_its_home(new_home: Make) -> None:
    def read(*arguments: str) -> list[str]:
        done = home.agentfuse("events", *arguments, "--state", str(home.state), "--format", "json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["path"] for line in done.stdout.splitlines()]

    home = new_home().start()
    for name in ("a", "b", "c"):
        (home.path / "downloads" / name).write_text(name)
    (home.path / "uploads" / "d").write_text("d")
    told(home)
    expected = read(str(home.path), "--since", "1")
    assert expected[:3] == ["b", "c", "d"]
    home.kill(leave_stale=False)
    assert read(str(home.path), "--since", "1") == expected
    home.start()
    home.umount()
    assert read(str(home.path), "--since", "1", "--follow") == expected
    assert read("--execution", home.execution, "--region", "uploads") == ["d"]
    missing = home.agentfuse("events", "--execution", "nobody", "--state", str(home.state))
    assert (missing.returncode, "no home of execution nobody" in missing.stderr) == (66, True)


# Crashes -------------------------------------------------------------------------------------------------


def test_killed_between_close_and_event_each_arrival_is_announced_once(new_home: Make) -> None:
    """By SIGKILL at the steps of announcing, and at any moment; AGENTFUSE_KILL_ROUNDS plays more of it."""
    home = new_home()
    rng = random.Random(4)
    steps = [
        "close.last",
        "announce.begun",
        "announce.judged",
        "announce.committed",
        "announce.told",
        "rename.moved",
    ]
    expected: set[str] = set()
    for round_ in range(int(os.environ.get("AGENTFUSE_KILL_ROUNDS", "20"))):
        is_at_a_step = round_ % 2 == 0
        with pytest.MonkeyPatch.context() as patch:
            if is_at_a_step:
                step = steps[round_ // 2 % len(steps)]
                patch.setenv(killpoints.VARIABLE, f"{step}:{rng.randrange(1, 6)}")
            home.start()
        directory = home.path / "downloads"
        assert home.process is not None
        if not is_at_a_step:
            threading.Timer(rng.uniform(0, 0.2), home.process.kill).start()
        with contextlib.suppress(OSError):
            for number in itertools.count():
                name = f"{round_}-{number}"
                with open(directory / f"{name}.part", "wb", buffering=0) as file:
                    file.write(b"x" * rng.randrange(1, 5000))
                if number % 2:
                    os.link(directory / f"{name}.part", directory / name)
                else:
                    os.rename(directory / f"{name}.part", directory / name)
                expected.add(name)
                with open(directory / f"{name}.txt", "wb", buffering=0) as file:
                    file.write(b"y")
                expected.add(f"{name}.txt")
        home.ended()
    home.start()
    found = Counter(brief(told(home)))
    assert found.keys() >= {("arrived", name) for name in expected}
    assert set(found.values()) == {1}
    final = {path.name for path in (home.path / "downloads").iterdir() if path.suffix != ".part"}
    assert {path for kind, path in found if kind == "arrived"} == {
        name for name in final if "mark" not in name
    }
    assert [e["seq"] for e in client(home).events(since=0) if e] == list(range(1, newest(home) + 1))
    home.umount()


def test_what_happened_untold_is_told_after_a_kill(new_home: Make) -> None:
    home = new_home().start()
    directory = home.path / "downloads"
    for name in ("stays", "changes", "renamed", "removed", "touched"):
        (directory / name).write_text(name)
    since = len(told(home)) + 1
    home.kill(leave_stale=False)
    # What a daemon did just before it died, and did not come to tell of.
    tree = home.tree / "downloads"
    (tree / "changes").write_text("something else")
    (tree / "renamed").rename(tree / "new name")
    (tree / "removed").unlink()
    (tree / "touched").chmod(0o600)
    (tree / "came").write_text("came")
    (tree / "half.crdownload").write_text("half")
    home.start()
    assert Counter(brief(told(home, since))) == Counter(
        [("modified", "changes"), ("moved", "new name"), ("deleted", "removed"), ("arrived", "came")]
    )
    home.umount()
    home.start()
    assert len(told(home, since)) == 4
    home.umount()


def test_a_file_held_open_at_a_lazy_unmount_is_told_of(new_home: Make) -> None:
    home = new_home().start()
    with open(home.path / "downloads" / "open", "wb", buffering=0) as file:
        file.write(b"x")
        assert home.agentfuse("umount", "--lazy", str(home.path)).returncode == 0
        home.ended()
    home.start()
    assert brief(told(home)) == [("arrived", "open")]
    home.umount()


def test_memory_that_is_restored_has_not_arrived(new_home: Make) -> None:
    home = new_home(top="[regions.shared]\nnotify = true\n").start()
    (home.path / "shared" / "note").write_text("learned")
    assert brief(told(home)) == [("arrived", "note")]
    home.umount()
    home.start(fresh=True)
    assert told(home) == []
    (home.path / "shared" / "note").write_text("more")
    assert brief(told(home)) == [("modified", "note")]
    home.umount()
