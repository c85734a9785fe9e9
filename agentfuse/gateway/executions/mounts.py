"""The daemons of this host's executions: started, found again, ended, and done after when they died.

Knows homes, the registry of mounts and the control API, but no records of executions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Literal

import trio

from agentfuse import mountpoint as mountpoints
from agentfuse.config import Config
from agentfuse.control import asks
from agentfuse.control.client import AsyncControlClient
from agentfuse.control.mountinfo import mounts_at, resolve_mountpoint
from agentfuse.control.registry import PublishedMount, Registry
from agentfuse.errors import AgentfuseError, BusyError, EnvironmentProblem, NotFoundError
from agentfuse.gateway.executions.starters import Starter, Wanted
from agentfuse.home.tree import Home, remove_home
from agentfuse.progress import Progress
from agentfuse.sync.keeper import is_removable
from agentfuse.sync.recovery import finish, held

_LOG = logging.getLogger(__name__)

_POLL_S = 0.05
_HELD_S = 10.0
"""So long may a sandbox hold a home that was unmounted here."""

_SILENCE_S = 15.0
"""A daemon that unmounts says something every second: one that is silent for so long, twice, hangs."""

_LOOK_S = 0.5
"""How often one looks for the end of a process that cannot be waited for."""

Outcome = Literal["none", "flushed", "unflushed", "died"]
"""What became of a home without a daemon: it never had one; it was unmounted, and everything is in the store,
or not yet; its daemon died."""


class Mounts:
    """The mounts of this host. ``directory`` has their mountpoints."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        *,
        registry: Registry,
        starter: Starter,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._config = config
        self._registry = registry
        self._starter = starter
        self._limiter = limiter
        before = os.umask(0o022)  # agents, who are not root, come through
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(
                f"{directory}: {error.strerror}",
                hint="the directory of the mounts must be writable; choose another with mounts in [gateway]",
            ) from error
        finally:
            os.umask(before)
        self._directory = resolve_mountpoint(directory)

    def path(self, execution: str) -> Path:
        """Where an execution's home is mounted."""
        return self._directory / execution

    def is_served(self, execution: str) -> bool:
        """Whether a daemon holds the mountpoint; it may be starting or ending."""
        return self._registry.is_served(self.path(execution))

    def outcome(self, execution: str) -> Outcome:
        """What became of the home; nobody serves it."""
        record = Home(self._config.state, execution).record()
        if record is None:
            return "none"
        if record.unmounted_at is None:
            return "died"
        return "flushed" if record.status == "clean" else "unflushed"

    async def start(self, agent: str, execution: str) -> None:
        """Mount a home, unless it is; returns when it is usable, or its daemon has ended already.

        Raises ``AgentfuseError`` that says why it cannot be mounted.
        """
        path = self.path(execution)
        if not self.is_served(execution):
            await trio.to_thread.run_sync(_make_mountpoint, path, limiter=self._limiter)
            await self._starter.start(Wanted(path, agent, execution))
        while self.is_served(execution) and self._found(execution) is None:  # noqa: ASYNC110  # another process
            await trio.sleep(_POLL_S)

    async def ended(self, execution: str) -> None:
        """Wait until the daemon of an execution, if there is one, is no more."""
        while self.is_served(execution):
            entry = self._found(execution)
            with _process_of(entry) as process:
                # Whose it is now is asked again: it may have been another's number by then.
                if process is None or self._found(execution) != entry:
                    await trio.sleep(_LOOK_S)
                else:
                    await trio.lowlevel.wait_readable(process)

    async def end(self, execution: str) -> None:
        """Unmount a home, if it is mounted, and bring everything into the store.

        When this returns nothing of it is only here. Raises ``AgentfuseError`` when that fails, mostly
        ``StoreError``: to be tried again.
        """
        while self.is_served(execution):
            if self._found(execution) is None:  # it is just starting, or ending
                await trio.sleep(_POLL_S)
                continue
            await self._unmount(execution)
            await self.ended(execution)
        await self._starter.settle(execution)
        await trio.to_thread.run_sync(self._finish, execution, limiter=self._limiter, abandon_on_cancel=True)

    def remove(self, execution: str) -> None:
        """Remove the mountpoint, which nothing is mounted at, if it is there."""
        try:
            mountpoints.remove(self.path(execution))
        except FileNotFoundError:
            pass
        except OSError as error:  # root wrote there while nothing was mounted: it is not ours to remove
            _LOG.warning("%s is left: %s", self.path(execution), error.strerror)

    def remove_home(self, execution: str) -> bool:
        """Remove an ended home from this host, unless it is still needed here; whether it is gone."""
        home = Home(self._config.state, execution)
        if not home.path.is_dir():
            return True
        with held(home) as record:
            if record is not None and not is_removable(record, keep_s=0):
                return False
            remove_home(home)
        return True

    def _found(self, execution: str) -> PublishedMount | None:
        try:
            return self._registry.find_live(self.path(execution))
        except NotFoundError:
            return None

    async def _unmount(self, execution: str) -> None:
        """Have the daemon end, one that does not answer by force."""
        entry = self._found(execution)
        if entry is None:
            return
        client = AsyncControlClient(entry.socket, deadline_s=_SILENCE_S)
        held_at = trio.current_time() + _HELD_S
        for lazy in (
            False,
            True,
        ):  # a process that is left in the home does not keep the execution from ending
            try:
                async with aclosing(client.lines(asks.unmount(lazy=lazy, timeout_s=None))) as lines:
                    async for line in lines:
                        if "say" in line:
                            _LOG.info("execution %s: %s", execution, line["say"])
                        if not lazy and trio.current_time() > held_at and await _is_held(client, entry):
                            break
                    else:
                        return
            except NotFoundError:
                return  # it has ended
            except BusyError as error:
                if lazy and self._found(execution) == entry:
                    _LOG.warning("execution %s: its daemon is killed: %s", execution, error)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(entry.record.pid, signal.SIGKILL)
                    return
            except AgentfuseError as error:
                _LOG.warning("execution %s: %s", execution, error)
                if not _is_mounted(entry):
                    return  # unmounted, but not flushed: that is done by us

    def _finish(self, execution: str) -> None:
        lock = self._registry.lock(self.path(execution))
        try:
            mountpoints.detach_stale(self.path(execution))
            self._registry.withdraw(self.path(execution))
        finally:
            lock.release()
        home = Home(self._config.state, execution)
        if home.record() is None:
            return
        with held(home) as record:
            if record is not None and record.status != "clean":
                finish(self._config, home, record, _Logging(execution))


class _Logging:
    """A reporter that logs what is said."""

    def __init__(self, execution: str) -> None:
        self._execution = execution

    def say(self, text: str) -> None:
        _LOG.info("execution %s: %s", self._execution, text)

    def progress(self, moment: Progress) -> None:
        """Nobody looks."""


async def _is_held(client: AsyncControlClient, entry: PublishedMount) -> bool:
    """Whether a home is in use although it is not on its path any more."""
    return not _is_mounted(entry) and (await client.ask(asks.status())).state == "live"


def _is_mounted(entry: PublishedMount) -> bool:
    """Whether what a daemon mounted is there still."""
    return bool(mounts_at(Path(entry.record.mountpoint)))


def _make_mountpoint(path: Path) -> None:
    """A directory that nobody can write to while nothing is mounted there."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mountpoints.CLOSED_MODE)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot make {path}: {error.strerror}", hint="the directory of the mounts must be writable"
        ) from error


@contextlib.contextmanager
def _process_of(entry: PublishedMount | None) -> Iterator[int | None]:
    """A descriptor of the process that published a mount, None when there is none to be seen from here."""
    process = None
    if entry is not None:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(entry.record.pid)
    try:
        yield process
    finally:
        if process is not None:
            os.close(process)
