"""Verbs that act on a running daemon: ``quota``, ``log-level``, ``dump``."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast, get_args

import msgspec
import typer

from agentfuse.cli import options
from agentfuse.cli.output import note, print_json, say
from agentfuse.client import Home
from agentfuse.config import format_size, parse_size
from agentfuse.control.client import ControlClient
from agentfuse.control.messages import Level
from agentfuse.control.registry import open_registry
from agentfuse.errors import AgentfuseError, NotFoundError, UsageError

_LEVELS = ", ".join(get_args(Level))
_ANSWER_S = 3.0
_DUMPED_S = 3.0
"""How long a daemon that does not answer may take to write its stacks."""
_POLL_S = 0.05
_SETTLED_S = 0.3
_SUMMARY = ("State", "VmRSS", "Threads", "SigBlk", "SigIgn")


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(quota)
    app.command(name="log-level")(log_level)
    app.command()(dump)


def quota(
    mountpoint: options.Mountpoint,
    region: Annotated[str, typer.Argument(metavar="REGION", help="Whose quotas.")],
    *,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Bytes that it may hold, like 1GiB.")
    ] = None,
    files: Annotated[
        int | None, typer.Option("--files", metavar="N", help="Files that it may hold.", min=0)
    ] = None,
    json: options.Json = False,
) -> None:
    """Show or change what a region may hold.

    At once, and for this execution's later mounts on this host. Less than what it holds is allowed: then
    nothing more fits until something is removed.
    """
    home = Home(mountpoint)
    if size is None and files is None:
        found = [each for each in home.regions() if each.name == region]
        if not found:
            raise NotFoundError(
                f"there is no region {region!a}",
                hint="there are " + ", ".join(each.name for each in home.regions()),
            )
        use = found[0]
    else:
        use = home.set_quota(region, bytes_quota=_size(size), files_quota=files)
    if json:
        print_json(msgspec.to_builtins(use))
        return
    say(
        f"{use.name}: {format_size(use.bytes_used)} of {format_size(use.bytes_quota)}, "
        f"{use.files_used} of {use.files_quota} files"
    )
    if use.bytes_used > use.bytes_quota or use.files_used > use.files_quota:
        say("it holds more than its quota: it can only shrink")


def _size(text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(f"--bytes {text!a}: {error}", hint="write it like 500MiB") from None


def log_level(
    mountpoint: options.Mountpoint,
    level: Annotated[str, typer.Argument(metavar="LEVEL", help=f"From which level on it logs: {_LEVELS}.")],
) -> None:
    """Change what a daemon logs, until it ends."""
    if level not in get_args(Level):
        raise UsageError(f"there is no level {level!a}", hint=f"name one of {_LEVELS}")
    Home(mountpoint).set_log_level(cast(Level, level))
    say(f"the daemon logs from {level} on")


def dump(mountpoint: options.Mountpoint) -> None:
    """Show what a daemon's threads and tasks do. Also of one that hangs."""
    entry = open_registry(os.environ).find_live(mountpoint)
    try:
        print_text(ControlClient(entry.socket, deadline_s=_ANSWER_S).dump())
    except AgentfuseError as error:
        note(f"agentfuse: {error.message}: it is asked by a signal")
        print_text(_signalled(entry.record.pid))
        print_text(_seen_by_the_kernel(entry.record.pid))


def print_text(text: str) -> None:
    """Lines on stdout."""
    for line in text.splitlines():
        say(line)


def _signalled(pid: int) -> str:
    """The stacks that a daemon writes at SIGUSR1, by itself, whatever it waits for."""
    stderr = f"/proc/{pid}/fd/2"
    try:
        target = os.readlink(stderr)
        if not stat.S_ISREG(os.stat(stderr).st_mode):
            os.kill(pid, signal.SIGUSR1)
            return f"its stacks are where its stderr goes: {target}\n"
        with open(stderr, "rb") as log:
            log.seek(0, os.SEEK_END)
            os.kill(pid, signal.SIGUSR1)
            text = _read_until_still(log.fileno())
    except OSError as error:
        return f"pid {pid} cannot be asked: {error.strerror}\n"
    if text:
        return text.decode("utf-8", "backslashreplace")
    return f"it wrote no stacks to {target} within {_DUMPED_S:g} s: it is stopped, or waits in the kernel\n"


def _read_until_still(fd: int) -> bytes:
    """What comes to be in a file, until nothing has come for a while."""
    text = b""
    until = time.monotonic() + _DUMPED_S
    while time.monotonic() < until:
        more = os.read(fd, 1 << 20)
        text += more
        if more:
            until = time.monotonic() + _SETTLED_S
        time.sleep(_POLL_S)
    return text


def _seen_by_the_kernel(pid: int) -> str:
    """What the kernel says of a process and its threads: where each of them waits."""
    process = Path(f"/proc/{pid}")
    facts = dict(line.split(":", 1) for line in _read(process / "status").splitlines() if ":" in line)
    lines = [f"pid {pid}: " + ", ".join(f"{name} {facts.get(name, '?').strip()}" for name in _SUMMARY)]
    for task in sorted((process / "task").glob("*")):
        lines += [f"thread {task.name} ({_read(task / 'comm').strip()})", *_where(task)]
    return "\n".join(lines)


def _where(task: Path) -> Iterator[str]:
    state = next((line for line in _read(task / "status").splitlines() if line.startswith("State:")), "")
    yield f"  {' '.join(state.split())}, waits in {_read(task / 'wchan') or '?'}"
    yield from (f"    {line}" for line in _read(task / "stack").splitlines())  # root's to see


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
