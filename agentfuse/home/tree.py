"""A home on the local disk: its record, its lock, its layout, and what is in it.

``STATE/homes/<execution>/{home.json, lock, tree/, <region>.index.db, events.db}``. Knows no FUSE.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from agentfuse.errors import BusyError, EnvironmentProblem, IntegrityError
from agentfuse.home.quota import Ledger
from agentfuse.home.walk import Cursor, clear_tree, join, local_disk, read_directory
from agentfuse.killpoints import passing
from agentfuse.regions import INCOMING, PLATFORM, Region

# Whoever asks "is it held?" holds the lock for microseconds; whoever really wants it outwaits that.
_PROBE_PATIENCE_S = 0.25
_POLL_S = 0.02

Status = Literal["restoring", "live", "clean"]
"""``restoring``: shared/ is not whole yet, nobody wrote; ``live``: may hold what no snapshot holds;
``clean``: everything durable is in the store."""


class HomeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What ``home.json`` says of a home. ``*_at`` are seconds since the epoch.

    ``undelivered``: it has events that a webhook may not have taken yet. ``is_retained``: the execution's
    regions go to the store, too (see ``regions.retained``). ``unmounted_at``: the last mount was ended, and
    did not break.
    """

    agent: str
    execution: str
    store: str
    status: Status
    created_at: float
    ended_at: float | None = None
    mountpoint: str | None = None
    undelivered: bool = False
    is_retained: bool = False
    unmounted_at: float | None = None
    quotas: dict[str, tuple[int, int]] = {}
    """Bytes and files that regions of this execution may hold, where an operator has changed that."""
    frozen: list[bytes] = []
    """Where the files are that may be frozen, from the tree's root; the marks on them say which are."""


class Home:
    """The directory of one execution's home. Cheap: it holds paths, no descriptors."""

    def __init__(self, state: Path, execution: str) -> None:
        self.execution = execution
        self.path = state / "homes" / execution
        self.tree = self.path / "tree"
        self.log = self.path / "daemon.log"
        self.events = self.path / "events.db"

    def index_of(self, region: str) -> Path:
        """The database that knows what was last synced of a region."""
        return self.path / f"{region}.index.db"

    def record(self) -> HomeRecord | None:
        """The home's record, or None when there is no home of this execution.

        Raises ``IntegrityError`` when the record cannot be read.
        """
        path = self.path / "home.json"
        try:
            return _RECORD.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentProblem(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
        except msgspec.DecodeError as error:
            raise IntegrityError(
                f"{path}: not a home's record: {error}",
                hint=f"keep a copy of {self.tree}, then remove {self.path}",
            ) from error

    def write_record(self, record: HomeRecord) -> None:
        """Replace the record; it appears whole or not at all, and survives a power cut."""
        passing("record.begun")
        write_durably(self.path / "home.json", msgspec.json.encode(record) + b"\n")
        passing("record.written")

    @contextmanager
    def locked(self, *, makes: bool = False) -> Iterator[None]:
        """Hold the home for this process alone; raises ``BusyError`` when another one does.

        ``makes``: a home that is not there is made, even while another process is removing it.
        """
        busy = f"execution {self.execution} is mounted by another process"
        with locked_file(self.path / "lock", busy, makes_directory=makes):
            yield

    def is_locked(self) -> bool:
        """Whether a process holds the home now."""
        try:
            with self.locked():
                return False
        except BusyError:
            return True
        except EnvironmentProblem:
            return False

    def lay_out(self, regions: Iterable[Region], owner: tuple[int, int] | None) -> None:
        """Make the tree's root and the regions' roots as far as they are missing.

        ``owner``: uid and gid of the agent, or None when this process cannot give files away.
        """
        for region in sorted(regions, key=lambda region: not region.is_loose):
            path = self.tree if region.is_loose else self.tree / region.name
            try:
                path.mkdir(mode=region.mode)
            except FileExistsError:
                continue
            path.chmod(region.mode)
            if owner and not region.root_only:
                os.chown(path, *owner)

    def lay_out_platform(self) -> None:
        """Make the platform's own directory anew: what was in it told of a mount that is gone."""
        path = self.tree / PLATFORM.name
        if path.is_dir():
            clear_tree(path)
        else:
            path.mkdir(mode=PLATFORM.mode)
        path.chmod(PLATFORM.mode)
        (path / INCOMING).mkdir(mode=0o700)


def list_homes(state: Path) -> list[Home]:
    """Every home of a state directory, whatever its status."""
    try:
        with os.scandir(state / "homes") as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    return [Home(state, name) for name in names]


def remove_home(home: Home) -> None:
    """Remove a home from this host; the caller holds its lock and knows that nothing in it is needed."""
    passing("remove.begun")
    clear_tree(home.tree)
    passing("remove.cleared")
    with local_disk(home.path):
        # The record goes last, so that who finds a half removed home knows what it is.
        names = sorted(os.listdir(home.path), key=lambda name: (name == "lock", name == "home.json"))
        for path in (home.path / name for name in names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with suppress(OSError):  # whoever has made another lock by now makes a new home there
            home.path.rmdir()


def now() -> float:
    """Seconds since the epoch."""
    return time.time()


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file of ours: temporary beside it, fsync, rename, fsync of the directory."""
    # Two processes may write the same: each its own.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(data)
            while left:  # of a disk that is nearly full it may take a part, and says so only the next time
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write {path}: {os.strerror(error.errno or 0)}",
            hint="the state directory must be writable and have free space; choose another with --state",
        ) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked_file(path: Path, busy: str, *, makes_directory: bool = False) -> Iterator[None]:
    """Hold an flock on ``path`` (made when missing), or raise ``BusyError(busy)`` after a moment."""
    deadline = time.monotonic() + _PROBE_PATIENCE_S
    while (fd := _try_to_lock(path, makes_directory)) is None:
        if time.monotonic() > deadline:
            raise BusyError(busy, hint="see `agentfuse ps`, or choose another")
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        os.close(fd)


def _try_to_lock(path: Path, makes_directory: bool) -> int | None:
    """The descriptor that holds the lock, None when somebody else does."""
    try:
        if makes_directory:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if makes_directory and isinstance(error, FileNotFoundError):
            return None  # it was being removed
        raise EnvironmentProblem(
            f"cannot open {path}: {os.strerror(error.errno or 0)}",
            hint="the state directory must be writable; choose another with --state",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the home: then this is the lock of nothing.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


class Weight:
    """What a subtree counts for: ``bytes_used`` and ``files_used``, each inode once.

    ``links_leave`` tells that an inode met here has another name outside of the subtree.
    """

    def __init__(self) -> None:
        self.bytes_used = 0
        self.files_used = 0
        self._names_left: dict[tuple[int, int], int] = {}

    @property
    def links_leave(self) -> bool:
        """Whether hard links lead out of what was weighed."""
        return any(self._names_left.values())

    def add(self, st: os.stat_result) -> None:
        """Count one name."""
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            key = (st.st_dev, st.st_ino)
            left = self._names_left.get(key)
            self._names_left[key] = (st.st_nlink if left is None else left) - 1
            if left is not None:
                return
        self.files_used += 1
        if stat.S_ISREG(st.st_mode):
            self.bytes_used += st.st_size


def weigh(
    directory: int | Path,
    name: bytes,
    weight: Weight,
    files: list[tuple[bytes, os.stat_result]] | None = None,
) -> Weight:
    """Count ``name``, which is in ``directory`` (its descriptor or path), and everything below it.

    ``files``: gets the regular files among them.
    """
    with Cursor(directory) as cursor:
        found = os.stat(name, dir_fd=cursor.enter(b""), follow_symlinks=False)
        for path, st in _everything(cursor, name, found):
            weight.add(st)
            if files is not None and stat.S_ISREG(st.st_mode):
                files.append((path, st))
    return weight


def regular_files(directory: int | Path, name: bytes) -> list[tuple[bytes, os.stat_result]]:
    """The regular files among ``name``, which is in ``directory``, and everything below it."""
    return list(walk_files(directory, name))


def walk_files(directory: int | Path, name: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """As ``regular_files``, one after the other."""
    with Cursor(directory) as cursor:
        found = os.stat(name, dir_fd=cursor.enter(b""), follow_symlinks=False)
        for path, st in _everything(cursor, name, found):
            if stat.S_ISREG(st.st_mode):
                yield path, st


def _weigh_from(cursor: Cursor, path: bytes, found: os.stat_result, weight: Weight) -> None:
    for _, st in _everything(cursor, path, found):
        weight.add(st)


def _everything(cursor: Cursor, path: bytes, found: os.stat_result) -> Iterator[tuple[bytes, os.stat_result]]:
    yield path, found
    pending = [path] if stat.S_ISDIR(found.st_mode) else []
    while pending:
        directory = pending.pop()
        for name, st in read_directory(cursor.enter(directory)):
            below = join(directory, name)
            yield below, st
            if stat.S_ISDIR(st.st_mode):
                pending.append(below)


def inodes_below(directory: int, name: bytes) -> list[int]:
    """The numbers of the inodes that ``name`` in a directory, given by descriptor, and all below it are."""
    with Cursor(directory) as cursor:
        found = os.stat(name, dir_fd=cursor.enter(b""), follow_symlinks=False)
        inodes = [found.st_ino]
        pending = [name] if stat.S_ISDIR(found.st_mode) else []
        while pending:
            path = pending.pop()
            for each, st in read_directory(cursor.enter(path)):
                inodes.append(st.st_ino)
                if stat.S_ISDIR(st.st_mode):
                    pending.append(join(path, each))
    return inodes


def take_stock(tree: Path, ledger: Ledger) -> None:
    """Set every account to what the tree on disk really holds."""
    accounts = [*ledger.accounts(), ledger.platform]
    weights = {account.name: Weight() for account in accounts}
    with Cursor(tree) as cursor:
        for name, found in read_directory(cursor.enter(b"")):
            account = ledger.of_root_entry(name)
            _weigh_from(cursor, name, found, weights[account.name])
            if account is not ledger.loose:
                weights[account.name].files_used -= 1  # the region's own root
    for account in accounts:
        weight = weights[account.name]
        account.bytes_used, account.files_used = weight.bytes_used, weight.files_used


# msgspec learns a type at its first use; two threads at once would crash the process.
_RECORD = msgspec.json.Decoder(HomeRecord)
