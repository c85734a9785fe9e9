"""Verbs that look into an agent's history, without a mount and from any host: ``log``, ``diff``, ``show``."""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from agentfuse.cli import options
from agentfuse.cli.output import note, print_json, say
from agentfuse.cli.tables import print_table
from agentfuse.config import format_size, parse_agent_id
from agentfuse.control.registry import open_registry
from agentfuse.errors import IntegrityError, UsageError
from agentfuse.objectstore import ObjectStore, open_store
from agentfuse.snapshots.account import Committed, Damaged, account
from agentfuse.snapshots.changes import Change, changes
from agentfuse.snapshots.entries import Entry, parent_of, printable
from agentfuse.snapshots.history import History
from agentfuse.snapshots.pins import Pins
from agentfuse.snapshots.rebase import by_path
from agentfuse.snapshots.references import (
    Reference,
    find,
    open_snapshot,
    parse_reference,
    require_newest,
)
from agentfuse.sync.contents import stream_content
from agentfuse.sync.glance import glance

_HELD_BYTES = 8 * 1024 * 1024
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(log)
    app.command()(diff)
    app.command()(show)


def log(
    *,
    agent: options.Agent,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Only the newest N lines.")
    ] = None,
    runs: Annotated[
        bool, typer.Option("--runs", help="One line for all that a run did without another in between.")
    ] = False,
    region: Annotated[
        str | None,
        typer.Option("--region", metavar="EXECUTION/REGION", help="A region that an execution kept."),
    ] = None,
    json: options.Json = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """List the snapshots of an agent's memory, newest first.

    With what each one changed. A run that syncs while it works makes many; with --runs there is one line
    for all that it did without another run in between.
    """
    parse_agent_id(agent)
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    whose = agent if region is None else f"{agent}/{region}"
    reference = parse_reference(os.fsencode(f"{whose}@latest"))
    history = History(opened, agent, reference.region)
    require_newest(history, agent)
    pinned = set(Pins(opened, agent, reference.region).numbers())
    rows = list(islice(account(history, pinned, by_run=runs), last))
    if json:
        print_json([_row_json(row) for row in rows])
    else:
        print_table(
            ("SNAPSHOT", "TIME", "EXECUTION", "REASON", "CHANGED", "NEW BYTES", "FILES", "BYTES", ""),
            [_log_cells(row, runs=runs) for row in rows],
            right=("SNAPSHOT", "NEW BYTES", "FILES", "BYTES"),
        )
    damaged = [str(row.number) for row in rows if isinstance(row, Damaged)]
    if damaged:
        raise IntegrityError(
            f"agent {agent}: damaged snapshots: {', '.join(damaged)}",
            hint=f"agentfuse fsck --agent {agent} --all-snapshots says what is lost",
        )


def diff(
    before: Annotated[str, typer.Argument(metavar="AGENT@N", help="The older snapshot.")],
    after: Annotated[
        str, typer.Argument(metavar="AGENT@N|MOUNTPOINT", help="The newer snapshot, or a live mount.")
    ],
    *,
    json: options.Json = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Show what is different between two snapshots.

    + is added, - removed, ~ changed. Or between a snapshot and what a mount on this host shows now, while
    it is in use. Files whose size, time and mode are as in the snapshot are taken for unchanged; only
    others are read. The store is the mount's, unless --store says otherwise.
    """
    mount = None if _is_reference(after) else open_registry(os.environ).find_live(after).record
    if mount is not None and store is None:
        store = mount.store
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    reference = _whole(before)
    one = open_snapshot(opened, reference)
    known = by_path(one.entries)
    if mount is None:
        other = open_snapshot(opened, _whole(after))
        name, now = f"{other.agent}@{other.number}", by_path(other.entries)
    else:
        region = reference.region.rpartition("/")[2]
        name, now = mount.mountpoint, glance(Path(mount.mountpoint) / region, known)
    found = list(changes(known, now))
    if json:
        print_json([_change_json(change) for change in found])
    elif not found:
        say(f"nothing differs between {one.agent}@{one.number} and {name}")
    else:
        print_table(("", "", ""), [_change_cells(change) for change in found])


def show(
    what: Annotated[str, typer.Argument(metavar="AGENT@N:PATH", help="A path in a snapshot.")],
    *,
    json: Annotated[
        bool, typer.Option("--json", help="What the snapshot says of the path, as JSON.")
    ] = False,
    store: options.Store = None,
    state: options.State = None,
    config: options.ConfigFile = None,
) -> None:
    """Print a file of a snapshot, verified, or list a directory.

    Nothing is printed of a content that is not what its hash says.
    """
    opened = open_store(options.configure(config=config, store=store, state=state).store)
    reference = parse_reference(os.fsencode(what))
    snapshot = open_snapshot(opened, reference)
    entry = find(snapshot, reference.path or b"")
    if entry.type == "dir":
        inside = [each for each in snapshot.entries if each.path and parent_of(each.path) == entry.path]
        if json:
            print_json([entry_json(each) for each in inside])
        else:
            print_table(("", "", "", ""), [_entry_cells(each) for each in inside])
    elif json:
        print_json(entry_json(entry))
    elif entry.type == "file":
        _print_content(opened, reference.agent, entry)
    else:
        say(f"{entry.type} -> {printable(entry.target)}" if entry.target else entry.type)


def _is_reference(text: str) -> bool:
    """Whether it names a snapshot rather than a directory, which ``./`` can be put before."""
    return "@" in text and not text.startswith(("/", "."))


def _whole(text: str) -> Reference:
    reference = parse_reference(os.fsencode(text))
    if reference.path is not None:
        raise UsageError("diff compares whole snapshots", hint="leave out the path, and search its output")
    return reference


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry as verbs with ``--json`` tell it; bytes that are not UTF-8 are lone surrogates. The hash of a
    file that could not be read is null."""
    told: dict[str, Any] = {
        "path": os.fsdecode(entry.path),
        "type": entry.type,
        "mode": f"{entry.mode:04o}",
        "mtime": entry.mtime_ns / 1e9,
    }
    if entry.type == "file":
        told |= {"size": entry.size, "sha256": entry.sha256 or None}
    if entry.target:
        told["target"] = os.fsdecode(entry.target)
    return told


def _row_json(row: Committed | Damaged) -> dict[str, Any]:
    if isinstance(row, Damaged):
        return {"number": row.number, "error": str(row.error), "pinned": row.is_pinned}
    totals, changed = row.totals, row.changed
    return {
        "number": row.number,
        "time": row.time.isoformat(),
        "execution": row.execution,
        "reason": row.reason,
        "parent": row.parent,
        "follows": row.follows,
        "compared_with": row.compared_with,
        "changed": changed
        and {
            "added": changed.added,
            "removed": changed.removed,
            "changed": changed.changed,
            "bytes": changed.bytes,
        },
        "totals": {"files": totals.files, "bytes": totals.bytes, "entries": totals.entries},
        "pinned": row.is_pinned,
        "error": None,
    }


def _log_cells(row: Committed | Damaged, *, runs: bool) -> tuple[object, ...]:
    mark = "pinned" if row.is_pinned else ""
    if isinstance(row, Damaged):
        return (row.number, "damaged", "", "", "", "", "", "", mark)
    changed = row.changed
    counts = {kind: getattr(changed, kind) for kind in _SIGNS} if changed else {}
    parts = [f"{_SIGNS[kind]}{number}" for kind, number in counts.items() if number] if changed else ["?"]
    if row.compared_with and row.compared_with != (row.follows if runs else row.parent):
        parts.append(f"since {row.compared_with}")
        if row.compared_with < row.follows:
            parts.append("by others, too")
    return (
        row.number,
        row.time.isoformat()[:19].replace("T", " "),
        row.execution,
        row.reason,
        " ".join(parts) or "-",
        format_size(changed.bytes) if changed else "?",
        row.totals.files,
        format_size(row.totals.bytes),
        mark,
    )


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "path": os.fsdecode(change.path),
        "change": change.kind,
        "before": entry_json(change.before) if change.before else None,
        "after": entry_json(change.after) if change.after else None,
    }


def _change_cells(change: Change) -> tuple[str, str, str]:
    sizes = [_brief(entry) for entry in (change.before, change.after) if entry]
    what = sizes[0] if len(set(sizes)) == 1 else " -> ".join(sizes)
    if change.attributes:
        what += f" ({', '.join(change.attributes)})"
    return _SIGNS[change.kind], printable(change.path) or ".", what


def _brief(entry: Entry) -> str:
    return format_size(entry.size) if entry.type == "file" else entry.type


def _entry_cells(entry: Entry) -> tuple[str, str, str, str]:
    name = printable(entry.path.rpartition(b"/")[2])
    target = f" -> {printable(entry.target)}" if entry.target else ""
    return (
        entry.type,
        f"{entry.mode:04o}",
        format_size(entry.size) if entry.type == "file" else "",
        name + target,
    )


def _print_content(store: ObjectStore, agent: str, entry: Entry) -> None:
    with tempfile.SpooledTemporaryFile(_HELD_BYTES) as verified:
        for piece in stream_content(store, agent, entry):
            verified.write(piece)
        verified.seek(0)
        try:
            while piece := verified.read(_HELD_BYTES):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            note("agentfuse: nobody reads any more")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
