"""The verb that shows a mount's requests as they happen: ``trace``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Annotated, Any

import typer

from agentfuse.cli import options
from agentfuse.cli.output import note, plain, until_nobody_reads
from agentfuse.config import parse_duration
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import open_registry
from agentfuse.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(trace)


def trace(
    mountpoint: options.Mountpoint,
    *,
    op: Annotated[
        str | None, typer.Option("--op", metavar="OP,OP", help="Only these operations, like write,create.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option("--path", metavar="GLOB", help="Only paths like this, below the mountpoint."),
    ] = None,
    pid: Annotated[int | None, typer.Option("--pid", metavar="N", help="Only this process's.")] = None,
    region: Annotated[str | None, typer.Option("--region", help="Only this region's.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Only those that fail.")] = False,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help='For so long, like "10s"; else until Ctrl-C.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show what programs do in a home, as it happens. A mount that nobody traces pays nothing for it."""
    try:
        for_s = None if duration is None else parse_duration(duration)
    except ValueError as error:
        raise UsageError(f"--for: {error}") from None
    entry = open_registry(os.environ).find_live(mountpoint)
    below = f"{entry.record.mountpoint}/"
    found = ControlClient(entry.socket).trace(
        operations=op.split(",") if op else [],
        path=path.removeprefix(below) if path else None,
        pid=pid,
        region=region,
        errors=errors,
        for_s=for_s,
    )
    with contextlib.suppress(KeyboardInterrupt), until_nobody_reads():
        for line in found:
            if "lost" in line and not as_json:
                note(f"agentfuse: {line['lost']:,} requests were too many to show")
            elif line:
                _print(json.dumps(line) if as_json else text_line(line))


def text_line(line: dict[str, Any]) -> str:
    """A request for people: ``12:30:01.123456  write  sh[7]  downloads/a  10 at 0  EDQUOT  53 us``."""
    clock = time.strftime("%H:%M:%S", time.localtime(line["time"]))
    who = f"{line['process'] or '?'}[{line['pid'] or '?'}]"
    path = line["path"] if line["path"] is not None else "-"
    if line["to"] is not None:
        path += f" -> {line['to']}"
    facts = [path or "."]
    if line["size"] is not None:
        facts.append(f"{line['size']}" + (f" at {line['offset']}" if line["offset"] is not None else ""))
    facts.append(line["errno"] or "ok")
    facts.append(f"{line['duration_us']:g} us")
    return (
        f"{clock}.{int(line['time'] % 1 * 1e6):06d}  {line['operation']:<10}  {who:<16}  {'  '.join(facts)}"
    )


def _print(line: str) -> None:
    sys.stdout.write(plain(line) + "\n")
    sys.stdout.flush()
