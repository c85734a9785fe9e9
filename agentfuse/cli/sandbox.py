"""Where ``agentfuse run`` runs a command: on the host, or in a sandbox that bubblewrap makes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from agentfuse.cli.confinement import terminal_filter
from agentfuse.control.mountinfo import covering, mounts, mounts_at
from agentfuse.control.registry import Registry
from agentfuse.errors import AgentfuseError, EnvironmentProblem, UsageError
from agentfuse.locks import is_held
from agentfuse.mountpoint import detach_stale, remove, reopen

AGENT = (1000, 1000)
"""Uid and gid of the agent in a sandbox, unless the configuration has an owner."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to ``agentfuse run`` that are meant for its command."""

_HOME = "/home/agent"
_MS_BIND, _MS_SHARED, _MNT_DETACH = 4096, 1 << 20, 2
_KEPT = ("TERM", "LANG", "TZ", "COLORTERM", "NO_COLOR")
_OF_THE_HOST = (
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl", "/etc/ca-certificates", "/etc/localtime"),
    *("/etc/os-release", "/etc/mime.types", "/etc/fonts", "/etc/services", "/etc/protocols"),
)
_OF_ITS_NETWORK = ("/etc/resolv.conf", "/etc/hosts")
_libc = ctypes.CDLL(None, use_errno=True)


class Kind(Enum):
    """The sandboxes that there are."""

    BWRAP = "bwrap"


@contextlib.contextmanager
def private_directory(registry: Registry) -> Iterator[Path]:
    """A new mountpoint that only this user can reach."""
    base = registry.runtime / "run"
    base.mkdir(mode=0o700, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=base))
    try:
        yield path
    finally:
        if not mounts_at(path):  # after a failure that left it mounted, umount and doctor know it
            remove(path)


@dataclass(frozen=True)
class Bwrap:
    """A sandbox for ``owner``, who sees the system's programs, the home, and of the host what is ``shown``.

    ``directory`` is bound into it whole, so that a home that is mounted anew in it is seen inside, too.
    ``terminal_filter``: see there. ``held_back``: signals that bubblewrap, which would end at once, and the
    agent with it, is to be started without; the agent gets them, those included that come before it begins.
    """

    directory: Path
    network: bool
    shown: Sequence[str]
    terminal_filter: int | None
    held_back: Sequence[signal.Signals]

    @property
    def has_own_session(self) -> bool:
        """Whether it is out of reach of the terminal, and of Ctrl-C with it."""
        return self.terminal_filter is None or not os.isatty(0)

    @property
    def follows(self) -> bool:
        """Whether a home that is mounted anew is seen inside: only root can see to that."""
        return covering(self.mountpoint, mounts()).shared is not None

    @property
    def mountpoint(self) -> Path:
        """Where on the host its home is mounted."""
        return self.directory / "homes" / "agent"

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command in it; exit codes are a shell's."""
        etc = self.directory / "etc"
        network = ["--share-net"] if self.network else []
        bound = [*_OF_THE_HOST, *(_OF_ITS_NETWORK if self.network else ())]
        return [
            *("bwrap", "--unshare-all", *network, "--die-with-parent", "--hostname", "agent"),
            *(["--new-session"] if self.has_own_session else []),
            *([] if self.terminal_filter is None else ["--seccomp", str(self.terminal_filter)]),
            *("--ro-bind", "/usr", "/usr", *_links(), "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
            *("--tmpfs", "/var/tmp", "--dir", "/run", "--dir", "/etc"),
            *(word for path in bound for word in ("--ro-bind-try", path, path)),
            *(
                word
                for name in sorted(os.listdir(etc))
                for word in ("--ro-bind", str(etc / name), f"/etc/{name}")
            ),
            *("--bind", str(self.directory / "homes"), "/home"),
            *(word for path in self.shown for word in ("--ro-bind", path, path)),
            *("--remount-ro", "/home", "--remount-ro", "/", "--chdir", _HOME),
            *(["env", f"--default-signal={_names(self.held_back)}"] if self.held_back else []),
            *("sh", "-c", 'exec "$@"', "agentfuse", *command),
        ]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What a command in it has of an environment: nothing that could be a secret."""
        kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith("LC_")}
        return {**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "USER": "agent", "LOGNAME": "agent"}

    @property
    def home(self) -> str:
        """The home's path inside."""
        return _HOME

    def process(self, pid: int) -> int:
        """The command's own process, below that of bwrap and the first one of its namespace.

        Before there is one, the process that it will come from: it is given what that one is sent.
        """
        for _ in range(2):
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                break
            if not children:
                break
            pid = int(children[0])
        return pid


@contextlib.contextmanager
def bwrap(
    registry: Registry, owner: tuple[int, int], *, network: bool, shown: Sequence[str]
) -> Iterator[Bwrap]:
    """A new sandbox. Raises ``EnvironmentProblem`` when this machine has none."""
    if shutil.which("bwrap") is None:
        raise EnvironmentProblem("bubblewrap is missing", hint="apt-get install bubblewrap")
    shown = [_showable(path) for path in shown]
    is_root = os.geteuid() == 0
    # As root the sandbox is another user's, who cannot pass through the registry.
    beside = registry.runtime.with_name(f"{registry.runtime.name}-sandboxes")
    base = beside if is_root else registry.runtime / "sandboxes"
    base.mkdir(mode=0o711 if is_root else 0o700, exist_ok=True)
    with _own_directory(base, registry) as directory, terminal_filter() as forbidding:
        homes = directory / "homes"
        (homes / "agent").mkdir(parents=True)
        (directory / "etc").mkdir()
        _write_etc(directory / "etc", owner, network=network)
        for path in shown:
            _make_way(homes, path)
        if is_root:
            for each in (directory, homes, directory / "etc"):
                os.chown(each, 0, owner[1])
                each.chmod(0o750)
            _share(homes)
        yield Bwrap(directory, network, shown, forbidding, _held_back())


@contextlib.contextmanager
def _own_directory(base: Path, registry: Registry) -> Iterator[Path]:
    """A new directory, locked as long as this process or a daemon that it has started lives."""
    at = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)  # a directory that is not locked is nobody's
        for left in base.iterdir():
            if not is_held(left):
                _detach_dead(left / "homes" / "agent", registry)
                with contextlib.suppress(OSError):
                    _remove(left)
        directory = Path(tempfile.mkdtemp(dir=base))
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(at)
    try:
        yield directory
    finally:
        _remove(directory)  # unless a failure left it mounted: umount and doctor know it
        os.close(lock)


def _detach_dead(home: Path, registry: Registry) -> None:
    with contextlib.suppress(AgentfuseError):  # who lives on stays
        if detach_stale(home):
            registry.withdraw(home)


def _remove(directory: Path) -> None:
    """Remove a sandbox's directory, unless a home is mounted in it."""
    homes = directory / "homes"
    if not mounts_at(homes / "agent"):
        _libc.umount2(os.fsencode(homes), _MNT_DETACH)
        if not mounts_at(homes):
            reopen(homes / "agent")
            shutil.rmtree(directory)


def _held_back() -> list[signal.Signals]:
    """What is meant for the command and not ignored, if env(1) can let it through to it: GNU's does."""
    heeded = [each for each in FORWARDED if signal.getsignal(each) is not signal.SIG_IGN]
    done = subprocess.run(
        ["env", f"--default-signal={_names(heeded)}", "true"], stderr=subprocess.DEVNULL, check=False
    )
    return heeded if heeded and done.returncode == 0 else []


def _names(signals: Sequence[signal.Signals]) -> str:
    return ",".join(each.name.removeprefix("SIG") for each in signals)


def _showable(path: str) -> str:
    """The absolute path. Raises UsageError when it cannot be shown."""
    shown = Path(os.path.abspath(path))
    if not shown.exists():
        raise UsageError(f"--show {path}: it does not exist", hint="name a file or directory of this host")
    if shown.is_relative_to(_HOME) or Path(_HOME).is_relative_to(shown):
        raise UsageError(f"--show {path}: the agent has its own {_HOME}", hint="name what is in it instead")
    return str(shown)


def _make_way(homes: Path, path: str) -> None:
    """Make what a path below /home is bound to in the sandbox; everything else bubblewrap makes itself."""
    if not Path(path).is_relative_to("/home"):
        return
    *above, name = Path(path).relative_to("/home").parts
    place = homes
    for each in above:
        place /= each
        place.mkdir(exist_ok=True)
        place.chmod(0o755)
    if os.path.isdir(path):
        (place / name).mkdir(exist_ok=True)
    else:
        (place / name).touch()


def _share(directory: Path) -> None:
    """Have what is mounted in a directory later seen wherever it is bound."""
    path = os.fsencode(directory)
    if _libc.mount(path, path, None, _MS_BIND, None) or _libc.mount(None, path, None, _MS_SHARED, None):
        raise EnvironmentProblem(
            f"{directory} cannot be shared with a sandbox: {os.strerror(ctypes.get_errno())}",
            hint="it needs CAP_SYS_ADMIN",
        )


def _links() -> list[str]:
    """/bin and the like, as this system has them."""
    words = []
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    return words


def _write_etc(etc: Path, owner: tuple[int, int], *, network: bool) -> None:
    uid, gid = owner if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    files = {
        "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{uid}:{gid}:agent:{_HOME}:/bin/sh\n",
        "group": f"root:x:0:\nagent:x:{gid}:\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    if not network:
        files["hosts"] = "127.0.0.1 localhost agent\n::1 localhost agent\n"
    for name, text in files.items():
        (etc / name).write_text(text)
        (etc / name).chmod(0o644)
