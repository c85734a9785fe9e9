"""The verb that shows a mount live, like top: ``watch``. Needs rich."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentfuse.cli import options
from agentfuse.cli.events import text_line
from agentfuse.cli.inspect import arrived, region_cells, sync_cells
from agentfuse.cli.output import plain, print_json
from agentfuse.cli.tables import duration
from agentfuse.config import format_size
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import open_registry

_SHOWN = 8


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(watch)


def watch(
    mountpoint: options.Mountpoint,
    *,
    interval: Annotated[
        float, typer.Option("--interval", metavar="S", help="Seconds between frames.", min=0.1, max=10)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One frame, and no more.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One frame as JSON.")] = False,
) -> None:
    """Show a mount live, like top.

    Requests, the hottest files and processes, quotas, sync, and the last events.
    """
    entry = open_registry(os.environ).find_live(mountpoint)
    console = Console()
    once = once or json or not console.is_terminal
    frames = ControlClient(entry.socket).watch(interval_s=interval, frames=1 if once else None)
    try:
        if json:
            print_json(next(frames))
        elif once:
            wide = console if console.is_terminal else Console(width=200)
            wide.print(picture(next(frames)))
        else:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for frame in frames:
                    live.update(picture(frame), refresh=True)
    except KeyboardInterrupt:
        return


def picture(frame: dict[str, Any]) -> RenderableType:
    """One frame for people."""
    status, activity = frame["status"], frame["activity"]
    return Group(
        _head(status, activity),
        "",
        _requests(activity["operations"]),
        "",
        _table(("PROCESS", "PID", *_RATES), [_process(each) for each in activity["processes"][:_SHOWN]]),
        "",
        _table(
            ("FILE", *_RATES), [(each["path"] or ".", *_rates(each)) for each in activity["files"][:_SHOWN]]
        ),
        "",
        _table(
            ("REGION", "BYTES", "", "FILES", ""), [region_cells(*item) for item in status["regions"].items()]
        ),
        "",
        *[_table(("SYNC", f"{name}/"), sync_cells(sync)) for name, sync in status["sync"].items()],
        "",
        _table(("EVENTS",), [(text_line(event),) for event in frame["events"]] or [("none yet",)]),
    )


_RATES = ("REQUESTS/S", "READ/S", "WRITTEN/S", "ERRORS/S")


def _head(status: dict[str, Any], activity: dict[str, Any]) -> Text:
    uptime = duration(time.time() - float(status["started_at"]))
    line = Text(f"{plain(status['mountpoint'])}  agent {status['agent']}  execution {status['execution']}")
    line.append(f"  {status['state']}", style="" if status["state"] == "live" else "yellow")
    line.append(f"  up {uptime}  memory {format_size(int(status['rss_bytes']))}")
    line.append(f"  contents {arrived(status['hydration'])}\n")
    line.append(f"{activity['requests_per_s']:,.0f} requests/s", style="bold")
    line.append(f"  p50 {_latency(activity['p50_us'])}  p99 {_latency(activity['p99_us'])}")
    line.append(f"  read {format_size(activity['read_bytes_per_s'])}/s")
    line.append(f"  written {format_size(activity['written_bytes_per_s'])}/s")
    if activity["errors_per_s"]:
        line.append(f"  {activity['errors_per_s']:,.1f} errors/s", style="yellow")
    return line


def _requests(operations: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (each["operation"], *_rates(each), _latency(each["p50_us"]), _latency(each["p99_us"]))
        for each in operations[:_SHOWN]
    ]
    return _table(("OPERATION", *_RATES, "P50", "P99"), rows)


def _process(each: dict[str, Any]) -> tuple[object, ...]:
    return (each["process"] or "?", each["pid"], *_rates(each))


def _rates(each: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{each['requests_per_s']:,.1f}",
        format_size(each["read_bytes_per_s"]) if each["read_bytes_per_s"] else "-",
        format_size(each["written_bytes_per_s"]) if each["written_bytes_per_s"] else "-",
        f"{each['errors_per_s']:,.1f}" if each["errors_per_s"] else "-",
    )


def _latency(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds:.0f} us" if microseconds < 1000 else f"{microseconds / 1000:,.1f} ms"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    right = {*_RATES, "PID", "P50", "P99"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    return table
