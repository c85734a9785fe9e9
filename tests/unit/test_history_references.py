"""How snapshots are named, what differs between two, and pins."""

from __future__ import annotations

from pathlib import Path

import pytest
from listings import directory, file, listing, snapshot, symlink
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import NotFoundError, StoreError, UsageError
from agentfuse.snapshots.changes import Summary, changes, summarise
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import snapshot_key
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.references import Reference, parse_reference, read_snapshot, resolve


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (b"a@12", Reference("a", 12, None)),
        (b"a@latest", Reference("a", 0, None)),
        (b"a@-3", Reference("a", -3, None)),
        (b"a.b-c@1:", Reference("a.b-c", 1, b"")),
        (b"a@1:d/x", Reference("a", 1, b"d/x")),
        (b"a@1:/d//./x/", Reference("a", 1, b"d/x")),
        (b"a@1:with:colon@2\n\xff", Reference("a", 1, b"with:colon@2\n\xff")),
    ],
)
def test_a_reference_names_a_snapshot_and_a_path(text: bytes, meant: Reference) -> None:
    assert parse_reference(text) == meant


@pytest.mark.parametrize(
    "text",
    [b"", b"a", b"a@", b"@1", b"a@x", b"a@1x", b"a@0", b"a@-0", b"a@1:../x", b"a/b@1", b".a@1", b"\xff@1"],
)
def test_what_names_no_snapshot_is_told_the_syntax(text: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert caught.value.hint


def test_references_count_back_over_gaps(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    history = History(store, "a", "shared")
    for number in range(1, 8):
        history.commit(snapshot(listing().values(), number))
    for number in (1, 3, 6):
        store.delete(snapshot_key("a", "shared", number))
    numbers = [resolve(history, Reference("a", back, None)) for back in (0, -1, -2, -3)]
    assert numbers == [7, 5, 4, 2]
    with pytest.raises(NotFoundError, match="only 4 snapshots"):
        resolve(history, Reference("a", -4, None))
    with pytest.raises(NotFoundError, match="no snapshot 6: it was collected"):
        read_snapshot(history, "a", 6)
    with pytest.raises(NotFoundError, match="no snapshot 8: there is none yet"):
        read_snapshot(history, "a", 8)


def test_an_agent_without_a_history_is_not_found(tmp_path: Path) -> None:
    history = History(local_store(tmp_path), "a", "shared")
    with pytest.raises(NotFoundError, match="has no snapshot in file://"):
        resolve(history, Reference("a", 0, None))


def test_changes_are_those_of_substance() -> None:
    before = listing(directory(b"d"), file(b"d/x", b"1"), file(b"gone", b"22"), symlink(b"l", b"t"))
    after = listing(
        directory(b"d", mtime_ns=9),
        file(b"d/x", b"333"),
        file(b"new", b"4444"),
        symlink(b"l", b"u"),
        directory(b"e"),
    )
    found = {change.path: (change.kind, change.new_bytes) for change in changes(before, after)}
    assert found == {
        b"d/x": ("changed", 3),
        b"e": ("added", 0),
        b"gone": ("removed", 0),
        b"l": ("changed", 0),
        b"new": ("added", 4),
    }
    assert list(found) == sorted(found)
    assert summarise(before, after) == Summary(added=1, removed=1, changed=2, bytes=7)
    assert summarise(before, before) == Summary()


def test_pins_come_and_go(tmp_path: Path) -> None:
    store = CountingStore(local_store(tmp_path))
    pins = Pins(store, "a", "shared")
    assert list(pins.numbers()) == []
    for number in (12, 3, 12):
        pins.add(number)
    store.put("agents/a/shared/pins/readme", b"")
    assert list(pins.numbers()) == [3, 12]
    assert pins.is_pinned(3)
    pins.remove(3)
    pins.remove(3)
    assert list(pins.numbers()) == [12]
    assert not pins.is_pinned(3)


def test_an_unreachable_store_is_not_without_pins(tmp_path: Path) -> None:
    down = Pins(FaultyStore(local_store(tmp_path), lambda *_: "before"), "a", "shared")
    for ask in (lambda: list(down.numbers()), lambda: down.is_pinned(1)):
        with pytest.raises(StoreError, match="injected"):
            ask()


def test_a_region_that_an_execution_kept_is_named_by_both() -> None:
    reference = parse_reference(b"alice/run-7/workspace@latest:src/main.py")
    assert (reference.agent, reference.region) == ("alice", "executions/run-7/workspace")
    assert (reference.number, reference.path, reference.is_memory) == (0, b"src/main.py", False)
    assert parse_reference(b"alice@3").is_memory
    for wrong in (b"alice/run-7@1", b"a/b/c/d@1", b"a//c@1", b"/b/c@1", b"a/b/@1", b"a/../c@1"):
        with pytest.raises(UsageError):
            parse_reference(wrong)
