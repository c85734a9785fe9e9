"""Verbs that carry files into a mounted home and out of it: ``put``, ``get``."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal

import msgspec
import typer

from agentfuse.cli import options
from agentfuse.cli.output import plain, print_json, say, until_nobody_reads
from agentfuse.client import Home, Put
from agentfuse.config import format_size
from agentfuse.errors import EnvironmentProblem, ExistsError, UsageError
from agentfuse.regions import Creator


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(put)
    app.command()(get)


def put(
    mountpoint: options.Mountpoint,
    sources: Annotated[list[str], typer.Argument(metavar="FILE", help="What to put; - is stdin.")],
    target: Annotated[str, typer.Argument(metavar="REGION/[NAME]", help="Where to.")],
    *,
    creator: Annotated[Creator, typer.Option("--as", help="Whose the files are.")] = Creator.USER,
    on_collision: Annotated[
        Literal["replace", "refuse", "number"],
        typer.Option(help="When the name is taken: replace it, refuse, or add a number."),
    ] = "replace",
    json: options.Json = False,
) -> None:
    """Put files into a region, each whole or not at all.

    A target that ends in a slash takes the files' own names. The directories on the way are made.
    """
    if len(sources) > 1 and not target.endswith("/"):
        raise UsageError(
            f"{target!a} is one name for {len(sources)} files", hint=f"end it with a slash: {target}/"
        )
    if "/" not in target:
        raise UsageError(f"{target!a} is a region", hint=f"write {target}/, or {target}/NAME")
    home = Home(mountpoint)
    placed: list[Put] = []
    for source in sources:
        what = sys.stdin.buffer if source == "-" else source
        placed.append(home.put(what, target, creator=creator, on_collision=on_collision))
        if not json:
            say(f"{plain(f'{placed[-1].region}/{placed[-1].path}')}  {format_size(placed[-1].size)}")
    if json:
        print_json(msgspec.to_builtins(placed))


def get(
    mountpoint: options.Mountpoint,
    path: Annotated[str, typer.Argument(metavar="REGION/PATH", help="The file in the home.")],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="Where to: a file, a directory, or - for stdout.")
    ] = ".",
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Get a file out of a region.

    It appears under its name when its whole content is here, in place of what was there with --force.
    """
    home = Home(mountpoint)
    found = home.stat(path)
    if found.type != "file":
        raise UsageError(f"{path!a} is a {found.type}, not a file", hint="agentfuse ls shows what there is")
    if destination == "-":
        with until_nobody_reads():
            home.get_into(path, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    if os.path.isdir(destination):
        destination = os.path.join(destination, os.path.basename(path))
    if os.path.isfile(destination) and not force:
        raise ExistsError(f"{destination!a} is there already", hint="name another place, or add --force")
    try:
        with _replacing(destination) as file:
            home.get_into(path, file)
    except OSError as error:
        raise EnvironmentProblem(
            f"{destination!a} cannot be written: {error.strerror}", hint="name another place"
        ) from error


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A file that takes the place of what is at ``path`` once it is complete."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a device or a pipe is written to
            with open(path, "wb") as file:
                yield file
            return
    path = os.path.realpath(path)
    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".agentfuse-")
    try:
        with open(fd, "wb") as file:
            yield file
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(fd, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
