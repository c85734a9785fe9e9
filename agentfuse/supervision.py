"""What a service manager is told of a daemon, by systemd's protocol (sd_notify(3)): readiness, what it does,
that it is alive, and that it needs longer to end. Without a manager all of it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

from agentfuse.progress import Progress, Reporter

EXTENSION_S = 30.0
"""How much longer a start or an end may take, from each time that it is said."""

_SAID_EVERY_S = 1.0

_READY_PATIENCE_S = 10.0
"""How long a manager, who hears of many services at once, may take to listen: it waits for nothing else."""


class Supervisor:
    """The manager of this process. ``watchdog_s``: it wants to hear at least so often that all is well; None:
    it does not ask."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        self._address = address

    @property
    def is_there(self) -> bool:
        """Whether there is one."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """The service can be used."""
        self._tell("READY=1", _status(status), patience_s=_READY_PATIENCE_S)

    def goes_on(self, status: str) -> None:
        """What its start or its end does now, which needs ``EXTENSION_S`` more."""
        self._tell(_status(status), f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}")

    def alive(self) -> None:
        """All is well."""
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str, patience_s: float = 0.0) -> None:
        if self._address is None:
            return
        # A manager that is gone, or does not read, is no reason to stop serving.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(patience_s)
            channel.sendto("\n".join(lines).encode(errors="replace"), self._address)


class SupervisedReporter:
    """Tells the manager, too, what a reporter is told."""

    def __init__(self, reporter: Reporter, supervisor: Supervisor) -> None:
        self._reporter = reporter
        self._supervisor = supervisor
        self._said_at = 0.0

    def say(self, text: str) -> None:
        """The line."""
        self._reporter.say(text)
        self._supervisor.goes_on(text)

    def progress(self, moment: Progress) -> None:
        """How far it is, once a second."""
        self._reporter.progress(moment)
        now = time.monotonic()
        if now - self._said_at >= _SAID_EVERY_S:
            self._said_at = now
            of_all = f" of {moment.total_files}" if moment.total_files else ""
            self._supervisor.goes_on(f"{moment.phase}: {moment.done_files}{of_all} files")


def supervisor_of(environ: Mapping[str, str]) -> Supervisor:
    """The manager that an environment names; the watchdog only where it means this very process."""
    address = environ.get("NOTIFY_SOCKET") or None
    if address is not None and address.startswith("@"):
        address = "\0" + address[1:]
    watched = environ.get("WATCHDOG_USEC", "")
    is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    seconds = int(watched) / 1e6 if address and is_ours and watched.isdecimal() and int(watched) else None
    return Supervisor(address, seconds)


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())
