"""Frozen files: nobody in the home changes one or takes it away, and they survive."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Home as Mounted

from agentfuse.client import Home
from agentfuse.errors import BusyError, FrozenError, NotFoundError, WrongTypeError
from agentfuse.fuse.names import RENAME_EXCHANGE, renameat2

pytestmark = pytest.mark.mount

AT_FDCWD = -100


@pytest.fixture
def there(home: Mounted, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """The mount from outside; afterwards shared/ is empty."""
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    found = Home(home.path)
    yield found
    for entry in found.list("shared", recursive=True):
        if entry.is_frozen:
            found.set_frozen(f"shared/{entry.path}", frozen=False)
    for entry in found.list("shared"):
        found.delete(f"shared/{entry.path}", recursive=True)


def attempts(top: Path) -> dict[str, Callable[[], object]]:
    """All that an agent may try on top/d/f, which is frozen, beside top/other and the directory top/d/e."""
    file, other = top / "d/f", top / "other"
    return {
        "write": lambda: file.open("r+b"),
        "append": lambda: file.open("ab"),
        "truncating open": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
        "create": lambda: os.open(file, os.O_WRONLY | os.O_CREAT),
        "truncate": lambda: os.truncate(file, 1),
        "chmod": lambda: file.chmod(0o777),
        "chown": lambda: os.chown(file, 1, 1),
        "utime": lambda: os.utime(file, (1, 1)),
        "unlink": file.unlink,
        "rename": lambda: file.rename(top / "d/g"),
        "rename over": lambda: other.rename(file),
        "link": lambda: os.link(file, top / "hard"),
        "rename of its directory": lambda: (top / "d").rename(top / "moved"),
        "rename of the directory above": lambda: top.rename(top.with_name("moved")),
        "rename out of the region": lambda: (top / "d").rename(top.parents[1] / "workspace/d"),
        "exchange": lambda: exchange(top / "d", top / "empty"),
        "exchange with it": lambda: exchange(other, file),
        "mv": lambda: run("mv", "-f", other, file),
        "rm": lambda: run("rm", "-rf", top / "d"),
        "sed": lambda: run("sed", "-i", "s/a/b/", file),
    }


def exchange(one: Path, other: Path) -> None:
    renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def facts(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_mode, found.st_uid, found.st_mtime_ns, found.st_nlink


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise PermissionError(errno.EPERM, done.stderr.decode())


def test_an_agent_neither_changes_a_frozen_file_nor_takes_it_away(home: Mounted, there: Home) -> None:
    there.put(b"content", "shared/top/d/f")
    there.put(b"other", "shared/top/other")
    there.mkdir("shared/top/empty")
    there.mkdir("shared/top/d/e")
    frozen = there.set_frozen("shared/top/d/f")
    assert frozen.is_frozen
    top = home.path / "shared/top"
    before = facts(top / "d/f")
    for what, attempt in attempts(top).items():
        with pytest.raises(PermissionError):
            attempt()
            pytest.fail(what)
    assert (top / "d/f").read_bytes() == b"content"
    assert facts(top / "d/f") == before
    assert (top / "other").read_bytes() == b"other"
    (top / "d/new").write_text("beside it everything goes on")
    (top / "d/new").rename(top / "new")
    listed = {entry.path: entry.is_frozen for entry in there.list("shared", recursive=True, brief=True)}
    assert [path for path, is_frozen in listed.items() if is_frozen] == ["top/d/f"]
    said = home.agentfuse("ls", "-l", f"{home.path}:shared/top/d").stdout.splitlines()
    assert said[0].split()[2] == "FROZEN"
    assert [line.split()[2] for line in said[1:] if line.endswith("top/d/f")] == ["yes"]

    assert not there.set_frozen("shared/top/d/f", frozen=False).is_frozen
    (top / "d/f").write_bytes(b"changed")
    (top / "d").rename(top / "moved")
    (top / "moved/f").unlink()


def test_users_are_refused_as_well_until_it_is_thawed(there: Home) -> None:
    there.put(b"content", "shared/d/f")
    there.put(b"other", "shared/other")
    there.set_frozen("shared/d/f")
    there.set_frozen("shared/d/f")  # again is no mistake
    for refused in (
        lambda: there.put(b"new", "shared/d/f"),
        lambda: there.delete("shared/d/f"),
        lambda: there.delete("shared/d", recursive=True),
        lambda: there.move("shared/d/f", "shared/g"),
        lambda: there.move("shared/d", "workspace/d"),
        lambda: there.move("shared/other", "shared/d/f", on_collision="replace"),
        lambda: there.copy("shared/other", "shared/d/f", on_collision="replace"),
        lambda: there.annotate("shared/d/f", mode=0o600),
    ):
        with pytest.raises(FrozenError):
            refused()
    there.annotate("shared/d/f", labels=b"tag")
    there.copy("shared/d/f", "shared/copy")
    assert not there.stat("shared/copy").is_frozen
    there.put(b"changed", "shared/copy")
    assert there.get("shared/d/f") == b"content"
    assert there.put(b"numbered", "shared/d/f", on_collision="number").path == "d/f (1)"
    for path, error in (("d", WrongTypeError), ("missing", NotFoundError), ("d/f/x", NotFoundError)):
        with pytest.raises(error):
            there.set_frozen(f"shared/{path}")


def test_what_is_open_for_writing_is_not_frozen_and_what_is_open_for_reading_is(
    home: Mounted, there: Home
) -> None:
    there.put(b"content", "shared/f")
    path = home.path / "shared/f"
    with path.open("r+b") as file:
        with pytest.raises(BusyError, match="open for writing"):
            there.set_frozen("shared/f")
        mapping = mmap.mmap(file.fileno(), 0)
    with pytest.raises(BusyError):
        there.set_frozen("shared/f")
    mapping[0:1] = b"C"
    mapping.close()
    with path.open("rb") as file:
        there.set_frozen("shared/f")
        assert file.read() == b"Content"
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY)


def test_it_is_frozen_after_a_kill_and_in_the_next_execution(
    new_home: Callable[..., Mounted], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new_home().start()
    monkeypatch.setenv("AGENTFUSE_RUNTIME_DIR", str(home.runtime))
    there = Home(home.path)
    for name in ("kept", "thawed"):
        there.put(b"content", f"shared/d/{name}")
    there.put(b"of the run", "workspace/w")
    for path in ("shared/d/kept", "shared/d/thawed", "workspace/w"):
        there.set_frozen(path)
    there.set_frozen("shared/d/thawed", frozen=False)

    def check() -> None:
        facts = {entry.path: entry.is_frozen for entry in there.list("shared", recursive=True)}
        assert facts == {"d": False, "d/kept": True, "d/thawed": False}
        for attempt in (
            (home.path / "shared/d/kept").unlink,
            lambda: (home.path / "shared/d").rename(home.path / "shared/e"),
        ):
            with pytest.raises(PermissionError):
                attempt()

    home.kill()
    home.start()
    check()
    with pytest.raises(PermissionError):
        (home.path / "workspace/w").write_bytes(b"")
    home.umount()
    home.start(fresh=True)
    check()
    assert (home.path / "shared/d/kept").read_bytes() == b"content"
    (home.path / "shared/d/thawed").write_bytes(b"changed")
    there.set_frozen("shared/d/kept", frozen=False)
    home.umount()
    home.start(fresh=True)
    (home.path / "shared/d/kept").unlink()
    home.umount()


def test_freezing_while_an_agent_writes_again_and_again_leaves_a_whole_file_that_stays(
    home: Mounted, there: Home
) -> None:
    path = home.path / "shared/f"
    writer = subprocess.Popen(
        ["sh", "-c", f"while :; do echo 0123456789 > {path}.new && mv -f {path}.new {path} || exit; done"],
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            try:
                there.set_frozen("shared/f")
                break
            except (BusyError, NotFoundError):
                continue
        assert writer.wait(30) != 0  # mv was refused
        before = (path.stat().st_ino, path.read_bytes())
        assert before[1] == b"0123456789\n"
        assert there.stat("shared/f").is_frozen
    finally:
        writer.kill()
        writer.wait(30)
