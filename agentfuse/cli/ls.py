"""``ls``: what a mounted home holds, and who made it. Asks the mount's daemon, never the mount."""

from __future__ import annotations

import os
import time
from typing import Annotated

import msgspec
import typer

from agentfuse.cli import options
from agentfuse.cli.output import plain, print_json, say
from agentfuse.cli.tables import print_table
from agentfuse.client import FileInfo, Home
from agentfuse.config import format_size
from agentfuse.control.registry import open_registry
from agentfuse.errors import NotFoundError
from agentfuse.regions import LOOSE


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(ls)


def ls(
    where: Annotated[
        str,
        typer.Argument(metavar="MOUNTPOINT[:REGION[/PATH]]", help="The home, a region, or what is in it."),
    ],
    *,
    long: Annotated[
        bool,
        typer.Option(
            "-l", "--long", help="Ids, creators, what is frozen, sizes, MIME types, times, and whole paths."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """List the files of a mounted home, dotfiles too.

    Names, or with -l who made each, and when. CREATED is when a file came to this host.
    """
    mountpoint, path = _split(where)
    home = Home(mountpoint)
    path = path.rstrip("/") or LOOSE
    top = home.stat(path)
    entries = list(home.list(path)) if top.type == "dir" else [top]
    if json:
        print_json(msgspec.to_builtins(entries))
    elif long:
        columns = ("ID", "CREATOR", "FROZEN", "SIZE", "TYPE", "CREATED", "MODIFIED", "PATH")
        print_table(columns, map(_cells, entries), right=("SIZE",))
    else:
        for entry in entries:
            say(plain(entry.path.rpartition("/")[2] or entry.region))


def _split(where: str) -> tuple[str, str]:
    """The mountpoint, which may have colons in it, and the path in the home."""
    registry = open_registry(os.environ)
    for end in [len(where), *(place for place, character in enumerate(where) if character == ":")]:
        try:
            registry.find(where[:end])
        except NotFoundError:
            continue
        return where[:end], where[end + 1 :]
    mountpoint, _, path = where.partition(":")
    return mountpoint, path


def _cells(entry: FileInfo) -> tuple[str, ...]:
    return (
        entry.id,
        entry.created_by,
        "yes" if entry.is_frozen else "-",
        format_size(entry.size) if entry.type == "file" else "-",
        entry.mime or entry.type,
        "-" if entry.created_at is None else _clock(entry.created_at),
        _clock(entry.modified_at),
        f"{entry.region}/{entry.path}" if entry.path else f"{entry.region}/",
    )


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
