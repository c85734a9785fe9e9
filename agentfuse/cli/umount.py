"""``agentfuse umount``: ask the daemon to end its mount, see it through, clean up after a dead one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from agentfuse.cli import options
from agentfuse.cli.holders import Holder, holders_of
from agentfuse.cli.output import say, terminal_reporter
from agentfuse.config import Config
from agentfuse.control.asks import ANSWER_DEADLINE_S
from agentfuse.control.client import ControlClient
from agentfuse.control.liveness import liveness
from agentfuse.control.mountinfo import mounts_at, resolve_mountpoint
from agentfuse.control.registry import PublishedMount, Registry, open_registry
from agentfuse.errors import AgentfuseError, BusyError, NotFoundError, UnflushedError
from agentfuse.helped import mounter_of
from agentfuse.home.tree import Home, HomeRecord, list_homes
from agentfuse.mountpoint import reopen
from agentfuse.progress import Progress, Reporter

_NAMED_HOLDERS = 5


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(umount)


def umount(
    mountpoint: options.Mountpoint,
    *,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Even if processes work in it; their open files fail.")
    ] = False,
    timeout: options.Timeout = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Unmount a home and wait until it is flushed. Exits 0 only if everything is durable.

    A store that cannot be reached is tried again for --timeout seconds (flush_timeout of the configuration
    if left out); then the exit code is 75 and the home stays on this host: agentfuse recover finishes it.
    A mount whose daemon died is detached; the next mount of its agent on this host finishes its work.
    """
    registry = open_registry(os.environ)
    resolved = resolve_mountpoint(mountpoint)
    entry = published(registry, resolved)
    if entry and entry.alive:
        os.chdir("/")  # where it was called may be in the home, which would keep that busy
        try:
            end_mount(registry, entry, lazy=lazy, timeout_s=timeout, reporter=terminal_reporter())
        except NotFoundError:
            _require_durable(entry, registry)  # it ended before it heard of us
        say(f"unmounted {resolved}: everything is durable")
    elif registry.is_served(resolved):
        raise BusyError(f"the daemon of {resolved} is just starting or ending", hint="try again in a moment")
    else:
        clean_up(registry, resolved, entry, options.configure(config=config, state=state))


def _require_durable(entry: PublishedMount, registry: Registry) -> None:
    """Raise UnflushedError unless the home of a mount that somebody else ended is in the store."""
    record = entry.record
    registry.wait_until_released(Path(record.mountpoint), timeout_s=ANSWER_DEADLINE_S)
    left = Home(Path(record.state), record.execution).record()
    if left is not None and left.status != "clean":
        raise UnflushedError(
            f"the daemon has ended, but execution {record.execution} is not in the store yet",
            hint=f"it is safe on this host: agentfuse recover, or mounting agent {record.agent}, finishes it",
        )


def published(registry: Registry, mountpoint: Path) -> PublishedMount | None:
    """The registry's entry for a resolved mountpoint, or None."""
    try:
        return registry.find(mountpoint)
    except NotFoundError:
        return None


def end_mount(
    registry: Registry, entry: PublishedMount, *, lazy: bool, timeout_s: float | None, reporter: Reporter
) -> None:
    """Have a live daemon unmount and flush; return when its process is gone.

    Raises the daemon's own error, and BusyError that names whoever keeps the mount busy.
    """
    mountpoint = Path(entry.record.mountpoint)
    begun = time.monotonic()
    silence_s = ANSWER_DEADLINE_S if timeout_s is None else max(0.1, min(timeout_s, ANSWER_DEADLINE_S))
    client = ControlClient(entry.socket, deadline_s=silence_s)
    try:
        for line in client.unmount(lazy=lazy, timeout_s=timeout_s):
            _report(line, reporter)
    except AgentfuseError as error:
        holders = holders_of(mountpoint) if registry.is_served(mountpoint) and not lazy else []
        if not holders or isinstance(error, BusyError):
            raise
        raise _held(mountpoint, holders) from error
    left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - begun))
    if not registry.wait_until_released(mountpoint, timeout_s=left_s):
        raise BusyError(
            f"everything is durable, but the daemon (pid {entry.record.pid}) has not ended yet",
            hint="agentfuse ps shows when it is gone",
        )


def clean_up(registry: Registry, mountpoint: Path, entry: PublishedMount | None, settings: Config) -> None:
    """Detach what a dead daemon left at a resolved path, and say whether its work is unfinished.

    Raises NotFoundError when nothing of ours is there, UnflushedError when the next start has work.
    """
    stack = mounts_at(mountpoint)
    ours = bool(stack) and stack[-1].is_ours
    is_left = not stack and reopen(mountpoint)  # closed: a service manager stopped it, or the machine did
    if not ours and entry is None and not is_left:
        what = f"a mount of type {stack[-1].fstype}, not of agentfuse," if stack else "nothing"
        raise NotFoundError(f"{what} is mounted at {mountpoint}", hint="agentfuse ps lists the mounts")
    if ours:
        _require_dead(mountpoint)
    lock = registry.lock(mountpoint)
    try:
        detached = _detach_all(mountpoint, settings)
        registry.withdraw(mountpoint)
    finally:
        lock.release()
    did = f"detached the dead mount at {mountpoint}" if detached else f"cleaned up after {mountpoint}"
    record = _unfinished(mountpoint, entry, settings)
    if record:
        raise UnflushedError(
            f"{did}: execution {record.execution} of agent {record.agent} is not in the store yet",
            hint=f"it is safe on this host: agentfuse recover, or mounting agent {record.agent}, finishes it",
        )
    say(f"{did}: nothing is unflushed")


def _report(line: dict[str, Any], reporter: Reporter) -> None:
    if "say" in line:
        reporter.say(line["say"])
    elif "progress" in line:
        reporter.progress(Progress(**line["progress"]))


def _held(mountpoint: Path, holders: list[Holder]) -> BusyError:
    named = ", ".join(str(holder) for holder in holders[:_NAMED_HOLDERS])
    more = f" and {len(holders) - _NAMED_HOLDERS} more" if len(holders) > _NAMED_HOLDERS else ""
    return BusyError(
        f"{mountpoint} is in use by {named}{more}",
        hint=f"end them or have them leave it; or agentfuse umount --lazy {mountpoint}",
    )


def _require_dead(mountpoint: Path) -> None:
    alive = liveness(mountpoint)
    if alive == "live":
        raise BusyError(
            f"{mountpoint} is served by a daemon that is not in this registry",
            hint="set AGENTFUSE_RUNTIME_DIR as that daemon has it, or act as its user",
        )
    if alive == "hung":
        raise BusyError(f"the daemon of {mountpoint} hangs", hint="kill -9 it, then umount again")


def _detach_all(mountpoint: Path, settings: Config) -> int:
    mounter, count = mounter_of(settings.mount_helper, mountpoint), 0
    while (stack := mounts_at(mountpoint)) and stack[-1].is_ours:
        mounter.detach(lazy=True)
        count += 1
    mounter.reopen()
    return count


def _unfinished(mountpoint: Path, entry: PublishedMount | None, settings: Config) -> HomeRecord | None:
    """The record of the home that was mounted there, if it holds work that no snapshot has."""
    state = Path(entry.record.state) if entry else settings.state
    for home in list_homes(state):
        record = home.record()
        if record is None or record.status != "live" or home.is_locked():
            continue
        if record.execution == entry.record.execution if entry else record.mountpoint == str(mountpoint):
            return record
    return None
