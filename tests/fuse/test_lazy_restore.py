"""A mount is ready before the contents are here; they come when opened, and in the background."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import invariants
import pytest
from mounts import READY_S, Home
from syscalls import refused

from agentfuse.home import marks

pytestmark = pytest.mark.mount

MiB = 1024 * 1024
Make = Callable[..., Home]
SMALL = {f"d{i % 3}/small {i}": os.urandom(100 + i) for i in range(60)}
LARGE = {f"large {i}": os.urandom((2 + i) * MiB) for i in range(3)}
ALL = SMALL | LARGE
OLD_NS = 1_400_000_000_987_654_321


def remember(home: Home) -> dict[bytes, tuple[object, ...]]:
    """Let an execution leave a memory; what it looks like."""
    home.start()
    shared = home.path / "shared"
    for name, content in ALL.items():
        path = shared / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(OLD_NS, OLD_NS))
    (shared / "large 0").chmod(0o755)
    (shared / "empty").touch()
    (shared / "link").symlink_to("d0/small 0")
    os.link(shared / "d0" / "small 3", shared / "second name")
    picture = invariants.picture(shared)
    home.umount()
    return picture


class Outage:
    """Objects of a home's store that cannot be reached, though nobody says that they are not there."""

    def __init__(self, objects: list[Path]) -> None:
        self._objects = objects
        for path in objects:
            path.rename(path.with_suffix(".aside"))
            path.symlink_to(path.name)

    def end(self) -> None:
        for path in self._objects:
            path.with_suffix(".aside").rename(path)


def objects(home: Home, *, at_least: int = 0) -> list[Path]:
    """The objects of a home's agent, those of some bytes at least."""
    found = (home.store / "agents" / home.agent / "objects").glob("*/*")
    return sorted(path for path in found if path.stat().st_size >= at_least)


def during(home: Home) -> Outage:
    """Mount in an outage of the objects, as a new execution."""
    outage = Outage(objects(home))
    home.start(fresh=True)
    return outage


def hydration(home: Home, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the daemon says of the contents, once ``until`` accepts it."""
    deadline = time.monotonic() + READY_S
    while not until(found := home.status()["hydration"]):
        assert time.monotonic() < deadline, found
    return found


def is_complete(found: dict[str, Any]) -> bool:
    return found["state"] == "complete"


def is_waiting(found: dict[str, Any]) -> bool:
    return found["state"] == "waiting"


def without_contents(picture: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    return {path: facts[:-1] for path, facts in picture.items()}


def test_names_and_attributes_are_there_before_any_content(new_home: Make) -> None:
    home = new_home()
    before = remember(home)
    outage = during(home)
    shared = home.path / "shared"
    found = hydration(home, is_waiting)
    assert (found["absent_files"], found["failed_files"]) == (len(ALL), 0)
    assert found["absent_bytes"] == sum(map(len, ALL.values()))
    text = home.agentfuse("status", str(home.path)).stdout
    assert "contents    waiting: 63 files, 9.01 MiB, not here yet" in text
    now = invariants.picture(shared, contents=False)
    assert invariants.differences(without_contents(before), without_contents(now)) == []
    assert (shared / "large 1").stat().st_blocks >= 3 * MiB // 512
    invariants.check(home, contents=False)
    outage.end()
    assert (shared / "large 1").read_bytes() == LARGE["large 1"]
    hydration(home, is_complete)
    assert invariants.differences(before, invariants.picture(shared)) == []
    assert not any(b"agentfuse" in os.fsencode(name) for path in ALL for name in marks_of(home, path))
    invariants.check(home)
    home.umount()


def marks_of(home: Home, path: str) -> list[str]:
    return os.listxattr(home.tree / "shared" / path)


def test_a_store_that_is_down_is_an_error_of_the_open_that_needs_it_and_of_nothing_else(
    new_home: Make,
) -> None:
    home = new_home()
    remember(home)
    outage = during(home)
    shared = home.path / "shared"
    with refused(errno.EIO):
        (shared / "d1" / "small 1").read_bytes()
    with refused(errno.EIO):
        (shared / "d2" / "small 2").open("r+b")
    (shared / "d1" / "small 1").rename(shared / "renamed")
    (shared / "large 1").chmod(0o600)
    os.utime(shared / "large 1", ns=(1, 2))
    os.link(shared / "large 2", shared / "third name")
    (shared / "large 2").unlink()
    (shared / "d2" / "small 2").unlink()
    (shared / "d0").rename(shared / "directory")
    (shared / "new").write_bytes(b"written meanwhile")
    os.replace(shared / "new", shared / "d1" / "small 4")
    invariants.check(home, contents=False)
    outage.end()
    assert (shared / "renamed").read_bytes() == SMALL["d1/small 1"]
    hydration(home, is_complete)
    assert (shared / "large 1").read_bytes() == LARGE["large 1"]
    assert (shared / "large 1").stat().st_mode & 0o777 == 0o600
    assert (shared / "large 1").stat().st_mtime_ns == 2
    assert (shared / "third name").read_bytes() == LARGE["large 2"]
    assert (shared / "directory" / "small 9").read_bytes() == SMALL["d0/small 9"]
    assert (shared / "d1" / "small 4").read_bytes() == b"written meanwhile"
    invariants.check(home)
    home.umount()


def test_emptying_an_absent_file_fetches_nothing(new_home: Make) -> None:
    home = new_home()
    remember(home)
    outage = during(home)
    shared = home.path / "shared"
    (shared / "large 0").write_bytes(b"all new")  # O_TRUNC
    os.truncate(shared / "large 1", 0)
    with refused(errno.EIO):
        os.truncate(shared / "large 2", 10)
    assert (shared / "large 0").read_bytes() == b"all new"
    assert (shared / "large 1").read_bytes() == b""
    assert hydration(home, is_waiting)["absent_files"] == len(ALL) - 2
    invariants.check(home, contents=False)
    outage.end()
    os.truncate(shared / "large 2", 10)
    assert (shared / "large 2").read_bytes() == LARGE["large 2"][:10]
    hydration(home, is_complete)
    assert (shared / "large 0").read_bytes() == b"all new"
    assert (shared / "large 1").read_bytes() == b""
    invariants.check(home)
    home.umount()


def test_a_commit_needs_no_content_that_is_absent(new_home: Make) -> None:
    home = new_home()
    remember(home)
    outage = during(home)
    shared = home.path / "shared"
    (shared / "large 1").rename(shared / "moved")
    (shared / "d1" / "small 1").chmod(0o700)
    os.utime(shared / "d1" / "small 4", ns=(5, 5))
    invariants.check(home, contents=False)
    before = invariants.picture(shared, contents=False)
    home.umount()  # no object can be read or written
    outage.end()
    home.start(fresh=True)
    now = invariants.picture(shared)
    assert invariants.differences(without_contents(before), without_contents(now)) == []
    assert (shared / "moved").read_bytes() == LARGE["large 1"]
    assert (shared / "d1" / "small 1").read_bytes() == SMALL["d1/small 1"]
    home.umount()


def test_a_damaged_content_is_an_error_of_its_file_alone(new_home: Make) -> None:
    home = new_home()
    before = remember(home)
    home.tolerated = ["cannot be read"]
    objects(home, at_least=MiB)[0].unlink()
    victim = SMALL["d1/small 7"]
    (pack,) = (path for path in objects(home) if victim in path.read_bytes())
    pack.write_bytes(pack.read_bytes().replace(victim, victim[::-1]))
    home.start(fresh=True)
    shared = home.path / "shared"
    assert hydration(home, lambda found: found["state"] == "incomplete")["failed_files"] == 2
    (lost,) = (name for name in LARGE if _is_lost(shared / name))
    for name in ("d1/small 7", lost):
        for _ in range(2):
            with refused(errno.EIO):
                (shared / name).read_bytes()
        assert len([line for line in home.output if f"{name} cannot be read" in line]) == 1
    for name, each in ALL.items():
        if name not in ("d1/small 7", lost):
            assert (shared / name).read_bytes() == each
    now = invariants.picture(shared, contents=False)
    assert invariants.differences(without_contents(before), without_contents(now)) == []
    home.umount()


def _is_lost(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return True
    return False


def test_killed_while_contents_come_nothing_is_lost_and_nothing_comes_twice(new_home: Make) -> None:
    home = new_home()
    remember(home)
    outage = Outage(objects(home, at_least=MiB))
    home.start(fresh=True)
    shared = home.path / "shared"
    hydration(home, lambda found: is_waiting(found) and found["absent_files"] == len(LARGE))
    (shared / "d1" / "small 1").write_bytes(b"rewritten")
    with (shared / "d1" / "small 4").open("r+b") as file:
        file.write(b"in place")
    (shared / "large 0").write_bytes(b"instead")
    expected = ALL | {
        "d1/small 1": b"rewritten",
        "d1/small 4": b"in place" + SMALL["d1/small 4"][8:],
        "large 0": b"instead",
    }
    home.kill()
    half_fill(home.tree / "shared" / "large 1")
    outage.end()
    home.start()
    assert (shared / "large 1").stat().st_mtime_ns == OLD_NS
    hydration(home, is_complete)
    for name, content in expected.items():
        assert (shared / name).read_bytes() == content, name
    assert (shared / "large 1").stat().st_mtime_ns == OLD_NS
    invariants.check(home)
    home.umount()
    home.start(fresh=True)
    for name, content in expected.items():
        assert (shared / name).read_bytes() == content, name
    home.umount()


def half_fill(path: Path) -> None:
    """What a process leaves that is killed while it writes a content."""
    with path.open("r+b") as file:
        mark = marks.read(file.fileno())
        assert mark is not None
        before = path.stat()
        marks.write(file.fileno(), marks.Mark(mark.sha256, (before.st_mtime_ns, before.st_mode & 0o7777)))
        file.write(b"half of it")


def test_what_was_never_fetched_is_recovered_without_being_fetched(new_home: Make) -> None:
    home = new_home()
    remember(home)
    outage = during(home)
    shared = home.path / "shared"
    (shared / "large 1").rename(shared / "moved")
    home.kill(leave_stale=False)
    options = ("--state", str(home.state), "--config", str(home.config))
    done = home.agentfuse("recover", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    outage.end()
    home.start(fresh=True)
    assert (shared / "moved").read_bytes() == LARGE["large 1"]
    assert (shared / "large 2").read_bytes() == LARGE["large 2"]
    home.umount()
