"""A network of this test's own: namespaces for a store and for hosts, on one bridge, whose links can be cut.

Namespaces have no names and belong to processes that die with this one, so nothing is left of them, whatever
happens; the machine's own network is not touched.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_CLONE_NEWNET = 0x40000000
_NOBODY = "02:00:00:00:00:01"
_libc = ctypes.CDLL(None, use_errno=True)

STORE = "10.77.0.1"
CLIENTS = "10.77.0.2"
"""Where the tests' own clients are, so that a host that is cut from the store still hears them."""


class Namespace:
    """A network namespace. ``address`` is its own."""

    def __init__(self, address: str) -> None:
        self.address = address
        # It is there when its process says so.
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sh", "-c", "echo; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout and self.process.stdout.readline()
        self.ip("link", "set", "lo", "up")

    @property
    def prefix(self) -> list[str]:
        """What runs a command in it, as the same process."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net"]

    def ip(self, *arguments: str) -> None:
        subprocess.run([*self.prefix, "ip", *arguments], check=True, timeout=30)

    def cut(self, other: str) -> None:
        """Have nothing that is sent to an address arrive; nobody is told."""
        self.ip("neigh", "replace", other, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")

    def heal(self, other: str) -> None:
        """Undo :meth:`cut`."""
        self.ip("neigh", "del", other, "dev", "eth0")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and the processes and threads that it starts, are in it."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.process.pid}/ns/net") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


@contextmanager
def network(hosts: int) -> Iterator[tuple[Namespace, list[Namespace]]]:
    """The store's namespace, where the clients are, too, and those of hosts."""
    with ExitStack() as stack:
        middle = Namespace(STORE)
        stack.callback(middle.close)
        middle.ip("link", "add", "eth0", "type", "bridge")
        for address in (STORE, CLIENTS):
            middle.ip("addr", "add", f"{address}/24", "dev", "eth0")
        middle.ip("link", "set", "eth0", "up")
        found = []
        for number in range(hosts):
            host = Namespace(f"10.77.0.{11 + number}")
            stack.callback(host.close)
            pair = ["link", "add", f"host{number}", "type", "veth", "peer", "name", "eth0"]
            middle.ip(*pair, "netns", str(host.process.pid))
            middle.ip("link", "set", f"host{number}", "master", "eth0", "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            found.append(host)
        yield middle, found


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to take its exit code does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False
