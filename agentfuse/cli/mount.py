"""``agentfuse mount``: a home in the foreground, or in the background behind a parent that reports."""

from __future__ import annotations

from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.output import say, terminal_reporter
from agentfuse.cli.serving import Request, serve_foreground, start_background


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(mount)


def mount(
    mountpoint: options.NewMountpoint,
    *,
    agent: options.Agent,
    execution: options.Execution = None,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
    owner: options.Owner = None,
    mount_option: options.MountOptions = None,
    xattrs: options.Xattrs = None,
    retain: Annotated[
        bool, typer.Option("--retain", help="Keep the execution's files in the store, too, but loose ones.")
    ] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Return when the mount is ready, and let it run.")
    ] = False,
) -> None:
    """Mount an agent's home: restore, serve, flush at the end.

    In the foreground it ends with Ctrl-C, SIGTERM or agentfuse umount, and exits 0 only if everything
    is durable. In the background it logs to STATE/homes/EXECUTION/daemon.log.
    """
    request = Request.of(mountpoint, agent, execution, retains=retain)
    settings = options.configure(
        config=config, store=store, state=state, owner=owner, mount_option=mount_option, xattrs=xattrs
    )
    if not background:
        serve_foreground(settings, request)
        return
    started = start_background(settings, request, terminal_reporter())
    say(f"ready: {request} in the background, pid {started.pid}")
