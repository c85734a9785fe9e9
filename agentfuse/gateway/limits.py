"""How much of each kind of work goes on at a time, in threads: every hop names one of these."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio


@dataclass(frozen=True, slots=True)
class Limits:
    """The limiters of one gateway.

    ``reads``: of listings. ``commits``: snapshots under way, each with its uploads. ``uploads``: large
    contents and staged files. ``downloads``: pieces fetched from the store. ``spool``: pieces of bodies
    written to disk. ``contents``: pieces of what is in homes on this host. ``lives``: steps in the lives of
    executions. ``archives``: archives that are read. ``searches``: whole ones. They are apart, so that slow
    ones of a kind hold up their own only.
    """

    reads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(16))
    commits: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    uploads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    downloads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(24))
    lives: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(32))
    spool: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    contents: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    archives: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(2))
    searches: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(4))
