"""Tables for people. Needs rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentfuse.cli.output import plain
from agentfuse.config import format_size
from agentfuse.home.quota import NEARLY_FULL, fraction

_BAR_CELLS = 10


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """Rows under columns on stdout; ``right`` names the columns of numbers. Piped, nothing is cut.

    Without a name for any column there is no head.
    """
    console = Console()
    table = Table(
        box=None, pad_edge=False, show_header=any(columns), header_style="bold" if console.is_terminal else ""
    )
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    if not console.is_terminal:
        console = Console(width=10_000)
    console.print(table, crop=False)


def share(used: int, quota: int) -> Text:
    """Use of a quota as a bar and a percentage, coloured from 80 % on."""
    full = fraction(used, quota)
    cells = min(_BAR_CELLS, round(full * _BAR_CELLS))
    style = "red" if full >= 1 else "yellow" if full >= NEARLY_FULL else ""
    return Text(f"{'█' * cells}{'░' * (_BAR_CELLS - cells)} {int(full * 100):3d}%", style=style)


def used_of(used: int, quota: int) -> str:
    """``3 MiB of 50 MiB``."""
    return f"{format_size(used)} of {format_size(quota)}"


def duration(seconds: float) -> str:
    """``17s``, ``5m``, ``3h20m``, ``2d4h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 60:
        return f"{minutes}m"
    if hours < 24:
        return f"{hours}h{minutes % 60}m"
    return f"{days}d{hours % 24}h"
