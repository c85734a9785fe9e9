"""Whose a new file is: what is known of the process that makes it.

Asked when a file is made, never when one is written. A process is looked at in /proc, and only when a rule
needs it: that never waits, least of all for the home itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

from agentfuse.attribution import CreatorRule
from agentfuse.errors import EnvironmentProblem
from agentfuse.home import marks
from agentfuse.regions import Creator

__all__ = ["Caller", "Creator", "Creators"]

_log = logging.getLogger(__name__)

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DELETED = " (deleted)"
_UNIFIED = "0::"
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is: the owner of what it makes. ``pid``: a thread's number, 0 for one that cannot be
    seen from here.
    """

    uid: int
    gid: int
    pid: int = 0


def _nobody(pid: int) -> Creator | None:
    return None


class Creators:
    """Who makes files. The first that knows it tells: ``creator_of``, the rules in order, the region.

    ``creator_of`` knows the daemon's own helpers by their numbers. ``agent_uid`` is the agent's where it has
    one to itself: whatever the region, no file of it is by default a person's or the platform's.

    Raises ``EnvironmentProblem`` if processes must be looked at, and ``proc`` does not show those that the
    kernel tells of.
    """

    def __init__(
        self,
        rules: Sequence[CreatorRule] = (),
        creator_of: Callable[[int], Creator | None] = _nobody,
        *,
        agent_uid: int | None = None,
        proc: Path = Path("/proc"),
    ) -> None:
        self._rules = tuple(rules)
        self._creator_of = creator_of
        self._agent_uid = agent_uid
        self._proc = proc
        self._are_kept = True
        if any(rule.exe or rule.cgroup for rule in self._rules):
            _require_own(proc)

    def attribute(self, fd: int, name: bytes | None, caller: Caller, region: Creator) -> None:
        """Mark what was just made. ``fd`` is that, or its directory when ``name`` is given.

        What is neither a file nor a directory cannot be marked, and stays the agent's. Raises ``OSError``.
        """
        creator = self.of(caller, region)
        if creator is Creator.AGENT or not self._are_kept:
            return
        if name is None:
            self._mark(fd, creator)
            return
        made = os.open(name, _PATH, dir_fd=fd)
        try:
            mode = os.fstat(made).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                self._mark(f"/proc/self/fd/{made}", creator)
        finally:
            os.close(made)

    def of(self, caller: Caller, region: Creator) -> Creator:
        """Whose it is what a caller makes; ``region``: whose it is if nothing else tells."""
        creator = self._creator_of(caller.pid)
        if creator is not None:
            return creator
        if self._rules:
            process = _Process(self._proc, caller.pid)
            for rule in self._rules:
                if _fits(rule, caller, process):
                    return rule.creator
        if self._agent_uid is not None and region in (Creator.USER, Creator.SYSTEM):
            # Not only its own: who may map user ids, as Debian lets everybody, has many.
            return region if caller.uid in (0, os.geteuid()) else Creator.AGENT
        return region

    def _mark(self, file: marks.File, creator: Creator) -> None:
        try:
            marks.write_creator(file, creator)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._are_kept = False
            _log.warning(
                "the state directory's filesystem keeps no extended attributes, so nothing tells who made a "
                "file: all are the agent's"
            )


class _Process:
    """A process as far as it is looked at; one that has ended, or is another's, fits no rule of these."""

    def __init__(self, proc: Path, pid: int) -> None:
        self._proc = proc
        self._at = f"{proc}/{pid}/" if pid else None

    @cached_property
    def exe(self) -> str | None:
        """The path of its executable.

        Only the link is read: whatever it leads to may be in the very home that waits for this.
        """
        path = self._link("exe")
        return path.removesuffix(_DELETED) if path else None

    @cached_property
    def shares_our_files(self) -> bool:
        """Whether a path means there what it means here, or to the host's first process.

        In a mount namespace of its own an agent can have any program under any path.
        """
        theirs = self._link("ns/mnt")
        return theirs is not None and theirs in (
            _link(f"{self._proc}/self/ns/mnt"),
            _link(f"{self._proc}/1/ns/mnt"),
        )

    @cached_property
    def cgroup(self) -> str | None:
        """The path of its cgroup of version 2."""
        if self._at is not None:
            with contextlib.suppress(OSError), open(f"{self._at}cgroup", "rb", buffering=0) as file:
                for line in os.fsdecode(file.read()).splitlines():
                    if line.startswith(_UNIFIED):
                        return line.removeprefix(_UNIFIED)
        return None

    def _link(self, name: str) -> str | None:
        return None if self._at is None else _link(self._at + name)


def _fits(rule: CreatorRule, caller: Caller, process: _Process) -> bool:
    if rule.uid not in (None, caller.uid) or rule.gid not in (None, caller.gid):
        return False
    if rule.exe is not None and not (
        process.exe is not None and _matches(process.exe, rule.exe) and process.shares_our_files
    ):
        return False
    return rule.cgroup is None or (process.cgroup is not None and _is_within(process.cgroup, rule.cgroup))


@lru_cache(_REMEMBERED)
def _matches(path: str, pattern: str) -> bool:
    return PurePosixPath(path).match(pattern)


@lru_cache(_REMEMBERED)
def _is_within(path: str, pattern: str) -> bool:
    """Whether a path, or one above it, matches."""
    here = PurePosixPath(path)
    return any(each.match(pattern) for each in (here, *here.parents))


def _require_own(proc: Path) -> None:
    if _link(f"{proc}/self") != str(os.getpid()):
        raise EnvironmentProblem(
            f"{proc} does not show this process, so no rule of [[creators]] can look at an exe or a cgroup",
            hint=f"mount the proc filesystem of this PID namespace at {proc}, or use uid and gid",
        )


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
