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
from agentfuse.cli.output import plain, print_json, say
from agentfuse.client import Home, Put
from agentfuse.config import format_size
from agentfuse.errors import EnvironmentProblem, UsageError
from agentfuse.regions import Creator


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(put)
    app.command()(get)


def put(
    mountpoint: options.Mountpoint,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE... REGION/[NAME]", help="What to put (- is stdin), and where to."),
    ],
    *,
    creator: Annotated[Creator, typer.Option("--as", help="Whose the files are.")] = Creator.USER,
    on_collision: Annotated[
        Literal["replace", "refuse", "number"],
        typer.Option(help="When the name is taken: replace it, refuse, or add a number."),
    ] = "replace",
    json: options.Json = False,
) -> None:
    """Put files into a region: each appears whole, under its name, or not at all.

    A target that ends in a slash takes the files' own names. The directories on the way are made.
    """
    *sources, target = files
    if not sources:
        raise UsageError(
            "nothing is named that is to be put", hint="agentfuse put MOUNTPOINT FILE... REGION/[NAME]"
        )
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
        str, typer.Argument(metavar="[DEST|-]", help="Where to: a file, a directory, or - for stdout.")
    ] = ".",
) -> None:
    """Get a file out of a region. What DEST was is replaced when the whole content is here."""
    home = Home(mountpoint)
    if destination == "-":
        try:
            home.get_into(path, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # whoever read has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if os.path.isdir(destination):
        destination = os.path.join(destination, os.path.basename(path))
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
