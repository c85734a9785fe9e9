"""Ranges of objects on local disk: bounded, verified, the least recently used go first. Knows no store.

``<directory>/<aa>/<name>-<offset>-<length>`` holds the bytes of one range, then the CRC-32 of each block of
them, little-endian. Nothing is locked or synced: a file appears by rename, and one that a crash, a disk or
another process spoiled fails its checksums, or is gone, and then counts as never there. So any number of
processes may share a directory. What goes wrong here costs a request to the store, never the operation.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_log = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 1024
"""What one checksum covers, so the least that is read to verify anything."""

MAX_RANGES = 64
"""Of one object; beyond that only what replaces others is kept. Finding a range takes listing them."""

RESERVE_BYTES = 1024**3
"""So much room, or a tenth of a smaller disk, is left to others: a cache must not be what fills a disk."""

_SHARE = 16  # one part in so many may be added before the directory is looked through again
_SUM_BYTES = 4
_TEMPORARY = "tmp-"
_FILE = re.compile(r"[0-9a-f]+-(\d+)-(\d+)")


class RangeCache:
    """The ranges below ``directory``, together no more than ``max_bytes``. Any thread may use it.

    While other processes fill it too, it may exceed the bound by a sixteenth for each of them.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = str(directory)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be added before the next look; there was none yet
        self._has_complained = False

    def read(self, name: str, offset: int, length: int) -> bytes:
        """The bytes of an object from ``offset`` on, as far as they are here and sound."""
        pieces: list[bytes] = []
        position, end = offset, offset + length
        with self._tolerating():
            ranges = self._ranges(name)
            while position < end:
                covering = [each for each in ranges if each.offset <= position < each.end]
                if not covering:
                    break
                found = max(covering, key=lambda each: each.end)
                if piece := _read(found, position, min(end, found.end)):
                    pieces.append(piece)
                    position += len(piece)
                else:
                    ranges.remove(found)
        return b"".join(pieces)  # of a single piece that is no copy

    def filling(self, name: str, offset: int, length: int) -> Filling:
        """What takes the bytes of an object from ``offset`` on, about ``length``. Use it as a context."""
        path = ""
        with self._tolerating():
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self._shard(name), 0o700)
            if length <= self._max_bytes and self._has_room(length):
                path = os.path.join(self._directory, _TEMPORARY + secrets.token_hex(8))
        return Filling(self, name, offset, path)

    def forget(self, name: str) -> None:
        """Remove all that is here of an object."""
        with self._tolerating():
            for each in self._ranges(name):
                _remove(each.path)

    def _shard(self, name: str) -> str:
        return os.path.join(self._directory, name[:2])

    def _ranges(self, name: str) -> list[_Range]:
        shard = self._shard(name)
        found = []
        with suppress(FileNotFoundError):
            for entry in os.listdir(shard):
                if match := entry.startswith(name) and _FILE.fullmatch(entry):
                    offset, length = int(match[1]), int(match[2])
                    found.append(_Range(offset, offset + length, os.path.join(shard, entry)))
        return found

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """A disk that is full, read-only or failing is told of once, and concerns no caller."""
        try:
            yield
        except (FileNotFoundError, BlockingIOError):
            pass  # another process was faster
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                _log.warning("the cache is of no use, the store is asked instead: %s", error)

    def _publish(self, temporary: str, name: str, offset: int, length: int) -> None:
        """Give a complete file its name, in place of the ranges that it covers."""
        others = self._ranges(name)
        covered = [each for each in others if offset <= each.offset and each.end <= offset + length]
        if len(others) - len(covered) >= MAX_RANGES:
            _remove(temporary)
            return
        path = os.path.join(self._shard(name), f"{name}-{offset}-{length}")
        os.rename(temporary, path)
        for each in covered:
            if each.path != path:
                _remove(each.path)
        with self._lock:
            self._room -= _on_disk(_file_bytes(length))
            if self._room < 0:
                self._tidy()

    # -- room

    def _has_room(self, length: int) -> bool:
        if _free_bytes(self._directory) < length:
            with self._lock:
                self._tidy()
        return _free_bytes(self._directory) >= length

    def _tidy(self) -> None:
        """Remove what killed processes left, and the least recently used until the bound is kept."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        allowed = max(0, min(self._max_bytes, used + _free_bytes(self._directory)))
        if used > allowed:
            for _, size, path in files:
                _remove(path)
                used -= size
                if used <= allowed - allowed // _SHARE:
                    break
        self._room = min(allowed - used, self._max_bytes // _SHARE)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """When each file was used last, the bytes that it takes, and its path."""
        with os.scandir(self._directory) as top:
            for entry in top:
                if entry.name.startswith(_TEMPORARY):
                    _remove_if_dead(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    with os.scandir(entry.path) as shard:
                        for each in shard:
                            with suppress(FileNotFoundError):
                                found = each.stat(follow_symlinks=False)
                                yield found.st_mtime_ns, _on_disk(found.st_size), each.path


class Filling:
    """One range on its way into a cache: :meth:`write` its bytes, then :meth:`keep` them.

    What is not kept when the context is left is dropped. Nothing here raises.
    """

    def __init__(self, cache: RangeCache, name: str, offset: int, path: str) -> None:
        """``path``: of the temporary file; empty if nothing is to be kept."""
        self._cache = cache
        self._name = name
        self._offset = offset
        self._path = path
        self._sums = _Sums()
        self._fd = -1
        if path:
            with cache._tolerating():
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                # Held as long as this process lives, see _remove_if_dead.
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            _remove(self._path)
            self._close()

    def write(self, piece: bytes | bytearray) -> None:
        """The next bytes of the range."""
        if self._fd < 0:
            return
        is_written = False
        with self._cache._tolerating():
            self._sums.add(piece)
            _write_all(self._fd, piece)
            is_written = True
        if not is_written:
            _remove(self._path)  # at once: on a full disk somebody waits for the room
            self._close()

    def keep(self) -> None:
        """The range is complete, and may be read from now on."""
        if self._fd < 0 or not self._sums.length:
            return
        with self._cache._tolerating():
            _write_all(self._fd, self._sums.packed())
            _touch(self._fd)
            self._cache._publish(self._path, self._name, self._offset, self._sums.length)
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class _Range(NamedTuple):
    """The bytes from ``offset`` to ``end`` of an object, in a file."""

    offset: int
    end: int
    path: str


class _Sums:
    """The checksums of the blocks of bytes that come in pieces."""

    def __init__(self) -> None:
        self.length = 0
        self._sums: list[int] = []

    def add(self, piece: bytes | bytearray) -> _Sums:
        view = memoryview(piece)
        while view:
            filled = self.length % BLOCK_BYTES
            part = view[: BLOCK_BYTES - filled]
            if filled:
                self._sums[-1] = zlib.crc32(part, self._sums[-1])
            else:
                self._sums.append(zlib.crc32(part))
            self.length += len(part)
            view = view[len(part) :]
        return self

    def packed(self) -> bytes:
        return struct.pack(f"<{len(self._sums)}I", *self._sums)


def _read(found: _Range, start: int, end: int) -> bytes:
    """The bytes of an object from ``start`` to ``end``, which ``found`` covers. Empty if its file is gone, or
    damaged; then it is removed."""
    length = found.end - found.offset
    first, last = (start - found.offset) // BLOCK_BYTES, _blocks(end - found.offset)
    begin = first * BLOCK_BYTES
    try:
        fd = os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        with suppress(OSError):  # what the disk cannot read is damaged, too
            data = os.pread(fd, min(last * BLOCK_BYTES, length) - begin, begin)
            sums = os.pread(fd, (last - first) * _SUM_BYTES, length + first * _SUM_BYTES)
            if os.fstat(fd).st_size == _file_bytes(length) and sums == _Sums().add(data).packed():
                with suppress(OSError):  # a cache that may only be read
                    _touch(fd)
                skipped = start - found.offset - begin
                return data[skipped : skipped + end - start]
    finally:
        os.close(fd)
    _log.warning("dropped a damaged file from the cache: %s", found.path)
    _remove(found.path)
    return b""


def _blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES)


def _file_bytes(length: int) -> int:
    return length + _blocks(length) * _SUM_BYTES


def _on_disk(size: int) -> int:
    return -(-size // 4096) * 4096


def _free_bytes(directory: str) -> int:
    """What may be taken of a disk; negative if others should have more than is left."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize - min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 10)


def _touch(fd: int) -> None:
    now = time.time_ns()  # the kernel's own stamp is some ms late, which would mix up the order
    os.utime(fd, ns=(now, now))


def _write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _remove_if_dead(path: str) -> None:
    """Remove a temporary file that no living process has locked. One that is just being made may be hit,
    too: then its range is not kept."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)
