"""File trees of mounted homes: they keep what file trees promise, as those in the store do."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from mounts import Home, eventually
from stores import local_store

from agentfuse.admission import Quota
from agentfuse.client import AsyncHome, Part
from agentfuse.control import asks
from agentfuse.control.registry import Registry
from agentfuse.errors import (
    AgentfuseError,
    BusyError,
    ChangedError,
    ExistsError,
    QuotaExceededError,
    UnflushedError,
    UsageError,
    WrongTypeError,
)
from agentfuse.gateway.filetree import FileTree, NewFile
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.livetree import LiveFile, LiveTree, LocalFile
from agentfuse.gateway.spool import Spool, Spooled
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.home import marks
from agentfuse.home.tree import Home as HomeOnDisk
from agentfuse.regions import Creator
from agentfuse.snapshots.layout import tenant_owner

pytestmark = pytest.mark.mount

USER = Creator.USER
NO_PART = {"path": "b", "offset": 0, "size": 0}
NAMES = (b"a", b"b.txt", b"c (1)", "ü".encode(), b"\xff")


class Body:
    """A content in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.content)


def new(path: bytes, content: bytes = b"1", mode: int = 0o644) -> NewFile:
    return NewFile(path, Body(content), mode)


@pytest.fixture
def live(home: Home, monkeypatch: pytest.MonkeyPatch) -> LiveTree:
    """The workspace of a mounted home."""
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    return LiveTree(home.path, "workspace", trio.CapacityLimiter(4), trio.CapacityLimiter(4))


@asynccontextmanager
async def stored_tree(path: Path) -> AsyncIterator[StoredTree]:
    async with trio.open_nursery() as nursery:
        yield StoredTree(
            local_store(path),
            tenant_owner("acme"),
            "files",
            quota=Quota(10**9, 10**6),
            committer="g1",
            nursery=nursery,
            limits=Limits(),
        )


async def content(tree: FileTree, path: bytes, offset: int = 0, length: int | None = None) -> bytes:
    file = await tree.open(path)
    try:
        return b"".join([piece async for piece in file.stream(offset, length)])
    finally:
        await file.aclose()


async def everything(tree: FileTree) -> list[tuple[Any, ...]]:
    """All that both trees must agree on."""
    return [
        (
            node.path,
            node.type,
            node.size,
            node.mode,
            node.created_by,
            node.labels,
            node.is_frozen,
            await content(tree, node.path) if node.type == "file" else b"",
        )
        for node in await tree.list(b"", recursive=True)
    ]


async def said(answer: Awaitable[object]) -> object:
    """What an operation answers, or the kind of error that it raises."""
    try:
        return await answer
    except AgentfuseError as error:
        return type(error)


async def _put(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    file = new(path, dice.randbytes(dice.choice([0, 5, 3000])), dice.choice([0o644, 0o600, 0o755]))
    collision: Any = dice.choice(["replace", "refuse", "number"])
    made = await tree.put([file], creator=creator, on_collision=collision)
    return [(node.path, node.size, node.mode, node.created_by) for node in made]


async def _put_many(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    below = path + b"-d"
    files = [new(b"%s/%d" % (below, number)) for number in range(3)]
    made = await tree.put(files, creator=creator, directories=[below, below + b"/x"])
    return [node.path for node in made]


async def _delete(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    return await tree.delete(path, creator=creator, recursive=dice.random() < 0.5)


async def _move(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    return await tree.move(path, some_path(dice), creator=creator, overwrite=dice.random() < 0.5)


async def _copy(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    return await tree.copy(path, some_path(dice), creator=creator, overwrite=dice.random() < 0.5)


async def _mkdir(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    parents, exist_ok = dice.random() < 0.5, dice.random() < 0.5
    return await tree.mkdir(path, creator=creator, parents=parents, exist_ok=exist_ok)


async def _annotate(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    labels, mode = dice.choice([None, b"", b"tag"]), dice.choice([None, 0o640, 0o750])
    node = await tree.annotate(path, creator=creator, mode=mode, labels=labels)
    return node.path, node.mode, node.labels


async def _look(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    return [node.path for node in await tree.list(path, recursive=dice.random() < 0.5)]


async def _freeze(tree: FileTree, dice: random.Random, path: bytes, creator: Creator) -> object:
    for node in await tree.list(b"", recursive=True) if dice.random() < 0.5 else []:
        if node.is_frozen:
            await tree.set_frozen(node.path, False, creator=creator)
    node = await tree.set_frozen(path, dice.random() < 0.7, creator=creator)
    return node.path, node.is_frozen


OPERATIONS = (_put, _put, _put_many, _delete, _move, _copy, _mkdir, _annotate, _look, _freeze)


def some_path(dice: random.Random) -> bytes:
    return b"/".join(dice.choices(NAMES, k=dice.choice([1, 1, 2, 3])))


@pytest.fixture(params=["in memory", "spooled"])
def bodies(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Contents that travel, and those whose file the daemon reads."""
    with Spool(tmp_path) as spool:

        def spooled(content: bytes) -> Spooled:
            body = spool.begin()
            body.write(content)
            return body

        if request.param == "spooled":
            monkeypatch.setattr(f"{__name__}.Body", spooled)
        yield


@pytest.mark.usefixtures("bodies")
async def test_random_operations_are_the_same_to_a_live_and_a_stored_tree(
    live: LiveTree, tmp_path: Path
) -> None:
    dice = random.Random(20261122)
    done: list[str] = []
    async with stored_tree(tmp_path) as stored:
        await live.put([new(b"a/b.txt/c (1)")], creator=USER)
        await stored.put([new(b"a/b.txt/c (1)")], creator=USER)
        for number in range(150):
            seed_of_one, does = dice.random(), dice.choice(OPERATIONS)
            path, creator = some_path(dice), dice.choice(list(Creator))
            done.append(f"{does.__name__} {path!r}")
            one = await said(does(live, random.Random(seed_of_one), path, creator))
            other = await said(does(stored, random.Random(seed_of_one), path, creator))
            assert one == other, done[-5:]
            if number % 20 == 0:
                assert await everything(live) == await everything(stored), done[-12:]
        assert await everything(live) == await everything(stored)
        for each in await live.list(b"", recursive=True):
            if each.is_frozen:
                await live.set_frozen(each.path, False, creator=USER)
        for each in await live.list(b""):
            await live.delete(each.path, creator=USER, recursive=True)
        assert (await live.usage()).bytes == (await live.usage()).files == 0


async def test_of_those_who_replace_what_they_read_only_one_gets_through_and_no_append_is_lost(
    live: LiveTree, tmp_path: Path
) -> None:
    async def append(tree: FileTree, line: bytes) -> None:
        while True:
            file = await tree.open(b"log")
            before = b"".join([piece async for piece in file.stream()])
            await file.aclose()
            try:
                await tree.put([new(b"log", before + line)], creator=USER, if_match=file.node.etag)
            except ChangedError:
                await trio.lowlevel.checkpoint()
            else:
                return

    async with stored_tree(tmp_path) as stored:
        for tree in (live, stored):
            with pytest.raises(ChangedError):
                await tree.put([new(b"log")], creator=USER, if_match="none")
            await tree.put([new(b"log", b"")], creator=USER)
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(append, tree, b"%d\n" % number)
            lines = (await content(tree, b"log")).split()
            assert sorted(map(int, lines)) == list(range(8))


async def test_what_was_opened_stays_what_it_was_though_it_is_replaced(home: Home, live: LiveTree) -> None:
    before, after = os.urandom(3_000_000), os.urandom(3_000_001)
    await live.put([new(b"f", before)], creator=USER)
    file, again = await live.open(b"f"), await live.open(b"f")
    await live.put([new(b"f", after)], creator=USER)
    assert file.node.size == len(before)
    assert b"".join([piece async for piece in file.stream()]) == before
    assert b"".join([piece async for piece in again.stream(2_000_000, 5)]) == before[2_000_000:2_000_005]
    for opened in (file, again):
        await opened.aclose()
    for offset, length in ((0, 10), (5, None), (2_999_999, 10), (3_000_001, None), (9_000_000, 1), (7, 0)):
        end = None if length is None else offset + length
        assert await content(live, b"f", offset, length) == after[offset:end]
    with (home.path / "workspace/f").open("r+b") as agents:
        file = await live.open(b"f")
        agents.truncate(10)
        with pytest.raises(BusyError):
            async for _ in file.stream():
                pass
        await file.aclose()


async def test_what_is_on_this_host_comes_from_its_disk_and_all_else_from_the_daemon(
    home: Home, live: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = os.urandom(3_000_001)
    await live.put([new(b"here/f", large)], creator=USER)

    async def opened_locally() -> LocalFile:
        with trio.fail_after(30):
            while not isinstance(file := await live.open(b"here/f"), LocalFile):
                await file.aclose()  # its ctime is too young: nothing tells yet that it is the same
        return file

    file, again = await opened_locally(), await opened_locally()
    async with AsyncHome(home.path).open("workspace/here/f") as asked:
        etag = asked.etag
    assert (file.node.size, file.node.etag) == (len(large), etag)
    for offset, length in ((0, None), (5, 10), (2_999_999, 10), (3_000_001, None), (9_000_000, 1), (7, 0)):
        end = None if length is None else offset + length
        assert b"".join([piece async for piece in file.stream(offset, length)]) == large[offset:end]
    await live.put([new(b"here/f", b"another")], creator=USER)
    assert b"".join([piece async for piece in file.stream()]) == large
    await file.aclose()
    await file.aclose()
    await again.aclose()

    await live.put([new(b"here/f", large)], creator=USER)
    file = await opened_locally()
    os.truncate(home.path / "workspace/here/f", 10)
    with pytest.raises(BusyError):
        [piece async for piece in file.stream()]
    await file.aclose()

    await live.put([new(b"here/f", large)], creator=USER)
    await (await opened_locally()).aclose()
    backing = home.tree / "workspace/here/f"
    with backing.open("rb") as held:
        marks.write(held.fileno(), marks.Mark("ab" * 32))
        absent = await live.open(b"here/f")
        await absent.aclose()
        assert isinstance(absent, LiveFile)
        marks.remove(held.fileno())
    await (await opened_locally()).aclose()
    monkeypatch.setattr(HomeOnDisk, "tree", home.tree / "elsewhere", raising=False)
    monkeypatch.setattr(HomeOnDisk, "__init__", lambda *_: None)
    away = await live.open(b"here/f")
    assert isinstance(away, LiveFile)
    assert b"".join([piece async for piece in away.stream()]) == large
    await away.aclose()


async def test_a_directory_is_copied_whole_or_not_at_all_and_links_lead_nowhere(
    home: Home, live: LiveTree, scratch: Path
) -> None:
    (scratch / "secret").write_text("secret")
    work = home.path / "workspace/d"
    work.mkdir()
    (work / "big").write_bytes(os.urandom(9_000_000))
    (work / "link").symlink_to(scratch / "secret")
    (work / "script").touch(mode=0o750)
    os.mkfifo(work / "fifo")
    (home.path / "workspace/out").symlink_to(scratch)
    await live.copy(b"d", b"e/copy", creator=Creator.SYSTEM)
    copy = home.path / "workspace/e/copy"
    assert (copy / "big").read_bytes() == (work / "big").read_bytes()
    assert os.readlink(copy / "link") == str(scratch / "secret")
    assert (copy / "script").stat().st_mode & 0o777 == 0o750
    assert {node.name: node.type for node in await live.list(b"e/copy")} == {
        b"big": "file",
        b"fifo": "fifo",
        b"link": "symlink",
        b"script": "file",
    }
    for path in (b"out/secret", b"d/link"):
        with pytest.raises(AgentfuseError):
            await live.open(path)
    with pytest.raises(WrongTypeError):
        await live.put([new(b"out/x")], creator=USER)
    with pytest.raises(WrongTypeError):
        await live.copy(b"d/big", b"out/x", creator=USER)
    assert os.listdir(scratch) == ["secret"]
    usage = await live.usage()
    control = AsyncHome(home.path)
    await control.set_quota("workspace", bytes_quota=usage.bytes + 1_000_000)
    with pytest.raises(QuotaExceededError):
        await live.copy(b"d", b"too much", creator=USER)
    await control.set_quota("workspace", bytes_quota=usage.bytes_quota)
    assert (await live.usage()) == usage
    assert os.listdir(home.tree / ".agentfuse" / "incoming") == []


async def test_without_a_daemon_nothing_is_said_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(tmp_path / "run"))
    tree = LiveTree(tmp_path, "workspace", trio.CapacityLimiter(1), trio.CapacityLimiter(1))
    with pytest.raises(UnflushedError):
        await tree.stat(b"a")
    with pytest.raises(UnflushedError):
        await tree.list(b"")
    with pytest.raises(UnflushedError):
        await tree.put([new(b"a")], creator=USER)


async def test_many_spooled_files_are_all_there_told_once_and_keep_what_was_kept_of_them(
    home: Home, live: LiveTree, tmp_path: Path
) -> None:
    dice, agents = random.Random(5), AsyncHome(home.path)
    uploads = LiveTree(home.path, "uploads", trio.CapacityLimiter(4), trio.CapacityLimiter(4))
    sizes = [0, 1, 4_096, 300_000, 9_000_000, *dice.choices(range(5000), k=200)]
    with Spool(tmp_path) as spool:
        contents = {b"d%d/\xff%d" % (number % 7, number): dice.randbytes(s) for number, s in enumerate(sizes)}
        files = []
        for path, data in contents.items():
            body = spool.begin()
            body.write(data)
            files.append(NewFile(path, body, 0o640))
        made = await uploads.put(files, creator=Creator.ENVIRONMENT)
        assert [(node.path, node.size, node.mode, node.created_by) for node in made] == [
            (file.path, file.body.size, 0o640, Creator.ENVIRONMENT) for file in files
        ]
        for path, data in contents.items():
            assert (home.path / "uploads" / os.fsdecode(path)).read_bytes() == data
        labelled = files[3].path
        await uploads.annotate(labelled, creator=USER, labels=b"tag")
        again = await uploads.put(files[:20], creator=USER)
        assert [node.labels for node in again] == [b"tag" * (file.path == labelled) for file in files[:20]]
        numbered = await uploads.put(files[:2], creator=USER, on_collision="number")
        assert [node.path for node in numbered] == [path + b" (1)" for path in [*contents][:2]]
    told = []
    async with aclosing(agents.events(follow=True, region="uploads")) as events:
        with trio.fail_after(60):
            async for event in events:
                told.append(event)
                if event.path == os.fsdecode(numbered[-1].path):
                    break
    paths = [*contents, *[*contents][:20], *(node.path for node in numbered)]
    assert [event.path for event in told] == [os.fsdecode(path) for path in paths]
    assert {event.created_by for event in told[: len(files)]} == {Creator.ENVIRONMENT}
    assert os.listdir(home.tree / ".agentfuse/incoming") == []


async def test_spooled_files_come_to_a_daemon_of_before_the_gateways_update_as_well(
    home: Home, live: LiveTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = asks.put_parts

    def unknown(*parts: Any, **options: Any) -> Any:
        asked = known(*parts, **options)
        return dataclasses.replace(asked, url=asked.url.replace("/v1/parts/", "/v1/of-tomorrow/"))

    files = []
    with Spool(tmp_path) as spool, monkeypatch.context() as patched:
        patched.setattr(asks, "put_parts", unknown)
        for number in range(300):
            body = spool.begin()
            body.write(b"%d" % number)
            files.append(NewFile(b"before/%d" % number, body))
        made = await live.put(files, creator=USER, on_collision="number")
    assert [(node.path, node.size) for node in made] == [(file.path, file.body.size) for file in files]
    assert [await content(live, file.path) for file in files] == [b"%d" % n for n in range(300)]
    await live.delete(b"before", creator=USER, recursive=True)


async def test_of_spooled_files_that_one_stops_those_before_it_stay_and_none_is_there_in_part(
    home: Home, live: LiveTree, tmp_path: Path
) -> None:
    control = AsyncHome(home.path)
    with Spool(tmp_path) as spool:

        def spooled(path: bytes, size: int) -> NewFile:
            body = spool.begin()
            body.write(b"x" * size)
            return NewFile(path, body)

        (home.path / "workspace/dir").mkdir()
        quota = next(each for each in await control.regions() if each.name == "workspace").bytes_quota
        before = (await live.usage()).bytes + 1
        await live.put([spooled(b"taken", 1)], creator=USER)
        files = [spooled(b"a%d" % number, 10) for number in range(40)]
        for taken, error in ((b"taken", ExistsError), (b"dir", WrongTypeError), (b"taken/x", WrongTypeError)):
            row = [*files[:30], spooled(taken, 10), *files[30:]]
            with pytest.raises(error):
                await live.put(row, creator=USER, on_collision="refuse")
            there = {node.path: node.size for node in await live.list(b"") if node.path.startswith(b"a")}
            assert there == {file.path: 10 for file in files[:30]}
            for path in there:
                await live.delete(path, creator=USER)
        await control.set_quota("workspace", bytes_quota=before + 250)
        with pytest.raises(QuotaExceededError):
            await live.put(files, creator=USER)
        assert (await live.usage()).bytes == before + 250
        with pytest.raises(QuotaExceededError):
            await live.put([spooled(b"b", 100), spooled(b"c", 100)], creator=USER, on_collision="number")
        assert (await live.usage()).bytes == before + 250
        assert os.listdir(home.tree / ".agentfuse/incoming") == []
        with pytest.raises(WrongTypeError):
            await live.put([spooled(b"", 1)], creator=USER)
        with pytest.raises(UsageError):
            await live.put([spooled(b"../x", 1)], creator=USER)
        await control.set_quota("workspace", bytes_quota=quota)


async def test_parts_are_refused_that_the_descriptor_has_not_and_descriptors_that_are_no_files(
    home: Home, live: LiveTree, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    control = AsyncHome(home.path)
    with (tmp_path / "source").open("rb") as source:
        for offset, size in ((0, 11), (10, 1), (11, 0), (2**62, 2**62)):
            with pytest.raises(UsageError):
                await control.put_parts(source.fileno(), "workspace", [Part("a", offset, size)])
        (made,) = await control.put_parts(source.fileno(), "workspace", [Part("a", 3, 4)])
        assert (made.path, made.size) == ("a", 4)
    assert (home.path / "workspace/a").read_bytes() == b"3456"
    reader, writer = os.pipe()
    try:
        for fd in (reader, os.open(tmp_path, os.O_RDONLY)):
            with pytest.raises(UsageError, match="SCM_RIGHTS"):
                await control.put_parts(fd, "workspace", [Part("b", 0, 0)])
            os.close(fd)
    finally:
        os.close(writer)
    assert await control._client.ask(asks.stat("workspace/a"))  # the socket goes on
    with pytest.raises(UsageError, match="SCM_RIGHTS"):
        await control._client.ask(
            asks.put_parts("workspace", [NO_PART], creator="user", on_collision="refuse")
        )


async def test_a_file_of_the_home_itself_may_be_put_in_parts_too(home: Home, live: LiveTree) -> None:
    with (home.path / "workspace/source").open("w+b") as source:
        source.write(b"0123456789")
        source.flush()  # now the kernel asks for its size when somebody looks
        with trio.fail_after(60):
            (made,) = await AsyncHome(home.path).put_parts(source.fileno(), "workspace", [Part("own", 2, 5)])
    assert (made.path, await content(live, b"own")) == ("own", b"23456")


async def test_of_descriptors_that_come_along_none_stays_open(
    home: Home, live: LiveTree, tmp_path: Path
) -> None:
    def is_open() -> bool:
        assert home.process is not None
        for each in Path(f"/proc/{home.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(each) == str(tmp_path / "source"):
                    return True
        return False

    with (tmp_path / "source").open("wb") as source:
        for count in (1, 2, 3):
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(Registry(home.runtime).find(home.path).socket))
                request = [b"GET /v1/regions HTTP/1.1\r\nHost: a\r\n\r\n"]
                socket.send_fds(asking, request, [source.fileno()] * count)
                while asking.recv(65536):
                    pass
    assert await live.usage()  # it goes on
    await trio.to_thread.run_sync(eventually, lambda: not is_open())
