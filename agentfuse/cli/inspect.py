"""Verbs that only look: ``ps``, ``status``, ``df``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from agentfuse.cli import options
from agentfuse.cli.output import note, print_json, say
from agentfuse.cli.tables import duration, print_table, share, used_of
from agentfuse.config import count, format_size
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import PublishedMount, Registry, open_registry
from agentfuse.errors import AgentfuseError, BusyError
from agentfuse.home.quota import NEARLY_FULL, fraction_used
from agentfuse.home.tree import list_homes

_DEADLINE_S = 2.0
_ASKED_AT_ONCE = 64
_BUSIEST = 8


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(ps)
    app.command()(status)
    app.command()(df)


def ps(*, json: options.Json = False, state: options.State = None, config: options.ConfigFile = None) -> None:
    """List this host's mounts, and homes not in the store yet."""
    settings = options.configure(config=config, state=state)
    mounts = open_registry(os.environ).list()
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as asking:  # each may hang, and none waits for another
        rows = list(asking.map(_mount_row, mounts))
    states = {settings.state, *(Path(entry.record.state) for entry in mounts)}
    rows += _unflushed_rows(sorted(states), {str(row["execution"]) for row in rows})
    if json:
        print_json(rows)
    elif not rows:
        say("nothing is mounted, and nothing is unflushed")
    else:
        print_table(
            ("AGENT", "EXECUTION", "MOUNTPOINT", "PID", "UPTIME", "USE", "UNSYNCED", "SNAPSHOT", "HEALTH"),
            [_ps_cells(row) for row in rows],
            right=("PID", "UPTIME"),
        )


def status(mountpoint: options.Mountpoint, *, json: options.Json = False) -> None:
    """Show everything that the daemon of a mount knows of itself."""
    answer = _ask(open_registry(os.environ), mountpoint)
    if json:
        print_json(answer)
        return
    facts = ("mountpoint", "agent", "execution", "state", "pid", "store", "state_dir")
    cells = [(name, answer[name]) for name in facts if name in answer]
    cells.append(("uptime", duration(time.time() - float(answer["started_at"]))))
    cells.append(("memory", format_size(int(answer["rss_bytes"]))))
    cells.append(("contents", arrived(answer["hydration"])))
    if answer["metrics_url"] is not None:
        cells.append(("metrics", answer["metrics_url"]))
    print_table(("", ""), cells)
    say("")
    print_table(("REGION", "BYTES", "", "FILES", ""), [region_cells(*item) for item in _regions(answer)])
    for region, sync in answer["sync"].items():
        say("")
        print_table(("SYNC", region + "/"), sync_cells(sync))
    for kind, name in (("webhooks", "name"), ("inboxes", "directory")):
        for each in answer[kind]:
            say("")
            print_table((kind.upper(), each[name]), _hook_cells(each, name))
    say("")
    requests = sorted(answer["fuse"]["requests"].items(), key=lambda item: -item[1])
    print_table(("REQUESTS", ""), [item for item in requests[:_BUSIEST] if item[1]], right=("",))


def df(
    mountpoints: Annotated[
        list[str] | None, typer.Argument(metavar="MOUNTPOINT", help="Which mounts; all if left out.")
    ] = None,
    *,
    json: options.Json = False,
) -> None:
    """Show how full each region is, and warn from 80 % on."""
    registry = open_registry(os.environ)
    if mountpoints:
        answers = [_ask(registry, mountpoint) for mountpoint in mountpoints]
    else:
        answers = [answer for entry in registry.list() if entry.alive and (answer := _try_to_ask(entry))]
    if json:
        where = ("mountpoint", "agent", "execution")
        print_json(
            [
                {name: answer[name] for name in where}
                | {"region": region, "sync": answer["sync"].get(region)}
                | use
                | {"nearly_full": fraction_used(use) >= NEARLY_FULL}
                for answer in answers
                for region, use in _regions(answer)
            ]
        )
    elif not answers:
        say("nothing is mounted")
    else:
        print_table(
            ("MOUNTPOINT", "REGION", "BYTES", "", "FILES", "", "UNSYNCED"),
            [
                (answer["mountpoint"], *region_cells(*item), _unsynced(answer["sync"].get(item[0])))
                for answer in answers
                for item in _regions(answer)
            ],
        )
        _warn(answers)


def _ask(registry: Registry, mountpoint: str) -> dict[str, Any]:
    entry = registry.find_live(mountpoint)
    return ControlClient(entry.socket, deadline_s=_DEADLINE_S).status() | {"socket": str(entry.socket)}


def _try_to_ask(entry: PublishedMount) -> dict[str, Any] | None:
    try:
        return ControlClient(entry.socket, deadline_s=_DEADLINE_S).status()
    except AgentfuseError as error:
        note(f"agentfuse: {error}")
        return None


def arrived(hydration: dict[str, Any]) -> str:
    """How far the contents of what was restored are here, in a few words."""
    absent = int(hydration["absent_files"])
    if not absent:
        return "all here"
    size = format_size(int(hydration["absent_bytes"]))
    failed = int(hydration["failed_files"])
    told = f"{hydration['state']}: {count(absent, 'file')}, {size}, not here yet"
    return f"{told}; {count(failed, 'file')} cannot be had, see the log" if failed else told


def _regions(answer: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    return list(answer["regions"].items())


def region_cells(name: str, use: dict[str, int]) -> tuple[object, ...]:
    return (
        name,
        used_of(use["bytes_used"], use["bytes_quota"]),
        share(use["bytes_used"], use["bytes_quota"]),
        f"{use['files_used']} of {use['files_quota']}",
        share(use["files_used"], use["files_quota"]),
    )


def _use(regions: dict[str, dict[str, int]] | None) -> Text:
    """What regions hold, if anything: ``shared 2 KiB, downloads 466 MiB (93%)``, coloured from 80 % on."""
    told = Text()
    for name, use in (regions or {}).items():
        if use["bytes_used"] or fraction_used(use) >= NEARLY_FULL:
            told.append(", " if told else "")
            used = fraction_used(use)
            style = "red" if used >= 1 else "yellow" if used >= NEARLY_FULL else ""
            full = f" ({int(used * 100)}%)" if used >= NEARLY_FULL else ""
            told.append(f"{name} {format_size(use['bytes_used'])}{full}", style=style)
    return told or Text("-")


def _warn(answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        for name, use in _regions(answer):
            if fraction_used(use) >= NEARLY_FULL:
                left = max(0, use["bytes_quota"] - use["bytes_used"])
                files = max(0, use["files_quota"] - use["files_used"])
                note(
                    f"agentfuse: {answer['mountpoint']}: {name} is {int(fraction_used(use) * 100)}% full, "
                    f"{format_size(left)} and {count(files, 'file')} are left"
                )


def _unsynced(sync: dict[str, Any] | None) -> str:
    """What a region has that no snapshot has: ``3 files, 1.2 MiB, 4s``."""
    if sync is None:
        return ""
    if sync["oldest_unsynced_s"] is None:
        return "-"
    files, size = count(sync["dirty_files"], "file"), format_size(sync["dirty_bytes"])
    return f"{files}, {size}, {duration(sync['oldest_unsynced_s'])}"


def sync_cells(sync: dict[str, Any]) -> list[tuple[str, object]]:
    cells: list[tuple[str, object]] = [("state", sync["state"]), ("unsynced", _unsynced(sync))]
    if sync["synced_at"] is not None:
        ago = duration(time.time() - sync["synced_at"])
        cells.append(("last sync", f"snapshot {sync['snapshot'] or '-'}, {ago} ago"))
    if sync["error"] is not None:
        cells.append(("store", f"failed {sync['failures']} times in a row: {sync['error']}"))
    cells += [("conflict", f"{each['path']}: kept as {each['kept_at']}") for each in sync["conflicts"]]
    return cells


def _hook_cells(state: dict[str, Any], name: str) -> list[tuple[str, object]]:
    cells = {key.replace("_", " "): value for key, value in state.items() if key != name}
    if state.get("next_try") is not None:
        cells["next try"] = f"in {duration(max(0.0, state['next_try'] - time.time()))}"
    return [(key, value) for key, value in cells.items() if value is not None]


def _mount_row(entry: PublishedMount) -> dict[str, object]:
    """A published mount as ``ps`` tells it; asks its daemon, but never waits long.

    ``state``: live, flushing, ending, hung (it does not answer) or dead.
    """
    record = entry.record
    row: dict[str, object] = {
        "agent": record.agent,
        "execution": record.execution,
        "mountpoint": record.mountpoint,
        "pid": record.pid,
        "state": "dead",
        "uptime_s": round(time.time() - record.started_at, 1) if entry.alive else None,
        "store": record.store,
        "socket": str(entry.socket) if entry.alive else None,
        "regions": None,
        "sync": None,
    }
    if entry.alive:
        try:
            answer = ControlClient(entry.socket, deadline_s=_DEADLINE_S).status()
            row |= {name: answer[name] for name in ("state", "regions", "sync")}
        except BusyError:
            row["state"] = "hung"
        except AgentfuseError:
            row["state"] = "ending"
    return row


def _unflushed_rows(states: Iterable[Path], mounted: set[str]) -> list[dict[str, object]]:
    """Homes that no daemon serves and whose work is not known to be in the store."""
    rows: list[dict[str, object]] = []
    for state in states:
        for home in _homes(state):
            if home.execution in mounted:
                continue
            try:
                record = home.record()
            except AgentfuseError as error:
                note(f"agentfuse: {error}")
                continue
            if record is None or record.status == "clean" or home.is_locked():
                continue
            rows.append(
                {
                    "agent": record.agent,
                    "execution": record.execution,
                    "mountpoint": record.mountpoint,
                    "pid": None,
                    "state": "unflushed" if record.status == "live" else "not restored",
                    "uptime_s": None,
                    "store": record.store,
                    "socket": None,
                    "regions": None,
                    "sync": None,
                }
            )
    return rows


def _homes(state: Path) -> list[Any]:
    try:
        return list(list_homes(state))
    except OSError as error:
        note(f"agentfuse: {state}/homes cannot be read: {error.strerror}")
        return []


def _ps_cells(row: dict[str, Any]) -> tuple[object, ...]:
    sync = row["sync"]["shared"] if row["sync"] else None
    return (
        row["agent"],
        row["execution"],
        row["mountpoint"] or "-",
        row["pid"] or "-",
        "-" if row["uptime_s"] is None else duration(row["uptime_s"]),
        _use(row["regions"]),
        _unsynced(sync) if sync else "-",
        sync["snapshot"] or "-" if sync else "-",
        row["state"] + (", not syncing" if sync and sync["error"] else ""),
    )
