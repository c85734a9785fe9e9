"""Merging texts: what comes together by line, what stays a conflict, and that no line gets lost."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import Run
from stores import CountingStore, FaultyStore, local_store

from agentfuse.errors import StoreError
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import object_key
from agentfuse.sync import merge, textmerge
from agentfuse.sync.textmerge import MAX_TEXT_BYTES, merge_texts

BASE = b"# Notes\n- one\n- two\n- three\n"


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(local_store(tmp_path))


# -- the texts


@pytest.mark.parametrize(
    ("base", "theirs", "mine", "merged"),
    [
        (BASE, BASE + b"t\n", BASE + b"m\n", BASE + b"t\nm\n"),
        (BASE, b"top\n" + BASE, BASE + b"m\n", b"top\n" + BASE + b"m\n"),
        (BASE, BASE.replace(b"one", b"1"), BASE.replace(b"three", b"3"), b"# Notes\n- 1\n- two\n- 3\n"),
        (BASE, BASE.replace(b"- two\n", b""), BASE + b"m\n", b"# Notes\n- one\n- three\nm\n"),
        (BASE, BASE.replace(b"one", b"1"), BASE.replace(b"one", b"eins"), None),
        (BASE, b"rewritten\n", BASE + b"m\n", None),
        (BASE, b"", BASE + b"m\n", None),
        # changes that touch
        (BASE, BASE + b"t\n", BASE.replace(b"- three\n", b""), b"# Notes\n- one\n- two\nt\n"),
        (BASE, BASE.replace(b"three", b"3"), BASE + b"m\n", BASE.replace(b"three", b"3") + b"m\n"),
        (
            BASE,
            BASE.replace(b"- two\n", b"t\n- two\n"),
            BASE.replace(b"two", b"2"),
            BASE.replace(b"- two", b"t\n- 2"),
        ),
        (
            BASE,
            BASE.replace(b"- two\n", b"2\nt\n"),
            BASE.replace(b"- two", b"2"),
            BASE.replace(b"- two", b"2\nt"),
        ),
        (BASE, BASE.replace(b"two", b"2"), BASE.replace(b"- two\n", b""), None),
        (BASE, b"# Notes\nt\n- one\n", b"# Notes\nm\n- one\n", None),
        (b"", b"t\n", b"m\n", b"t\nm\n"),
        (b"a\r\n", b"a\r\nt\r\n", b"a\r\nm\r\n", b"a\r\nt\r\nm\r\n"),
        # a last line without its end
        (b"a", b"a\nt", b"a\nm", b"a\nt\nm"),
        (b"a\n", b"a\nt", b"a\nm\n", b"a\nt\nm"),
        (b"a", b"a\nt\n", b"a\nm", b"a\nt\nm\n"),
        (b"a\n", b"b\n", b"a", b"b"),
        # a merge that is done again, and one that goes on from there
        (BASE, BASE + b"t\nm\n", BASE + b"m\n", BASE + b"t\nm\n"),
        (BASE, BASE + b"t\nm\n", BASE + b"m\nm2\n", BASE + b"t\nm\nm2\n"),
        # what is no text
        (b"a\n", b"a\n\xff\n", b"a\nm\n", None),
        (b"a\n", b"a\nt\n", b"a\n\0\n", None),
        (b"\xff\n", b"\xff\nt\n", b"\xff\nm\n", None),
        (b"x" * MAX_TEXT_BYTES + b"\n", b"t\n", b"m\n", None),
        # without a base
        (None, b"# Notes\nt\n", b"# Notes\nm\n", b"# Notes\nt\nm\n"),
        (None, b"# Notes\nt\n", b"# Notes\n", b"# Notes\nt\n"),
        (None, b"# Notes\nt\n", b"# Notes\nt\nm\n", b"# Notes\nt\nm\n"),
        (None, b"# Notes\nt\nm\n", b"# Notes\nm\n", b"# Notes\nt\nm\n"),
        (None, b"", b"m\n", b"m\n"),
        (None, b"t\n", b"m\n", None),
        (None, b"\nt\n", b"\nm\n", None),
        (None, b'{\n "t": 1\n}\n', b'{\n "m": 1\n}\n', None),
        (None, b"#!/bin/sh\nt\n", b"#!/bin/sh\nm\n", None),
    ],
)
def test_what_comes_together(base: bytes | None, theirs: bytes, mine: bytes, merged: bytes | None) -> None:
    assert merge_texts(base, theirs, mine) == merged


def texts(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda found, is_terminated: b"\n".join(found) + (b"\n" if found and is_terminated else b""),
        st.lists(lines, max_size=12),
        st.booleans(),
    )


TEXTS = texts(st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e"]))


def edits(base: bytes) -> st.SearchStrategy[bytes]:
    """What a program makes of a text: some lines taken away, changed or put in."""

    def edit(seed: int) -> bytes:
        dice = random.Random(seed)
        lines = base.split(b"\n")
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(lines) + 1)
            lines[at : at + dice.randrange(2)] = [b"new %d" % dice.randrange(6)] * dice.randrange(3)
        return b"\n".join(lines)

    return st.builds(edit, st.integers(0, 2**32))


@st.composite
def triples(draw: st.DrawFn) -> tuple[bytes | None, bytes, bytes]:
    base = draw(TEXTS)
    has_base = draw(st.sampled_from([True, True, True, False]))
    return base if has_base else None, draw(edits(base) | TEXTS), draw(edits(base) | TEXTS)


@given(triples())
@settings(max_examples=2000, deadline=None)
def test_no_line_that_a_side_added_is_missing_and_none_is_made_up(
    triple: tuple[bytes | None, bytes, bytes],
) -> None:
    base, theirs, mine = triple
    merged = merge_texts(base, theirs, mine)
    if merged is None:
        return
    of_base, of_theirs, of_mine, of_merged = (
        Counter((text or b"").split(b"\n")) for text in (base, theirs, mine, merged)
    )
    del of_merged[b""], of_theirs[b""], of_mine[b""]  # blank lines may be shared at the seams
    for side in (of_theirs, of_mine):
        added = side - of_base
        assert not added - of_merged
    assert not of_merged - (of_theirs + of_mine)


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_what_both_append_stands_in_committed_order(base: bytes, theirs: bytes, mine: bytes) -> None:
    base = base if base.endswith(b"\n") or not base else base + b"\n"
    theirs, mine = (
        b"".join(b"%s %s\n" % (who, x) for x in t.split()) for who, t in ((b"t", theirs), (b"m", mine))
    )
    assert merge_texts(base, base + theirs, base + mine) == base + theirs + mine


@given(triples())
@settings(max_examples=1000, deadline=None)
def test_a_merge_that_is_done_again_loses_nothing_new(
    triple: tuple[bytes | None, bytes, bytes],
) -> None:
    base, theirs, mine = triple
    merged = merge_texts(base, theirs, mine)
    if merged is not None and (again := merge_texts(base, merged, mine)) is not None:
        before, first, second = (Counter((text or b"").split()) for text in (base, merged, again))
        # Of a line that the base has, too, nothing tells whether it is the one that a side took away.
        assert not (first - before) - second


@given(TEXTS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_a_side_that_changed_nothing_leaves_the_other(base: bytes, other: bytes) -> None:
    assert merge_texts(base, other, base) == other
    assert merge_texts(base, base, other) == other
    assert merge_texts(base, other, other) == other


@given(TEXTS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_matches_are_matches(one: bytes, other: bytes) -> None:
    a, b = one.split(b"\n"), other.split(b"\n")
    blocks = textmerge.matching_blocks(a, b)
    for (start_a, start_b, length), (next_a, next_b, _) in itertools.pairwise([*blocks, (len(a), len(b), 0)]):
        assert a[start_a : start_a + length] == b[start_b : start_b + length]
        assert start_a + length <= next_a
        assert start_b + length <= next_b


@pytest.mark.parametrize("kind", ["reversed", "same line", "shuffled", "blank between"])
def test_no_text_takes_long(kind: str) -> None:
    lines = [b"%06d" % number for number in range(140_000)]
    if kind == "same line":
        lines = [b"x"] * 500_000
    elif kind == "blank between":
        lines = [line for number in range(70_000) for line in (b"%06d" % number, b"")]
    other = lines[::-1]
    if kind == "shuffled":
        random.Random(1).shuffle(other)
    base, theirs, mine = (b"\n".join(each) for each in (lines, other, [*lines[:-9], b"mine", *lines[-9:]]))
    begun = time.process_time()
    merge_texts(base, theirs, mine)
    merge_texts(None, b"same\n" + theirs, b"same\n" + mine)
    assert time.process_time() - begun < 10


# -- in a commit


def restored(tmp_path: Path, store: CountingStore, name: str) -> Run:
    run = Run(tmp_path, store, name)
    run.restore()
    return run


def two_runs(tmp_path: Path, store: CountingStore, base: bytes | None = BASE) -> tuple[Run, Run]:
    first = Run(tmp_path, store, "e0")
    first.write("unchanged", b"0")
    if base is not None:
        first.write("notes.md", base)
    first.commit()
    return restored(tmp_path, store, "e1"), restored(tmp_path, store, "e2")


def newest(tmp_path: Path, store: CountingStore) -> dict[str, bytes]:
    name = f"look {len(list(tmp_path.iterdir()))}"
    root = restored(tmp_path, store, name).root
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_two_runs_that_append_keep_both_lines_and_the_local_file_stays(
    tmp_path: Path, store: CountingStore
) -> None:
    one, two = two_runs(tmp_path, store)
    one.write("notes.md", BASE + b"- from e1\n")
    two.write("notes.md", BASE + b"- from e2\n")
    one.commit()
    store.reset()
    report = two.commit()
    assert report.merged == ("notes.md",)
    assert not report.conflicts
    assert store.puts == 2
    assert (two.root / "notes.md").read_bytes() == BASE + b"- from e2\n"
    merged = BASE + b"- from e1\n- from e2\n"
    assert newest(tmp_path, store) == {"notes.md": merged, "unchanged": b"0"}
    store.reset()
    assert two.commit().number is None
    assert not store.requests


@pytest.mark.parametrize("forgets", [False, True])
def test_runs_that_go_on_appending_never_lose_or_double_a_line(
    tmp_path: Path, store: CountingStore, forgets: bool
) -> None:
    runs = two_runs(tmp_path, store)
    for step in range(6):
        for run in runs:
            with (run.root / "notes.md").open("ab") as notes:
                notes.write(b"- %d of %s\n" % (step, run.execution.encode()))
            if forgets:
                run.another_process()
            report = run.commit()
            assert not report.conflicts, step
    found = newest(tmp_path, store)
    assert list(found) == ["notes.md", "unchanged"]
    lines = [b"- %d of e%d" % (step, number) for step in range(6) for number in (1, 2)]
    assert found["notes.md"] == BASE + b"\n".join(lines) + b"\n"


def test_a_commit_whose_note_got_lost_is_merged_again_without_doubling(
    tmp_path: Path, store: CountingStore
) -> None:
    one, two = two_runs(tmp_path, store)
    one.write("notes.md", BASE + b"- from e1\n")
    one.commit()
    two.write("notes.md", BASE + b"- from e2\n")
    two.index.close()
    index = {path: path.read_bytes() for path in two.home.glob("index*")}
    two.commit()
    two.index.close()
    for path, content in index.items():
        path.write_bytes(content)
    two.another_process()
    assert two.commit().number is None
    two.write("notes.md", BASE + b"- from e2\n- more\n")
    two.commit()
    assert newest(tmp_path, store)["notes.md"] == BASE + b"- from e1\n- from e2\n- more\n"


def test_a_real_overlap_keeps_both(tmp_path: Path, store: CountingStore) -> None:
    one, two = two_runs(tmp_path, store)
    one.write("notes.md", BASE.replace(b"one", b"1"))
    two.write("notes.md", BASE.replace(b"one", b"eins"))
    one.commit()
    report = two.commit()
    assert not report.merged
    (conflict,) = report.conflicts
    assert (conflict.path, conflict.kept_at) == (b"notes.md", b".conflicts/e2/notes.md")
    assert conflict.base is not None
    assert conflict.theirs is not None
    assert len({conflict.base.sha256, conflict.theirs.sha256, conflict.mine.sha256}) == 3
    found = newest(tmp_path, store)
    assert found["notes.md"] == BASE.replace(b"one", b"1")
    assert found[".conflicts/e2/notes.md"] == BASE.replace(b"one", b"eins")


def test_files_that_both_made_merge_only_if_they_are_notes(tmp_path: Path, store: CountingStore) -> None:
    one, two = two_runs(tmp_path, store, base=None)
    for run in (one, two):
        name = run.execution.encode()
        run.write("notes.md", b"# Notes\n- %s\n" % name)
        run.write("tool.py", b"print(%s)\n" % name)
        run.write("same", b"same\n")
    one.commit()
    report = two.commit()
    assert report.merged == ("notes.md",)
    assert [conflict.path for conflict in report.conflicts] == [b"tool.py"]
    found = newest(tmp_path, store)
    assert found["notes.md"] == b"# Notes\n- e1\n- e2\n"
    assert found[".conflicts/e2/tool.py"] == b"print(e2)\n"


def test_attributes_merge_with_the_text(tmp_path: Path, store: CountingStore) -> None:
    one, two = two_runs(tmp_path, store)
    one.write("notes.md", BASE + b"- from e1\n")
    two.write("notes.md", BASE + b"- from e2\n").chmod(0o600)
    one.commit()
    two.commit()
    three = restored(tmp_path, store, "e3")
    assert (three.root / "notes.md").stat().st_mode & 0o7777 == 0o600


def test_a_base_that_is_gone_keeps_both(tmp_path: Path, store: CountingStore) -> None:
    one, two = two_runs(tmp_path, store)
    (entry,) = (e for e in History(store, "a", "shared").read(1).entries if e.path == b"notes.md")
    one.write("notes.md", BASE + b"- from e1\n")
    two.write("notes.md", BASE + b"- from e2\n")
    one.commit()
    store.delete(object_key("a", entry.object))
    report = two.commit()
    assert [conflict.path for conflict in report.conflicts] == [b"notes.md"]


def test_an_unreachable_store_is_no_conflict(tmp_path: Path, store: CountingStore) -> None:
    one, two = two_runs(tmp_path, store)
    one.write("notes.md", BASE + b"- from e1\n")
    two.write("notes.md", BASE + b"- from e2\n")
    one.commit()
    down = FaultyStore(
        store, lambda n, method, key: "before" if "/objects/" in key and method == "get" else None
    )
    two.store = down
    two.another_process()
    with pytest.raises(StoreError, match="injected"):
        two.commit()
    assert History(store, "a", "shared").newest() == 2
    two.store = store
    two.another_process()
    assert two.commit().merged == ("notes.md",)


def test_texts_beyond_what_may_be_held_keep_both(
    tmp_path: Path, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MAX_HELD_BYTES", 100)
    one, two = two_runs(tmp_path, store)
    for run in (one, two):
        for number in range(3):
            run.write(
                f"{number}.md", b"# Notes about %d\n" % number + b"- of %s\n" % run.execution.encode() * 3
            )
    one.commit()
    report = two.commit()
    assert report.merged == ("0.md",)
    assert [conflict.path for conflict in report.conflicts] == [b"1.md", b"2.md"]


def test_large_merged_texts_travel_alone(tmp_path: Path, store: CountingStore) -> None:
    base = b"".join(b"%07d\n" % number for number in range(100_000))
    one, two = two_runs(tmp_path, store, base=base)
    one.write("notes.md", base + b"t" * 200_000 + b"\n")
    two.write("notes.md", base + b"m" * 200_000 + b"\n")
    one.commit()
    assert two.commit().merged == ("notes.md",)
    assert newest(tmp_path, store)["notes.md"] == base + b"t" * 200_000 + b"\n" + b"m" * 200_000 + b"\n"


def test_hard_links_to_a_merged_text_stay_one(tmp_path: Path, store: CountingStore) -> None:
    first = Run(tmp_path, store, "e0")
    first.write("notes.md", BASE)
    (first.root / "link.md").hardlink_to(first.root / "notes.md")
    first.commit()
    one, two = restored(tmp_path, store, "e1"), restored(tmp_path, store, "e2")
    one.write("notes.md", BASE + b"- from e1\n")
    two.write("notes.md", BASE + b"- from e2\n")
    one.commit()
    assert two.commit().merged == ("link.md", "notes.md")
    root = restored(tmp_path, store, "e3").root
    assert (root / "link.md").samefile(root / "notes.md")
    assert (root / "link.md").read_bytes() == BASE + b"- from e1\n- from e2\n"
