"""SQLite databases in a listing: a file and what SQLite keeps beside it are one thing, or torn.

A log of one execution beside the database of another is damage: what was committed is lost, or the
database is. Which files belong together is told by their names; knows no contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agentfuse.snapshots.entries import Entry

BESIDE = (b"-wal", b"-journal", b"-shm")
_INDEX = b"-shm"  # SQLite makes it again when it opens the database
_INDEX_BYTES = 32 * 1024  # it has so many, or a multiple


def together(path: bytes) -> Iterator[bytes]:
    """The path of a database, and of what may lie beside it."""
    yield path
    for suffix in BESIDE:
        yield path + suffix


def main_of(path: bytes) -> bytes | None:
    """The path of the file that this one would lie beside; None for what has no such name."""
    for suffix in BESIDE:
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return None


def databases(*listings: Mapping[bytes, Entry]) -> set[bytes]:
    """The paths at which a file has something beside it, in whichever listings; all of it must be files."""
    named = {main_of(path) for path in set().union(*listings)}
    return {
        main
        for main in named
        if main is not None
        and any(main in listing for listing in listings)
        and all(_is_file(listing.get(path)) for listing in listings for path in together(main))
    }


def whole(path: bytes, *listings: Mapping[bytes, Entry]) -> list[bytes]:
    """A path, and if it is a database's, those of what may lie beside it."""
    return list(together(path)) if path in databases(*listings) else [path]


def state(listing: Mapping[bytes, Entry], database: bytes) -> tuple[str, ...]:
    """What a database holds, to be compared; empty when there is nothing of it."""
    entries = map(listing.get, together(database))
    hashes = [entry.sha256 if entry is not None and matters(entry, database) else "" for entry in entries]
    return tuple(hashes) if any(hashes) else ()


def matters(entry: Entry, database: bytes) -> bool:
    """Whether a database is another without this file of it: an empty log is as good as none."""
    if entry.path == database:
        return True
    return entry.size % _INDEX_BYTES > 0 if entry.path.endswith(_INDEX) else entry.size > 0


def _is_file(entry: Entry | None) -> bool:
    return entry is None or entry.type == "file"
