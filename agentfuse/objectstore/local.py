"""The object store that is a local directory: the embedded default, and the reference for the contract.

An object is a file; it is written beside its place, synced, and then renamed (or linked, if it must be
absent). The file ``.agentfuse-store`` marks a directory as a store, so that an unmounted disk is told
from an empty store. Knows nothing of what the objects mean.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from agentfuse.errors import ObjectNotFoundError, StoreError
from agentfuse.objectstore.base import (
    CHUNK_BYTES,
    RESERVED_PREFIX,
    ObjectStat,
    Source,
    check_key,
    require_presignable,
)

MARKER = RESERVED_PREFIX + "store"
MARKER_CONTENT = b"agentfuse object store, format 1\n"
TEMPORARY = RESERVED_PREFIX + "tmp-"
_NOT_OURS = ("lost+found",)  # what a fresh filesystem may hold and still counts as empty

_HINTS = {
    errno.ENOSPC: "free some space on its disk, then try again",
    errno.EDQUOT: "its disk quota is used up; free some space, then try again",
    errno.EACCES: "give this user read and write access to the store's directory",
    errno.EPERM: "its filesystem must allow hard links; give this user write access",
    errno.EOPNOTSUPP: "its filesystem must allow hard links",
    errno.EROFS: "its filesystem is read-only; mount it read-write or choose another store",
    errno.EIO: "its disk is failing; look at the kernel's log",
    errno.ENOTDIR: "a file is where a directory of the store should be",
    errno.ESTALE: "its network filesystem went away; mount it again",
}


class LocalStore:
    """An object store in a directory, made at the first write. See ``ObjectStore`` for the contract.

    A directory that was a store and is one no longer (unmounted, removed), or that holds other things,
    raises ``StoreError`` on every call: what it held is unknown, not absent.
    """

    def __init__(self, root: Path, *, is_known: bool = False) -> None:
        self._root = root
        self._marker = os.path.join(root, MARKER)
        self._lock = threading.Lock()
        self._is_known = is_known  # whether its absence is a loss
        self._was_store = False

    @property
    def url(self) -> str:
        """``file:///…``, percent-encoded."""
        return "file://" + quote(str(self._root))

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        """Write an object; durable when this returns."""
        path = self._path(key)
        self._initialise()
        with _failing("write", key), self._temporary(path, body, size_bytes) as temporary:
            os.rename(temporary, path)
            _sync_directory(os.path.dirname(path))

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write an object unless there is one; whether this call wrote it."""
        path = self._path(key)
        self._initialise()
        with _failing("write", key), self._temporary(path, body) as temporary:
            won = _link(temporary, path)
            _sync_directory(os.path.dirname(path))
            return won

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object or of a range of it."""
        path = self._path(key)
        with self._reading(key), open(path, "rb", buffering=0) as file:
            file.seek(offset)
            there = max(os.fstat(file.fileno()).st_size - offset, 0)
            wanted = there if length is None else min(length, there)
            data = file.read(wanted)  # at once: pieces would have to be joined, and be there twice
            return data if len(data) == wanted else data + file.read(wanted - len(data))

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same in pieces."""
        path = self._path(key)
        with self._reading(key), open(path, "rb", buffering=0) as file:
            file.seek(offset)
            left = length
            while left is None or left > 0:
                piece = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece

    def stat(self, key: str) -> ObjectStat:
        """Size and age of an object."""
        path = self._path(key)
        with self._reading(key):
            found = os.stat(path)
            return ObjectStat(key, found.st_size, found.st_mtime)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """The objects under a prefix, in key order. Directories are read as the iterator gets to them."""
        if not self._is_store():
            return
        directory = prefix.rpartition("/")[0]
        with _failing("list", prefix):
            yield from self._walk(directory + "/" if directory else "", prefix, start_after)
        self._is_store()  # what vanished while we read it was not read to its end

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> None:
        """Files of a host have no URL that others could use."""
        require_presignable(key, ttl_s)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        path = self._path(key)
        if not self._is_store():
            return
        with _failing("delete", key), suppress(FileNotFoundError):
            os.unlink(path)
            _sync_directory(os.path.dirname(path))

    def forget(self, key: str) -> None:
        """Nothing is kept but the objects."""

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        """Remove the temporary files of writers that were killed."""
        if not self._is_store():
            return 0
        before, count = time.time() - grace_s, 0
        with _failing("clean", prefix or self._root):
            for path in self._leftovers(prefix):
                with suppress(FileNotFoundError):  # its writer lives, and was faster
                    if os.stat(path).st_mtime < before:
                        if not dry_run:
                            os.unlink(path)
                        count += 1
        return count

    # -- the store as such

    def _path(self, key: str) -> str:
        return os.path.join(self._root, check_key(key))

    def _is_store(self) -> bool:
        """Whether the directory is a store. False: a new one. Raises when it is neither, or no longer."""
        is_known = self._is_known  # before the look: another thread may be making the store right now
        with _failing("open", self._root):
            if os.path.lexists(self._marker):
                if not self._was_store:
                    self._check_format()
                self._was_store = self._is_known = True
                return True
            if not is_known and (not self._holds_anything() or os.path.lexists(self._marker)):
                return False
        if is_known:
            raise StoreError(
                f"object store {self._root}: it was there and is gone ({MARKER} is missing)",
                hint="mount its disk or put its directory back, then try again; "
                "to begin a new one on purpose, first remove stores/ in the state directory",
            )
        raise StoreError(
            f"object store {self._root}: the directory holds files but is no agentfuse store",
            hint=f"choose an empty directory; if its {MARKER} got lost, write it: "
            f"printf {MARKER_CONTENT.decode().rstrip()!r} > {MARKER}",
        )

    def _check_format(self) -> None:
        with open(self._marker, "rb") as file:
            found = file.read(200).strip()
        if found != MARKER_CONTENT.strip():
            raise StoreError(
                f"object store {self._root}: {MARKER} says {found.decode(errors='replace')!r}, which this "
                f"version of agentfuse does not know",
                hint="install the agentfuse that made the store, or a newer one",
            )

    def _holds_anything(self) -> bool:
        try:
            names = os.listdir(self._root)
        except FileNotFoundError:
            return False
        return any(not name.startswith(RESERVED_PREFIX) and name not in _NOT_OURS for name in names)

    def _initialise(self) -> None:
        """Make the directory a store if it is none yet, so that a write can go on."""
        with self._lock:
            if self._is_store():
                return
            with _failing("make", self._root):
                os.makedirs(self._root, mode=0o700, exist_ok=True)
                with self._temporary(self._marker, MARKER_CONTENT) as temporary:
                    _link(temporary, self._marker)
                _sync_directory(self._root)
                _sync_directory(os.path.dirname(self._root))
            self._was_store = self._is_known = True

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        with _failing("read", key):
            try:
                yield
            except FileNotFoundError:
                self._is_store()  # "absent" may only be said by a store that is there
                raise ObjectNotFoundError(f"object {key}: the store {self._root} has none") from None

    # -- files

    @contextmanager
    def _temporary(
        self, path: str, body: bytes | bytearray | Source, size_bytes: int | None = None
    ) -> Iterator[str]:
        """A synced file with the body, beside ``path``; removed at the end unless it was renamed."""
        directory = os.path.dirname(path)
        self._make_directories(directory)
        temporary = os.path.join(directory, TEMPORARY + secrets.token_hex(8))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _write_body(fd, body, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def _make_directories(self, directory: str) -> None:
        missing = []
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        for made in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(made, 0o700)
            _sync_directory(os.path.dirname(made))

    def _leftovers(self, prefix: str) -> Iterator[str]:
        """All temporary files; they lie beside the objects that they were to become."""
        top = os.path.join(self._root, prefix.rpartition("/")[0])
        for directory, _, names in os.walk(top, onerror=_unless_gone):
            if os.path.join(directory, "").startswith(os.path.join(self._root, prefix)):
                yield from (os.path.join(directory, name) for name in names if name.startswith(TEMPORARY))

    def _walk(self, directory: str, prefix: str, start_after: str) -> Iterator[ObjectStat]:
        try:
            with os.scandir(os.path.join(self._root, directory)) as found:
                # A directory sorts as its keys do: "a-b" comes before "a/b".
                keys = sorted(directory + e.name + ("/" if e.is_dir() else "") for e in found if _is_ours(e))
        except FileNotFoundError:
            return
        for key in keys:
            if not key.startswith(prefix) and not prefix.startswith(key):
                continue
            if key.endswith("/"):
                if key > start_after or start_after.startswith(key):
                    yield from self._walk(key, prefix, start_after)
            elif key > start_after:
                with suppress(FileNotFoundError):  # deleted while we listed
                    found_stat = os.stat(os.path.join(self._root, key))
                    yield ObjectStat(key, found_stat.st_size, found_stat.st_mtime)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(RESERVED_PREFIX) and entry.name not in _NOT_OURS


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_body(fd: int, body: bytes | bytearray | Source, size_bytes: int | None) -> None:
    if isinstance(body, (bytes, bytearray)):
        _write_all(fd, body)
        return
    if size_bytes is None:
        raise TypeError("size_bytes is required for a source")
    written = 0
    while piece := body.read(CHUNK_BYTES):
        written += len(piece)
        if written > size_bytes:
            break
        _write_all(fd, piece)
    if written != size_bytes:
        raise StoreError(f"upload of {size_bytes} bytes: the source gave {written}")


def _write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _link(source: str, target: str) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True


def _sync_directory(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _failing(verb: str, what: object) -> Iterator[None]:
    """Turn what the operating system says into a StoreError; here and nowhere else."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(
            f"object store: cannot {verb} {what}: {reason}",
            hint=_HINTS.get(error.errno or 0, "what it holds is unknown now; try again when it is well"),
        ) from error
