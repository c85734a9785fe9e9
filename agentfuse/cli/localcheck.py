"""``fsck --local``: whether homes on this host are sound, mounted or not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agentfuse.cli.homes import find_ended
from agentfuse.cli.output import print_json, say
from agentfuse.config import Config, count, format_size
from agentfuse.control.client import ControlClient
from agentfuse.control.registry import PublishedMount, Registry, open_registry
from agentfuse.errors import AgentfuseError, BusyError, IntegrityError, NotFoundError
from agentfuse.home.tree import Home, list_homes
from agentfuse.inspection import check_rest, check_still


def check_local(where: str, settings: Config, *, json: bool) -> None:
    """Check the home mounted at a path, or that was, or all homes of a state directory; print what is found.

    Raises ``IntegrityError`` when anything is wrong.
    """
    registry = open_registry(os.environ)
    reports = list(_reports(where, settings, registry))
    if json:
        print_json({"homes": reports})
    else:
        for report in reports:
            _tell(report)
        if not reports:
            say("there are no homes")
    wrong = [report for report in reports if report["problems"]]
    if wrong:
        names = ", ".join(report["execution"] for report in wrong)
        raise IntegrityError(
            f"{count(len(wrong), 'home')} of {len(reports)} not sound: {names}",
            hint="keep a copy of the state directory; the next mount weighs the tree anew, and compares it "
            "with the events",
        )


def _reports(where: str, settings: Config, registry: Registry) -> Iterator[dict[str, Any]]:
    try:
        mount = registry.find(where)
    except NotFoundError:
        mount = None
    if mount is not None and mount.alive:
        yield ControlClient(mount.socket).check()
    elif mount is not None:
        yield _of(Home(Path(mount.record.state), mount.record.execution), settings, ())
    elif os.path.isdir(os.path.join(where, "homes")):
        mounts = registry.list()
        for home in list_homes(Path(os.path.abspath(where))):
            yield _of(home, settings, mounts)
    else:
        yield _of(find_ended([settings.state], mountpoint=where)[0], settings, ())


def _of(home: Home, settings: Config, mounts: Iterable[PublishedMount]) -> dict[str, Any]:
    for mount in mounts:
        if mount.alive and Home(Path(mount.record.state), mount.record.execution).path == home.path:
            return ControlClient(mount.socket).check()
    try:
        with home.locked():
            home.record()
            report = check_still(home, settings.regions, None)
            check_rest(home, settings.regions, report, is_live=False)
            return report.as_dict()
    except BusyError:
        raise
    except (AgentfuseError, OSError) as error:
        return {
            "execution": home.execution,
            "regions": {},
            "events": 0,
            "problems": [str(error)],
            "notes": [],
        }


def _tell(report: dict[str, Any]) -> None:
    files = sum(region["files_used"] for region in report["regions"].values())
    size = format_size(sum(region["bytes_used"] for region in report["regions"].values()))
    for problem in report["problems"]:
        say(f"{report['execution']}: {problem}")
    for note in report["notes"]:
        say(f"{report['execution']}: note: {note}")
    found = count(len(report["problems"]), "problem") if report["problems"] else "nothing wrong"
    say(
        f"checked {report['execution']}: {count(files, 'file')}, {size}, "
        f"{count(report['events'], 'event')}: {found}"
    )
