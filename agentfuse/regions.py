"""What a region is, and the six that a home has by default.

A region is a top directory of the home with a scope, a quota and an owner; the *loose* region
(``home``) is everything at the home's root that is not in one of the others. This module knows
no files and no configuration syntax.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

MiB = 1024 * 1024

LOOSE = "home"
"""Name of the region that holds the loose files of the home's root (dotfiles)."""


FROZEN = b"user.frozen"
"""The extended attribute of a file that nobody may change. It is in snapshots, and comes back with the file;
agents neither see nor set it.
"""


class Scope(enum.StrEnum):
    """Whose a region is: the agent's (it survives executions) or one execution's."""

    AGENT = "agent"
    EXECUTION = "execution"


class SyncPolicy(enum.StrEnum):
    """When a region goes to the object store: never, once at the end, or during the run as well."""

    NEVER = "never"
    AT_END = "at_end"
    CONTINUOUS = "continuous"


class Creator(enum.StrEnum):
    """Who made a file; the words are the HTTP contract's ``createdBy``."""

    USER = "user"
    """A person, through an API or staging."""
    AGENT = "agent"
    """The agent, through its tools."""
    ENVIRONMENT = "environment"
    """A browser, or what came from outside in another way."""
    SYSTEM = "system"
    """The platform."""


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a home.

    ``bytes_quota`` counts logical sizes of regular files, ``files_quota`` counts inodes that have
    a name (files, directories, symlinks, ...), the region's own root not included.
    ``mode`` is that of the region's root; ``root_only`` regions belong to the daemon's user,
    the others to the agent. ``sync``: an agent's region is always synced continuously, since that is
    what it is for. ``creator``: whose the files are that processes make here of which no rule says it.
    """

    name: str
    scope: Scope
    bytes_quota: int
    files_quota: int
    notify: bool = False
    mode: int = 0o755
    root_only: bool = False
    sync: SyncPolicy = SyncPolicy.NEVER
    creator: Creator = Creator.AGENT

    @property
    def is_loose(self) -> bool:
        """Whether this is the home's root itself rather than a directory in it."""
        return self.name == LOOSE


PLATFORM = Region(".agentfuse", Scope.EXECUTION, 2**50, 2**30, root_only=True, creator=Creator.SYSTEM)
"""The platform's own directory in a home: everybody may read it, nobody else may change it. No quota counts
it."""

INCOMING = "incoming"
"""The directory in it where contents grow until they are whole and get their names in a region."""

DEFAULT_REGIONS: tuple[Region, ...] = (
    Region("shared", Scope.AGENT, 50 * MiB, 50_000, sync=SyncPolicy.CONTINUOUS),
    Region("workspace", Scope.EXECUTION, 500 * MiB, 500_000),
    Region("downloads", Scope.EXECUTION, 500 * MiB, 50_000, notify=True, creator=Creator.ENVIRONMENT),
    Region("uploads", Scope.EXECUTION, 200 * MiB, 50_000, notify=True, creator=Creator.USER),
    Region("debug", Scope.EXECUTION, 100 * MiB, 50_000, mode=0o700, root_only=True),
    Region(LOOSE, Scope.EXECUTION, 200 * MiB, 200_000),
)


_SOON = ("uploads", "downloads")
"""What people sent, and what came of it, is in the store although the host dies."""


def retained(regions: Iterable[Region]) -> tuple[Region, ...]:
    """The regions of a home whose files can be had after its execution: all but what lies loose are kept.

    A region that is configured to be kept is kept as that says.
    """
    return tuple(
        region
        if region.is_loose or region.sync is not SyncPolicy.NEVER
        else replace(region, sync=SyncPolicy.CONTINUOUS if region.name in _SOON else SyncPolicy.AT_END)
        for region in regions
    )
