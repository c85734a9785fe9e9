"""Events of what a hostile or broken agent does: each replayed, they still add up to what is there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import invariants
import pytest
from mounts import Home

from agentfuse.control.client import ControlClient
from agentfuse.control.registry import Registry

pytestmark = pytest.mark.mount

Event = dict[str, Any]
FILES = 300
"""How many files uploads/ takes."""

_marks = itertools.count()


@pytest.fixture(scope="module")
def home(make_home: Callable[..., Home]) -> Any:
    mounted = make_home(regions={"uploads": (10_000_000, FILES)}).start()
    yield mounted
    invariants.check(mounted)
    assert mounted.agentfuse("fsck", "--local", str(mounted.path)).returncode == 0
    mounted.umount()


def told(home: Home, since: int) -> list[Event]:
    """All events after ``since`` of what was done before now."""
    home.settled()
    mark = f"mark-{next(_marks)}"
    (home.path / "downloads" / mark).write_text("x")
    entry = Registry(home.runtime).find(home.path)
    found = (event for event in ControlClient(entry.socket).events(since=since, follow=True) if event)
    return [*itertools.takewhile(lambda event: event["path"] != mark, found)]


def newest(home: Home) -> int:
    told(home, 0)
    return int(home.status()["events"]["newest"])


def replayed(events: list[Event], region: str) -> dict[str, int]:
    """The files and their sizes that one who believes the events knows of. Asserts that each makes sense."""
    files: dict[str, int] = {}
    for event in events:
        if event["region"] != region or event["path"].startswith("mark-"):
            continue
        path, kind = event["path"], event["kind"]
        assert kind == "moved" or (kind == "arrived") == (path not in files), event
        if kind == "moved":
            del files[event["old_path"]]
        if kind == "deleted":
            del files[path]
        else:
            files[path] = event["size"]
    return files


def present(directory: Path, region: Path) -> dict[str, int]:
    return {
        os.path.relpath(path, region): path.stat().st_size for path in directory.rglob("*") if path.is_file()
    }


def assert_gapless(events: list[Event], since: int) -> None:
    assert [event["seq"] for event in events] == list(range(since + 1, since + 1 + len(events)))


def test_processes_that_make_tiny_files_until_the_quota_says_no_are_told_of_to_the_file(home: Home) -> None:
    since = newest(home)
    script = (
        "import sys, itertools\n"
        "for number in itertools.count():\n"
        "    with open(f'{sys.argv[1]}/{sys.argv[2]}-{number}', 'w') as file: file.write('x')\n"
    )
    uploads = home.path / "uploads"
    bombs = [
        subprocess.Popen([sys.executable, "-c", script, uploads, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(6)
    ]
    for bomb in bombs:
        assert "Disk quota exceeded" in bomb.communicate(timeout=60)[1]
    assert home.usage("uploads") == (FILES, FILES)
    events = told(home, since)
    assert_gapless(events, since)
    assert replayed(events, "uploads") == present(uploads, uploads)
    assert len(events) == FILES
    for path in uploads.iterdir():
        path.unlink()
    assert replayed(told(home, since), "uploads") == {}


def test_a_tree_of_5000_files_that_is_moved_in_is_5000_arrivals(home: Home) -> None:
    since = newest(home)
    tree, downloads = home.path / "workspace" / "tree", home.path / "downloads"
    for number in range(5000):
        directory = tree / str(number % 50)
        if number < 50:
            directory.mkdir(parents=True)
        os.close(os.open(directory / str(number), os.O_WRONLY | os.O_CREAT))
    os.rename(tree, downloads / "tree")
    events = told(home, since)
    assert_gapless(events, since)
    assert replayed(events, "downloads") == present(downloads / "tree", downloads)
    assert len(events) == 5000
    os.rename(downloads / "tree", tree)
    assert replayed(told(home, since), "downloads") == {}


def test_a_storm_of_renames_adds_up_to_what_is_there(home: Home) -> None:
    since = newest(home)
    downloads = home.path / "downloads"
    names = ["a", "b", "c", "d.part", "e", "directory/f", "directory/g", "directory.tmp/h"]
    for name in names:
        (downloads / name).parent.mkdir(exist_ok=True)

    def storm(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(400):
            one, two = (downloads / name for name in rng.sample(names, 2))
            try:
                if rng.random() < 0.3:
                    one.write_bytes(bytes(rng.randrange(1, 9)))
                elif rng.random() < 0.1:
                    one.unlink()
                elif rng.random() < 0.1:
                    os.link(one, two)
                elif rng.random() < 0.2:
                    os.rename(downloads / "directory", downloads / "renamed")
                    os.rename(downloads / "renamed", downloads / "directory")
                else:
                    os.rename(one, two)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                    raise

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = told(home, since)
    assert_gapless(events, since)
    final = {
        path: size for path, size in present(downloads, downloads).items()
        if not path.startswith("mark-") and ".part" not in path and ".tmp" not in path
    }  # fmt: skip
    assert replayed(events, "downloads") == final
    for path in [*(downloads / name for name in names)]:
        path.unlink(missing_ok=True)


def test_a_file_that_is_rewritten_in_a_loop_is_told_of_no_more_often_than_it_was(home: Home) -> None:
    since = newest(home)
    for number in range(500):
        (home.path / "downloads" / "log").write_text(str(number))
    events = told(home, since)
    assert_gapless(events, since)
    assert [event["kind"] for event in events] == ["arrived"] + ["modified"] * (len(events) - 1)
    assert len(events) <= 500
    assert (events[-1]["size"], home.status()["events"]["waiting"]) == (3, 0)


def test_a_forged_directory_of_the_platform_s_is_a_directory_like_any_hidden_one(home: Home) -> None:
    since = newest(home)
    forged = home.path / "uploads" / ".agentfuse"
    forged.mkdir()
    (forged / "events.ndjson").write_text('{"seq":1,"kind":"arrived","path":"forged"}\n')
    (forged / "incoming").mkdir()
    (forged / "incoming" / "x").write_text("x")
    assert told(home, since) == []
    with pytest.raises(OSError, match=r"busy|not permitted|denied"):
        os.rename(forged, home.path / ".agentfuse")
    real = [
        json.loads(line) for line in (home.path / ".agentfuse" / "events.ndjson").read_bytes().splitlines()
    ]
    assert "forged" not in {event["path"] for event in real}
    os.rename(forged, home.path / "uploads" / "plain")
    assert replayed(told(home, since), "uploads").keys() == {"plain/events.ndjson", "plain/incoming/x"}
