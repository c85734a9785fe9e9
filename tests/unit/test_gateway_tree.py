"""Stored trees beneath HTTP: drafts of listings, what a commit costs, what a race and a failure leave."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from stores import CountingStore, FaultyStore, local_store

from agentfuse.admission import Quota
from agentfuse.errors import (
    AgentfuseError,
    ChangedError,
    ExistsError,
    FrozenError,
    NotEmptyError,
    NotFoundError,
    QuotaExceededError,
    StoreError,
    UsageError,
    WrongTypeError,
)
from agentfuse.gateway.draft import Draft
from agentfuse.gateway.filetree import FileTree, NewFile, clean
from agentfuse.gateway.limits import Limits
from agentfuse.gateway.storedtree import StoredTree
from agentfuse.objectstore import ObjectStore
from agentfuse.regions import Creator
from agentfuse.snapshots.collect import Collector, tenants
from agentfuse.snapshots.entries import Entry, check, totals_of
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import tenant_owner
from agentfuse.snapshots.retention import MIN_GRACE_S, Policy

USER = Creator.USER
PLENTY = Quota(10**9, 10**6)
OWNER = tenant_owner("acme")


class Body:
    """A content in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.content)


def new(path: bytes, content: bytes = b"1") -> NewFile:
    return NewFile(path, Body(content))


@asynccontextmanager
async def tree_on(store: ObjectStore, name: str = "g1", quota: Quota = PLENTY) -> AsyncIterator[StoredTree]:
    async with trio.open_nursery() as nursery:
        yield StoredTree(store, OWNER, "files", quota=quota, committer=name, nursery=nursery, limits=Limits())


Opened = Callable[..., AbstractAsyncContextManager[StoredTree]]


async def content(tree: FileTree, path: bytes) -> bytes:
    file = await tree.open(path)
    return b"".join([piece async for piece in file.stream()])


async def paths(tree: FileTree, path: bytes = b"") -> list[bytes]:
    return [node.path for node in await tree.list(path, recursive=True)]


# -- drafts

ROOT = {b"": Entry(path=b"", type="dir", mode=0o755, mtime_ns=0)}
names = st.sampled_from([b"a", b"b", b"c"])
some_paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
operations = st.one_of(
    st.tuples(
        st.just("put"), some_paths, st.integers(0, 40), st.sampled_from(["replace", "refuse", "number"])
    ),
    st.tuples(st.just("delete"), some_paths, st.booleans()),
    st.tuples(st.just("move"), some_paths, some_paths, st.booleans()),
    st.tuples(st.just("copy"), some_paths, some_paths, st.booleans()),
    st.tuples(st.just("mkdir"), some_paths, st.booleans(), st.booleans()),
)


def _do(draft: Draft, operation: tuple[Any, ...]) -> None:
    match operation:
        case ("put", path, size, on_collision):
            sha256 = hashlib.sha256(bytes(size)).hexdigest()
            draft.put(path, size, sha256, 0o644, on_collision)
        case ("delete", path, recursive):
            draft.delete(path, recursive=recursive)
        case ("move", source, target, overwrite):
            draft.move(source, target, overwrite=overwrite)
        case ("copy", source, target, overwrite):
            draft.copy(source, target, overwrite=overwrite)
        case ("mkdir", path, parents, exist_ok):
            draft.mkdir(path, parents=parents, exist_ok=exist_ok)


@given(st.lists(operations, max_size=40))
def test_a_draft_is_sound_counts_right_and_keeps_within_its_quota(run: list[tuple[Any, ...]]) -> None:
    quota = Quota(100, 12)
    draft = Draft(ROOT, quota, 1)
    for operation in run:
        before = dict(draft.entries)
        try:
            draft.attempt(lambda draft, operation=operation: _do(draft, operation), USER)  # type: ignore[misc]
        except AgentfuseError:
            assert draft.entries == before
        listing = draft.listing()
        totals = totals_of(check(listing.values()))
        assert (draft.bytes, draft.files) == (totals.bytes, totals.entries)
        assert draft.bytes <= quota.bytes
        assert draft.files <= quota.files


def test_names_of_one_inode_are_charged_once_and_parted_when_one_is_left() -> None:
    file = Entry(
        path=b"a", type="file", mode=0o644, mtime_ns=0, size=60, sha256="0" * 64, object="1" * 64, link=1
    )
    other = Entry(
        path=b"b", type="file", mode=0o644, mtime_ns=0, size=60, sha256="0" * 64, object="1" * 64, link=1
    )
    draft = Draft({**ROOT, b"a": file, b"b": other}, Quota(100, 10), 1)
    assert (draft.bytes, draft.files) == (60, 1)
    draft.attempt(lambda draft: draft.move(b"a", b"d/a", overwrite=False), USER)
    assert (draft.bytes, draft.files) == (60, 2)
    assert draft.listing()[b"d/a"].link == 1
    with pytest.raises(QuotaExceededError):
        draft.attempt(lambda draft: draft.copy(b"b", b"c", overwrite=False), USER)
    draft.attempt(lambda draft: draft.delete(b"d", recursive=True), USER)
    assert (draft.bytes, draft.files, draft.listing()[b"b"].link) == (60, 1, 0)


def test_a_tree_beyond_its_quota_may_shrink_and_not_grow() -> None:
    draft = Draft(ROOT, PLENTY, 1)
    draft.attempt(lambda draft: draft.put(b"a", 500, "0" * 64, 0o644, "replace"), USER)
    draft = Draft(draft.entries, Quota(100, 10), 1)
    with pytest.raises(QuotaExceededError):
        draft.attempt(lambda draft: draft.put(b"b", 1, "0" * 64, 0o644, "replace"), USER)
    draft.attempt(lambda draft: draft.put(b"a", 400, "0" * 64, 0o644, "replace"), USER)
    assert draft.bytes == 400


@pytest.mark.parametrize(
    ("text", "path"),
    [("/a//b/./c/", b"a/b/c"), ("", b""), ("/", b""), ("a\udcff", b"a\xff"), ("...", b"...")],
)
def test_paths_of_clients_become_relative(text: str, path: bytes) -> None:
    assert clean(text) == path


@pytest.mark.parametrize("text", ["..", "a/../b", "a\0", "\ud800", "x" * 256, "a/" * 2100])
def test_paths_that_lead_out_or_nowhere_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        clean(text)


# -- trees


async def test_every_operation_as_it_is_promised(tmp_path: Path) -> None:
    async with tree_on(local_store(tmp_path)) as tree:
        made = await tree.put([new(b"d/a", b"1"), new(b"d/b", b"")], creator=USER)
        assert [(node.path, node.size, node.name) for node in made] == [(b"d/a", 1, b"a"), (b"d/b", 0, b"b")]
        (again,) = await tree.put([new(b"d/a", b"22")], creator=USER, on_collision="number")
        assert again.path == b"d/a (1)"
        with pytest.raises(ExistsError):
            await tree.put([new(b"d/a")], creator=USER, on_collision="refuse")
        with pytest.raises(WrongTypeError):
            await tree.put([new(b"x"), new(b"d/a/b")], creator=USER)
        await tree.copy(b"d", b"e/f", creator=USER)
        assert await content(tree, b"e/f/a (1)") == b"22"
        with pytest.raises(ExistsError):
            await tree.copy(b"d/a", b"d/b", creator=USER)
        await tree.copy(b"d/a", b"d/b", creator=USER, overwrite=True)
        assert await content(tree, b"d/b") == b"1"
        with pytest.raises(NotFoundError):
            await tree.mkdir(b"x/y", creator=USER)
        with pytest.raises(NotEmptyError):
            await tree.delete(b"d", creator=USER)
        await tree.delete(b"d", creator=USER, recursive=True)
        await tree.move(b"e/f", b"g", creator=Creator.SYSTEM)
        assert await paths(tree) == [b"e", b"g", b"g/a", b"g/a (1)", b"g/b"]
        assert [node.path for node in await tree.list(b"g")] == [b"g/a", b"g/a (1)", b"g/b"]
        await tree.copy(b"g", b"h", creator=Creator.ENVIRONMENT)
        creators = {node.path: node.created_by.value for node in await tree.list(b"", recursive=True)}
        assert (creators[b"g/a"], creators[b"h"], creators[b"h/a"]) == ("user", "environment", "environment")
        await tree.delete(b"h", creator=USER, recursive=True)
        with pytest.raises(WrongTypeError):
            await tree.list(b"g/a")
        with pytest.raises(WrongTypeError):
            await tree.open(b"g")
        with pytest.raises(NotFoundError):
            await tree.stat(b"missing")
        usage = await tree.usage()
        assert (usage.bytes, usage.files) == (3, 5)


async def test_what_is_frozen_stays_until_it_is_thawed(tmp_path: Path) -> None:
    async with tree_on(local_store(tmp_path)) as tree:
        await tree.put([new(b"d/a", b"1"), new(b"b", b"2")], creator=USER)
        assert (await tree.set_frozen(b"d/a", True, creator=USER)).is_frozen
        for refused in (
            lambda: tree.put([new(b"d/a", b"3")], creator=USER),
            lambda: tree.delete(b"d/a", creator=USER),
            lambda: tree.delete(b"d", creator=USER, recursive=True),
            lambda: tree.move(b"d", b"e", creator=USER),
            lambda: tree.move(b"b", b"d/a", creator=USER, overwrite=True),
            lambda: tree.annotate(b"d/a", creator=USER, mode=0o600),
        ):
            with pytest.raises(FrozenError):
                await refused()
        await tree.copy(b"d", b"e", creator=USER)
        await tree.put([new(b"e/a", b"3")], creator=USER)
        with pytest.raises(WrongTypeError):
            await tree.set_frozen(b"d", True, creator=USER)
        assert not (await tree.set_frozen(b"d/a", False, creator=USER)).is_frozen
        await tree.delete(b"d", creator=USER, recursive=True)


async def test_what_was_changed_since_it_was_read_is_not_removed(tmp_path: Path) -> None:
    async with tree_on(local_store(tmp_path)) as tree:
        await tree.put([new(b"d/a"), new(b"d/b"), new(b"e")], creator=USER)
        read = [await tree.stat(b"d"), *await tree.list(b"d", recursive=True)]
        for change in (new(b"d/c"), new(b"d/a", b"2")):
            await tree.put([change], creator=USER)
            with pytest.raises(ChangedError):
                await tree.delete_unchanged(read, creator=USER)
            assert await content(tree, change.path) == change.body.content  # type: ignore[attr-defined]
            await tree.delete(b"d/c", creator=USER) if change.path == b"d/c" else None
        await tree.delete(b"d/a", creator=USER)
        with pytest.raises(ChangedError):
            await tree.delete_unchanged(read, creator=USER)
        await tree.delete_unchanged([await tree.stat(b"d"), await tree.stat(b"d/b")], creator=USER)
        assert await paths(tree) == [b"e"]
        with pytest.raises(ChangedError):
            await tree.delete_unchanged(read, creator=USER)


async def test_a_small_upload_costs_one_pack_one_snapshot_and_one_look(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    async with tree_on(store) as tree:
        await tree.put([new(b"a"), new(b"b", b"2")], creator=USER)
        store.reset()
        await tree.put([new(b"c", b"3"), new(b"d", b"4")], creator=USER)
        assert store.requests == {"list": 1, "put_if_absent": 2}
        store.reset()
        await tree.put([new(b"e", b"3")], creator=USER)  # the content is there already
        await tree.move(b"e", b"f", creator=USER)
        assert store.requests == {"list": 2, "put_if_absent": 2}
        store.reset()
        assert len(await tree.list(b"")) == 5
        assert store.requests == {"list": 1}


async def test_what_many_want_at_a_time_is_one_snapshot(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    async with tree_on(store) as tree, trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(lambda n: tree.put([new(b"%d" % n, b"%d" % n)], creator=USER), number)
    snapshots = list(History(store, OWNER, "files").numbers())
    assert len(snapshots) <= 3
    async with tree_on(store) as tree:
        assert len(await paths(tree)) == 50
        assert await content(tree, b"49") == b"49"


async def test_who_loses_a_race_does_it_again_upon_the_winner(tmp_path: Path) -> None:
    quota = Quota(10, 100)
    async with (
        tree_on(local_store(tmp_path), "g1", quota) as one,
        tree_on(local_store(tmp_path), "g2", quota) as other,
    ):
        await one.put([new(b"a", b"12345")], creator=USER)
        await other.put([new(b"b", b"1234")], creator=USER)
        with pytest.raises(QuotaExceededError):
            await one.put([new(b"c", b"12")], creator=USER)
        await one.put([new(b"c", b"1")], creator=USER)
        assert await paths(other) == [b"a", b"b", b"c"]
        newest = History(local_store(tmp_path), OWNER, "files").read(3)
        assert (newest.follows, newest.execution) == (2, "g1")


async def test_large_contents_that_are_refused_do_not_travel(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    async with tree_on(store, quota=Quota(3_000_000, 10)) as tree:
        await tree.put([new(b"a", bytes(2_000_000))], creator=USER)
        store.reset()
        with pytest.raises(QuotaExceededError):
            await tree.put([new(b"b", b"x" * 2_000_000)], creator=USER)
        assert store.puts == 0


async def test_a_commit_whose_answer_is_lost_is_recognised(tmp_path: Path) -> None:
    def fails(_: int, method: str, key: str) -> str | None:
        return "after" if method == "put_if_absent" and "/snapshots/" in key else None

    async with tree_on(FaultyStore(local_store(tmp_path), fails)) as tree:
        await tree.put([new(b"a")], creator=USER)
        assert await paths(tree) == [b"a"]


async def test_what_fails_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    broken = True

    def fails(_: int, method: str, key: str) -> str | None:
        return "before" if broken and method == "put_if_absent" else None

    async with tree_on(FaultyStore(local_store(tmp_path), fails)) as tree:
        with pytest.raises(StoreError):
            await tree.put([new(b"a")], creator=USER)
        assert await paths(tree) == []
        broken = False
        await tree.put([new(b"a", b"2")], creator=USER)
        assert await content(tree, b"a") == b"2"


async def test_a_damaged_content_never_comes_whole(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    async with tree_on(store) as tree:
        await tree.put([new(b"a", b"right"), new(b"big", bytes(3_000_000))], creator=USER)
        for found in list(store.list(f"{OWNER}/objects/")):
            store.put(found.key, b"wrong"[: found.size_bytes] + bytes(found.size_bytes - 5))
        for path in (b"a", b"big"):
            received = bytearray()
            file = await tree.open(path)
            with pytest.raises(StoreError):
                async for piece in file.stream():
                    received += piece
            assert len(received) < file.node.size


async def test_tenants_and_agents_of_one_name_do_not_meet(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    async with tree_on(store) as tree:
        await tree.put([new(b"a")], creator=USER)
    assert {found.key.split("/")[0] for found in store.list("")} == {"tenants"}
    assert History(store, "acme", "files").newest() == 0


async def test_the_garbage_of_a_tenant_is_collected_like_an_agents(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    async with tree_on(store) as tree:
        for number in range(5):
            await tree.put([new(b"a", b"%d" % number)], creator=USER)
        await tree.put([new(b"b", b"kept")], creator=USER)
    assert list(tenants(store)) == [OWNER]
    policy = Policy(keep_last=1, keep_daily=0, grace_s=MIN_GRACE_S)
    long_ago = time.time() - 10 * 86400
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    report = Collector(store, OWNER, "files").run(policy)
    assert report.kept_snapshots == [6]
    assert report.deleted_objects == 4
    async with tree_on(store) as tree:
        assert await content(tree, b"a") == b"4"
        assert await content(tree, b"b") == b"kept"
