"""A machine with systemd as its first process, booted in a container of systemd-nspawn in about a second.

It has this machine's /usr, and everything else to itself; agentfuse is this checkout's, at /usr/local/bin.
``boot`` after ``power_off`` or ``kill`` finds what was on its disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ordinary import ALONE, CHECKOUT

BOOTED_S = 60.0
ENDED_S = 60.0
_numbers = itertools.count()
_UNITS = Path(CHECKOUT) / "systemd"
# From a cgroup of its own in a plain cgroup2 tree: this machine's may be a hybrid one.
_START = """
set -e
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -l /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
fi
mkdir -p "/sys/fs/cgroup/$1"
echo $$ >"/sys/fs/cgroup/$1/cgroup.procs"
shift
exec "$@"
"""
_CLEAN = """
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""


class Machine:
    """``base``: an empty directory for its disk."""

    def __init__(self, base: Path) -> None:
        self.root = base / "root"
        self._base = base
        self._name = f"agentfuse-test-{os.getpid()}-{next(_numbers)}"
        self._container: subprocess.Popen[bytes] | None = None
        self._leader = 0
        for name in (
            "etc/systemd/system",
            "var",
            "usr",
            "run",
            "tmp",
            "proc",
            "sys",
            "dev",
            "root",
            "home",
            "srv",
        ):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64"):
            if Path("/", name).is_symlink():
                (self.root / name).symlink_to(f"usr/{name}")
        (self.root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        (self.root / "etc/os-release").write_text("ID=agentfuse-test\n")
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000::/:/bin/sh\n")
        (self.root / "etc/group").write_text("root:x:0:\nagent:x:1000:\n")
        local = base / "local/bin"
        local.mkdir(parents=True)
        for name in ("agentfuse", "agentfuse-mount-helper"):
            (local / name).symlink_to(Path(sys.executable).with_name(name))
        (self.root / "sbin").mkdir()  # where mount(8) looks
        for name in ("mount.agentfuse", "umount.fuse.agentfuse"):
            (self.root / "sbin" / name).symlink_to(Path(sys.executable).with_name(name))
        for unit in _UNITS.glob("*.*"):
            if unit.is_file():
                shutil.copy(unit, self.root / "etc/systemd/system")
                self._show_checkout(unit)
        for name in ("sysusers.d", "tmpfiles.d"):
            shutil.copytree(_UNITS / name, self.root / "etc" / name)
        # As every system has it, for fstab's _netdev.
        wants = self.root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir()
        (wants / "remote-fs.target").symlink_to("/lib/systemd/system/remote-fs.target")
        # What this machine's /usr would start beside.
        for unit in (
            "dbus.service",
            "dbus.socket",
            "systemd-logind.service",
            "getty.target",
            "console-getty.service",
        ):
            (self.root / "etc/systemd/system" / unit).symlink_to("/dev/null")

    def _show_checkout(self, unit: Path) -> None:
        """To a unit that sees no /tmp or /home of the machine's: the checkout may be there."""
        settings = unit.read_text().splitlines()
        if {"PrivateTmp=yes", "ProtectHome=yes"}.isdisjoint(settings):
            return  # and would get a mount namespace by it
        lines = ["[Service]", f"BindReadOnlyPaths={CHECKOUT} {sys.base_prefix}"]
        if "ProtectHome=yes" in settings and str(CHECKOUT).startswith(("/home/", "/root/")):
            lines.append("ProtectHome=tmpfs")
        self.write(f"/etc/systemd/system/{unit.name}.d/checkout.conf", "\n".join([*lines, ""]))

    def write(self, path: str, text: str) -> None:
        """A file, made while it runs or before."""
        top = Path(f"/proc/{self._leader}/root") if self._leader else self.root
        at = top / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)

    def boot(self) -> Machine:
        """Returns when all that starts by itself has started."""
        bound = [f"--bind-ro={path}" for path in ("/usr", sys.base_prefix, CHECKOUT)]
        self._container = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "slave"),
                *("sh", "-c", ALONE + _START, "sh", self._name),
                *("systemd-nspawn", "-q", "-D", str(self.root), "-M", self._name, "-b"),
                *("--register=no", "--keep-unit", "--private-network", "--console=pipe"),
                *(*bound, f"--bind-ro={self._base}/local:/usr/local", "--bind=/dev/fuse"),
            ],
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=(self._base / "console").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + BOOTED_S
        while self.state() not in ("running", "degraded"):
            assert self._container.poll() is None, (self._base / "console").read_text(errors="replace")
            assert time.monotonic() < deadline, self.journal()
            time.sleep(0.05)
        return self

    def state(self) -> str:
        """What systemd says of the whole."""
        children = (
            Path(f"/proc/{self._container.pid}/task/{self._container.pid}/children")
            if self._container
            else None
        )
        with contextlib.suppress(OSError, IndexError):
            assert children is not None
            leader = int(children.read_text().split()[0])
            if Path(f"/proc/{leader}/comm").read_text().strip() == "systemd":
                self._leader = leader
                return self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return "starting"

    def command(self, *command: object) -> list[str]:
        """A command that runs in the machine."""
        inside = ["nsenter", f"--target={self._leader}", "--mount", "--pid", "--uts", "--ipc", "--net"]
        return [*inside, "env", "-i", "PATH=/usr/local/bin:/usr/bin:/usr/sbin", *map(str, command)]

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root; its output must be looked at when it fails."""
        done = subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.journal()}"
        return done

    def shell(self, script: str) -> str:
        """What a script says."""
        return self.run("sh", "-ec", script).stdout

    def systemctl(self, *arguments: str) -> str:
        """What systemctl says."""
        return self.run("systemctl", "--no-pager", *arguments).stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "-P", name, unit).strip()

    def drop_in(self, unit: str, text: str) -> None:
        """Have a unit otherwise, until the next boot or ``drop_in`` of it."""
        self.write(f"/run/systemd/system/{unit}.service.d/test.conf", f"[Service]\n{text}\n")
        self.systemctl("daemon-reload")

    def journal(self) -> str:
        """The newest of what was logged."""
        command = self.command("journalctl", "--no-pager", "-b", "-n", "80", "-o", "cat")
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout

    def power_off(self) -> None:
        """As an operator does."""
        assert self._container is not None
        self.run("systemctl", "--no-block", "poweroff")
        self._container.wait(ENDED_S)
        self._leader = 0

    def kill(self) -> None:
        """As a power cut does, but for what only the disk's cache has."""
        if self._container is not None and self._container.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader, 9)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._container.wait(15)
            self._container.kill()
            self._container.wait()
            self._leader = 0

    def discard(self) -> None:
        """Nothing of it stays."""
        self.kill()
        subprocess.run(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _CLEAN, "sh", self._name],
            check=False,
            stderr=subprocess.DEVNULL,
        )
