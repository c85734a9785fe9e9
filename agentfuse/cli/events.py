"""The verb that tells which files came: ``events``, for programs, for people and for models."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agentfuse.cli import options
from agentfuse.cli.homes import find_ended
from agentfuse.cli.output import plain, until_nobody_reads
from agentfuse.config import format_size
from agentfuse.control.client import ControlClient
from agentfuse.control.mountinfo import resolve_mountpoint
from agentfuse.control.registry import open_registry
from agentfuse.errors import UsageError
from agentfuse.events.log import EventLog
from agentfuse.home.tree import Home, HomeRecord

_TOGETHER_S = 1.0
"""What comes within this time of each other is one message to a model."""
_MOST_NAMES = 20
_AT_ONCE = 1000
_PLAIN_NAME = re.compile(r"[\w.+@=~/-]+")
_HEADINGS = {
    "arrived": "New files",
    "modified": "Changed files",
    "moved": "Renamed files",
    "deleted": "Removed files",
    "refused": "Files that could not be taken",
}


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(events)


def events(
    mountpoint: Annotated[
        str | None, typer.Argument(metavar="MOUNTPOINT", help="Where the home is, or was, mounted.")
    ] = None,
    *,
    execution: Annotated[
        str | None, typer.Option("--execution", help="The execution instead of a mountpoint.")
    ] = None,
    since: Annotated[
        int | None, typer.Option("--since", metavar="N", help="Only events numbered higher than N.", min=0)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those to come.")] = False,
    region: Annotated[str | None, typer.Option("--region", help="Only this region's.")] = None,
    form: Annotated[
        Literal["json", "text", "prompt"],
        typer.Option("--format", help="One JSON object a line, a table's line, or a message to a model."),
    ] = "text",
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Tell which files arrived, changed, moved and went.

    Each once, of the regions that notify. Of a run that has ended, what is kept of it: as long as its
    home is.
    """
    if (mountpoint is None) == (execution is None):
        raise UsageError(
            "events needs either a mountpoint or an execution", hint="give MOUNTPOINT, or --execution E"
        )
    mounts = open_registry(os.environ).list()
    where = None if mountpoint is None else str(resolve_mountpoint(mountpoint))
    live = [each for each in mounts if each.alive and where in (None, each.record.mountpoint)]
    live = [each for each in live if execution in (None, each.record.execution)]
    found: Iterator[dict[str, Any]]
    if live:
        found = ControlClient(live[0].socket).events(since=since, region=region, follow=follow)
    else:
        states = {
            options.configure(config=config, state=state).state,
            *(Path(each.record.state) for each in mounts),
        }
        home, record = find_ended(sorted(states), mountpoint=mountpoint, execution=execution)
        found = _of_ended(home, record, since or 0, region)
    with contextlib.suppress(KeyboardInterrupt), until_nobody_reads():
        if form == "prompt":
            for burst in _bursts(found):
                for line in prompt_lines(burst):
                    _print(line)
        else:
            for event in found:
                if event:
                    _print(json.dumps(event) if form == "json" else text_line(event))


def _of_ended(home: Home, record: HomeRecord, since: int, region: str | None) -> Iterator[dict[str, Any]]:
    """The events in the log of a home that is not mounted."""
    log = EventLog(home.events, home.tree, only_looks=True)
    try:
        while log.exists() and (some := log.read(since, _AT_ONCE)):
            for event in some:
                if region in (None, event.region):
                    yield json.loads(event.to_json(execution=record.execution, agent=record.agent))
            since = some[-1].seq
    finally:
        log.close()


def text_line(event: dict[str, Any]) -> str:
    """An event for people: ``7 2026-10-01 12:30:01 arrived downloads/a.csv 1.2 KiB text/csv``."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    path = quoted(f"{event['region']}/{event['path']}")
    if event["old_path"] is not None:
        path = f"{quoted(event['region'] + '/' + event['old_path'])} -> {path}"
    size = format_size(event["size"])
    return f"{event['seq']:>6}  {clock}  {event['kind']:<8}  {path}  {size}  {event['mime'] or '-'}"


def prompt_lines(burst: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What a harness hands to a model: ``New files in uploads/: a.csv (1.2 KB), b.pdf (300 KB)``."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for event in burst:
        named = f"{quoted(event['path'])} ({short_size(event['size'])})"
        if event["kind"] == "moved":
            named = f"{quoted(event['old_path'])} -> {named}"
        elif event["kind"] == "deleted":
            named = quoted(event["path"])
        groups.setdefault((event["kind"], event["region"]), {})[event["path"]] = named
    for (kind, region), names in groups.items():
        shown = list(names.values())[:_MOST_NAMES]
        if len(names) > len(shown):
            shown[-1] += f" and {len(names) - len(shown):,} more"
        yield f"{_HEADINGS[kind]} in {region}/: " + ", ".join(shown)


def quoted(name: str) -> str:
    """A name as it is if it is plain, otherwise as a JSON string: no name looks like what is around it."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    safe = (c if c.isprintable() and c not in '"\\' else json.dumps(c)[1:-1] for c in name)
    return f'"{"".join(safe)}"'


def short_size(size_bytes: int) -> str:
    """Bytes as models are told them, in powers of 1000: ``1.2 KB``. People get ``format_size``."""
    amount, units = float(size_bytes), iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 999.5 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    number = f"{amount:.1f}".removesuffix(".0") if amount < 9.95 else f"{amount:.0f}"
    return f"{number} {unit}"


def _print(line: str) -> None:
    sys.stdout.write(plain(line) + "\n")
    sys.stdout.flush()


def _bursts(found: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Events that come together, together."""
    burst: list[dict[str, Any]] = []
    began = 0.0
    for event in found:
        if event:
            began = began if burst else time.monotonic()
            burst.append(event)
        if burst and (not event or time.monotonic() - began > _TOGETHER_S):
            yield burst
            burst = []
    if burst:
        yield burst
