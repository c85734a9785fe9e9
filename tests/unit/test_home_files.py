"""The facts of files: what is true of each name, while others change the tree."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentfuse.errors import NotFoundError, UsageError
from agentfuse.home import files as home_files
from agentfuse.home import marks
from agentfuse.home.files import FileFacts, Files
from agentfuse.regions import DEFAULT_REGIONS, Creator


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    for region in DEFAULT_REGIONS:
        (path if region.is_loose else path / region.name).mkdir(parents=True, exist_ok=True)
    return path


def files_of(tree: Path, *, agent: str = "a", execution: str = "e") -> Files:
    return Files(tree, DEFAULT_REGIONS, agent=agent, execution=execution)


def test_a_file_has_its_facts(tree: Path) -> None:
    path = tree / "downloads" / "data.csv"
    path.write_text("a,b\n")
    path.chmod(0o4750)
    os.utime(path, ns=(0, 1_500_000_000_000_000_000))
    with path.open() as file:
        marks.write_creator(file.fileno(), Creator.ENVIRONMENT)
    facts = files_of(tree).stat("downloads", b"data.csv")
    assert facts.created_at is not None
    assert abs(facts.created_at - path.stat().st_ctime) < 60
    assert facts.as_dict() == {
        "id": facts.id,
        "region": "downloads",
        "path": "data.csv",
        "type": "file",
        "size": 4,
        "mode": "4750",
        "mime": "text/csv",
        "created_by": "environment",
        "created_at": facts.created_at,
        "modified_at": 1_500_000_000.0,
        "is_absent": False,
        "etag": facts.etag,
        "labels": "",
        "is_frozen": False,
    }


def test_a_directory_lists_every_kind_in_order_of_bytes_and_follows_no_symlink(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tree / "workspace" / "d"
    work.mkdir()
    (work / "b").symlink_to("/etc/passwd")
    os.mkfifo(work / "a")
    (work / "c").mkdir()
    (work / "\udcff").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(work)  # a socket's path is short
        listener.bind("s")
    facts = list(files_of(tree).list("workspace", b"d"))
    assert [(each.name, each.type) for each in facts] == [
        (b"a", "fifo"),
        (b"b", "symlink"),
        (b"c", "dir"),
        (b"s", "socket"),
        (b"\xff", "file"),
    ]
    assert {each.created_by for each in facts} == {Creator.AGENT}
    assert json.loads(json.dumps(facts[-1].as_dict()))["path"] == "d/\udcff"


def test_a_directory_has_a_creator_too_and_a_regions_root_is_the_platforms(tree: Path) -> None:
    (tree / "uploads" / "d").mkdir()
    fd = os.open(tree / "uploads" / "d", os.O_RDONLY)
    marks.write_creator(fd, Creator.USER)
    os.close(fd)
    files = files_of(tree)
    assert files.stat("uploads", b"d").created_by is Creator.USER
    assert files.stat("uploads", b"").created_by is Creator.SYSTEM
    (tree / ".agentfuse").mkdir()
    (tree / "uploads" / ".agentfuse").mkdir()
    assert files.stat("uploads", b".agentfuse").created_by is Creator.AGENT
    assert files.stat("home", b".agentfuse").created_by is Creator.SYSTEM


def test_the_home_lists_its_regions_beside_what_is_loose(tree: Path) -> None:
    (tree / ".gitconfig").touch()
    (tree / "home").touch()
    facts = list(files_of(tree).list("home", b""))
    assert [(each.name, each.region, each.path) for each in facts] == [
        (b".gitconfig", "home", b".gitconfig"),
        (b"debug", "debug", b""),
        (b"downloads", "downloads", b""),
        (b"home", "home", b"home"),
        (b"shared", "shared", b""),
        (b"uploads", "uploads", b""),
        (b"workspace", "workspace", b""),
    ]


def test_what_is_absent_has_the_facts_that_it_will_have(tree: Path) -> None:
    path = tree / "shared" / "movie.mp4"
    with path.open("wb") as file:
        file.truncate(1000)
        marks.write(file.fileno(), marks.Mark("ab" * 32, (1_600_000_000 * 10**9, 0o640)))
    path.chmod(0o600)
    facts = files_of(tree).stat("shared", b"movie.mp4")
    assert (facts.size, facts.mode, facts.modified_at) == (1000, 0o640, 1_600_000_000.0)
    assert (facts.mime, facts.is_absent) == ("video/mp4", True)


def test_what_is_known_of_a_file_is_read_once_until_something_of_it_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tree / "uploads" / "a"
    path.write_bytes(b"1")
    files, reads = files_of(tree), []

    def names_on(file: marks.File, real: Callable[[marks.File], Sequence[str]] = marks.names_on) -> Any:
        reads.append(file)
        return real(file)

    def settled() -> FileFacts:
        """The facts that were read from nothing but the attributes; at first its ctime is too young."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            reads.clear()
            facts = files.stat("uploads", b"a")
            if not reads:
                return facts
        raise AssertionError("it is read again and again")

    monkeypatch.setattr(marks, "names_on", names_on)
    first = settled()
    assert (first.created_by, first.labels, first.is_frozen) == (Creator.AGENT, b"", False)
    fd = os.open(path, os.O_RDONLY)
    marks.write_creator(fd, Creator.USER)
    marks.write_labels(fd, b"red")
    marks.write_frozen(fd, frozen=True)
    os.close(fd)
    for facts in (files.stat("uploads", b"a"), settled(), next(files.list("uploads", b""))):
        assert (facts.created_by, facts.labels, facts.is_frozen) == (Creator.USER, b"red", True)
        assert facts.created_at == first.created_at
    path.unlink()
    path.write_bytes(b"2")  # most likely with the inode that has become free
    facts = files.stat("uploads", b"a")
    assert (facts.created_by, facts.labels, facts.is_frozen) == (Creator.AGENT, b"", False)
    monkeypatch.setattr(home_files, "_KNOWN", 1)
    for name in ("b", "c"):
        (tree / "uploads" / name).touch()
    settled()
    assert len(list(files.list("uploads", b""))) == 3


def test_an_id_stays_with_the_path_and_an_agents_goes_through_all_executions(tree: Path) -> None:
    one, other, stranger = files_of(tree), files_of(tree, execution="e2"), files_of(tree, agent="b")
    assert uuid.UUID(one.id_of("shared", b"x")).version == 5
    assert one.id_of("shared", b"x") == other.id_of("shared", b"x") != stranger.id_of("shared", b"x")
    assert one.id_of("uploads", b"x") == stranger.id_of("uploads", b"x") != other.id_of("uploads", b"x")
    assert len({one.id_of(*name) for name in [("uploads", b"x"), ("uploads", b"\xff"), ("home", b"x")]}) == 3


@pytest.mark.parametrize(
    ("region", "path", "error"),
    [
        ("nowhere", b"x", NotFoundError),
        ("shared", b"x", NotFoundError),
        ("shared", b"file/x", NotFoundError),
        ("shared", b"link/x", NotFoundError),
        ("shared", b"n" * 300, NotFoundError),
        ("home", b"shared/file", NotFoundError),
        ("shared", b"../uploads", UsageError),
        ("shared", b"/etc", UsageError),
        ("shared", b"a\0b", UsageError),
        ("shared", b"./file", UsageError),
    ],
)
def test_what_is_not_there_is_told(tree: Path, region: str, path: bytes, error: type[Exception]) -> None:
    (tree / "shared" / "file").touch()
    (tree / "shared" / "link").symlink_to(".")
    with pytest.raises(error):
        files_of(tree).stat(region, path)
    with pytest.raises(error):
        next(files_of(tree).list(region, path))


def test_a_file_is_not_listed_as_a_directory(tree: Path) -> None:
    (tree / "shared" / "file").touch()
    with pytest.raises(UsageError, match="not a directory"):
        next(files_of(tree).list("shared", b"file"))


def test_what_vanishes_while_it_is_listed_is_left_out(tree: Path) -> None:
    for name in "abc":
        (tree / "shared" / name).touch()
    listing = files_of(tree).list("shared", b"")
    assert next(listing).name == b"a"
    (tree / "shared" / "b").unlink()
    (tree / "shared" / "c").unlink()
    (tree / "shared" / "c").mkdir()
    assert [(each.name, each.type) for each in listing] == [(b"c", "dir")]


def spread(tree: Path) -> list[bytes]:
    """Fill ``shared/top``; returns what is in it as it is listed."""
    top = tree / "shared" / "top"
    for directory in ("a", "a.b", "a/x", "a/x/y", "b", "b/1", "b/2", "c"):
        (top / directory).mkdir(parents=True)
        for name in "123":
            (top / directory / f"f{name}").touch()
    found = [os.fsencode(path.relative_to(tree / "shared")) for path in top.rglob("*")]
    return sorted(found, key=lambda path: path.split(b"/"))


def test_a_recursive_listing_goes_on_behind_every_name_however_few_it_keeps(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = spread(tree)
    files = files_of(tree)
    for kept in (2000, 2, 1):
        monkeypatch.setattr("agentfuse.home.files._NAMES", kept)
        monkeypatch.setattr("agentfuse.home.files._LEVELS", kept)
        assert [each.path for each in files.list("shared", b"top", recursive=True)] == expected
        for number, path in enumerate(expected):
            found = files.list("shared", b"top", recursive=True, after=path.removeprefix(b"top/"))
            assert [each.path for each in found] == expected[number + 1 :]


@pytest.mark.parametrize("after", [b"top/../../uploads", b"top//", b"/", b"top/\0", b"top/gone/x"])
def test_a_recursive_listing_goes_nowhere_else_whatever_it_is_told_to_go_on_behind(
    tree: Path, after: bytes
) -> None:
    expected = spread(tree)
    (tree / "uploads" / "secret").touch()
    found = [each.path for each in files_of(tree).list("shared", b"", recursive=True, after=after)]
    assert {each for each in found if each.startswith(b"top/")} <= set(expected)
    assert set(found) <= {b"top", *expected}


def test_a_recursive_listing_of_the_home_stays_out_of_other_regions(tree: Path) -> None:
    (tree / "dir").mkdir()
    (tree / "dir" / "file").touch()
    (tree / "shared" / "file").touch()
    files = files_of(tree)
    found = [(each.region, each.path) for each in files.list("home", b"", recursive=True)]
    assert [path for region, path in found if region == "home"] == [b"dir", b"dir/file"]
    assert {path for region, path in found if region != "home"} == {b""}
    behind = files.list("home", b"", recursive=True, after=b"shared")
    assert [each.name for each in behind] == [b"uploads", b"workspace"]
    behind = files.list("home", b"", recursive=True, after=b"shared/a")
    assert [each.name for each in behind] == [b"uploads", b"workspace"]


@pytest.mark.parametrize("rest", [[], ["d/later", "e"]])
@pytest.mark.parametrize("goes", ["moved", "removed"])
def test_a_recursive_listing_goes_on_when_the_directories_it_is_in_go_away(
    tree: Path, goes: str, rest: list[str]
) -> None:
    deep = "/".join("d" * 150)
    (tree / "shared" / deep).mkdir(parents=True)
    for name in rest:
        (tree / "shared" / name).touch()
    listing = files_of(tree).list("shared", b"", recursive=True)
    for _ in range(149):
        next(listing)
    assert next(listing).path == os.fsencode(deep)
    if goes == "moved":
        (tree / "shared" / "d" / "d").rename(tree / "uploads" / "d")
    else:
        shutil.rmtree(tree / "shared" / "d" / "d")
    assert [os.fsdecode(each.path) for each in listing] == rest
