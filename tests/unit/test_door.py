"""Doors: processes that write where the daemon must not. Here into a directory that is no mount."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import trio

from agentfuse.door.doors import MAX_DOORS, Doors, OnCollision, Part, Put
from agentfuse.door.worker import MOST_PARTS
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    EnvironmentProblem,
    ExistsError,
    NotFoundError,
    QuotaExceededError,
    UsageError,
    WrongTypeError,
)
from agentfuse.home.creators import Creator
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home
from agentfuse.regions import DEFAULT_REGIONS

MINE = (os.getuid(), os.getgid())


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for each in data:
        yield each


class House:
    """A home on disk, and the doors that lead into it."""

    def __init__(self, base: Path) -> None:
        home = Home(base, "e")
        home.tree.parent.mkdir(parents=True)
        home.lay_out(DEFAULT_REGIONS, None)
        home.lay_out_platform()
        self.path = home.tree
        self.ledger = Ledger(DEFAULT_REGIONS)
        self.doors = Doors(self.path, MINE, self.ledger)
        self.doors.device = self.path.stat().st_dev

    async def put(self, path: bytes, *data: bytes, on_collision: OnCollision = "replace") -> Put:
        return await self.doors.put(
            "uploads", path, pieces(*data), creator=Creator.USER, on_collision=on_collision
        )

    def uploads(self) -> dict[str, bytes]:
        found = (self.path / "uploads").rglob("*")
        return {
            str(each.relative_to(self.path / "uploads")): each.read_bytes()
            for each in found
            if each.is_file()
        }

    def incoming(self) -> list[str]:
        return os.listdir(self.path / ".agentfuse" / "incoming")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    async with house.doors.closed():
        assert house.incoming() == []


def pids_of_doors(house: House) -> list[int]:
    """The processes that work now."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if house.doors.creator_of(pid)]


async def test_a_put_file_has_its_content_its_mode_its_owner_and_its_directories(house: House) -> None:
    large = os.urandom(300_000)
    put = await house.put(b"reports/2026/a.csv", b"x,y\n", large, b"", b"end")
    assert put == Put(b"reports/2026/a.csv", 300_007)
    assert house.uploads() == {"reports/2026/a.csv": b"x,y\n" + large + b"end"}
    st = (house.path / "uploads/reports/2026/a.csv").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o644, *MINE)


async def test_an_empty_file_can_be_put(house: House) -> None:
    assert (await house.put(b"empty")).size_bytes == 0
    assert house.uploads() == {"empty": b""}


@pytest.mark.parametrize(
    "name", [b"caf\xe9", b"new\nline", b'"quoted"', b"n" * 255, "é".encode() * 127, b" "]
)
async def test_any_name_can_be_put(house: House, name: bytes) -> None:
    assert (await house.put(name, b"1")).path == name
    assert os.listdir(os.fsencode(house.path / "uploads")) == [name]


@pytest.mark.parametrize(
    ("name", "numbered"),
    [
        (b"a.csv", b"a (1).csv"),
        (b"a.tar.gz", b"a.tar (1).gz"),
        (b"README", b"README (1)"),
        (b".env", b".env (1)"),
        (b"n" * 255, b"n" * 251 + b" (1)"),
        ("é".encode() * 127, "é".encode() * 125 + b" (1)"),
        (b"\xe9" * 255, b"\xe9" * 251 + b" (1)"),
        (b"a. this is no suffix", b"a. this is no suffix (1)"),
    ],
)
async def test_a_taken_name_gets_a_number(house: House, name: bytes, numbered: bytes) -> None:
    await house.put(name, b"first")
    assert (await house.put(name, b"second", on_collision="number")).path == numbered
    assert (house.path / "uploads" / os.fsdecode(name)).read_bytes() == b"first"


async def test_a_taken_name_is_refused_or_replaced_as_one_wishes(house: House) -> None:
    await house.put(b"a", b"first")
    with pytest.raises(ExistsError):
        await house.put(b"a", b"second", on_collision="refuse")
    assert house.uploads() == {"a": b"first"}
    await house.put(b"a", b"third", on_collision="replace")
    assert house.uploads() == {"a": b"third"}


async def test_no_symlink_of_the_agents_is_followed(house: House, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (house.path / "uploads" / "way").symlink_to(outside)
    (house.path / "uploads" / "file").symlink_to(outside / "target")
    for way in (b"way/x", b"way/deep/x"):
        with pytest.raises(UsageError, match="directory on the way"):
            await house.put(way, b"1")
    with pytest.raises(UsageError):
        await house.doors.move(("uploads", b"file"), ("uploads", b"way/z"), creator=Creator.USER)
    await house.put(b"file", b"instead of the link")
    await house.doors.remove("uploads", b"way", creator=Creator.USER, recursive=True)
    assert os.listdir(outside) == []
    assert house.uploads() == {"file": b"instead of the link"}


async def test_a_region_itself_is_no_file(house: House) -> None:
    with pytest.raises(UsageError, match="stays where it is"):
        await house.put(b"", b"1")


@pytest.mark.parametrize("path", [b"/", b"/etc/passwd", b"a//b", b"..", b"../x", b"a/../b", b"a/.", b"a\0b"])
async def test_a_path_that_is_none_is_refused(house: House, path: bytes) -> None:
    with pytest.raises(UsageError, match="is not a path in a region"):
        await house.put(path, b"1")


async def test_what_is_loose_in_the_home_is_no_way_into_a_region(house: House) -> None:
    await house.doors.put("home", b".gitconfig", pieces(b"[user]"), creator=Creator.USER)
    assert (house.path / ".gitconfig").read_bytes() == b"[user]"
    for path in (b"shared/x", b".agentfuse/status.json"):
        with pytest.raises(UsageError, match="not loose in the home"):
            await house.doors.put("home", path, pieces(b"1"), creator=Creator.USER)


async def test_a_region_that_is_none_is_told_with_those_that_are(house: House) -> None:
    with pytest.raises(NotFoundError, match="no region 'upload'") as caught:
        await house.doors.put("upload", b"a", pieces(b"1"), creator=Creator.USER)
    assert "uploads" in caught.value.hint


@pytest.mark.parametrize("size", [3, 5, 0])
async def test_other_than_the_announced_length_is_refused_and_leaves_nothing(house: House, size: int) -> None:
    with pytest.raises(UsageError, match="bytes than the"):
        await house.doors.put("uploads", b"a", pieces(b"12", b"34"), creator=Creator.USER, size=size)
    assert house.uploads() == {}
    assert house.incoming() == []


async def test_what_does_not_fit_is_refused_before_or_while_it_comes(house: House) -> None:
    house.ledger.by_directory[b"uploads"].bytes_quota = 10
    with pytest.raises(QuotaExceededError):
        await house.doors.put("uploads", b"a", pieces(b"12345678901"), creator=Creator.USER, size=11)
    with pytest.raises(QuotaExceededError):
        await house.put(b"a", b"123456", b"78901")
    assert house.uploads() == {}
    await house.put(b"a", b"123456", b"7890")


async def test_content_that_breaks_off_leaves_nothing_and_what_was_there(house: House) -> None:
    await house.put(b"a", b"old")

    async def breaks() -> AsyncIterator[bytes]:
        yield b"some"
        raise ConnectionAbortedError

    with pytest.raises((ConnectionAbortedError, AgentfuseError)):
        await house.doors.put("uploads", b"a", breaks(), creator=Creator.USER)
    assert house.uploads() == {"a": b"old"}
    assert house.incoming() == []


async def test_a_put_that_is_cancelled_leaves_nothing(house: House) -> None:
    came = trio.Event()

    async def never_ends() -> AsyncIterator[bytes]:
        yield b"some"
        came.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:

        async def put() -> None:
            await house.doors.put("uploads", b"a", never_ends(), creator=Creator.USER)

        nursery.start_soon(put)
        await came.wait()
        nursery.cancel_scope.cancel()
    assert house.uploads() == {}
    assert house.incoming() == []


async def test_closing_the_doors_breaks_off_what_is_under_way_and_they_open_again(house: House) -> None:
    came = trio.Event()

    async def never_ends() -> AsyncIterator[bytes]:
        came.set()
        yield b"some"
        await trio.sleep_forever()

    async def put() -> None:
        with pytest.raises(BusyError, match="being unmounted"):
            await house.doors.put("uploads", b"a", never_ends(), creator=Creator.USER)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await came.wait()
        async with house.doors.closed():
            with pytest.raises(BusyError):
                await house.put(b"b", b"1")
            assert house.incoming() == []
    await house.put(b"c", b"1")
    assert house.uploads() == {"c": b"1"}


async def test_a_door_that_was_killed_is_told_and_the_next_one_works(house: House) -> None:
    async def kills() -> AsyncIterator[bytes]:
        yield b"some"
        (pid,) = pids_of_doors(house)
        os.kill(pid, signal.SIGKILL)
        yield b"more"
        yield b"and more"

    with pytest.raises(EnvironmentProblem, match="has died"):
        await house.doors.put("uploads", b"a", kills(), creator=Creator.USER)
    assert house.uploads() == {}
    await house.put(b"a", b"1")
    assert house.uploads() == {"a": b"1"}


async def test_creators_are_known_while_their_doors_work_and_never_else(house: House) -> None:
    known: list[Creator] = []

    def working() -> list[Creator]:
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return [creator for pid in pids if (creator := house.doors.creator_of(pid))]

    async def looks() -> AsyncIterator[bytes]:
        known.extend(working())
        yield b"1"

    await house.doors.put("uploads", b"a", looks(), creator=Creator.ENVIRONMENT)
    assert known == [Creator.ENVIRONMENT]
    assert working() == []


async def test_more_puts_than_doors_all_arrive(house: House) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(3 * MAX_DOORS):
            nursery.start_soon(house.put, b"%d" % number, b"x" * number)
    assert {int(name): len(data) for name, data in house.uploads().items()} == {
        number: number for number in range(3 * MAX_DOORS)
    }


async def test_a_file_from_outside_is_put_by_its_descriptor(house: House, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with (tmp_path / "source").open("rb") as source:
        first = await house.doors.put_fd("downloads", b"a.txt", source.fileno(), creator=Creator.ENVIRONMENT)
        again = await house.doors.put_fd("downloads", b"a.txt", source.fileno(), creator=Creator.ENVIRONMENT)
    assert (first, again) == (Put(b"a.txt", 7), Put(b"a (1).txt", 7))
    assert (house.path / "downloads" / "a (1).txt").read_bytes() == b"content"


async def put_parts(house: House, source: Path, *parts: Part) -> list[list[Put]]:
    with source.open("rb") as file:
        making = house.doors.put_parts(
            "uploads", file.fileno(), parts, creator=Creator.USER, on_collision="refuse"
        )
        async with aclosing(making):
            return [some async for some in making]


async def test_many_files_are_made_of_parts_of_a_descriptor_a_few_at_a_time(
    house: House, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)))
    long = b"/".join([b"\xff" * 250] * 12)  # of which few fit into one command
    names = [b"%d/%d" % (n % 3, n) for n in range(40)] + [b"%d-%s" % (n, long) for n in range(10)]
    parts = [Part(name, number, number, 0o600) for number, name in enumerate(names)]
    made = await put_parts(house, tmp_path / "source", *parts)
    assert [put for some in made for put in some] == [Put(part.path, part.size_bytes) for part in parts]
    assert max(map(len, made)) == MOST_PARTS
    for part in parts:
        found = house.path / "uploads" / os.fsdecode(part.path)
        assert found.read_bytes() == bytes(range(256))[part.offset :][: part.size_bytes]
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
        assert (found.stat().st_uid, found.stat().st_gid) == MINE


async def test_a_part_that_the_descriptor_has_not_leaves_nothing_of_those_with_it(
    house: House, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    with pytest.raises(AgentfuseError):
        await put_parts(house, tmp_path / "source", Part(b"a", 0, 5, 0o600), Part(b"b", 5, 6, 0o600))
    assert house.uploads() == {}
    assert house.incoming() == []


async def test_files_and_directories_are_moved_and_removed(house: House) -> None:
    doors, user = house.doors, Creator.USER
    await house.put(b"a", b"1")
    assert await doors.move(("uploads", b"a"), ("workspace", b"in/b"), creator=user) == b"in/b"
    assert (house.path / "workspace" / "in" / "b").read_bytes() == b"1"
    await house.put(b"made/deep/file", b"1")
    with pytest.raises(UsageError, match="not empty"):
        await doors.remove("uploads", b"made", creator=user)
    await doors.remove("uploads", b"made", creator=user, recursive=True)
    with pytest.raises(NotFoundError):
        await doors.remove("uploads", b"made", creator=user)
    with pytest.raises(NotFoundError):
        await doors.move(("uploads", b"no"), ("uploads", b"yes"), creator=user)


async def test_lines_are_appended(house: House) -> None:
    for line in (b"one\n", b"two\n"):
        await house.doors.append("debug", b"log", line)
    assert (house.path / "debug" / "log").read_bytes() == b"one\ntwo\n"


async def test_where_the_mount_is_gone_nothing_is_written(house: House) -> None:
    house.doors.device += 1
    with pytest.raises(BusyError, match="being unmounted"):
        await house.put(b"a", b"1")
    assert house.uploads() == {}


async def test_two_who_close_the_doors_both_get_through(house: House) -> None:
    came, breaking = trio.Event(), trio.Event()

    async def never_ends() -> AsyncIterator[bytes]:
        came.set()
        try:
            yield b"some"
            await trio.sleep_forever()
        finally:
            breaking.set()

    async def put() -> None:
        with pytest.raises(BusyError):
            await house.doors.put("uploads", b"a", never_ends(), creator=Creator.USER)

    async def close() -> None:
        async with house.doors.closed():
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await came.wait()
        (pid,) = pids_of_doors(house)
        os.kill(pid, signal.SIGSTOP)  # so that breaking off takes its time
        nursery.start_soon(close)
        await breaking.wait()
        nursery.start_soon(close)
    await house.put(b"b", b"1")
    assert house.uploads() == {"b": b"1"}


async def test_what_a_killed_door_left_goes_with_the_next_put(house: House) -> None:
    async def kills() -> AsyncIterator[bytes]:
        yield b"some"
        (pid,) = pids_of_doors(house)
        os.kill(pid, signal.SIGKILL)
        yield b"more"

    with pytest.raises(EnvironmentProblem):
        await house.doors.put("uploads", b"a", kills(), creator=Creator.USER)
    await house.put(b"b", b"1")
    assert house.incoming() == []


async def test_what_a_killed_door_left_goes_although_the_next_put_fails(house: House) -> None:
    async def kills() -> AsyncIterator[bytes]:
        yield b"some"
        (pid,) = pids_of_doors(house)
        (house.path / f".agentfuse/incoming/{pid}").write_bytes(b"half")
        os.kill(pid, signal.SIGKILL)
        yield b"more"

    (house.path / "uploads/file").touch()
    with pytest.raises(EnvironmentProblem):
        await house.doors.put("uploads", b"a", kills(), creator=Creator.USER)
    with pytest.raises(WrongTypeError):
        await house.put(b"file/a", b"1")
    assert house.incoming() == []


async def test_parts_that_a_killed_door_left_go_with_the_next_put(house: House, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")

    async def kills() -> AsyncIterator[bytes]:
        yield b"some"
        (pid,) = pids_of_doors(house)
        for number in (0, MOST_PARTS - 1):
            (house.path / f".agentfuse/incoming/{pid}-{number}").write_bytes(b"half")
        os.kill(pid, signal.SIGKILL)
        yield b"more"

    with pytest.raises(EnvironmentProblem):
        await house.doors.put("uploads", b"a", kills(), creator=Creator.USER)
    await put_parts(house, tmp_path / "source", Part(b"b", 0, 5, 0o600))
    assert house.uploads() == {"b": b"01234"}
    assert house.incoming() == []


async def test_without_descriptors_a_door_is_an_error_like_others(house: House) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match="cannot start a process"):
            await house.put(b"a", b"1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await house.put(b"a", b"1")


async def test_a_full_region_takes_what_replaces_as_much(house: House) -> None:
    await house.put(b"a", b"1234567890")
    account = house.ledger.by_directory[b"uploads"]
    account.bytes_quota = account.bytes_used = 10
    await house.doors.put("uploads", b"a", pieces(b"12345"), creator=Creator.USER, size=5)
    await house.put(b"a", b"123456789")
    assert (house.uploads(), account.refusals) == ({"a": b"123456789"}, 0)
    for size in (None, 11):
        with pytest.raises(QuotaExceededError):
            await house.doors.put("uploads", b"a", pieces(b"1" * 11), creator=Creator.USER, size=size)


async def test_moving_what_is_not_there_makes_nothing(house: House) -> None:
    with pytest.raises(NotFoundError):
        await house.doors.move(("uploads", b"no"), ("workspace", b"new/x"), creator=Creator.USER)
    assert os.listdir(house.path / "workspace") == []


async def test_a_path_that_is_too_long_is_refused_at_once(house: House) -> None:
    with pytest.raises(UsageError, match="bytes"):
        await house.put(b"/".join([b"d" * 200] * 21), b"1")


async def test_a_tree_of_any_depth_is_removed(house: House) -> None:
    top = os.open(house.path / "uploads", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=top)
        below = os.open("d", os.O_RDONLY, dir_fd=top)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
        os.close(top)
        top = below
    os.close(top)
    await house.doors.remove("uploads", b"d", creator=Creator.USER, recursive=True)
    assert os.listdir(house.path / "uploads") == []
    assert house.incoming() == []


async def test_nothing_is_done_in_what_is_mounted_in_the_home(house: House) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    foreign = house.path / "uploads" / "deep" / "mounted"
    foreign.mkdir(parents=True)
    await trio.run_process(["mount", "-t", "tmpfs", "none", foreign])
    try:
        (foreign / "theirs").write_text("kept")
        with pytest.raises(BusyError, match="mounted"):
            await house.doors.remove("uploads", b"deep", creator=Creator.USER, recursive=True)
        with pytest.raises(UsageError, match="mounted"):
            await house.put(b"deep/mounted/mine", b"1")
        with pytest.raises(UsageError, match="mounted"):
            await house.doors.remove("uploads", b"deep/mounted/theirs", creator=Creator.USER)
        assert os.listdir(foreign) == ["theirs"]
    finally:
        await trio.run_process(["umount", foreign])


async def test_a_door_that_was_killed_while_it_waited_for_work_is_not_asked(house: House) -> None:
    async def tells() -> AsyncIterator[bytes]:
        pids.extend(pids_of_doors(house))
        yield b"1"

    pids: list[int] = []
    await house.doors.put("uploads", b"a", tells(), creator=Creator.USER)
    watched = os.pidfd_open(pids[0])
    os.kill(pids[0], signal.SIGKILL)
    await trio.lowlevel.wait_readable(watched)
    os.close(watched)
    await house.put(b"b", b"1")
    assert set(house.uploads()) == {"a", "b"}


async def test_a_ping_is_answered_by_the_mount_it_was_made_for_and_by_no_other(house: House) -> None:
    await house.doors.ping()
    house.doors.device += 1
    async with house.doors.closed():
        pass  # a door remembers where it goes
    with pytest.raises(AgentfuseError):
        await house.doors.ping()


async def test_a_ping_waits_for_no_slow_upload(house: House) -> None:
    async def never_ends() -> AsyncIterator[bytes]:
        begun.append(1)
        if len(begun) == MAX_DOORS:
            all_begun.set()
        yield b"some"
        await trio.sleep_forever()

    begun: list[int] = []
    all_begun = trio.Event()
    async with trio.open_nursery() as nursery:
        for number in range(MAX_DOORS):
            put = house.doors.put
            nursery.start_soon(partial(put, "uploads", b"%d" % number, never_ends(), creator=Creator.USER))
        with trio.fail_after(30):
            await all_begun.wait()
            await house.doors.ping()
        nursery.cancel_scope.cancel()
