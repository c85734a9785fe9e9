"""``agentfuse diff`` of a snapshot and a live mount."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Home

pytestmark = pytest.mark.mount


@pytest.fixture
def home(new_home: Callable[..., Home]) -> Iterator[Home]:
    """A mount whose memory is in snapshot 1, and then nothing is synced by itself any more."""
    home = new_home(top='sync_delay = "1h"\ncheckpoint_interval = "1h"').start()
    shared = home.path / "shared"
    (shared / "dir").mkdir()
    for name in ("notes", "gone", "dir/inside", "large"):
        (shared / name).write_bytes(name.encode() * 1000)
    (shared / "link").symlink_to("notes")
    assert home.agentfuse("sync", str(home.path)).returncode == 0
    yield home
    home.umount()


def diff(home: Home, *arguments: str) -> Any:
    done = home.agentfuse("diff", *arguments, "--json", "--state", str(home.state))
    assert done.returncode == 0, done.stderr
    return {change["path"]: change for change in json.loads(done.stdout)}


def test_nothing_differs_from_what_was_synced_or_restored_and_nothing_is_read(home: Home) -> None:
    for is_restored in (False, True):
        if is_restored:
            home.umount()
            home.start(fresh=True)
        with home.counting() as requests:
            done = home.agentfuse("diff", "tester@latest", str(home.path), "--state", str(home.state))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"nothing differs between tester@1 and {home.path}\n"
        assert not requests.keys() & {"open", "read"}
    (home.path / "shared" / "notes").chmod(0o600)
    with home.counting() as requests:
        assert list(diff(home, "tester@latest", str(home.path))) == ["notes"]
    assert requests["open"] == 1


def test_what_the_run_changed_since(home: Home) -> None:
    shared = home.path / "shared"
    (shared / "notes").write_bytes(b"changed")
    (shared / "gone").unlink()
    (shared / "new").write_bytes(b"new")
    (shared / "dir/inside").chmod(0o600)
    found = diff(home, "tester@1", str(home.path))
    assert {path: change["change"] for path, change in found.items()} == {
        "notes": "changed",
        "gone": "removed",
        "new": "added",
        "dir/inside": "changed",
    }
    assert found["notes"]["after"]["size"] == 7
    assert found["dir/inside"]["before"]["sha256"] == found["dir/inside"]["after"]["sha256"]
    assert home.agentfuse("sync", str(home.path)).returncode == 0
    assert diff(home, "tester@1", "tester@2", "--store", home.store.as_uri()) == found
    text = home.agentfuse("diff", "tester@1", str(home.path), "--state", str(home.state)).stdout
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["~", "dir/inside"],
        ["-", "gone"],
        ["+", "new"],
        ["~", "notes"],
    ]


def test_an_agent_that_never_rests_does_not_make_it_fail(home: Home) -> None:
    shared = home.path / "shared"
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            directory = shared / f"d{number % 7}"
            directory.mkdir(exist_ok=True)
            (directory / "file").write_bytes(os.urandom(number % 5000))
            (shared / "log").open("ab").write(b"x" * 100)
            if number % 3 == 0:
                os.replace(directory / "file", shared / f"f{number % 5}")
                directory.rmdir()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            found = diff(home, "tester@1", str(home.path))
            assert not found.keys() & {"notes", "gone", "dir", "dir/inside", "large", "link"}
    finally:
        stop.set()
        worker.join()


def test_what_is_no_live_mount_is_refused(home: Home, tmp_path: Path) -> None:
    done = home.agentfuse("diff", "tester@1", str(tmp_path), "--state", str(home.state))
    assert done.returncode == 66
    assert "no agentfuse mount" in done.stderr
    done = home.agentfuse("diff", str(home.path), "tester@1", "--state", str(home.state))
    assert done.returncode == 2
    assert "names no snapshot" in done.stderr
    done = home.agentfuse("diff", "tester@1", f"{home.path}@2")
    assert done.returncode == 66
    assert "no agentfuse mount" in done.stderr


def test_a_region_that_an_execution_kept_is_compared_with_the_same_one(new_home: Callable[..., Home]) -> None:
    home = new_home(regions={"workspace": (10**6, 100)}, top='sync_delay = "1h"\ncheckpoint_interval = "1h"')
    home.config.write_text(home.config.read_text() + 'sync = "continuous"\n')
    home.start()
    (home.path / "workspace" / "a").write_bytes(b"1")
    assert home.agentfuse("sync", str(home.path)).returncode == 0
    (home.path / "workspace" / "b").write_bytes(b"2")
    found = diff(home, f"tester/{home.execution}/workspace@latest", str(home.path))
    assert {path: change["change"] for path, change in found.items()} == {"b": "added"}
    home.umount()
