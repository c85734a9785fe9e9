"""Verbs that look after what the store holds: ``fsck`` and ``gc``."""

from __future__ import annotations

import dataclasses
import os
from itertools import chain
from typing import Annotated

import typer

from agentfuse.cli import options
from agentfuse.cli.localcheck import check_local
from agentfuse.cli.output import note, print_error, print_json, say, terminal_reporter
from agentfuse.config import Config, count, format_size, parse_agent_id, parse_duration
from agentfuse.errors import AgentfuseError, IntegrityError, UsageError
from agentfuse.objectstore import ObjectStore, open_store
from agentfuse.snapshots.collect import Collector, CollectReport, agents, tenants
from agentfuse.snapshots.entries import printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.layout import agent_prefix, tenant_owner
from agentfuse.snapshots.references import MEMORY, main_region, require_newest, whose
from agentfuse.snapshots.retention import Policy
from agentfuse.sync.fsck import Checker, Loss


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(fsck)
    app.command()(gc)


def fsck(
    *,
    agent: Annotated[str | None, typer.Option("--agent", help="The agent whose snapshots are read.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="A tenant instead.")] = None,
    local: Annotated[
        str | None,
        typer.Option("--local", metavar="PATH", help="A home on this host by its mountpoint, or a STATE."),
    ] = None,
    all_snapshots: Annotated[
        bool,
        typer.Option("--all-snapshots", help="Check every snapshot, not only the newest of each region."),
    ] = False,
    json: options.Json = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Say what of an agent's snapshots is lost, if anything.

    Reads everything that they name; changes nothing. Its memory is checked, and what its executions kept
    of other regions. With --local homes on this host are checked instead: use against the books, marks,
    index, and the log of events against the files.
    """
    if [agent is not None, tenant is not None, local is not None].count(True) != 1:
        raise UsageError(
            "fsck needs either an agent or a home", hint="give --agent A, --tenant T, or --local MOUNTPOINT"
        )
    if local is not None:
        check_local(local, options.configure(config=config, state=state), json=json)
    else:
        one = tenant_owner(tenant) if tenant is not None else parse_agent_id(agent or "")
        _check_stored(one, options.configure(config=config, store=store, state=state), all_snapshots, json)


def _check_stored(agent: str, settings: Config, all_snapshots: bool, json: bool) -> None:
    opened = open_store(settings.store)
    report = Checker(opened, agent, terminal_reporter(note)).run(all_snapshots=all_snapshots)
    if json:
        print_json(
            {
                "agent": agent,
                "snapshots": report.snapshots,
                "contents": report.contents,
                "bytes": report.bytes,
                "lost": [
                    {
                        "in": _name(agent, loss),
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
            say(f"{_name(agent, loss)}{where}: {loss.problem}")
        say(
            f"checked {count(report.snapshots, 'snapshot')}, {count(report.contents, 'content')}, "
            f"{format_size(report.bytes)}: "
            f"{len(report.lost) or 'nothing'} lost"
        )
    if report.lost:
        raise IntegrityError(
            f"agent {agent}: something is lost in "
            f"{len({_name(agent, loss) for loss in report.lost})} of {report.snapshots} snapshots",
            hint=f"agentfuse restore {agent}@N:PATH brings a path back from a snapshot where it is whole",
        )


def _name(agent: str, loss: Loss) -> str:
    return f"{whose(agent, loss.region)}@{loss.snapshot}"


def gc(
    *,
    agent: Annotated[str | None, typer.Option("--agent", help="The agent whose garbage it is.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="The tenant whose garbage it is.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All agents and tenants of the store.")] = False,
    keep_last: Annotated[
        int,
        typer.Option("--keep-last", metavar="N", min=1, help="Keep what the newest N runs left and changed."),
    ] = 20,
    keep_daily: Annotated[
        int, typer.Option("--keep-daily", metavar="D", min=0, help="Keep one a day, of the last D days.")
    ] = 30,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="Touch nothing that was in use within it.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
    json: options.Json = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Delete old snapshots, and what no snapshot needs any more.

    Kept are what the newest runs left and what they began with, one snapshot a day, pinned ones, and
    whatever was the newest within the grace period; of a region that an execution kept, the newest. Then
    what interrupted writes left behind is removed, such as multipart uploads that nobody completed. Safe
    beside running mounts, and when it is killed.
    """
    if [every, agent is not None, tenant is not None].count(True) != 1:
        raise UsageError("gc needs either one agent or all", hint="give --agent A, --tenant T, or --all")
    try:
        policy = Policy(keep_last, keep_daily, parse_duration(grace))
    except ValueError as error:
        raise UsageError(f"--grace: {error}") from error
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    one = agent if tenant is None else tenant_owner(tenant)
    if one is not None:
        _require_anything(opened, one)
    told: list[dict[str, object]] = []
    failures: list[AgentfuseError] = []
    for each in chain(agents(opened), tenants(opened)) if one is None else [one]:
        try:
            report = Collector(opened, each, main_region(each)).run(policy, dry_run=dry_run)
        except AgentfuseError as error:
            if one is not None:
                raise
            failures.append(error)  # one agent's trouble does not keep the others' garbage
            continue
        told.append({"agent": each, "dry_run": dry_run} | dataclasses.asdict(report))
        if not json:
            _tell(each, report, dry_run)
    leftovers = 0
    try:
        # After collecting, which they have nothing to do with: no snapshot can name what never was complete.
        prefix = agent_prefix(one) if one else ""
        leftovers = opened.remove_leftovers(prefix, policy.grace_s, dry_run=dry_run)
    except AgentfuseError as error:
        failures.append(error)
    if json:
        print_json({"agents": told, "interrupted_writes": leftovers})
    elif leftovers:
        say(f"{'would clean' if dry_run else 'cleaned'} up after {count(leftovers, 'interrupted write')}")
    for failure in failures:
        print_error(failure)
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _require_anything(store: ObjectStore, agent: str) -> None:
    if main_region(agent) == MEMORY:  # a tenant's name is checked already
        parse_agent_id(agent)
    if next(iter(store.list(agent_prefix(agent))), None) is None:
        require_newest(History(store, agent, main_region(agent)), agent)  # which says that there is none


def _tell(agent: str, report: CollectReport, dry_run: bool) -> None:
    would = "would delete" if dry_run else "deleted"
    say(
        f"{agent}: {would} {count(len(report.deleted_snapshots), 'snapshot')} and "
        f"{count(report.deleted_objects, 'object')}, "
        f"{format_size(report.deleted_bytes)}; kept {count(len(report.kept_snapshots), 'snapshot')} and "
        f"{count(report.kept_objects, 'object')}, {format_size(report.kept_bytes)}"
    )
    if report.deleted_of_executions or report.kept_of_executions:
        say(
            f"{agent}: {would} {report.deleted_of_executions} snapshots of what executions kept; "
            f"kept {report.kept_of_executions}"
        )
    if report.young_objects:
        say(
            f"{agent}: {report.young_objects} more objects, {format_size(report.young_bytes)}, are named by "
            "no snapshot, but within the grace period"
        )
    if report.stopped:
        say(f"{agent}: ran out of time; the next gc goes on")
