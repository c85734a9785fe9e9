"""What a workload does to a directory, one system call at a time, and what the directory is then.

A ``Step`` can be performed on a real directory by ``Hands`` and applied to a ``Tree``, which is the model.
Paths are relative to the region, as text with surrogate escapes. SQLite databases (``*.db`` and what lies
beside them) are outside of the model: they are judged by their rows.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import random
import re
import sqlite3
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

TOKEN = re.compile(rb"<(e\d+\.\d+)>")
"""Every write brings a token of its own, so that what became of it can be told."""

DATABASE = re.compile(r"\.db(~\d+)?(-wal|-shm|-journal)?$")
_BESIDE = ("", "-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class Step:
    """One system call (``insert``: one transaction). ``other``: a rename's or link's new name, a symlink's
    target. ``handle``: the number under which an open file is known.
    """

    op: str
    path: str = ""
    other: str = ""
    handle: int = 0
    offset: int = 0
    size: int = 0
    token: str = ""
    mode: int = 0
    is_text: bool = False

    def data(self) -> bytes:
        """What a write writes: lines that hold the token, or bytes that begin with it."""
        mark = f"<{self.token}>".encode()
        if self.is_text:
            return mark + b" " + b"x" * self.size + b"\n"
        return b"\0" + mark + random.Random(self.token).randbytes(self.size)


@dataclass(eq=False, slots=True)
class Node:
    """A file, a directory or a symlink; two names of one file have one node."""

    kind: str
    mode: int = 0
    content: bytearray = field(default_factory=bytearray)
    target: str = ""
    _digest: str = ""

    def touch(self) -> None:
        """The content has changed."""
        self._digest = ""

    @property
    def digest(self) -> str:
        if not self._digest:
            self._digest = hashlib.sha256(self.content).hexdigest()
        return self._digest


Picture = dict[str, tuple[object, ...]]
"""By path what a tree holds: kind, mode, hash or target, and the first name of the same inode."""


class Tree:
    """The model of a region."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self.handles: dict[int, Node] = {}
        self.rows: dict[str, list[str]] = {}  # of each database, the tokens that were committed

    # -- looking

    def below(self, directory: str) -> list[str]:
        return [path for path in self.names if path.startswith(directory + "/")]

    def of_kind(self, kind: str, top: str) -> list[str]:
        return [path for path in self.below(top) if self.names[path].kind == kind]

    def picture(self, top: str = "") -> Picture:
        first: dict[Node, str] = {}
        found: Picture = {}
        for path in sorted(self.names):
            node = self.names[path]
            if (top and not path.startswith(top + "/")) or DATABASE.search(path):
                continue
            if node.kind == "file":
                found[path] = ("file", node.mode, node.digest, first.setdefault(node, path))
            else:
                found[path] = (node.kind, node.mode, node.target, path)
        return found

    def sizes(self) -> dict[str, int]:
        """The length of every file."""
        return {path: len(node.content) for path, node in self.names.items() if node.kind == "file"}

    def tokens(self) -> set[str]:
        """The tokens in all files that have a name, and all rows."""
        found = {row for rows in self.rows.values() for row in rows}
        for node in set(self.names.values()):
            found.update(tokens_in(bytes(node.content)))
        return found

    def databases(self) -> list[str]:
        """Every path of a database."""
        paths = (path for path, node in self.names.items() if node.kind == "file")
        return [path for path in paths if (match := DATABASE.search(path)) and not match[2]]

    def read_databases(self) -> None:
        """Find out the rows from the contents."""
        self.rows = {path: read_rows(self._files_of(path)) for path in self.databases()}

    def _files_of(self, database: str) -> dict[str, bytes]:
        beside = {suffix: self.names.get(database + suffix) for suffix in _BESIDE}
        return {
            suffix: bytes(node.content) for suffix, node in beside.items() if node and node.kind == "file"
        }

    def linked_tokens(self) -> set[str]:
        """The tokens in files of several names."""
        names = Counter(self.names.values())
        return {token for node in names if names[node] > 1 for token in tokens_in(bytes(node.content))}

    def after(self, step: Step | None) -> Tree:
        """What this tree is to be after a step; itself after none."""
        if step is None:
            return self
        tree = copy.deepcopy(self)
        tree.apply(step)
        return tree

    # -- changing

    def apply(self, step: Step) -> None:
        getattr(self, f"_{step.op}")(step)

    def _mkdir(self, step: Step) -> None:
        self.names[step.path] = Node("dir", step.mode)

    def _rmdir(self, step: Step) -> None:
        del self.names[step.path]

    _unlink = _rmdir

    def _symlink(self, step: Step) -> None:
        self.names[step.path] = Node("symlink", target=step.other)

    def _create(self, step: Step) -> None:
        self.handles[step.handle] = self.names[step.path] = Node("file", step.mode)

    def _open(self, step: Step) -> None:
        self.handles[step.handle] = self.names[step.path]

    def _wipe(self, step: Step) -> None:
        """Open with O_TRUNC."""
        self._open(step)
        self._cut(self.names[step.path], 0)

    def _close(self, step: Step) -> None:
        del self.handles[step.handle]

    def _write(self, step: Step) -> None:
        node, data = self.handles[step.handle], step.data()
        node.content.extend(bytes(max(0, step.offset - len(node.content))))
        node.content[step.offset : step.offset + len(data)] = data
        node.touch()

    def _append(self, step: Step) -> None:
        node = self.handles[step.handle]
        node.content += step.data()
        node.touch()

    def _truncate(self, step: Step) -> None:
        self._cut(self.names[step.path], step.size)

    @staticmethod
    def _cut(node: Node, size: int) -> None:
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))
        node.touch()

    def _chmod(self, step: Step) -> None:
        self.names[step.path].mode = step.mode

    def _link(self, step: Step) -> None:
        self.names[step.other] = self.names[step.path]

    def _rename(self, step: Step) -> None:
        if self.names.get(step.other) is self.names[step.path]:
            return  # two names of one file: nothing happens
        for path in [step.path, *self.below(step.path)]:
            self.names[step.other + path[len(step.path) :]] = self.names.pop(path)

    def _insert(self, step: Step) -> None:
        self.rows.setdefault(step.path, []).append(step.token)

    def _part(self, step: Step) -> None:
        """Close a database."""


class Hands:
    """Performs steps in a real directory. Holds what is open; ``let_go`` when the mount is gone."""

    def __init__(self, root: Path, journal_mode: str) -> None:
        self.root = root
        self._journal_mode = journal_mode
        self._handles: dict[int, int] = {}
        self._databases: dict[str, sqlite3.Connection] = {}

    def perform(self, step: Step) -> None:
        """Raises ``OSError``, EIO for what may be tried again, and ``sqlite3.Error``."""
        getattr(self, f"_{step.op}")(step, os.path.join(self.root, step.path))

    def let_go(self) -> None:
        """Close everything, whether or not anybody listens."""
        for fd in self._handles.values():
            _quietly(partial(os.close, fd))
        for connection in self._databases.values():
            _quietly(connection.close)
        self._handles, self._databases = {}, {}

    def _mkdir(self, step: Step, path: str) -> None:
        os.mkdir(path, step.mode)

    def _rmdir(self, step: Step, path: str) -> None:
        os.rmdir(path)

    def _unlink(self, step: Step, path: str) -> None:
        os.unlink(path)

    def _symlink(self, step: Step, path: str) -> None:
        os.symlink(step.other, path)

    def _create(self, step: Step, path: str) -> None:
        self._handles[step.handle] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, step.mode)

    def _open(self, step: Step, path: str) -> None:
        self._handles[step.handle] = os.open(path, os.O_RDWR)

    def _wipe(self, step: Step, path: str) -> None:
        self._handles[step.handle] = os.open(path, os.O_RDWR | os.O_TRUNC)

    def _close(self, step: Step, path: str) -> None:
        os.close(self._handles.pop(step.handle))

    def _write(self, step: Step, path: str) -> None:
        _write_all(self._handles[step.handle], step.data(), step.offset)

    def _append(self, step: Step, path: str) -> None:
        fd = self._handles[step.handle]
        _write_all(fd, step.data(), os.fstat(fd).st_size)

    def _truncate(self, step: Step, path: str) -> None:
        os.truncate(path, step.size)

    def _chmod(self, step: Step, path: str) -> None:
        os.chmod(path, step.mode)

    def _link(self, step: Step, path: str) -> None:
        os.link(path, os.path.join(self.root, step.other))

    def _rename(self, step: Step, path: str) -> None:
        os.rename(path, os.path.join(self.root, step.other))

    def _insert(self, step: Step, path: str) -> None:
        connection = self._databases.get(step.path) or self._connect(step.path, path)
        try:
            connection.execute(
                "INSERT INTO kept SELECT coalesce(max(n), 0) + 1, ?, zeroblob(?) FROM kept",
                (step.token, step.size),
            )
        except sqlite3.OperationalError as error:
            _quietly(self._databases.pop(step.path).close)
            # SQLite opens for reading what it cannot open for writing, and its journal when it writes.
            if "readonly" in str(error) or "unable to open" in str(error):
                raise OSError(errno.EIO, str(error)) from error
            raise

    def _connect(self, name: str, path: str) -> sqlite3.Connection:
        try:
            connection = self._databases[name] = sqlite3.connect(path, isolation_level=None)
            connection.execute(f"PRAGMA journal_mode = {self._journal_mode}").fetchall()
            connection.execute("CREATE TABLE IF NOT EXISTS kept (n INTEGER PRIMARY KEY, token, filling)")
        except sqlite3.OperationalError as error:
            if name in self._databases:
                _quietly(self._databases.pop(name).close)
            raise OSError(errno.EIO, str(error)) from error
        return connection

    def _part(self, step: Step, path: str) -> None:
        self._databases.pop(step.path).close()


def read_tree(root: Path) -> Tree:
    """The tree that a directory really is. Databases come with the rows they hold."""
    tree = Tree()
    nodes: dict[int, Node] = {}
    for path in _paths(root):
        full = os.path.join(root, path)
        st = os.lstat(full)
        mode = stat.S_IMODE(st.st_mode)
        if stat.S_ISDIR(st.st_mode):
            tree.names[path] = Node("dir", mode)
        elif stat.S_ISLNK(st.st_mode):
            tree.names[path] = Node("symlink", target=os.readlink(full))
        elif st.st_ino in nodes:
            tree.names[path] = nodes[st.st_ino]
        else:
            with open(full, "rb") as file:
                nodes[st.st_ino] = tree.names[path] = Node("file", mode, bytearray(file.read()))
    tree.read_databases()
    return tree


def sizes_in(root: Path) -> dict[str, int]:
    """The length of every file in a directory, without opening one."""
    found = ((path, os.lstat(os.path.join(root, path))) for path in _paths(root))
    return {path: st.st_size for path, st in found if stat.S_ISREG(st.st_mode)}


def read_rows(files: Mapping[str, bytes]) -> list[str]:
    """The tokens in a database, in order; ``files``: its content, and of what lies beside it, by suffix.

    Raises ``AssertionError`` when it is damaged or has gaps. Works on a copy: opening changes a database.
    """
    with tempfile.TemporaryDirectory(prefix="agentfuse-db-") as directory:
        for suffix, content in files.items():
            Path(directory, "copy.db" + suffix).write_bytes(content)
        return _read_rows(f"{directory}/copy.db")


def _read_rows(path: str) -> list[str]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        sound = connection.execute("PRAGMA integrity_check").fetchall()
        assert sound == [("ok",)], f"{path}: {sound}"
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchall():
            return []
        rows = connection.execute("SELECT n, token FROM kept ORDER BY n").fetchall()
    except sqlite3.DatabaseError as error:
        raise AssertionError(f"{path}: {error}") from error
    finally:
        connection.close()
    assert [n for n, _ in rows] == list(range(1, len(rows) + 1)), f"{path}: rows {rows}"
    return [token for _, token in rows]


def tokens_in(content: bytes) -> set[str]:
    return {token.decode() for token in TOKEN.findall(content)}


def explains(found: Tree, before: Tree, after: Tree, top: str = "") -> str:
    """Why ``found`` is neither of two trees nor on the way from one to the other; empty if it is.

    A write of several pages is several requests: what it wrote so far may be there.
    """
    there, old, new = found.picture(top), before.picture(top), after.picture(top)
    for path in sorted(there.keys() | old.keys() | new.keys()):
        if there.get(path) in (old.get(path), new.get(path)):
            continue
        if path in there and path in old and path in new and "file" == there[path][0] == old[path][0]:
            contents = [bytes(tree.names[path].content) for tree in (found, before, after)]
            if is_mixture(*contents):
                continue
        shown = [_shown(picture.get(path)) for picture in (there, old, new)]
        return f"{path!r} is {shown[0]}; was {shown[1]}, then {shown[2]}"
    return ""


def is_mixture(found: bytes, old: bytes, new: bytes) -> bool:
    """Whether every byte is one of either content at this place."""
    if not min(len(old), len(new)) <= len(found) <= max(len(old), len(new)):
        return False
    length = max(len(old), len(new))
    versions = zip(old.ljust(length, b"\0"), new.ljust(length, b"\0"), strict=True)
    return all(byte in both for byte, both in zip(found, versions, strict=False))


def _shown(what: tuple[object, ...] | None) -> str:
    return "absent" if what is None else " ".join(str(each)[:12] for each in what)


def _paths(root: Path) -> Iterable[str]:
    def fail(error: OSError) -> None:
        raise error

    for directory, names, files in os.walk(root, onerror=fail):
        for name in (*names, *files):
            yield os.path.relpath(os.path.join(directory, name), root)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _quietly(close: Callable[[], None]) -> None:
    with contextlib.suppress(OSError, sqlite3.Error):
        close()
