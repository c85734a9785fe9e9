"""The bodies of requests and answers of the control API: for the server, its OpenAPI document, its clients.

Paths are text; bytes in them that are no UTF-8 are lone surrogates, as ``os.fsdecode`` makes them. Sizes are
in bytes, ``*_at`` in seconds since the epoch. A client ignores fields that it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from agentfuse.events.arrivals import Kind
from agentfuse.regions import Creator

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Quota = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Mode = Annotated[str, msgspec.Meta(pattern="^0?[0-7]{3}$", description="in octal")]
OnCollision = Literal["replace", "refuse", "number"]
"""When a name is taken: what has it is replaced, or the new file is refused, or gets ``name (1).ext``."""
Level = Literal["debug", "info", "warning", "error"]

# What is asked -----------------------------------------------------------------------------------------


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """A request that says nothing more."""


class AnyQuery(msgspec.Struct):
    """A query that nobody reads."""


class EventsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which events are wanted: numbered higher than ``since``, of one region, and those to come."""

    since: _Count | None = None
    region: str | None = None
    follow: bool = False


class TraceQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which requests are wanted, all of them if nothing is said; ``op``: names with commas in between,
    ``path``: a glob, ``for_s``: for so long.
    """

    op: str = ""
    path: str | None = None
    pid: int | None = None
    region: str | None = None
    errors: bool = False
    for_s: _Seconds | None = None


class WatchQuery(msgspec.Struct, forbid_unknown_fields=True):
    """How long each interval is, and how many are wanted; null: until the client leaves."""

    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=10)] = 1.0
    frames: Annotated[int, msgspec.Meta(ge=1)] | None = None


class SyncRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How long a sync may take."""

    timeout_s: _Seconds | None = None


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``timeout_s``: how long the sync may take; ``hold_s``: how long nothing may change after it."""

    timeout_s: _Seconds | None = None
    hold_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 60.0


class UnmountRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``lazy``: do not wait for who holds files open. ``timeout_s``: how long the store is tried."""

    lazy: bool = False
    timeout_s: _Seconds | None = None


class QuotaChange(msgspec.Struct, forbid_unknown_fields=True):
    """New quotas of a region; what is left out stays."""

    bytes_quota: _Quota | None = None
    files_quota: _Quota | None = None


class LogLevel(msgspec.Struct, forbid_unknown_fields=True):
    """From which level on the daemon logs."""

    level: Level


class ListQuery(msgspec.Struct, forbid_unknown_fields=True):
    """``cursor``: where the listing before ended; ``recursive``: what is in its directories as well;
    ``brief``: no content is looked at, so that types are by the name alone.
    """

    recursive: bool = False
    brief: bool = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    cursor: str | None = None


class PutQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whose the file is, and what becomes of one that has its name; ``mode``: its permissions, in octal."""

    creator: Creator = msgspec.field(default=Creator.USER, name="as")
    on_collision: OnCollision = "replace"
    mode: _Mode = "644"


class DeleteQuery(msgspec.Struct, forbid_unknown_fields=True):
    """``recursive``: a directory goes with all that is in it."""

    creator: Creator = msgspec.field(default=Creator.USER, name="as")
    recursive: bool = False


class MkdirQuery(msgspec.Struct, forbid_unknown_fields=True):
    """``parents``: those that it is in are made, too; ``exist_ok``: one that is there is no error."""

    creator: Creator = msgspec.field(default=Creator.USER, name="as")
    parents: bool = False
    exist_ok: bool = False


class AttributesChange(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be set of a file or directory; what is left out stays. ``mode``: its permissions, in octal;
    ``labels``: base64, kept in the attribute ``user.labels``, which nobody but their giver reads;
    ``is_frozen``: nobody may change a file that is, nor take it away, until it is so no more.
    """

    mode: _Mode | None = None
    labels: bytes | None = None
    is_frozen: bool | None = None
    creator: Creator = msgspec.field(default=Creator.USER, name="as")


class NewPart(msgspec.Struct, forbid_unknown_fields=True):
    """A file to be made: its path in the region, and where in the descriptor its content is, in bytes."""

    path: str
    offset: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0)]
    mode: _Mode = "644"


class PutPartsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whose the files are, and what becomes of those that have their names."""

    files: list[NewPart]
    creator: Creator = msgspec.field(default=Creator.USER, name="as")
    on_collision: OnCollision = "replace"


class MoveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """From and to where, like ``uploads/a.csv``: the region, then the path in it."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    creator: Creator = msgspec.field(default=Creator.USER, name="as")
    on_collision: OnCollision = "refuse"


# What is answered --------------------------------------------------------------------------------------


class Error(msgspec.Struct):
    """What went wrong, and what to do about it. ``code`` is for programs."""

    code: str
    message: str
    hint: str


class Failure(msgspec.Struct):
    """As Error, in the last line of what takes time; ``exit_code``: what a command would exit with."""

    message: str
    hint: str
    exit_code: int


class RegionUse(msgspec.Struct):
    """What a region may hold and holds; ``refusals``: how often its quota said no."""

    bytes_used: int
    bytes_quota: int
    files_used: int
    files_quota: int
    refusals: int


class RegionInfo(RegionUse):
    """A region; see the configuration for what its settings mean."""

    name: str
    scope: str
    sync: str
    notify: bool
    creator: Creator


class Regions(msgspec.Struct):
    """All regions of a home."""

    regions: list[RegionInfo]


class RegionSyncStatus(msgspec.Struct):
    """What of a region no snapshot has yet, and why."""

    state: str
    dirty_files: int
    dirty_bytes: int
    oldest_unsynced_s: float | None
    snapshot: int | None
    synced_at: float | None
    error: str | None
    failures: int
    conflicts: list[dict[str, str]]


class Checkpoint(msgspec.Struct):
    """The regions whose commit has begun, as they are now."""

    regions: dict[str, RegionSyncStatus]


class EventsStatus(msgspec.Struct):
    """The newest event's number, how many are not in the log yet, and who listens."""

    newest: int
    waiting: int
    followers: int


class WebhookStatus(msgspec.Struct):
    """A webhook: events ``delivered`` and attempts that ``failed`` since the mount.

    ``backlog``: how many events it is behind; ``missed``: those of them that fell out of the log.
    """

    name: str
    state: Literal["idle", "sending", "waiting", "disabled"]
    delivered: int
    failed: int
    missed: int
    backlog: int
    last_error: str | None
    next_try: float | None


class InboxStatus(msgspec.Struct):
    """An inbox: files ``taken`` since the mount, and those ``left`` there because they could not be."""

    directory: str
    region: str
    taken: int
    left: int
    last_error: str | None


class Status(msgspec.Struct):
    """A mount as its daemon describes it. ``metrics_url``: where they are scraped, null when nowhere."""

    mountpoint: str
    agent: str
    execution: str
    pid: int
    state: str
    state_dir: str
    store: str
    owner: list[int]
    metrics_url: str | None
    started_at: float
    rss_bytes: int
    regions: dict[str, RegionUse]
    sync: dict[str, RegionSyncStatus]
    hydration: dict[str, Any]
    events: EventsStatus
    webhooks: list[WebhookStatus]
    inboxes: list[InboxStatus]
    fuse: dict[str, Any]


class HomeReport(msgspec.Struct):
    """What was found in a home; ``events``: the newest's number."""

    execution: str
    regions: dict[str, dict[str, int]]
    events: int
    problems: list[str]
    notes: list[str]


class FileInfo(msgspec.Struct):
    """One name in a region. ``is_absent``: its content is still in the store, and comes when it is read.

    ``etag``: of files, a strong validator of the content, without quotes. ``labels``: base64, as they
    were set.
    """

    id: str
    region: str
    path: str
    type: Literal["file", "dir", "symlink", "fifo", "socket", "device"]
    size: int
    mode: str
    mime: str | None
    created_by: Creator
    created_at: float | None
    modified_at: float
    is_absent: bool
    etag: str
    labels: bytes = b""
    is_frozen: bool = False


class Listing(msgspec.Struct):
    """Some of what a directory holds, by names in the order of their bytes, what is in one after it itself.

    ``cursor`` is null when that was all.
    """

    entries: list[FileInfo]
    cursor: str | None


class Placed(msgspec.Struct):
    """Where a file is now: the path may have got a number."""

    region: str
    path: str


class Made(Placed):
    """A directory that is there now."""


class Put(Placed):
    """A file that was put; it is on the local disk."""

    size: int


class PutPart(Put):
    """One of many files that were put. ``facts``: as it is now, null if somebody has taken it already."""

    facts: FileInfo | None


class PutParts(msgspec.Struct):
    """The files that were put, in the order in which they were asked for."""

    files: list[PutPart]


class Deleted(Placed):
    """What is gone."""


class Event(msgspec.Struct):
    """What happened to one file; see docs/events.md."""

    seq: int
    time: float
    kind: Kind
    mask: list[str]
    region: str
    path: str
    old_path: str | None
    size: int
    mime: str | None
    sha256: str | None
    created_by: Creator
    execution: str
    agent: str


class Line(msgspec.Struct, omit_defaults=True):
    """A line of what takes time: something to say, progress, and at last ``done`` or ``error``."""

    say: str | None = None
    progress: dict[str, Any] | None = None
    drained: dict[str, Any] | None = None
    done: dict[str, Any] | None = None
    error: Failure | None = None


class OpenApi(msgspec.Struct):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: dict[str, Any]
    servers: list[dict[str, Any]]
    paths: dict[str, Any]
    components: dict[str, Any]


class TracedRequest(msgspec.Struct):
    """One request of the kernel: what was asked, by whom, and how it went.

    ``pid`` is the process's; of reads and writes, that of who opened the file. ``path`` is below the
    mountpoint, null for a file without a name; ``errno`` is a name like EDQUOT, null when all went well.
    """

    time: float
    operation: str
    pid: int | None
    process: str | None
    region: str | None
    path: str | None
    to: str | None
    offset: int | None
    size: int | None
    errno: str | None
    duration_us: float


class Frame(msgspec.Struct):
    """One interval: rates and latencies, in all and of the busiest operations, files and processes."""

    activity: dict[str, Any]
    status: Status
    events: list[Event]
