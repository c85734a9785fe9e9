"""What is done with files of a mount, or with strangers' expressions, in a process of its own: it can be
killed whatever it waits for.

    searcher.py read MOST_BYTES ROOT        paths, ended by NUL, in stdin: RECORDs and contents to stdout
    searcher.py gather FD MOST_BYTES ROOT   paths, ended by NUL, in stdin: contents to FD, places to stdout
    searcher.py match PATTERN FLAGS         stdin is a file: its lines that a regular expression finds

A script of the standard library alone. Paths are walked by descriptors, never through a symbolic link or into
another filesystem.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import sys

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PREVIEW_BYTES = 1000

RECORD = struct.Struct("<qqI")
"""Length of a content, -1 for none; mtime in nanoseconds; permissions."""


class _Reader:
    """Reads files below a directory."""

    def __init__(self, most_bytes: int, root: str) -> None:
        self._most_bytes = most_bytes
        self._root = os.open(root, _DIRECTORY)
        self._device = os.fstat(self._root).st_dev
        self._directory, self._directory_fd = b"", os.dup(self._root)

    def read(self, path: bytes) -> tuple[bytes, os.stat_result] | None:
        """The content of a file and its facts; None if it is not there, no file, or too long."""
        try:
            directory, _, name = path.rpartition(b"/")
            self._enter(directory)
            fd = os.open(name, _FILE, dir_fd=self._directory_fd)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_dev != self._device:
                    return None
                with open(fd, "rb", buffering=0, closefd=False) as file:
                    data = file.read(self._most_bytes + 1)
                    while data and len(data) <= self._most_bytes and (more := file.read(self._most_bytes)):
                        data += more
            finally:
                os.close(fd)
        except OSError:
            return None
        return None if len(data) > self._most_bytes else (data, found)

    def _enter(self, directory: bytes) -> None:
        if directory == self._directory:
            return
        fd = os.dup(self._root)
        try:
            for name in directory.split(b"/") if directory else ():
                below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError:
            os.close(fd)
            raise
        os.close(self._directory_fd)
        self._directory, self._directory_fd = directory, fd


class _Gatherer:
    """Copies contents of text files, one after the other, each of them ending in a line break."""

    def __init__(self, fd: int, reader: _Reader) -> None:
        self._fd = fd
        self._reader = reader
        self._end = 0

    def gather(self, path: bytes) -> int | None:
        """Where its content begins, None if it is left out, also for being binary."""
        found = self._reader.read(path)
        if found is None or b"\0" in found[0]:
            return None
        data = found[0]
        return self._write(data if data.endswith(b"\n") else data + b"\n")

    def _write(self, data: bytes) -> int:
        start = self._end
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, self._end)
            self._end += written
            left = left[written:]
        return start


def _read(most_bytes: int, root: str) -> None:
    reader = _Reader(most_bytes, root)
    for path in _paths():
        found = reader.read(path)
        if found is None:
            sys.stdout.buffer.write(RECORD.pack(-1, 0, 0))
        else:
            data, facts = found
            head = RECORD.pack(len(data), facts.st_mtime_ns, stat.S_IMODE(facts.st_mode))
            sys.stdout.buffer.write(head + data)


def _paths() -> list[bytes]:
    return sys.stdin.buffer.read().split(b"\0")[:-1]


def _gather(fd: int, most_bytes: int, root: str) -> None:
    gatherer = _Gatherer(fd, _Reader(most_bytes, root))
    places = (gatherer.gather(path) for path in _paths())
    sys.stdout.write("".join(f"{-1 if place is None else place}\n" for place in places))


def _match(pattern: str, flags: str) -> int:
    try:
        search = re.compile(pattern, re.IGNORECASE if "i" in flags else 0).search
    except (re.error, OverflowError, RecursionError):
        return 2
    at = 0
    for line in sys.stdin.buffer:
        text = line.rstrip(b"\r\n").decode(errors="replace")
        if search(text):
            sys.stdout.buffer.write(b"%d:%s\n" % (at, text.encode()[:_PREVIEW_BYTES]))
            sys.stdout.buffer.flush()
        at += len(line)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "read":
        _read(int(sys.argv[2]), sys.argv[3])
    elif sys.argv[1] == "gather":
        _gather(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(_match(sys.argv[2], sys.argv[3]))
