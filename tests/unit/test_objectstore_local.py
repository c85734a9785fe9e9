"""The local store where it differs from others: directories, disks, and what else goes wrong with them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentfuse.errors import ObjectNotFoundError, StoreError, UsageError
from agentfuse.objectstore import ObjectStore, open_store, probe
from agentfuse.objectstore.local import MARKER, LocalStore

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, or becomes another user")


def calls(store: ObjectStore) -> list[Callable[[], object]]:
    return [
        lambda: store.put("a/b", b"x"),
        lambda: store.put_if_absent("a/b", b"x"),
        lambda: store.get("a/b"),
        lambda: store.stat("a/b"),
        lambda: list(store.stream("a/b")),
        lambda: list(store.list("")),
        lambda: store.delete("a/b"),
        lambda: store.remove_leftovers("", 0),
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    "url",
    [
        "s4://bucket/x",
        "/plain/path",
        "",
        "file://host/path",
        "file:relative",
        "file://",
        "file:///a?b=c",
        "file:///a%00b",
    ],
)
def test_urls_of_no_store_are_refused_and_told_what_there_is(url: str) -> None:
    with pytest.raises(UsageError, match="file:///absolute/path"):
        open_store(url)


def test_urls_may_be_percent_encoded(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/my%20st%C3%B6re/")
    store.put("a", b"x")
    assert (tmp_path / "my störe" / "a").read_bytes() == b"x"
    assert store.url == f"file://{tmp_path}/my%20st%C3%B6re"


def test_opening_and_reading_make_no_directory(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert list(store.list("")) == []
    with pytest.raises(ObjectNotFoundError):
        store.get("a")
    assert not (tmp_path / "store").exists()


def test_the_first_write_makes_the_store_with_its_marker(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "deep" / "store")
    store.put("a/b", b"x")
    assert (tmp_path / "deep/store" / MARKER).read_text() == "agentfuse object store, format 1\n"
    assert (tmp_path / "deep/store").stat().st_mode & 0o777 == 0o700
    assert [found.key for found in store.list("")] == ["a/b"]


def test_a_store_that_vanished_is_unknown_not_empty(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("a/b", b"x")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for call in calls(store):
        with pytest.raises(StoreError, match="it was there and is gone") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError)
    (tmp_path / "store").mkdir()  # the mountpoint of a disk that is not mounted
    for call in calls(store):
        with pytest.raises(StoreError, match="it was there and is gone"):
            call()
    (tmp_path / "store").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.get("a/b") == b"x"


def test_a_directory_of_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    store = LocalStore(tmp_path)
    for call in calls(store):
        with pytest.raises(StoreError, match="is no agentfuse store"):
            call()
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_the_hint_for_a_lost_marker_works(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("a", b"x")
    (tmp_path / "store" / MARKER).unlink()
    with pytest.raises(StoreError) as caught:
        list(LocalStore(tmp_path / "store").list(""))
    command = caught.value.hint.partition("write it: ")[2]
    subprocess.run(["sh", "-c", command], cwd=tmp_path / "store", check=True)
    assert [found.key for found in LocalStore(tmp_path / "store").list("")] == ["a"]


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("a", b"x")
    (tmp_path / MARKER).write_text("agentfuse object store, format 2\n")
    with pytest.raises(StoreError, match="format 2"):
        list(LocalStore(tmp_path).list(""))


def test_the_root_of_a_fresh_disk_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    assert [found.key for found in store.list("")] == ["a"]


def test_leftover_temporaries_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"x")
    (tmp_path / "a" / ".agentfuse-tmp-0123").write_bytes(b"half")
    (tmp_path / ".agentfuse-tmp-4567").write_bytes(b"half")
    assert [found.key for found in store.list("")] == ["a/b"]


def test_leftover_temporaries_are_removed_after_the_grace(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("agents/a/x/1", "agents/b/x/1"):
        store.put(key, b"x")
    old = [tmp_path / at / ".agentfuse-tmp-0123" for at in ("", "agents/a/x", "agents/b", "agents/b/x")]
    young = tmp_path / "agents/a/x" / ".agentfuse-tmp-4567"
    for path in (*old, young):
        path.write_bytes(b"half")
    for path in (*old, tmp_path / "agents/a/x/1", tmp_path / MARKER):
        os.utime(path, (1e9, 1e9))
    assert store.remove_leftovers("", 3600, dry_run=True) == 4
    assert store.remove_leftovers("agents/a/", 3600) == 1
    assert store.remove_leftovers("agents/c/", 3600) == 0
    assert [path.exists() for path in (*old, young)] == [True, False, True, True, True]
    assert store.remove_leftovers("agents/", 3600) == 2
    assert store.remove_leftovers("", 3600) == 1
    assert [path.exists() for path in (*old, young)] == [False, False, False, False, True]
    assert [found.key for found in store.list("")] == ["agents/a/x/1", "agents/b/x/1"]


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"x")
    store.put_if_absent("a/b", b"y")
    store.put_if_absent("a/c", b"y")
    assert sorted(os.listdir(tmp_path / "a")) == ["b", "c"]


def test_a_file_in_the_place_of_the_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    for call in calls(LocalStore(tmp_path / "store")):
        with pytest.raises(StoreError, match="Not a directory"):
            call()


@as_root
def test_a_full_disk_says_so_and_corrupts_nothing(small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    store.put("a", b"old")
    with pytest.raises(StoreError, match=r"No space left on device.*free some space"):
        store.put("a", bytes(400_000))
    assert store.get("a") == b"old"
    assert sorted(os.listdir(small_disk / "store")) == [MARKER, "a"]


@as_root
def test_a_read_only_disk_says_so(small_disk: Path) -> None:
    LocalStore(small_disk / "store").put("a/b", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = LocalStore(small_disk / "store")
    assert store.get("a/b") == b"x"
    for call in (lambda: store.put("a/c", b"x"), lambda: store.delete("a/b"), lambda: probe(store)):
        with pytest.raises(StoreError, match=r"Read-only file system.*mount it read-write"):
            call()


@as_root
def test_a_disk_that_is_unmounted_while_in_use_is_not_an_empty_store(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    store.put("a/b", b"x")
    subprocess.run(["umount", small_disk], check=True)
    try:
        with pytest.raises(StoreError, match="mount its disk"):
            list(store.list(""))
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", small_disk], check=True)


@as_root
def test_missing_permission_says_so(tmp_path: Path) -> None:
    LocalStore(tmp_path / "store").put("a/b", b"x")
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match=r"Permission denied.*read and write access") as caught:
            LocalStore(tmp_path / "store").get("a/b")
    finally:
        os.seteuid(0)
    assert not isinstance(caught.value, ObjectNotFoundError)
