"""``agentfuse serve``: the gateway in the foreground, for systemd and people."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.output import say
from agentfuse.config import load_config
from agentfuse.supervision import supervisor_of
from agentfuse.values import Address


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(serve)


def serve(
    *,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; 127.0.0.1:8080 if left out."),
    ] = None,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Serve the HTTP APIs: executions, files, memories, staging.

    It ends with SIGTERM or Ctrl-C: it accepts nothing more, finishes what is under way and exits 0. The
    routes are described at /docs. Keys come from [[keys]] of the configuration, see agentfuse key new; for
    a try, from AGENTFUSE_DEV_KEY=KEY:ORGANIZATION.
    """
    settings = load_config(
        None if config is None else Path(config),
        environ=os.environ,
        overrides={
            "store": store,
            "state": os.path.abspath(state) if state else state,
            "listen": listen,
        },
    )
    from agentfuse.gateway import server  # noqa: PLC0415  only the process that serves pays for it
    from agentfuse.logs import log_to_stream  # noqa: PLC0415

    log_to_stream(sys.stderr, settings.log_format, None, os.environ)

    def on_ready(address: Address) -> None:
        say(f"ready: {settings.gateway.scheme}://{address}")
        supervisor_of(os.environ).ready(f"answers at {settings.gateway.scheme}://{address}")

    server.serve(settings, None if config is None else Path(config), on_ready=on_ready)
