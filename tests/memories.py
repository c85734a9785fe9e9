"""Trees and memories for tests of restoring and committing."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from agentfuse.home import marks
from agentfuse.home.index import Index
from agentfuse.home.walk import Cursor, join, read_directory
from agentfuse.objectstore import ObjectStore
from agentfuse.progress import Progress, Silent
from agentfuse.regions import Creator
from agentfuse.snapshots.layout import execution_region
from agentfuse.sync.engine import Memory

SILENT = Silent()


class Listening:
    """A reporter that remembers the moments it was told of."""

    def __init__(self) -> None:
        self.moments: list[Progress] = []

    def say(self, text: str) -> None:
        raise AssertionError(f"nothing to say: {text}")

    def progress(self, moment: Progress) -> None:
        self.moments.append(moment)


class Run:
    """One execution of agent "a": its root, its index, and its memory in a store.

    ``kept``: instead of its memory, a region of this name that the execution keeps.
    """

    def __init__(
        self,
        base: Path,
        store: ObjectStore,
        execution: str = "e1",
        owner: tuple[int, int] | None = None,
        *,
        kept: str = "",
    ) -> None:
        self.home = base / execution
        self.kept = kept
        self.root = self.home / (kept or "shared")
        self.region = execution_region(execution, kept) if kept else "shared"
        self.root.mkdir(parents=True, exist_ok=True)
        self.execution = execution
        self.owner = owner
        self.store = store
        self.memory = self.another_process()

    def another_process(self) -> Memory:
        """A memory as a new process has it: it remembers only what the index does."""
        self.index = Index(self.home / f"{self.kept or 'index'}.db")
        self.memory = Memory(
            store=self.store,
            agent="a",
            execution=self.execution,
            root=self.root,
            index=self.index,
            owner=self.owner,
            region=self.region,
        )
        return self.memory

    def restore(self):  # type: ignore[no-untyped-def]
        return self.memory.restore(SILENT)

    def commit(self, reason: str = "end"):  # type: ignore[no-untyped-def]
        return self.memory.commit(SILENT, reason)

    def write(self, path: str, content: bytes) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return target


def picture(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a restore must bring back, by path. Read by descriptors, so that no depth is too deep."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}
    with Cursor(root) as cursor:
        pending = [(b"", os.stat(root))]
        while pending:
            path, st = pending.pop()
            kind, mode = stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode)
            if kind == stat.S_IFDIR:
                fd = cursor.enter(path)
                found[path] = (kind, mode, st.st_mtime_ns, marks.read_creator(fd))
                below = read_directory(fd)
                pending += [(join(path, name), each) for name, each in reversed(below)]
                continue
            content: object = ""
            creator = Creator.AGENT
            parent_fd, name = cursor.parent(path)
            if kind == stat.S_IFREG:
                with open(cursor.open_file(path), "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                    creator = marks.read_creator(file.fileno())
            elif kind == stat.S_IFLNK:
                content = os.readlink(name, dir_fd=parent_fd)
            first_name = inodes.setdefault(st.st_ino, path) if st.st_nlink > 1 else path
            found[path] = (kind, mode, st.st_mtime_ns, content, first_name, creator)
    return found


def grow_nasty_tree(root: Path) -> None:
    """One of everything that a region may hold and that is easily lost."""
    top = os.fsencode(root)

    def write(
        name: bytes, content: bytes, mode: int = 0o644, mtime_ns: int = 1_700_000_000_123_456_789
    ) -> None:
        path = top + b"/" + name
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
        os.utime(path, ns=(0, mtime_ns))

    for directory in (b"empty", b"deep", b"locked", b"sticky", b"setgid", b"\xff\xfe dir", b"a", b"a-b"):
        os.mkdir(top + b"/" + directory)
    write(b"locked/inside", b"behind a locked door")
    write(b"not utf-8 \xff\xfe", b"1")
    write(b"new\nline\ttab\x01", b"2")
    write(b"n" * 255, b"3")
    write("grün 🙂".encode(), b"4")
    write(b"\xff\xfe dir/x", b"5")
    write(b"a/x", b"6")  # "a-b" sorts between "a" and "a/x"
    write(b"nobody", b"mode 0", mode=0)
    write(b"nobody too", b"mode 0", mode=0)
    write(b"readonly", b"mode 0444", mode=0o444)
    write(b"program", b"#!/bin/sh\n", mode=0o4755)
    write(b"before 1970", b"old", mtime_ns=-1_500_000_001)
    write(b"far future", b"new", mtime_ns=15_000_000_000 * 10**9 + 7)
    write(b"empty file", b"")
    write(b"large", bytes(range(256)) * 20_000)
    write(b"large again", bytes(range(256)) * 20_000)
    with open(top + b"/sparse", "wb") as file:
        file.seek(20_000_000)
        file.write(b"end")
    for target in (b"a/x", b"/etc/passwd", b"../../../escape", b"dangling \xff", b"x" * 4000):
        os.symlink(target, top + b"/link " + target[:9].replace(b"/", b"_"))
    os.link(top + b"/a/x", top + b"/a-b/hard")
    os.link(top + b"/a/x", top + b"/zz hard")
    os.link(top + b"/empty file", top + b"/empty file 2")
    os.mkfifo(top + b"/pipe", 0o620)
    _dig(top + b"/deep")
    for name, creator in ((b"a/x", Creator.USER), (b"nobody", Creator.SYSTEM), (b"a", Creator.ENVIRONMENT)):
        marks.write_creator(os.fsdecode(top + b"/" + name), creator)
    for name, mode in ((b"locked", 0), (b"sticky", 0o1777), (b"setgid", 0o2755), (b"empty", 0o555)):
        os.utime(top + b"/" + name, ns=(0, 1_600_000_000_000_000_001))
        os.chmod(top + b"/" + name, mode)
    os.chmod(top, 0o750)
    os.utime(top, ns=(0, 1_234_567_890_000_000_001))


def _dig(path: bytes) -> None:
    """A path far longer than PATH_MAX, as programs make it: step by step."""
    fd = os.open(path, os.O_RDONLY)
    for _ in range(40):
        os.mkdir(b"d" * 200, dir_fd=fd)
        below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open(b"bottom", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd), "wb") as file:
        file.write(b"at the bottom")
    os.close(fd)
