"""What goes into memory comes out of it: every kind of file, as root and as an ordinary user."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memories import Listening, Run, grow_nasty_tree, picture
from stores import CountingStore, local_store

from agentfuse.home import marks
from agentfuse.home.walk import Cursor, clear_tree
from agentfuse.progress import Silent
from agentfuse.regions import Creator
from agentfuse.snapshots.history import History
from agentfuse.sync.export import export

NOBODY = 65534


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that another user can reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="agentfuse-test-"))
    yield path
    clear_tree(path)
    path.rmdir()


def as_nobody(base: Path, work: Callable[[], None]) -> None:
    """Run ``work`` in a process without any privilege; fails as it does."""
    os.chown(base, NOBODY, NOBODY)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            status = 0
        except BaseException:  # noqa: BLE001  this process ends here and must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def go_round(base: Path) -> None:
    store = local_store(base)
    first = Run(base, store)
    grow_nasty_tree(first.root)
    before = picture(first.root)
    assert first.commit().number == 1
    assert picture(first.root) == before, "a commit leaves no trace"
    second = Run(base, store, "e2")
    report = second.restore()
    assert picture(second.root) == before
    assert report.files == sum(1 for entry in before.values() if entry[0] == stat.S_IFREG)
    assert first.commit().number is None
    assert second.commit().number is None
    clear_tree(second.root)
    assert os.listdir(second.root) == []


def test_a_nasty_tree_goes_round(base: Path) -> None:
    go_round(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="is this already")
def test_a_nasty_tree_goes_round_without_privileges(base: Path) -> None:
    as_nobody(base, lambda: go_round(base))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_restored_files_belong_to_the_agent(base: Path) -> None:
    store = local_store(base)
    first = Run(base, store)
    grow_nasty_tree(first.root)
    before = picture(first.root)
    first.commit()
    second = Run(base, store, "e2", owner=(1234, 5678))
    second.restore()
    assert picture(second.root) == before, "setuid and setgid survive the change of the owner"
    with Cursor(second.root) as cursor:
        for path in filter(None, before):
            parent_fd, name = cursor.parent(path)
            found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            assert (found.st_uid, found.st_gid) == (1234, 5678)
    found = os.stat(second.root)
    assert (found.st_uid, found.st_gid) == (1234, 5678)


def test_sparse_files_come_back_sparse(base: Path) -> None:
    store = local_store(base)
    first = Run(base, store)
    with first.write("sparse", b"begin").open("r+b") as file:
        file.seek(30_000_000)
        file.write(b"end")
    first.commit()
    second = Run(base, store, "e2")
    second.restore()
    found = (second.root / "sparse").stat()
    assert found.st_size == 30_000_003
    assert found.st_blocks * 512 < 3_000_000


def test_sockets_and_devices_are_reported_not_kept(base: Path) -> None:
    store = local_store(base)
    run = Run(base, store)
    run.write("file", b"1")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(run.root)
        server.bind("socket")
    os.chdir("/")
    if os.geteuid() == 0:
        os.mknod(run.root / "null", 0o20666, os.makedev(1, 3))
    report = run.commit()
    assert report.skipped == (("null", "socket") if os.geteuid() == 0 else ("socket",))
    assert report.files == 1


def test_user_attributes_come_back_and_the_daemons_marks_do_not(base: Path) -> None:
    store = local_store(base)
    run = Run(base, store)
    path = run.write("d/file", b"1")
    try:
        os.setxattr(path, "user.origin", b"https://example.org/\xff")
    except OSError:
        pytest.skip("this filesystem has no extended attributes")
    os.setxattr(path.parent, "user.empty", b"")
    os.setxattr(path, "user.agentfuse.missing", b"1")
    run.commit()
    other = Run(base, store, "e2")
    other.restore()
    assert os.getxattr(other.root / "d/file", "user.origin") == b"https://example.org/\xff"
    assert os.listxattr(other.root / "d") == ["user.empty"]
    assert os.listxattr(other.root / "d/file") == ["user.origin"]
    os.setxattr(other.root / "d", "user.empty", b"no more")
    assert other.commit().number == 2


def test_who_made_a_file_stays_known_whoever_looks_at_it_next(base: Path) -> None:
    store = local_store(base)
    run = Run(base, store)
    for name, creator in (("user", Creator.USER), ("environment", Creator.ENVIRONMENT)):
        marks.write_creator(str(run.write(f"{name}.d/file", name.encode())), creator)
        marks.write_creator(str(run.root / f"{name}.d"), creator)
        marks.write_creator(str(run.write(f"{name}.d/empty", b"")), creator)
    run.write("mine", b"x")
    for number in (1, 2, 3):  # what did not change is known from the index alone, once it has settled
        run.write(f"file {number}", b"y")
        assert run.commit().number == number
        run.another_process()
    other = Run(base, store, "e2")
    other.restore()
    assert picture(other.root) == picture(run.root)
    assert marks.read_creator(str(other.root / "user.d" / "empty")) is Creator.USER
    assert marks.read_creator(str(other.root / "environment.d")) is Creator.ENVIRONMENT
    assert os.listxattr(other.root / "mine") == []


def test_what_is_given_to_an_operator_has_no_marks(base: Path) -> None:
    run = Run(base, local_store(base))
    marks.write_creator(str(run.write("file", b"x")), Creator.USER)
    run.commit()
    snapshot = History(run.store, "a", "shared").read(1)
    export(run.store, snapshot, b"", base / "out", Silent())
    assert (base / "out" / "file").read_bytes() == b"x"
    assert os.listxattr(base / "out" / "file") == []


def test_both_tell_how_far_they_are(base: Path) -> None:
    store = local_store(base)
    first = Run(base, store)
    for number in range(30):
        first.write(f"{number}", b"%d" % number * 1000)
    listening = Listening()
    first.memory.commit(listening, "end")
    assert [moment.phase for moment in listening.moments][-1] == "flush"
    last = listening.moments[-1]
    assert (last.done_files, last.done_bytes) == (last.total_files, last.total_bytes) == (30, 50_000)
    listening = Listening()
    Run(base, store, "e2").memory.restore(listening)
    last = listening.moments[-1]
    assert (last.phase, last.done_files, last.done_bytes) == ("restore", 30, 50_000)


def test_many_small_files_cost_few_requests(base: Path) -> None:
    store = CountingStore(local_store(base))
    first = Run(base, store)
    for number in range(5000):
        first.write(f"d{number % 40}/{number}", os.urandom(1024))
    report = first.commit()
    assert report.files == 5000
    assert (store.puts, store.requests["list"], store.gets) == (2, 1, 0)
    assert report.objects_put == 1
    store.reset()
    second = Run(base, store, "e2")
    assert second.restore().requests == 1
    assert (store.gets, store.requests["list"]) == (2, 1)
    assert picture(second.root) == picture(first.root)


def test_forty_megabytes_of_small_files_are_packed(base: Path) -> None:
    store = CountingStore(local_store(base))
    first = Run(base, store)
    for number in range(80):
        first.write(str(number), os.urandom(512 * 1024))
    first.commit()
    assert store.puts == 6
    Run(base, store, "e2").restore()
    assert store.gets == 6
    shutil.rmtree(first.root)


def test_a_scattered_rest_of_old_packs_is_read_with_few_requests(base: Path) -> None:
    """Most of a pack is gone; what is left of it is near enough to be read at once."""
    store = CountingStore(local_store(base))
    first = Run(base, store)
    for number in range(1000):
        first.write(f"{number:04}", os.urandom(1024))
    first.commit()
    for number in range(1000):
        if number % 100:
            (first.root / f"{number:04}").unlink()
    first.commit()
    store.reset()
    Run(base, store, "e2").restore()
    assert store.gets == 2
