"""Verbs that look after what the store holds: ``fsck``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.history import REGION
from agentfuse.cli.output import note, print_json, say, terminal_reporter
from agentfuse.config import format_size, parse_agent_id
from agentfuse.errors import IntegrityError
from agentfuse.objectstore import open_store
from agentfuse.snapshots.entries import printable
from agentfuse.sync.fsck import Checker


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(fsck)


def fsck(
    *,
    agent: options.Agent,
    all_snapshots: Annotated[
        bool, typer.Option("--all-snapshots", help="Check every snapshot, not only the newest.")
    ] = False,
    json: options.Json = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Read everything that an agent's snapshots name, and say what is lost, if anything. Changes nothing."""
    parse_agent_id(agent)
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    report = Checker(opened, agent, REGION, terminal_reporter(note)).run(all_snapshots=all_snapshots)
    if json:
        print_json(
            {
                "agent": agent,
                "snapshots": report.snapshots,
                "contents": report.contents,
                "bytes": report.bytes,
                "lost": [
                    {
                        "snapshot": loss.snapshot,
                        "path": None if loss.path is None else os.fsdecode(loss.path),
                        "problem": loss.problem,
                    }
                    for loss in report.lost
                ],
            }
        )
    else:
        for loss in report.lost:
            where = "" if loss.path is None else f":{printable(loss.path)}"
            say(f"{agent}@{loss.snapshot}{where}: {loss.problem}")
        say(
            f"checked {report.snapshots} snapshots, {report.contents} contents, {format_size(report.bytes)}: "
            f"{len(report.lost) or 'nothing'} lost"
        )
    if report.lost:
        raise IntegrityError(
            f"agent {agent}: something is lost in "
            f"{len({loss.snapshot for loss in report.lost})} of {report.snapshots} snapshots",
            hint=f"agentfuse restore {agent}@N:PATH brings a path back from a snapshot where it is whole",
        )
