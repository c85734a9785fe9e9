"""The ``agentfuse`` command. One module per group of verbs; only the one that is asked for is imported.

That keeps a mount's start and memory free of what other verbs need (tables, the HTTP client).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from agentfuse import __version__
from agentfuse.cli.output import print_error
from agentfuse.errors import AgentfuseError

_EXIT_CODES = """
\b
Exit codes:
  0   done; for mount, umount and run: everything is durable
  2   the command line is wrong
  65  stored bytes are not what they should be
  66  no such mount, agent or snapshot
  69  the machine or the object store lacks something (agentfuse doctor says what)
  70  a mistake of agentfuse itself (AGENTFUSE_DEBUG=1 shows where)
  73  the mountpoint cannot be used, or a quota is full
  75  somebody else holds it, or work is not in the store yet (it is safe on this host)
  78  the configuration is wrong

\b
run returns its command's exit code: 128 + n after signal n, 127 not found, 126 not executable.
"""

VERBS = {
    "mount": "mount",
    "umount": "umount",
    "run": "run",
    "ps": "inspect",
    "status": "inspect",
    "df": "inspect",
    "ls": "ls",
    "events": "events",
    "put": "files",
    "get": "files",
    "quota": "operate",
    "log-level": "operate",
    "dump": "operate",
    "trace": "trace",
    "watch": "watch",
    "sync": "sync",
    "recover": "sync",
    "doctor": "doctor",
    "log": "history",
    "diff": "history",
    "show": "history",
    "restore": "rewrite",
    "revert": "rewrite",
    "pin": "rewrite",
    "unpin": "rewrite",
    "fsck": "upkeep",
    "gc": "upkeep",
    "serve": "serve",
    "key": "key",
    "prompt": "prompt",
    "completion": "completion",
}


def main() -> None:
    """Run the command line of this process and exit."""
    command = application(_modules(sys.argv[1:]))
    try:
        command(prog_name="agentfuse")
    except AgentfuseError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 -- the outermost edge
        if os.environ.get("AGENTFUSE_DEBUG"):
            traceback.print_exc()
        print_error(
            AgentfuseError(
                f"unexpected {type(error).__name__}: {error}",
                hint="this is a mistake of agentfuse; AGENTFUSE_DEBUG=1 shows where",
            )
        )
        sys.exit(AgentfuseError.exit_code)


def application(modules: Iterable[str]) -> Any:
    """The command of these modules' verbs: click's, or typer's own copy of it, by version."""
    app = typer.Typer(
        name="agentfuse",
        epilog=_EXIT_CODES,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in modules:
        importlib.import_module(f"agentfuse.cli.{name}").register(app)
    return typer.main.get_command(app)


def _modules(arguments: list[str]) -> list[str]:
    """The modules of the verb that is asked for; all of them when it is not clear (help, a typo)."""
    if arguments and arguments[0] in VERBS:
        return [VERBS[arguments[0]]]
    return list(dict.fromkeys(VERBS.values()))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"agentfuse {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An AI agent's home as a real filesystem: four regions, exact quotas, memory that survives."""
