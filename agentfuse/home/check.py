"""Whether what stands beside and on the files of a home is sound: marks, the index, leftovers."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from agentfuse.errors import BusyError, IntegrityError
from agentfuse.home import marks
from agentfuse.home.index import Index, Row
from agentfuse.home.tree import Home
from agentfuse.home.walk import Cursor, join, read_directory
from agentfuse.regions import INCOMING, PLATFORM

_OURS = "user.agentfuse."


def wrong_marks(tree: Path) -> Iterator[str]:
    """Files and directories whose marks say nothing that we know, a line each."""
    with Cursor(tree) as cursor:
        pending = [b""]
        while pending:
            directory = pending.pop()
            fd = cursor.enter(directory)
            for name, st in read_directory(fd):
                path = join(directory, name)
                if stat.S_ISDIR(st.st_mode):
                    pending.append(path)
                elif not stat.S_ISREG(st.st_mode):
                    continue
                # Not by its own path: that is never followed, and may be longer than a path can be.
                link = os.fsencode(f"/proc/self/fd/{fd}/") + name
                yield from (f"{os.fsdecode(path)!r}: {each}" for each in _wrong(link, st))


def _wrong(link: bytes, st: os.stat_result) -> Iterator[str]:
    try:
        names = [name for name in os.listxattr(link, follow_symlinks=False) if name.startswith(_OURS)]
        values = {name: os.getxattr(link, name, follow_symlinks=False) for name in names}
    except OSError as error:
        yield f"its marks cannot be read: {error.strerror}"
        return
    for name, value in values.items():
        if not marks.is_sound(os.fsencode(name), value):
            yield f"the mark {name} says {value[:60]!r}, which is nothing we know"
        elif os.fsencode(name) == marks.NAME and not stat.S_ISREG(st.st_mode):
            yield f"the mark {name} is on what is no file"


def wrong_index(home: Home, region: str, *, reads_contents: bool) -> Iterator[str]:
    """What is wrong with what was noted of a region when it was last synced, a line each.

    ``reads_contents``: compare the contents of files that are untouched since, which must be as they were.
    """
    path = home.index_of(region)
    if not path.exists():
        return
    index = Index(path, only_looks=True)
    try:
        _, rows = index.load()
    except IntegrityError as error:
        yield error.message
        return
    finally:
        index.close()
    if reads_contents:
        with Cursor(home.tree / region) as cursor:
            for row in rows:
                if row.sha256 and not _is_as_noted(cursor, row):
                    name = os.path.join(region, os.fsdecode(row.path))
                    yield f"{name!r}: its content is not what was synced"


def _is_as_noted(cursor: Cursor, row: Row) -> bool:
    """Whether a file that is untouched since it was synced has the content that it had."""
    try:
        fd = cursor.open_file(row.path)
    except (OSError, BusyError):
        return True  # it was removed since
    with open(fd, "rb") as file:
        st = os.fstat(fd)
        now = (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        is_untouched = now == (row.ino, row.size, row.mtime_ns, row.ctime_ns)
        if not is_untouched or marks.read(fd) is not None:
            return True
        return hashlib.file_digest(file, "sha256").hexdigest() == row.sha256


def leftovers(home: Home) -> Iterator[str]:
    """What interrupted work left beside the tree, or on its way into it, a line each."""
    for name in sorted(os.listdir(home.path)):
        if name.endswith(".tmp"):
            yield f"{name}: a temporary that nobody will complete"
        elif ".corrupt-" in name:
            yield f"{name}: was damaged, and moved aside"
    incoming = home.tree / PLATFORM.name / INCOMING
    if incoming.is_dir():
        for name in sorted(os.listdir(incoming)):
            yield f"{PLATFORM.name}/{INCOMING}/{name}: came only in part"
