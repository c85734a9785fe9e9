"""Where ``agentfuse run`` runs a command: on the host, or in a sandbox that bubblewrap makes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from agentfuse.control.mountinfo import covering, mounts, mounts_at
from agentfuse.control.registry import Registry
from agentfuse.errors import EnvironmentProblem
from agentfuse.mountpoint import remove, reopen

AGENT = (1000, 1000)
"""Uid and gid of the agent in a sandbox, unless the configuration has an owner."""

_HOME = "/home/agent"
_MS_BIND, _MS_SHARED, _MNT_DETACH = 4096, 1 << 20, 2
_KEPT = ("TERM", "LANG", "TZ", "COLORTERM", "NO_COLOR")
_OF_THE_HOST = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl", "/etc/ca-certificates", "/etc/localtime")
_OF_ITS_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/services", "/etc/protocols")
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
    """

    directory: Path
    owner: tuple[int, int]
    network: bool
    shown: Sequence[str]

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
            *([] if os.isatty(0) else ["--new-session"]),
            *("--ro-bind", "/usr", "/usr", *_links(), "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
            *("--tmpfs", "/var/tmp", "--dir", "/run", "--dir", "/etc"),
            *(word for path in bound for word in ("--ro-bind-try", path, path)),
            *(
                word
                for name in sorted(os.listdir(etc))
                for word in ("--ro-bind", str(etc / name), f"/etc/{name}")
            ),
            *(word for path in self.shown for word in ("--ro-bind", path, path)),
            *("--bind", str(self.directory / "homes"), "/home", "--remount-ro", "/home"),
            *("--remount-ro", "/", "--chdir", _HOME),
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
        """The command's own process, below that of bwrap and the first one of its namespace."""
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
    is_root = os.geteuid() == 0
    # As root the sandbox is another user's, who cannot pass through the registry.
    base = (
        registry.runtime.with_name(f"{registry.runtime.name}-sandboxes")
        if is_root
        else registry.runtime / "run"
    )
    base.mkdir(mode=0o711 if is_root else 0o700, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=base))
    homes = directory / "homes"
    try:
        (homes / "agent").mkdir(parents=True)
        (directory / "etc").mkdir()
        _write_etc(directory / "etc", owner)
        if is_root:
            for path in (directory, homes, directory / "etc"):
                os.chown(path, 0, owner[1])
                path.chmod(0o750)
            _share(homes)
        yield Bwrap(directory, owner, network, shown)
    finally:
        if not mounts_at(homes / "agent"):  # after a failure that left it mounted, umount and doctor know it
            reopen(homes / "agent")
            _libc.umount2(os.fsencode(homes), _MNT_DETACH)
            shutil.rmtree(directory)


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


def _write_etc(etc: Path, owner: tuple[int, int]) -> None:
    uid, gid = owner if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    files = {
        "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{uid}:{gid}:agent:{_HOME}:/bin/sh\n",
        "group": f"root:x:0:\nagent:x:{gid}:\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    for name, text in files.items():
        (etc / name).write_text(text)
        (etc / name).chmod(0o644)
