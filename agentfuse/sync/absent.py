"""The files of a mounted home whose contents are not here yet, by backing inode number.

    ABSENT --claim--> FILLING --filled--> HERE --settling--> SETTLING --release--> not in the registry
       ^------failed-----'                 ^------failed------'

ABSENT: a hole with a mark. FILLING: a thread fetches, verifies and writes the content; the mark remembers
mtime and mode, which that changes. HERE: verified, so it may be read; the mark stays, so after a crash it
is fetched again. SETTLING: made durable, then the mark is removed, durably. Only then may it be written
to. Emptying a file (O_TRUNC) releases it at once unless it is FILLING; losing its last name does always,
and whoever works on it drops it when done. The trio thread's alone; knows no FUSE, and no fetching.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from agentfuse.home import marks
from agentfuse.home.walk import Cursor, join, local_disk, open_to_fill, read_directory
from agentfuse.killpoints import passing
from agentfuse.objectstore.base import ObjectStore
from agentfuse.snapshots.entries import Entry, printable

_log = logging.getLogger(__name__)


_REFUSES_S = 1.0
"""So long after one who wanted to write was refused readers are, too. Programs that may not write at once try
to read, and take what then works for a file that they may only read. SQLite, when that happens to its -shm
in closing, removes a -wal whose contents it has not brought into the database."""


class State(enum.Enum):
    """Where a file is on its way, see above."""

    ABSENT = enum.auto()
    FILLING = enum.auto()
    HERE = enum.auto()
    SETTLING = enum.auto()


class Settled(NamedTuple):
    """A file that holds its content for good: its name when it was restored, and what its print is now."""

    path: bytes
    sha256: str
    ino: int
    ctime_ns: int


class Part:
    """Where the files of one region are, where their contents come from, and who remembers their prints.

    ``settled`` is called in a thread; it may do nothing.
    """

    def __init__(
        self, root: Path, store: ObjectStore, agent: str, settled: Callable[[Iterable[Settled]], None]
    ) -> None:
        self.root = root
        self.store = store
        self.agent = agent
        self.settled = settled

    def open_to_fill(self, item: Item) -> int:
        """Open a file under the name it once had: it may be another one now, see ``Absent.claim``."""
        with Cursor(self.root) as cursor:
            directory_fd, name = cursor.parent(item.entry.path)
            return open_to_fill(name, directory_fd)

    def name_of(self, entry: Entry) -> str:
        """A file as people know it."""
        return f"{self.root.name}/{printable(entry.path)}"


class Step:
    """Something under way with a file: wait for ``done``, then ``errno`` says how it failed, if not 0."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.errno = 0


class Item:
    """One file of the registry. ``entry`` has its content's hash, size and place, and a name it once had.

    ``step`` is what is under way while FILLING or SETTLING, ``fd`` its descriptor in all but ABSENT.
    ``is_abandoned`` tells the thread that fills it to stop, ``emptiers`` counts who waits for that.
    ``problem``: why it could not be fetched, and ``is_hopeless`` that trying again will not help.
    ``is_astray``: it is not where ``entry`` says. ``refusal`` is the errno that whoever wanted to write got
    last, and ``refused_at_s`` when, in trio's time.
    """

    __slots__ = (
        "emptiers", "entry", "fd", "ino", "is_abandoned", "is_astray", "is_hopeless", "mode", "mtime_ns",
        "part", "problem", "refusal", "refused_at_s", "state", "step",
    )  # fmt: skip

    def __init__(self, part: Part, ino: int, entry: Entry) -> None:
        self.part = part
        self.ino = ino
        self.entry = entry
        self.state = State.ABSENT
        self.step: Step | None = None
        self.fd = -1
        self.mtime_ns = 0
        self.mode = 0
        self.is_abandoned = False
        self.emptiers = 0
        self.is_astray = False
        self.is_hopeless = False
        self.problem = ""
        self.refusal = 0
        self.refused_at_s = -_REFUSES_S

    def refuse(self, code: int) -> None:
        """Whoever wanted to write was told that it cannot be opened."""
        self.refusal, self.refused_at_s = code, trio.current_time()

    def check_refusal(self) -> None:
        """Raise ``OSError`` for a reader who comes soon after a writer was refused."""
        if trio.current_time() < self.refused_at_s + _REFUSES_S:
            raise OSError(self.refusal, "the content cannot be had")

    def allows(self, *, writing: bool) -> bool:
        """Whether the file may be opened now."""
        return not writing and self.state in (State.HERE, State.SETTLING)


class Absent:
    """The registry. A file that is not in ``by_ino`` is what it seems to be.

    ``on_here`` is called with the number of an inode whose attributes on disk have changed.
    """

    def __init__(self) -> None:
        self.by_ino: dict[int, Item] = {}
        self.here: dict[int, Item] = {}
        self.on_here: Callable[[int], None] = lambda ino: None
        self.files = 0
        self.bytes = 0
        self.hopeless_files = 0

    def add(self, part: Part, ino: int, entry: Entry) -> None:
        """One more absent file."""
        self.by_ino[ino] = Item(part, ino, entry)
        self.files += 1
        self.bytes += entry.size

    # What others do to such files -------------------------------------------------------------------

    def told(self, st: os.stat_result) -> os.stat_result:
        """What people are to be told of a file: as if its content were here and nothing being written."""
        item = self.by_ino.get(st.st_ino)
        if item is None or item.state not in (State.ABSENT, State.FILLING) or not stat.S_ISREG(st.st_mode):
            return st
        mode, mtime_ns = st.st_mode, st.st_mtime_ns
        if item.state is State.FILLING:
            mode, mtime_ns = stat.S_IFMT(mode) | item.mode, item.mtime_ns
        exact = {
            "st_atime_ns": st.st_atime_ns,
            "st_mtime_ns": mtime_ns,
            "st_ctime_ns": st.st_ctime_ns,
            "st_blksize": st.st_blksize,
            "st_blocks": max(st.st_blocks, -(-st.st_size // 512)),
            "st_rdev": st.st_rdev,
        }
        return os.stat_result((mode, *st[1:8], mtime_ns // 10**9, st[9]), exact)

    def attributes_set(self, ino: int, mode: int | None, mtime_ns: int | None) -> None:
        """Mode or mtime were set by somebody: that is what a fill under way leaves behind."""
        item = self.by_ino.get(ino)
        if item is not None and item.state is State.FILLING:
            item.mode = item.mode if mode is None else mode
            item.mtime_ns = item.mtime_ns if mtime_ns is None else mtime_ns
            marks.write(item.fd, _filling(item))

    def emptied(self, ino: int, fd: int) -> None:
        """The file, open as ``fd`` and not FILLING, was truncated to nothing, which is all it is now."""
        item = self.by_ino.get(ino)
        if item is not None:
            marks.remove(fd)
            self._drop(item)

    def forget(self, ino: int) -> None:
        """The inode has lost its last name: its number may soon be another file's."""
        item = self.by_ino.get(ino)
        if item is not None:
            self._drop(item)

    def _drop(self, item: Item) -> None:
        item.is_abandoned = True
        del self.by_ino[item.ino]
        if item.state in (State.ABSENT, State.FILLING):
            self._count(item, -1)
        if self.here.pop(item.ino, None) is not None:
            _close(item)

    def _count(self, item: Item, sign: int) -> None:
        self.files += sign
        self.bytes += sign * item.entry.size
        if item.is_hopeless:
            self.hopeless_files += sign

    # The way of a file -------------------------------------------------------------------------------

    def claim(self, item: Item, fd: int) -> bool:
        """Begin to fill an ABSENT file, open as ``fd``, which is taken over; False if it has no mark.

        Raises ``OSError``, ESTALE if it is another file; the descriptor is closed then, as with False.
        """
        assert item.state is State.ABSENT
        try:
            found = os.fstat(fd)
            if found.st_ino != item.ino:
                raise OSError(errno.ESTALE, "another file has its name")  # noqa: TRY301
            mark = marks.read(fd)
            if mark is None:
                os.close(fd)
                return False
            if mark.sha256 != item.entry.sha256 or found.st_size != item.entry.size:
                raise OSError(errno.EIO, "its mark is not the one it was given")  # noqa: TRY301
            item.fd, item.mtime_ns, item.mode = fd, found.st_mtime_ns, stat.S_IMODE(found.st_mode)
            marks.write(fd, _filling(item))
        except OSError:
            os.close(fd)
            raise
        passing("fill.claimed")
        item.state, item.step, item.is_abandoned = State.FILLING, Step(), False
        return True

    def filled(self, item: Item) -> None:
        """The content of a FILLING file is in it, verified, or the thread has been told to stop."""
        if item.is_abandoned:
            self._back(item, 0)
            return
        try:
            marks.restore(item.fd, _filling(item))
        except OSError as error:
            self.failed(item, error)
            return
        self._count(item, -1)
        item.problem, item.is_hopeless = "", False
        self.here[item.ino] = item
        self._done(item, State.HERE)
        passing("fill.here")
        self.on_here(item.ino)

    def failed(self, item: Item, error: Exception) -> None:
        """A FILLING file could not be filled; what is in it is worthless, and its mark says so."""
        self._back(item, error.errno if isinstance(error, OSError) and error.errno else errno.EIO)

    def blame(self, item: Item, problem: str, *, is_hopeless: bool) -> None:
        """Say once why the content of a file cannot be had."""
        if item.problem != problem and item.ino in self.by_ino:
            level = logging.ERROR if is_hopeless else logging.WARNING
            _log.log(level, "%s cannot be read: %s", item.part.name_of(item.entry), problem)
        if item.ino in self.by_ino:
            self.hopeless_files += is_hopeless - item.is_hopeless
        item.problem, item.is_hopeless = problem, is_hopeless

    def _back(self, item: Item, code: int) -> None:
        try:
            marks.restore(item.fd, _filling(item))
        except OSError as error:
            _log.warning("%s: %s", item.part.name_of(item.entry), error)
        _close(item)
        self._done(item, State.ABSENT, code)
        self.on_here(item.ino)

    def settling(self, item: Item) -> None:
        """A file that is HERE is about to be made durable."""
        del self.here[item.ino]
        item.state, item.step = State.SETTLING, Step()

    def unsettled(self, item: Item, code: int) -> None:
        """Making it durable has failed: it is HERE as before."""
        if self.by_ino.get(item.ino) is item:
            self.here[item.ino] = item
        else:
            _close(item)
        self._done(item, State.HERE, code)

    def release(self, item: Item) -> None:
        """The content is durable, and so is it that the mark is gone: the file is like any other now."""
        if self.by_ino.get(item.ino) is item:
            del self.by_ino[item.ino]
        _close(item)
        self._done(item, State.HERE)

    @staticmethod
    def _done(item: Item, state: State, code: int = 0) -> None:
        item.state = state
        if item.step is not None:
            item.step.errno = code
            item.step.done.set()
            item.step = None


def take_up(root: Path) -> Iterator[tuple[int, Entry]]:
    """The absent files below a root that an earlier process left, each inode once, as (number, entry).

    The entries have no place. What that process had begun is undone; nobody else may change the tree.
    """
    seen: set[int] = set()
    with local_disk(root), Cursor(root) as cursor:
        pending = [b""]
        while pending:
            directory = pending.pop()
            for name, found in read_directory(cursor.enter(directory)):
                path = join(directory, name)
                if stat.S_ISDIR(found.st_mode):
                    pending.append(path)
                elif stat.S_ISREG(found.st_mode) and found.st_ino not in seen:
                    seen.add(found.st_ino)
                    entry = _take_up(cursor, path)
                    if entry is not None:
                        yield found.st_ino, entry


def _take_up(cursor: Cursor, path: bytes) -> Entry | None:
    with open(cursor.open_file(path), "rb", buffering=0) as file:
        fd = file.fileno()
        mark = marks.read(fd)
        if mark is None:
            return None
        size = os.fstat(fd).st_size
        if not size:
            marks.remove(fd)  # it was emptied, and its mark was about to be removed
            return None
        marks.restore(fd, mark)
        found = os.fstat(fd)
        mode = stat.S_IMODE(found.st_mode)
        return Entry(
            path=path, type="file", mode=mode, mtime_ns=found.st_mtime_ns, size=size, sha256=mark.sha256
        )


def _filling(item: Item) -> marks.Mark:
    return marks.Mark(item.entry.sha256, (item.mtime_ns, item.mode))


def _close(item: Item) -> None:
    os.close(item.fd)
    item.fd = -1
