"""The frozen files of a home: which they are, so that whoever asks to change one is refused.

What says that a file is frozen is a mark on it (``home.marks``); this knows the marked ones by number, as
looking at every file that is opened would cost everybody. A frozen file and the directories above it stay
where they are, so their numbers stay true.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from agentfuse.errors import BusyError, FrozenError, WrongTypeError
from agentfuse.home import marks
from agentfuse.home.walk import Cursor


class Whereabouts(NamedTuple):
    """A file: its path from the home's root, its inode's number, and those of the directories above it."""

    path: bytes
    ino: int
    above: tuple[int, ...]


class Frozen:
    """The frozen files of one home. ``files``: their inodes; ``holders``: those of the directories above.

    Changed by the trio thread only.
    """

    def __init__(self, files: Iterable[Whereabouts] = ()) -> None:
        self.files: set[int] = set()
        self.holders: Counter[int] = Counter()
        self._places: dict[int, Whereabouts] = {}
        for file in files:
            self.add(file)

    def add(self, file: Whereabouts) -> None:
        """From now on it is refused to change a file."""
        if file.ino not in self.files:
            self.files.add(file.ino)
            self.holders.update(file.above)
            self._places[file.ino] = file

    def remove(self, ino: int) -> None:
        """From now on a file may be changed again."""
        if ino in self.files:
            self.files.remove(ino)
            self.holders -= Counter(self._places.pop(ino).above)

    def paths(self) -> list[bytes]:
        """Of all of them, from the home's root."""
        return sorted(file.path for file in self._places.values())

    def require_changeable(self, ino: int) -> None:
        """Raise ``FrozenError`` for a frozen file."""
        if ino in self.files:
            raise FrozenError("the file is frozen")

    def require_movable(self, ino: int) -> None:
        """Raise ``FrozenError`` for a frozen file, and for a directory with one in it."""
        self.require_changeable(ino)
        if ino in self.holders:
            raise FrozenError("a frozen file is in it")


def frozen_of(tree: Path, paths: Iterable[bytes]) -> Frozen:
    """Of the files at these paths those that are marked; a home's, before it is mounted."""
    found = []
    with Cursor(tree, only_looks=True) as cursor:
        for path in paths:
            with contextlib.suppress(OSError, BusyError, WrongTypeError):  # it is not there
                fd = cursor.open_file(path)
                try:
                    if marks.is_frozen(fd):
                        found.append(_whereabouts(tree, path))
                finally:
                    os.close(fd)
    return Frozen(found)


def locate(tree: Path, path: bytes) -> Whereabouts:
    """Where a regular file is now. Raises ``OSError``, and ``WrongTypeError`` for anything else."""
    return _whereabouts(tree, path)


def set_mark(tree: Path, file: Whereabouts, *, frozen: bool) -> None:
    """Mark a file durably, or take the mark away. Raises ``BusyError`` if it is not there any more."""
    with Cursor(tree, only_looks=True) as cursor:
        fd = cursor.open_file(file.path)
        try:
            if _whereabouts(tree, file.path) != file or os.fstat(fd).st_ino != file.ino:
                raise BusyError("the file has been moved or replaced just now", hint="ask again")
            marks.write_frozen(fd, frozen=frozen)
            os.fsync(fd)
        finally:
            os.close(fd)


def _whereabouts(tree: Path, path: bytes) -> Whereabouts:
    names = path.split(b"/")
    inodes: list[int] = []
    with Cursor(tree, only_looks=True) as cursor:
        for depth in range(1, len(names)):
            inodes.append(os.fstat(cursor.enter(b"/".join(names[:depth]))).st_ino)
        directory_fd, name = cursor.parent(path)
        found = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise WrongTypeError("only files can be frozen", hint="name a file")
    return Whereabouts(path, found.st_ino, tuple(inodes))
