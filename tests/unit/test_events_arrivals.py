"""What makes an event: each complete file once, under its final name, whatever was done to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowns import KnownFiles

from agentfuse.events.arrivals import (
    Completed,
    Judgement,
    Moved,
    Operation,
    Replaced,
    Seen,
    Touched,
    is_temporary,
    judge,
)


def told(known: KnownFiles, *operations: Operation) -> list[tuple[str, bytes]]:
    return [(each.kind, each.path) for each in judged(known, *operations)]


def judged(known: KnownFiles, *operations: Operation) -> list[Judgement]:
    return [each for operation in operations for each in judge(operation, known)]


FIRST = Seen(1, 10, 100)


def closed(path: bytes, seen: Seen = FIRST) -> Completed:
    return Completed(path, seen, "IN_CLOSE_WRITE")


@pytest.mark.parametrize(
    "path",
    [
        b"a.pdf.crdownload", b"Unconfirmed 1234.crdownload", b"a.pdf.part", b"A.PDF.PART", b"a.tmp", b".tmp",
        b"a.zip.download", b"a.zip.download/a.zip", b"~$report.docx", b".~lock.report.odt#",
        b".goutputstream-AB12CD", b".a.csv.Xy12Zw", b".org.chromium.Chromium.AbCdEf", b".notes.txt.swp",
        b".nfs00000000012345", b"x/.git/config", b".cache/a/b", b"deep/a.part", b"line\nbreak.tmp",
        b"\xff.part",
    ],
)  # fmt: skip
def test_nothing_is_told_of_a_temporary(path: bytes) -> None:
    assert is_temporary(path)
    assert told(KnownFiles(), closed(path)) == []


@pytest.mark.parametrize(
    "path",
    [
        b"a.csv",
        b".env",
        b".gitignore",
        b"part",
        b"crdownload",
        b"a.part.pdf",
        b"tmp",
        b"a.tmpl",
        b"~",
        b"\n",
        b"a~$b",
    ],
)
def test_a_final_name_is_told_of(path: bytes) -> None:
    assert told(KnownFiles(), closed(path)) == [("arrived", path)]


def test_what_is_written_again_is_modified_even_if_it_looks_the_same() -> None:
    assert told(KnownFiles(), closed(b"a"), closed(b"a")) == [("arrived", b"a"), ("modified", b"a")]


def test_times_that_are_set_are_no_event_and_a_later_comparison_knows_them() -> None:
    known = KnownFiles()
    told(known, closed(b"a"))
    assert told(known, Touched(b"a", Seen(1, 10, 5)), Touched(b"never told", Seen(2, 0, 0))) == []
    assert told(known, Replaced(b"", [(b"a", Seen(1, 10, 5))], "IN_CLOSE_WRITE", "IN_DELETE")) == []


def test_a_directory_that_moves_takes_along_what_was_told_of_it() -> None:
    known = KnownFiles()
    told(
        known,
        closed(b"d/a"),
        closed(b"d/e/b", Seen(2, 1, 1)),
        closed(b"d.txt", Seen(3, 1, 1)),
        closed(b"d0", Seen(4, 1, 1)),
    )
    found = judged(known, Moved(b"d", b"new", None))
    assert [(each.kind, each.old_path, each.path) for each in found] == [
        ("moved", b"d/a", b"new/a"),
        ("moved", b"d/e/b", b"new/e/b"),
    ]
    assert set(known.files) == {b"new/a", b"new/e/b", b"d.txt", b"d0"}


def test_a_file_that_is_still_written_is_neither_told_of_nor_taken_for_gone() -> None:
    known = KnownFiles()
    told(known, closed(b"d/old"))
    listing = [(b"d/old", None), (b"d/new", None)]
    assert told(known, Replaced(b"d", listing, "IN_MOVED_TO", "IN_DELETE")) == []
    assert told(known, closed(b"d/old"), closed(b"d/new")) == [("modified", b"d/old"), ("arrived", b"d/new")]


def test_a_rename_that_nobody_was_told_of_is_found_as_a_rename() -> None:
    known = KnownFiles()
    told(known, closed(b"a"))
    found = judged(known, Replaced(b"", [(b"b", Seen(1, 10, 100))], "IN_CLOSE_WRITE", "IN_DELETE"))
    assert [(each.kind, each.old_path, each.path) for each in found] == [("moved", b"a", b"b")]


# Any sequence of operations, against a filesystem of names and inodes -----------------------------------

NAMES = st.sampled_from([b"a", b"b.csv", b"c.part", b".d.AbCdEf", b".env"])
DIRECTORIES = st.sampled_from([b"", b"d", b"e", b".git", b"x.download"])
PATHS = st.builds(lambda directory, name: directory + b"/" + name if directory else name, DIRECTORIES, NAMES)
STEPS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.just(b"")),
    st.tuples(st.just("unlink"), PATHS, st.just(b"")),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename-directory"), DIRECTORIES.filter(bool), DIRECTORIES.filter(bool)),
    st.tuples(st.just("leave"), PATHS, st.just(b"")),
    st.tuples(st.just("crash"), st.just(b""), st.just(b"")),
)


class Disk:
    """Files by path; what was done since the last announcement may be forgotten by a crash."""

    def __init__(self) -> None:
        self.files: dict[bytes, Seen] = {}
        self.clock = 0

    def do(self, step: str, one: bytes, two: bytes) -> list[Operation]:
        self.clock += 1
        match step:
            case "write":
                self.files[one] = Seen(
                    self.files.get(one, Seen(self.clock, 0, 0)).ino, self.clock, self.clock
                )
                return [closed(one, self.files[one])]
            case "unlink" | "leave" if one in self.files:
                del self.files[one]
                return [Replaced(one, [], "", "IN_DELETE")]
            case "rename" if one in self.files and one != two:
                return self._rename(one, two)
            case "rename-directory" if one != two and not self._below(two):
                return self._rename_directory(one, two)
        return []

    def _rename(self, old: bytes, new: bytes) -> list[Operation]:
        seen = self.files[new] = self.files.pop(old)
        if is_temporary(old) and is_temporary(new):
            return []
        if is_temporary(new):
            return [Replaced(old, [], "", "IN_MOVED_FROM")]
        if is_temporary(old):
            return [Replaced(new, [(new, seen)], "IN_MOVED_TO", "IN_DELETE")]
        return [Moved(old, new, seen)]

    def _rename_directory(self, old: bytes, new: bytes) -> list[Operation]:
        for path in self._below(old):
            self.files[new + path[len(old) :]] = self.files.pop(path)
        hidden = {name: is_temporary(name + b"/file") for name in (old, new)}
        if not any(hidden.values()):
            return [Moved(old, new, None)]
        if hidden[new]:
            return [] if hidden[old] else [Replaced(old, [], "", "IN_MOVED_FROM")]
        return [
            Replaced(new, [(path, self.files[path]) for path in self._below(new)], "IN_MOVED_TO", "IN_DELETE")
        ]

    def _below(self, directory: bytes) -> list[bytes]:
        return [path for path in self.files if path.startswith(directory + b"/")]

    def everything(self) -> Replaced:
        return Replaced(b"", list(self.files.items()), "IN_CLOSE_WRITE", "IN_DELETE")


@settings(max_examples=400, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_whoever_follows_the_events_knows_every_complete_file_and_none_twice(
    steps: list[tuple[str, bytes, bytes]],
) -> None:
    disk, known = Disk(), KnownFiles()
    mirror: dict[bytes, Seen] = {}
    forgotten = False
    for step, one, two in steps:
        operations = disk.do(step, one, two)
        if step == "crash":
            operations, forgotten = [disk.everything()], False
        elif forgotten or step == "leave":  # the process died before it told anybody
            operations, forgotten = [], True
        for each in judged(known, *operations):
            follow(mirror, each)
    for each in judged(known, disk.everything()):
        follow(mirror, each)
    assert mirror == {path: seen for path, seen in disk.files.items() if not is_temporary(path)}
    assert judged(known, disk.everything()) == []


def follow(mirror: dict[bytes, Seen], event: Judgement) -> None:
    """Apply an event as a subscriber would; one that does not fit what was told before is wrong."""
    assert not is_temporary(event.path)
    match event.kind:
        case "arrived":
            assert event.path not in mirror
            mirror[event.path] = event.seen
        case "modified":
            assert event.path in mirror
            mirror[event.path] = event.seen
        case "moved":
            assert event.old_path is not None
            del mirror[event.old_path]
            mirror[event.path] = event.seen
        case "deleted":
            del mirror[event.path]


def test_what_changes_through_one_name_has_changed_under_each_that_was_told_of() -> None:
    known = KnownFiles()
    told(known, closed(b"a"), Completed(b"b", FIRST, "IN_CREATE"), closed(b"c", Seen(2, 10, 100)))
    second = Seen(1, 11, 200)
    through_both = [Completed(name, second, "IN_CLOSE_WRITE", is_shared=True) for name in (b"a", b"b")]
    assert told(known, through_both[0]) == [("modified", b"a"), ("modified", b"b")]
    assert told(known, through_both[1]) == []
    third = Seen(1, 11, 300)
    assert told(known, Touched(b"a", third, is_shared=True)) == []
    assert known.files == {b"a": third, b"b": third, b"c": Seen(2, 10, 100)}
