"""Verbs that bring earlier states of a memory back, and keep them: ``restore``, ``revert``, ``pin``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.output import note, say, terminal_reporter
from agentfuse.config import count, format_size, parse_agent_id, parse_execution_id
from agentfuse.errors import NotFoundError, UsageError
from agentfuse.objectstore import open_store
from agentfuse.snapshots.entries import printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.references import (
    MEMORY,
    Reference,
    clean_path,
    open_snapshot,
    parse_reference,
    read_snapshot,
    resolve,
)
from agentfuse.sync.export import export
from agentfuse.sync.rewrite import Rewriter, RewriteReport

Snapshot = Annotated[str, typer.Argument(metavar="AGENT@N", help="The snapshot.")]


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(restore)
    app.command()(revert)
    app.command()(pin)
    app.command()(unpin)


def restore(
    what: Annotated[str, typer.Argument(metavar="AGENT@N[:PATH]", help="The snapshot, or a path in it.")],
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="The path, if not said there.")] = None,
    *,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR", help="Into this directory, which must be empty.")
    ] = None,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Bring a snapshot, or a path of it, back.

    As a new snapshot, or with --to into a directory. With a path, everything else stays as it is now.
    Mounts that run keep what they have; what they changed themselves is merged onto the restored state
    when they commit.
    """
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    reference = _with_path(parse_reference(os.fsencode(what)), path)
    agent = reference.agent
    snapshot = open_snapshot(opened, reference)
    reporter = terminal_reporter(note)
    if to is not None:
        totals = export(opened, snapshot, reference.path or b"", Path(os.path.abspath(to)), reporter)
        say(f"restored {count(totals.files, 'file')}, {format_size(totals.bytes)}, into {to}")
        return
    _require_memory(reference, "give --to DIR")
    number = snapshot.number
    report = Rewriter(opened, agent, MEMORY, reporter).restore(number, reference.path or b"")
    if report.number is None:
        say(f"nothing to restore: it is as in {agent}@{number} now")
    else:
        say(f"{agent}@{report.number} is as {agent}@{number} was{_where(reference)}: {_told(report)}")


def revert(
    *,
    agent: options.Agent,
    execution: Annotated[str, typer.Option("--execution", help="The run whose changes are taken back.")],
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Take back what one run changed. What later runs changed stays.
     It makes a new snapshot. Texts are taken back line by line. Where a later run changed the same, its
    version keeps the name, and what was there before the run is kept under
    .conflicts/revert-of-EXECUTION/.
    """
    parse_agent_id(agent)
    parse_execution_id(execution)
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    report = Rewriter(opened, agent, MEMORY, terminal_reporter(note)).revert(execution)
    for path in report.merged:
        say(f"{path}: its lines were taken out, later changes stay")
    for conflict in report.conflicts:
        say(
            f"{printable(conflict.path)}: changed by a later run too, which stays; "
            f"what was there before is kept as {printable(conflict.kept_at)}"
        )
    for path in report.kept:
        say(f"{path}: added by {execution}, but changed by a later run, so it stays")
    if report.number is None:
        say(f"nothing of execution {execution} is left to take back")
    else:
        say(f"{agent}@{report.number} is without what execution {execution} changed: {_told(report)}")


def pin(
    snapshot: Snapshot,
    *,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Keep a snapshot, whatever the retention policy says. The log shows it."""
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    reference = _whole(snapshot)
    history = History(opened, reference.agent, MEMORY)
    number = resolve(history, reference)
    pins = Pins(opened, reference.agent, MEMORY)
    pins.add(number)
    try:
        read_snapshot(history, reference.agent, number)
    except NotFoundError:
        pins.remove(number)
        raise
    say(f"pinned {reference.agent}@{number}")


def unpin(
    snapshot: Snapshot,
    *,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Leave a pinned snapshot to the retention policy again."""
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    reference = _whole(snapshot)
    number = resolve(History(opened, reference.agent, MEMORY), reference)
    pins = Pins(opened, reference.agent, MEMORY)
    if not pins.is_pinned(number):
        raise NotFoundError(
            f"{reference.agent}@{number} is not pinned",
            hint=f"agentfuse log --agent {reference.agent} shows which are",
        )
    pins.remove(number)
    say(f"unpinned {reference.agent}@{number}")


def _with_path(reference: Reference, path: str | None) -> Reference:
    if path is None:
        return reference
    if reference.path is not None:
        raise UsageError("the path was given twice", hint="write AGENT@N:PATH, or AGENT@N PATH")
    return replace(reference, path=clean_path(os.fsencode(path)))


def _require_memory(reference: Reference, hint: str) -> None:
    if not reference.is_memory:
        raise UsageError("what an execution kept is not written to any more", hint=hint)


def _whole(snapshot: str) -> Reference:
    reference = parse_reference(os.fsencode(snapshot))
    if reference.path is not None:
        raise UsageError("a pin holds a whole snapshot", hint=f"write {reference.agent}@{reference.number}")
    _require_memory(reference, "pin snapshots of the agent's memory only")
    return reference


def _where(reference: Reference) -> str:
    return f" in {printable(reference.path)}" if reference.path else ""


def _told(report: RewriteReport) -> str:
    changed = report.changed
    return f"{changed.added} added, {changed.removed} removed, {changed.changed} changed"
