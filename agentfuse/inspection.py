"""Whether a home on this host is sound: its books, its marks, its index and its log of events.

Changes nothing. Blocking: for threads. What can be wrong for a good reason is a note: after a crash the
next start puts it right.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from agentfuse.config import format_size
from agentfuse.errors import AgentfuseError
from agentfuse.events.check import untold, wrong_numbers
from agentfuse.events.log import EventLog
from agentfuse.home.check import leftovers, wrong_index, wrong_marks
from agentfuse.home.quota import Ledger
from agentfuse.home.tree import Home, take_stock
from agentfuse.regions import Region, SyncPolicy


class Live(NamedTuple):
    """What a daemon says of its home at a moment at which nothing changes.

    ``booked``: (bytes, files) that the names in each region are charged with. ``unfinished``: the inodes
    that are being written. ``held``: what is not told of yet, by region and path; None when the daemon does
    not get its events into the log.
    """

    booked: Mapping[str, tuple[int, int]]
    unfinished: Collection[int]
    held: Collection[tuple[str, bytes]] | None


@dataclass(slots=True)
class HomeReport:
    """What was found. ``regions``: ``{bytes_used, files_used}`` of each; ``events``: the newest's number."""

    execution: str
    regions: dict[str, dict[str, int]] = field(default_factory=dict)
    events: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return asdict(self)


def check_still(home: Home, regions: Sequence[Region], live: Live | None) -> HomeReport:
    """What must be looked at while nothing changes: use, and what was told of.

    ``live``: None of a home that no daemon serves, whose lock the caller holds.
    """
    report = HomeReport(home.execution)
    _check_books(home, regions, live, report)
    log = EventLog(home.events, home.tree, only_looks=True)
    if log.exists():
        try:
            report.problems += wrong_numbers(log)
            report.events = log.newest()
            _check_events(log, home, regions, live, report)
        except AgentfuseError as error:
            if error.message not in report.problems:
                report.problems.append(error.message)
        finally:
            log.close()
    return report


def check_rest(home: Home, regions: Sequence[Region], report: HomeReport, *, is_live: bool) -> None:
    """What may be looked at while the home lives: adds to ``report``."""
    try:
        report.problems += wrong_marks(home.tree)
        for region in regions:
            if region.sync is not SyncPolicy.NEVER:
                report.problems += wrong_index(home, region.name, reads_contents=not is_live)
    except (OSError, AgentfuseError) as error:
        report.notes.append(f"not all could be looked at: {error}")
    if not is_live:
        left = list(leftovers(home))
        (report.problems if _is_clean(home) else report.notes).extend(left)


def _check_books(home: Home, regions: Sequence[Region], live: Live | None, report: HomeReport) -> None:
    truth = Ledger(regions)
    take_stock(home.tree, truth)
    for account in truth.accounts():
        report.regions[account.name] = {"bytes_used": account.bytes_used, "files_used": account.files_used}
        found = (account.bytes_used, account.files_used)
        booked = found if live is None else live.booked.get(account.name, found)
        if booked != found:
            report.problems.append(
                f"{account.name}: charged with {booked[0]} bytes in {booked[1]} files, "
                f"but there are {found[0]} in {found[1]}"
            )
        if account.bytes_used > account.bytes_quota or account.files_used > account.files_quota:
            quota = f"{format_size(account.bytes_quota)} in {account.files_quota} files"
            report.notes.append(f"{account.name}: holds more than its quota, {quota}")
    for region in regions:
        if not region.is_loose and not os.path.isdir(home.tree / region.name):
            report.problems.append(f"{region.name}/: is not there")


def _check_events(
    log: EventLog, home: Home, regions: Sequence[Region], live: Live | None, report: HomeReport
) -> None:
    held = set() if live is None else live.held
    if held is None:
        report.notes.append("the daemon does not get its events into the log: see its own")
        return
    unfinished = () if live is None else live.unfinished
    # What a daemon that was killed had not told of is told of by the next one.
    found = report.problems if live is not None or _is_clean(home) else report.notes
    for region in regions:
        if region.notify:
            of_region = {path for where, path in held if where == region.name}
            found += untold(log, home.tree, region.name, unfinished=unfinished, held=of_region)


def _is_clean(home: Home) -> bool:
    record = home.record()
    return record is not None and record.status == "clean"
