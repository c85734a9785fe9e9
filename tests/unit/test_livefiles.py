"""Listings of a live home: a page reads what it returns, not what the tree holds, and nobody waits for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from agentfuse import livefiles
from agentfuse.control.contract import Page
from agentfuse.home import files as home_files
from agentfuse.home.files import FileFacts, Files
from agentfuse.home.walk import clear_tree
from agentfuse.livefiles import LiveFiles
from agentfuse.regions import DEFAULT_REGIONS

DEPTH = 1000


class CountedFiles(Files):
    """Counts what is read of a tree."""

    looks = 0
    names = 0

    def _facts(self, *arguments: Any, **options: Any) -> FileFacts:
        self.looks += 1
        return super()._facts(*arguments, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tree"
    (path / "uploads").mkdir(parents=True)
    yield path
    clear_tree(path)


@pytest.fixture
def files(tree: Path, monkeypatch: pytest.MonkeyPatch) -> CountedFiles:
    found = CountedFiles(tree, DEFAULT_REGIONS, agent="a", execution="e")
    names_behind = home_files._names_behind

    def counted(*arguments: Any) -> list[bytes]:
        names = names_behind(*arguments)
        found.names += len(names)
        return names

    monkeypatch.setattr(home_files, "_names_behind", counted)
    monkeypatch.setattr(livefiles, "PAGE_S", float("inf"))
    return found


@pytest.fixture
def live(files: CountedFiles, tree: Path) -> LiveFiles:
    return LiveFiles(files, tree, cast(Any, None), cast(Any, None), lambda _: None)


def nest(root: Path, depth: int, *, beside: int = 0) -> None:
    """Directories in directories, so many, each beside so many files."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        for number in range(beside):
            os.close(os.open(f"f{number}", os.O_CREAT, dir_fd=fd))
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


async def page(live: LiveFiles, limit: int, after: bytes | None) -> Page:
    return await live.list("uploads", b"", recursive=True, brief=False, limit=limit, after=after)


def paths(found: Page) -> list[bytes]:
    return [cast(FileFacts, facts).path for facts in found.entries]


async def test_nested_directories_are_listed_in_full_and_each_is_read_once(
    tree: Path, files: CountedFiles, live: LiveFiles
) -> None:
    nest(tree / "uploads", DEPTH)
    found: list[bytes] = []
    after: bytes | None = None
    while True:
        files.looks = files.names = 0
        got = await page(live, 300, after)
        found += paths(got)
        assert files.looks <= 300 + 2  # the directory itself, and whether there is more
        assert files.names <= 300 + 1
        if (after := got.after) is None:
            break
    assert found == [b"/".join([b"d"] * depth) for depth in range(1, DEPTH + 1)]


async def test_a_page_of_a_deep_and_wide_tree_reads_only_its_own_entries(
    tree: Path, files: CountedFiles, live: LiveFiles
) -> None:
    nest(tree / "uploads", 100, beside=20)
    found: list[bytes] = []
    after: bytes | None = None
    while True:
        files.looks = 0
        got = await page(live, 50, after)
        found += paths(got)
        assert files.looks <= 50 + 2
        if (after := got.after) is None:
            break
    assert len(found) == 100 * 21
    assert found == sorted(found, key=lambda path: path.split(b"/"))


async def test_a_page_that_takes_long_has_what_it_found_and_says_where_to_go_on(
    tree: Path, live: LiveFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    nest(tree / "uploads", 3, beside=2)
    everything = paths(await page(live, 100, None))
    assert len(everything) == 9
    monkeypatch.setattr(livefiles, "PAGE_S", 0.0)
    found: list[bytes] = []
    after: bytes | None = None
    while True:
        got = await page(live, 100, after)
        found += paths(got)
        if (after := got.after) is None:
            break
        assert len(got.entries) == 1
    assert found == everything


@pytest.mark.parametrize("holds", ["_names_behind", "etag_of"])
async def test_nobody_waits_for_a_cancelled_listing_which_reads_no_further(
    tree: Path, files: CountedFiles, live: LiveFiles, monkeypatch: pytest.MonkeyPatch, holds: str
) -> None:
    for name in "abcd":
        (tree / "uploads" / name).touch()
    begun, gate, ended = trio.Event(), threading.Event(), threading.Event()
    real, real_page = getattr(home_files, holds), livefiles._page

    def held(*arguments: Any) -> object:
        trio.from_thread.run_sync(begun.set)
        assert gate.wait(30)
        return real(*arguments)

    def watched(*arguments: Any, **options: Any) -> object:
        try:
            return real_page(*arguments, **options)
        finally:
            ended.set()

    monkeypatch.setattr(home_files, holds, held)
    monkeypatch.setattr(livefiles, "_page", watched)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page, live, 100, None)
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert not ended.is_set()
    gate.set()
    assert await trio.to_thread.run_sync(ended.wait, 30)
    assert files.looks == {"_names_behind": 1, "etag_of": 2}[holds]  # the directory itself; and "a"
