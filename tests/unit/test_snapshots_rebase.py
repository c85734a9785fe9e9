"""Three-way merging of listings: what each rule says, and what holds whatever the listings are."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listings import Forest, Listing, directory, fifo, file, forests, listing, symlink

from agentfuse.regions import FROZEN, Creator
from agentfuse.snapshots.databases import main_of
from agentfuse.snapshots.entries import Entry, check, names_by_inode, parent_of
from agentfuse.snapshots.rebase import is_changed, rebase

COPY = b".conflicts/e1/"


def paths(entries: Listing) -> list[bytes]:
    return [path for path in entries if path]


def held(entries: Listing) -> dict[bytes, object]:
    """What a listing holds, path by path, whatever numbers its links have and wherever its contents lie."""
    return {
        path: msgspec.structs.replace(entry, link=0, object="", offset=0) for path, entry in entries.items()
    }


def groups(entries: Listing) -> set[frozenset[bytes]]:
    return {frozenset(names) for names in names_by_inode(entries.values()).values()}


def contents(entries: Listing) -> set[str]:
    return {entry.sha256 for entry in entries.values() if entry.size}


def targets(entries: Listing) -> set[bytes]:
    return {entry.target for entry in entries.values() if entry.type == "symlink"}


def _triple(forest: Forest, has_base: bool) -> tuple[Listing, Listing, Listing]:
    start = forest.grow()
    return start if has_base else {}, forest.edit(start), forest.edit(start)


triples = st.builds(_triple, forests, st.sampled_from([True, True, True, False]))


@given(triples)
@settings(max_examples=400, deadline=None)
def test_nothing_that_a_side_added_or_changed_is_lost_and_the_result_is_sound(
    triple: tuple[Listing, Listing, Listing],
) -> None:
    _assert_complete(*triple)


def _assert_complete(base: Listing, theirs: Listing, mine: Listing) -> Listing:
    """Merge, and see that nothing is missing and that it can be written; the result."""
    merged = rebase(base, theirs, mine, "e1")
    list(check(merged.entries.values()))
    assert {path: entry.path for path, entry in merged.entries.items()} == {p: p for p in merged.entries}
    overwritten = {entry.sha256 for path, entry in base.items() if path in theirs.keys() | mine.keys()}
    assert (contents(theirs) & contents(mine)) - overwritten <= contents(merged.entries)
    for find in (contents, targets):
        for side in (theirs, mine):
            before = find(base)
            changed = {p: e for p, e in side.items() if base.get(p) is None or held(base)[p] != held(side)[p]}
            assert find(changed) - before <= find(merged.entries)
    for conflict in merged.conflicts:
        kept = merged.entries[conflict.kept_at]
        assert (kept.sha256, kept.target) == (conflict.mine.sha256, conflict.mine.target)
        assert conflict.kept_at.startswith(b".conflicts")
    return merged.entries


@given(forests)
@settings(max_examples=300, deadline=None)
def test_what_was_kept_before_is_in_no_later_merges_way(forest: Forest) -> None:
    base, theirs = forest.grow(), forest.grow()
    for _ in range(4):
        mine = forest.edit(base)
        theirs = forest.edit(_assert_complete(base, theirs, mine))
        base = mine


def test_a_directory_among_what_was_kept_is_not_taken_for_the_directory_that_a_file_replaced() -> None:
    base = changed(BASE, directory(b"d"), file(b"d/inside", b"first"))
    kept = (directory(b".conflicts"), directory(b".conflicts/e1"), file(COPY + b"d", b"earlier"))
    again = (directory(COPY + b"d~2"), file(COPY + b"d~2/inside", b"first"))
    theirs = changed(BASE, file(b"d", b"theirs"), *kept, *again)
    merged = _assert_complete(base, theirs, changed(BASE, file(b"d", b"mine")))
    assert merged[COPY + b"d~3"].sha256 == file(b"", b"mine").sha256


@given(triples)
@settings(max_examples=400, deadline=None)
def test_a_committed_file_that_was_changed_keeps_its_name(triple: tuple[Listing, Listing, Listing]) -> None:
    base, theirs, mine = triple
    merged = rebase(base, theirs, mine, "e1").entries
    for path, entry in theirs.items():
        was = base.get(path)
        content_changed = was is None or (was.type, was.sha256, was.target) != (
            entry.type,
            entry.sha256,
            entry.target,
        )
        is_log = main_of(path) is not None and not entry.size  # an empty one is as good as none
        if entry.type != "dir" and content_changed and not path.startswith(COPY) and not is_log:
            assert (merged[path].type, merged[path].sha256, merged[path].target) == (
                entry.type,
                entry.sha256,
                entry.target,
            )


@given(triples)
@settings(max_examples=300, deadline=None)
def test_without_a_change_on_one_side_the_other_side_is_the_result(
    triple: tuple[Listing, Listing, Listing],
) -> None:
    base, theirs, mine = triple
    for one, other in ((theirs, base), (base, mine)):
        if not base:
            continue
        merged = rebase(base, one, other, "e1")
        changed = theirs if other is base else mine
        assert held(merged.entries) == held(changed)
        assert groups(merged.entries) == groups(changed)
        assert not merged.conflicts
        assert not is_changed(changed, merged.entries)


@given(triples)
@settings(max_examples=200, deadline=None)
def test_sides_that_are_the_same_have_no_conflict(triple: tuple[Listing, Listing, Listing]) -> None:
    base, theirs, _ = triple
    merged = rebase(base, theirs, theirs, "e1")
    assert held(merged.entries) == held(theirs)
    assert groups(merged.entries) == groups(theirs)
    assert not merged.conflicts


@given(triples)
@settings(max_examples=200, deadline=None)
def test_committing_the_same_again_changes_nothing(triple: tuple[Listing, Listing, Listing]) -> None:
    """As after a crash between the commit and the note of it: the base is still the old one."""
    base, theirs, mine = triple
    first = rebase(base, theirs, mine, "e1").entries
    second = rebase(base, first, mine, "e1").entries
    assert contents(second) == contents(first)
    assert paths(second) == paths(first)


BASE = listing(directory(b"d"), file(b"d/x", b"base"), file(b"n", b"base"))


def changed(start: Listing, *entries: Entry, without: tuple[bytes, ...] = ()) -> Listing:
    merged = start | {entry.path: entry for entry in entries}
    return listing(*(e for p, e in merged.items() if p and p not in without))


def test_changes_to_different_files_come_together() -> None:
    merged = rebase(BASE, changed(BASE, file(b"n", b"theirs")), changed(BASE, file(b"d/x", b"mine")), "e1")
    assert held(merged.entries) == held(changed(BASE, file(b"n", b"theirs"), file(b"d/x", b"mine")))
    assert not merged.conflicts


def test_of_two_changes_to_a_file_the_committed_keeps_the_name_and_the_other_is_kept() -> None:
    theirs, mine = file(b"n", b"theirs"), file(b"n", b"mine")
    merged = rebase(BASE, changed(BASE, theirs), changed(BASE, mine), "e1")
    assert merged.entries[b"n"].sha256 == theirs.sha256
    assert merged.entries[COPY + b"n"].sha256 == mine.sha256
    (conflict,) = merged.conflicts
    assert (conflict.path, conflict.kept_at) == (b"n", COPY + b"n")
    assert (conflict.base, conflict.theirs, conflict.mine) == (BASE[b"n"], theirs, mine)


def test_identical_changes_are_no_conflict() -> None:
    merged = rebase(
        BASE, changed(BASE, file(b"n", b"same", mtime_ns=1)), changed(BASE, file(b"n", b"same")), "e1"
    )
    assert merged.entries[b"n"].mtime_ns == 1
    assert not merged.conflicts


def test_mode_of_one_side_and_content_of_the_other_come_together() -> None:
    executable = changed(BASE, file(b"n", b"base", mode=0o755))
    rewritten = changed(BASE, file(b"n", b"new", mtime_ns=9))
    for theirs, mine in ((executable, rewritten), (rewritten, executable)):
        merged = rebase(BASE, theirs, mine, "e1")
        assert held(merged.entries)[b"n"] == held(listing(file(b"n", b"new", mode=0o755, mtime_ns=9)))[b"n"]
        assert not merged.conflicts


def test_a_creator_comes_along_with_either_side_and_is_no_conflict_by_itself() -> None:
    replaced = changed(BASE, file(b"n", b"new", mtime_ns=9, created_by=Creator.USER))
    executable = changed(BASE, file(b"n", b"base", mode=0o755))
    for theirs, mine in ((executable, replaced), (replaced, executable), (BASE, replaced), (replaced, BASE)):
        merged = rebase(BASE, theirs, mine, "e1")
        assert (merged.entries[b"n"].created_by, merged.conflicts) == (Creator.USER, ())
    again = changed(BASE, file(b"n", b"base", created_by=Creator.SYSTEM))
    assert not rebase(BASE, again, executable, "e1").conflicts
    assert not rebase(BASE, executable, again, "e1").conflicts
    assert not is_changed(BASE, again)


def frozen(entries: Listing, *wanted: bytes) -> Listing:
    """With these files frozen, under all the names that they have."""
    links = {entries[path].link for path in wanted} - {0}
    return {
        path: msgspec.structs.replace(entry, xattrs=tuple(sorted({*entry.xattrs, (FROZEN, b"1")})))
        if entry.link in links or path in wanted
        else entry
        for path, entry in entries.items()
    }


@pytest.mark.parametrize("other", ["rewritten", "replaced", "removed", "database"])
@pytest.mark.parametrize("freezes", ["theirs", "mine"])
def test_what_one_side_has_frozen_stays_as_it_is_whatever_the_other_made_of_it(
    freezes: str, other: str
) -> None:
    base = changed(BASE, directory(b"k"), file(b"k/n", b"base"))
    if other == "database":
        base = changed(base, file(b"k/n-wal", b"log"))
    edited = {
        "rewritten": changed(base, file(b"k/n", b"new", mtime_ns=9)),
        "replaced": changed(base, directory(b"k/n"), file(b"k/n/below", b"new")),
        "removed": changed(base, without=(b"k", b"k/n")),
        "database": changed(base, file(b"k/n", b"new"), file(b"k/n-wal", b"new log")),
    }[other]
    cold = frozen(base, b"k/n")
    sides = (cold, edited) if freezes == "theirs" else (edited, cold)
    merged = _assert_complete(base, *sides)
    assert held(merged)[b"k/n"] == held(cold)[b"k/n"]
    text = {b"k/n": (file(b"", b"merged").sha256, 6)}
    assert rebase(base, *sides, "e1", merged=text).entries[b"k/n"].sha256 == base[b"k/n"].sha256
    if other != "removed":
        kept = merged[COPY + b"k/n/below" if other == "replaced" else COPY + b"k/n"]
        assert kept.sha256 == file(b"", b"new").sha256


def test_freezing_and_other_attributes_come_together_and_thawing_does_not_undo_a_change() -> None:
    labelled = changed(BASE, file(b"n", b"base", xattrs=((b"user.labels", b"1"),)))
    cold = frozen(BASE, b"n")
    for theirs, mine in ((labelled, cold), (cold, labelled)):
        entry = rebase(BASE, theirs, mine, "e1").entries[b"n"]
        assert dict(entry.xattrs) == {FROZEN: b"1", b"user.labels": b"1"}
    rewritten = changed(BASE, file(b"n", b"new"))
    for theirs, mine in ((rewritten, cold), (cold, rewritten)):
        assert rebase(cold, theirs, mine, "e1").entries[b"n"] == rewritten[b"n"]
    assert is_changed(BASE, cold)


@given(triples, st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_what_was_frozen_by_either_side_keeps_its_content_and_nothing_is_lost(
    triple: tuple[Listing, Listing, Listing], dice: random.Random
) -> None:
    base, theirs, mine = triple
    files = [[path for path, entry in side.items() if entry.type == "file"] for side in (theirs, mine)]
    theirs, mine = (
        frozen(side, *dice.sample(names, min(2, len(names))))
        for side, names in zip((theirs, mine), files, strict=True)
    )
    merged = _assert_complete(base, theirs, mine)
    for path, entry in theirs.items():
        above = merged.get(parent_of(path)) or merged.get(parent_of(parent_of(path)))
        is_in_the_way = above is None or above.is_frozen  # of which only one can keep its name
        if entry.is_frozen and not path.startswith(COPY) and not is_in_the_way:
            assert merged[path].sha256 == entry.sha256


@pytest.mark.parametrize("deletes", ["theirs", "mine"])
def test_a_change_wins_over_a_deletion(deletes: str) -> None:
    without, with_change = changed(BASE, without=(b"d", b"d/x")), changed(BASE, file(b"d/x", b"changed"))
    sides = (without, with_change) if deletes == "theirs" else (with_change, without)
    merged = rebase(BASE, *sides, "e1")
    assert held(merged.entries) == held(with_change)


def test_deletions_by_both_and_by_one_are_deletions() -> None:
    merged = rebase(BASE, changed(BASE, without=(b"n",)), changed(BASE, without=(b"n", b"d", b"d/x")), "e1")
    assert paths(merged.entries) == []


def test_a_directory_that_became_a_committed_file_gives_way_with_all_that_was_added_in_it() -> None:
    theirs = changed(BASE, file(b"d", b"a file now"), without=(b"d/x",))
    mine = changed(BASE, file(b"d/y", b"new"), directory(b"d/s"), file(b"d/s/z", b"newer"))
    merged = rebase(BASE, theirs, mine, "e1")
    assert merged.entries[b"d"].type == "file"
    assert b"d/y" not in merged.entries
    assert merged.entries[COPY + b"d/y"].sha256 == mine[b"d/y"].sha256
    assert merged.entries[COPY + b"d/s/z"].sha256 == mine[b"d/s/z"].sha256
    assert COPY + b"d/x" not in merged.entries  # unchanged here, removed there


def test_a_file_in_the_place_of_a_directory_gives_way_to_what_was_committed_in_it() -> None:
    theirs = changed(BASE, file(b"d/y", b"new"))
    mine = changed(BASE, file(b"d", b"a file now"), without=(b"d/x",))
    merged = rebase(BASE, theirs, mine, "e1")
    assert paths(merged.entries) == [b".conflicts", b".conflicts/e1", COPY + b"d", b"d", b"d/y", b"n"]
    assert merged.entries[COPY + b"d"].sha256 == mine[b"d"].sha256


def test_a_renamed_directory_and_changes_under_its_old_name_are_both_kept() -> None:
    theirs = changed(BASE, file(b"d/x", b"theirs"), file(b"d/y", b"new"))
    mine = changed(BASE, directory(b"e"), file(b"e/x", b"base"), without=(b"d", b"d/x"))
    merged = rebase(BASE, theirs, mine, "e1")
    assert paths(merged.entries) == [b"d", b"d/x", b"d/y", b"e", b"e/x", b"n"]


def test_a_parent_removed_by_the_other_side_comes_back_with_its_mode() -> None:
    base = changed(BASE, directory(b"d", mode=0o700))
    merged = rebase(base, changed(base, without=(b"d", b"d/x")), changed(base, file(b"d/new", b"1")), "e1")
    assert paths(merged.entries) == [b"d", b"d/new", b"n"]
    assert merged.entries[b"d"].mode == 0o700


def test_symlinks_are_kept_in_conflicts_and_pipes_are_not() -> None:
    theirs = changed(BASE, symlink(b"l", b"one"), file(b"p", b"file"))
    mine = changed(BASE, symlink(b"l", b"two"), fifo(b"p"))
    merged = rebase(BASE, theirs, mine, "e1")
    assert merged.entries[b"l"].target == b"one"
    assert merged.entries[COPY + b"l"].target == b"two"
    assert COPY + b"p" not in merged.entries


def test_a_second_conflict_of_the_same_execution_replaces_its_own_copy() -> None:
    first = changed(BASE, file(b"n", b"mine 1"))
    committed = rebase(BASE, changed(BASE, file(b"n", b"theirs")), first, "e1").entries
    merged = rebase(first, committed, changed(BASE, file(b"n", b"mine 2")), "e1")
    assert [path for path in merged.entries if path.startswith(COPY)] == [COPY + b"n"]
    assert merged.entries[COPY + b"n"].sha256 == file(b"", b"mine 2").sha256


def test_copies_of_others_are_never_replaced() -> None:
    dirs = (directory(b".conflicts"), directory(b".conflicts/e1"))
    theirs = changed(BASE, file(b"n", b"theirs"), *dirs, file(COPY + b"n", b"another"))
    merged = rebase(BASE, theirs, changed(BASE, file(b"n", b"mine")), "e1")
    assert merged.entries[COPY + b"n"].sha256 == theirs[COPY + b"n"].sha256
    assert merged.entries[COPY + b"n~2"].sha256 == file(b"", b"mine").sha256


def test_an_identical_copy_is_kept_once() -> None:
    dirs = (directory(b".conflicts"), directory(b".conflicts/e1"))
    theirs = changed(BASE, file(b"n", b"theirs"), *dirs, file(COPY + b"n", b"mine"))
    merged = rebase(BASE, theirs, changed(BASE, file(b"n", b"mine")), "e1")
    assert [path for path in merged.entries if path.startswith(COPY)] == [COPY + b"n"]


@pytest.mark.parametrize("hostile", [file(b".conflicts", b"in the way"), symlink(b".conflicts", b"/etc")])
def test_a_conflicts_directory_that_is_none_is_walked_around(hostile: Entry) -> None:
    theirs = changed(BASE, file(b"n", b"theirs"), hostile)
    merged = rebase(BASE, theirs, changed(BASE, file(b"n", b"mine")), "e1")
    assert merged.entries[b".conflicts~2/e1/n"].sha256 == file(b"", b"mine").sha256
    assert merged.entries[b".conflicts"].type == hostile.type


def test_names_of_full_length_find_a_free_place() -> None:
    name = b"n" * 255
    dirs = (directory(b".conflicts"), directory(b".conflicts/e1"))
    theirs = listing(file(name, b"theirs"), *dirs, file(COPY + name, b"another"))
    merged = rebase({}, theirs, listing(file(name, b"mine")), "e1")
    assert merged.entries[COPY + b"n" * 245 + b"~2"].sha256 == file(b"", b"mine").sha256


def test_hard_links_made_on_both_sides_survive() -> None:
    theirs = changed(BASE, file(b"d/x", b"base", link=1), file(b"t", b"base", link=1))
    mine = changed(BASE, file(b"n", b"base", link=1), file(b"m", b"base", link=1))
    merged = rebase(BASE, theirs, mine, "e1")
    assert groups(merged.entries) == {frozenset((b"d/x", b"t")), frozenset((b"n", b"m"))}


def test_a_link_that_one_side_parted_stays_parted() -> None:
    base = changed(BASE, file(b"p", b"1", link=1), file(b"q", b"1", link=1))
    parted = changed(BASE, file(b"p", b"1"), file(b"q", b"1"))
    for theirs, mine in ((parted, base), (base, parted), (parted, changed(base, file(b"new", b"")))):
        assert not groups(rebase(base, theirs, mine, "e1").entries)


def test_linked_files_in_conflict_are_linked_where_they_are_kept() -> None:
    base = listing(file(b"p", b"1", link=1), file(b"q", b"1", link=1))
    theirs = listing(file(b"p", b"t", link=1), file(b"q", b"t", link=1))
    mine = listing(file(b"p", b"m", link=1), file(b"q", b"m", link=1))
    merged = rebase(base, theirs, mine, "e1")
    assert groups(merged.entries) == {frozenset((b"p", b"q")), frozenset((COPY + b"p", COPY + b"q"))}


def test_only_files_modes_and_links_count_as_changes() -> None:
    later = {p: msgspec.structs.replace(e, mtime_ns=5) if e.type == "dir" else e for p, e in BASE.items()}
    assert not is_changed(BASE, later)
    for change in (
        file(b"n", b"other"),
        file(b"n", b"base", mtime_ns=1),
        file(b"n", b"base", mode=0o600),
        file(b"new", b""),
        directory(b"d", mode=0o700),
        directory(b"new"),
        symlink(b"n", b"x"),
        file(b"n", b"base", xattrs=((b"user.a", b"1"),)),
    ):
        assert is_changed(BASE, changed(BASE, change))
    assert is_changed(BASE, changed(BASE, file(b"n", b"base", link=1), file(b"d/x", b"base", link=1)))


def test_what_both_sides_kept_under_another_name_is_kept() -> None:
    base = listing(file(b"a", b"same"), file(b"b", b"same"), file(b"c", b"more"))
    one, other = changed(base, without=(b"a",)), changed(base, without=(b"b",))
    assert contents(rebase(base, one, other, "e1").entries) == contents(base)
    moved = changed(base, file(b"d", b"same"), without=(b"a", b"b"))
    assert rebase(base, one, moved, "e1").entries == moved


# SQLite databases: what lies beside one belongs to it.

DB, WAL, JOURNAL, SHM = b"m.db", b"m.db-wal", b"m.db-journal", b"m.db-shm"
INDEX = bytes(32768)


def database(content: bytes, **beside: bytes) -> Listing:
    return listing(file(DB, content), *(file(DB + b"-" + name.encode(), c) for name, c in beside.items()))


def test_a_log_never_comes_beside_the_database_of_another() -> None:
    """Theirs was written back and lost its log; mine has more in its log, and the same database below it."""
    base = database(b"0", wal=b"1")
    theirs, mine = database(b"1 2"), database(b"0", wal=b"1 3")
    merged = rebase(base, theirs, mine, "e1")
    kept = file(COPY + DB, b"0"), file(COPY + WAL, b"1 3")
    dirs = directory(b".conflicts"), directory(b".conflicts/e1")
    assert merged.entries == listing(file(DB, b"1 2"), *dirs, *kept)
    assert [(each.path, each.kept_at, each.is_part) for each in merged.conflicts] == [
        (DB, COPY + DB, True),
        (WAL, COPY + WAL, True),
    ]


def test_one_sides_database_comes_whole() -> None:
    base = database(b"0", wal=b"1")
    written_back, longer = database(b"1"), database(b"0", wal=b"1 2")
    opened = database(b"0", wal=b"1", shm=INDEX)
    for changed_one in (written_back, longer):
        assert rebase(base, changed_one, opened, "e1").entries.items() >= changed_one.items()
        assert rebase(base, opened, changed_one, "e1").entries.items() >= changed_one.items()
        assert not rebase(base, opened, changed_one, "e1").conflicts


def test_reading_one_database_at_once_is_no_conflict() -> None:
    base = database(b"0")
    theirs, mine = database(b"0", wal=b"", shm=INDEX), database(b"0", wal=b"", shm=b"\1" * 32768)
    assert rebase(base, theirs, mine, "e1") == rebase(base, theirs, theirs, "e1")
    assert rebase(base, theirs, database(b"1", wal=b"", shm=b"\1" * 32768), "e1").conflicts == ()


def test_a_database_that_one_side_removed_and_the_other_changed_stays_whole() -> None:
    base, gone, longer = database(b"0", wal=b"1"), listing(), database(b"0", wal=b"1 2")
    assert rebase(base, gone, longer, "e1").entries == longer
    assert rebase(base, longer, gone, "e1").entries == longer
    assert rebase(base, gone, base, "e1").entries == gone
    assert rebase(base, base, gone, "e1").entries == gone


def test_the_next_version_of_a_kept_database_replaces_all_of_the_one_before() -> None:
    base = database(b"0")
    first = rebase(base, database(b"theirs"), database(b"0", wal=b"mine"), "e1").entries
    second = rebase(database(b"0", wal=b"mine"), first, database(b"mine 2", journal=b"j"), "e1").entries
    kept = {path: entry.sha256 for path, entry in second.items() if path.startswith(COPY)}
    assert kept == {COPY + DB: file(b"", b"mine 2").sha256, COPY + JOURNAL: file(b"", b"j").sha256}


def test_a_database_finds_a_place_where_nothing_is_beside_it() -> None:
    dirs = directory(b".conflicts"), directory(b".conflicts/e1")
    theirs = listing(file(DB, b"theirs"), *dirs, file(COPY + WAL, b"of another time"))
    merged = rebase(database(b"0"), theirs, database(b"0", journal=b"mine"), "e1").entries
    assert merged[COPY + WAL].sha256 == theirs[COPY + WAL].sha256
    assert COPY + DB not in merged
    assert {COPY + b"m.db~2", COPY + b"m.db~2-journal"} <= merged.keys()


def test_files_that_are_only_named_alike_are_files_as_any() -> None:
    base = listing(directory(DB), file(WAL, b"0"))
    merged = rebase(base, base | {JOURNAL: file(JOURNAL, b"t")}, base | {WAL: file(WAL, b"1")}, "e1")
    assert merged.entries == base | {JOURNAL: file(JOURNAL, b"t"), WAL: file(WAL, b"1")}
    notes = listing(file(b"n", b"0"), file(b"n-shm", b"0"))
    merged = rebase(
        notes, notes | {b"n-shm": file(b"n-shm", b"1")}, notes | {b"n-shm": file(b"n-shm", b"2")}, "e1"
    )
    assert merged.entries[COPY + b"n-shm"].sha256 == file(b"", b"2").sha256
