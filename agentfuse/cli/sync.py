"""Verbs that bring work into the store: ``sync`` of a live mount, ``recover`` of homes that were left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentfuse.cli import options
from agentfuse.cli.output import note, print_error, print_json, say, terminal_reporter
from agentfuse.config import count, format_size
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import open_registry
from agentfuse.errors import UnflushedError
from agentfuse.progress import Silent

if TYPE_CHECKING:
    from agentfuse.events.endpoint import Endpoint


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(sync)
    app.command()(recover)


def sync(
    mountpoint: options.Mountpoint, *, timeout: options.Timeout = None, json: options.Json = False
) -> None:
    """Return when all that was closed so far is in a snapshot.

    Exits with 75 if it is not. Files held open go along as they are. Without --timeout it tries for 60
    seconds. The mount goes on.
    """
    entry = open_registry(os.environ).find_live(mountpoint)
    done: dict[str, Any] = {}
    for line in ControlClient(entry.socket).sync(timeout_s=timeout):
        done = line.get("done", done)
    if json:
        print_json(done)
        return
    for region, state in done["regions"].items():
        say(f"{region}/: {_told(state)}")


def _told(state: dict[str, Any]) -> str:
    report = state["commit"]
    if report is None:
        return "everything was in the store already"
    return (
        f"snapshot {report['number']} holds {count(report['files'], 'file')}, "
        f"{format_size(report['bytes'])}; sent {format_size(report['bytes_put'])} "
        f"in {count(report['objects_put'], 'object')}"
    )


def recover(
    *,
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="URL", help="Where their store is now; each home's own if left out."),
    ] = None,
    json: options.Json = False,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Finish what killed daemons and unreachable stores left here.
     Exits with 75 if something is left. Webhooks that did not take all events of a run that is over are
    sent the rest. As often as you like, at any time, beside running mounts: whose daemon lives is left
    alone.
    """
    from agentfuse.events.endpoint import open_endpoints  # noqa: PLC0415  needs what mounts need
    from agentfuse.sync.recovery import recover as recover_homes  # noqa: PLC0415

    settings = options.configure(config=config, store=store, state=state)
    endpoints = open_endpoints(settings.webhooks, os.environ)
    reporter = Silent() if json else terminal_reporter()
    found = list(recover_homes(settings, reporter, store=settings.store if store else None))
    if json:
        print_json([each.as_dict() for each in found])
    for each in found:
        if each.error is not None and not json:
            note(
                f"agentfuse: execution {each.execution} of agent {each.agent or 'unknown'} is left as it was:"
            )
            print_error(each.error)
    left = _deliver_left(settings.state, endpoints)
    counts = {outcome: sum(each.outcome == outcome for each in found) for outcome in ("recovered", "failed")}
    if counts["failed"]:
        raise UnflushedError(
            f"{counts['failed']} of {count(len(found), 'unfinished home')} could not be recovered",
            hint="they are safe on this host; run it again when what is named above works",
        )
    if left:
        raise UnflushedError(
            f"webhooks have not taken the events of {count(left, 'home')} yet",
            hint="they are kept on this host; run it again when the endpoints work",
        )
    if not json:
        say(
            f"recovered {count(counts['recovered'], 'home')}"
            if counts["recovered"]
            else "nothing is left to recover"
        )


def _deliver_left(state: Path, endpoints: list[Endpoint]) -> int:
    """In how many homes there are events left that a webhook has not taken."""
    from agentfuse.events.redelivery import deliver_left  # noqa: PLC0415

    left = 0
    for each in deliver_left(state, endpoints):
        left += each.is_left
        if each.delivered:
            note(
                f"agentfuse: sent {count(each.delivered, 'event')} of execution {each.execution} to webhooks"
            )
    return left
