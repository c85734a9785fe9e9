"""The host's registry of live mounts: for each a lock, a record and a control socket in RUNTIME.

A record whose lock nobody holds is stale: its daemon died. The directory may lie in /tmp, so it is
used only if it is this user's own and closed to everybody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from agentfuse.control.mountinfo import resolve_mountpoint
from agentfuse.errors import BusyError, EnvironmentProblem, NotFoundError
from agentfuse.locks import is_held

# Whoever asks "is it alive?" holds the lock for microseconds; a daemon that starts outwaits that.
_PROBE_PATIENCE_S = 0.25
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a daemon tells the host about its mount. ``started_at`` is in seconds of the epoch."""

    mountpoint: str
    execution: str
    agent: str
    pid: int
    state: str
    store: str
    started_at: float


@dataclass(frozen=True, slots=True)
class PublishedMount:
    """A record, where its control socket is, and whether its daemon lives."""

    record: MountRecord
    socket: Path
    alive: bool


class MountLock:
    """The right to serve one mountpoint, held until ``release`` or the end of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def release(self) -> None:
        """Give the lock up and remove its file; once."""
        # Removed while held, so that whoever waits on this inode sees that it lost its name.
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


class NoDaemonError(NotFoundError):
    """Nobody serves a mountpoint, or answers at a socket."""


class Registry:
    """Publishes, withdraws and finds mounts. ``runtime`` comes from ``runtime_directory``."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime

    def lock(self, mountpoint: Path) -> MountLock:
        """Take the mountpoint (resolved) for this process; BusyError when a daemon serves it."""
        path = self._path(mountpoint, "lock")
        deadline = time.monotonic() + _PROBE_PATIENCE_S
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                if time.monotonic() > deadline:
                    raise self._busy(mountpoint) from None
                time.sleep(_POLL_S)
                continue
            if _same_file(fd, path):
                return MountLock(path, fd)
            os.close(fd)  # the former holder removed it between our open and our lock

    def publish(self, record: MountRecord) -> None:
        """Write the mount's record, whole or not at all. The caller holds the lock."""
        path = self._path(Path(record.mountpoint), "json")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        # No fsync: the registry describes processes, and none of them survives a power cut.
        temporary.write_text(json.dumps(asdict(record)) + "\n")
        temporary.replace(path)

    def withdraw(self, mountpoint: Path) -> None:
        """Remove the mount's record and socket; those that are not there are no error."""
        for suffix in ("json", "sock"):
            self._path(mountpoint, suffix).unlink(missing_ok=True)

    def socket_path(self, mountpoint: Path) -> Path:
        """Where the control socket of a resolved mountpoint is, or will be."""
        return self._path(mountpoint, "sock")

    def list(self) -> list[PublishedMount]:
        """Every published mount, live and stale, by mountpoint. What is no record is passed over."""
        entries = (self._read(path) for path in self.runtime.glob("*.json"))
        return sorted((entry for entry in entries if entry), key=lambda entry: entry.record.mountpoint)

    def find(self, mountpoint: str | Path) -> PublishedMount:
        """The published mount at a path (relative or through symlinks), live or stale.

        Never asks the filesystem mounted there. Raises NotFoundError.
        """
        resolved = resolve_mountpoint(mountpoint)
        entry = self._read(self._path(resolved, "json"))
        if entry is None:
            raise NoDaemonError(
                f"no agentfuse mount at {resolved}", hint="agentfuse ps lists the mounts of this host"
            )
        return entry

    def find_live(self, mountpoint: str | Path) -> PublishedMount:
        """As :meth:`find`, of a mount whose daemon lives."""
        entry = self.find(mountpoint)
        if not entry.alive:
            raise NoDaemonError(
                f"the daemon of {entry.record.mountpoint} is dead",
                hint=f"agentfuse umount {entry.record.mountpoint} cleans up; agentfuse recover, or mounting "
                "again, finishes its work",
            )
        return entry

    def is_served(self, mountpoint: Path) -> bool:
        """Whether a daemon holds the lock of this resolved mountpoint."""
        return is_held(self._path(mountpoint, "lock"))

    def wait_until_released(self, mountpoint: Path, *, timeout_s: float | None) -> bool:
        """Whether the daemon of this resolved mountpoint ended within the time (None: however long)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_served(mountpoint):
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _path(self, mountpoint: Path, suffix: str) -> Path:
        digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
        return self.runtime / f"{digest}.{suffix}"

    def _read(self, path: Path) -> PublishedMount | None:
        # Withdrawn meanwhile, or not of our making: either way no mount that one could speak of.
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            record = _record(json.loads(path.read_bytes()))
            alive = self.is_served(Path(record.mountpoint))
            return PublishedMount(record, path.with_suffix(".sock"), alive)
        return None

    def _busy(self, mountpoint: Path) -> BusyError:
        entry = self._read(self._path(mountpoint, "json"))
        by = f" by execution {entry.record.execution} (pid {entry.record.pid})" if entry else ""
        return BusyError(
            f"{mountpoint} is already served{by}",
            hint=f"end that one first: agentfuse umount {mountpoint}",
        )


def runtime_path(environ: Mapping[str, str]) -> Path:
    """Where RUNTIME is: AGENTFUSE_RUNTIME_DIR, else /run for root, else XDG_RUNTIME_DIR, else /tmp."""
    if environ.get("AGENTFUSE_RUNTIME_DIR"):
        return Path(os.path.abspath(environ["AGENTFUSE_RUNTIME_DIR"]))
    if os.geteuid() == 0:
        return Path("/run/agentfuse")
    if environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "agentfuse"
    return Path(f"/tmp/agentfuse-{os.geteuid()}")


def runtime_directory(environ: Mapping[str, str]) -> Path:
    """RUNTIME, created if need be; EnvironmentProblem unless it is ours alone."""
    path = runtime_path(environ)
    fix = "remove it, or set AGENTFUSE_RUNTIME_DIR to a directory of your own with mode 0700"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise EnvironmentProblem(
            f"the runtime directory {path} cannot be made: {error.strerror}",
            hint="set AGENTFUSE_RUNTIME_DIR to a directory that you can write",
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        what = "a symlink" if stat.S_ISLNK(found.st_mode) else "not a directory"
        raise EnvironmentProblem(f"the runtime directory {path} is {what}", hint=fix)
    if found.st_uid != os.geteuid():
        raise EnvironmentProblem(f"the runtime directory {path} belongs to uid {found.st_uid}", hint=fix)
    if found.st_mode & 0o077:
        raise EnvironmentProblem(
            f"the runtime directory {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o})",
            hint=f"chmod 0700 {path}, after a look at what is in it",
        )
    return path


def open_registry(environ: Mapping[str, str]) -> Registry:
    """The registry of this user on this host; creates its directory if need be."""
    return Registry(runtime_directory(environ))


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address to bind or connect to for a socket path of any length (sun_path holds 107 bytes)."""
    if len(os.fsencode(path)) <= 107:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _record(fields: dict[str, object]) -> MountRecord:
    """A record of exactly its fields' types; KeyError or TypeError otherwise."""
    texts = {name: fields[name] for name in ("mountpoint", "execution", "agent", "state", "store")}
    pid, started_at = fields["pid"], fields["started_at"]
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a text is no text")
    if not isinstance(pid, int) or not isinstance(started_at, int | float):
        raise TypeError("a number is no number")
    return MountRecord(**{name: str(text) for name, text in texts.items()}, pid=pid, started_at=started_at)


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
