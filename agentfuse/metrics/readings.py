"""What the parts of a mount have counted, read at one moment: cheap enough for the trio thread.

Plain tuples; what Prometheus wants of them is ``exposition``'s.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from agentfuse import __version__
from agentfuse.control.registry import MountRecord
from agentfuse.events.feed import EventFeed
from agentfuse.events.inboxes import Inboxes
from agentfuse.events.webhooks import Webhooks
from agentfuse.fuse.session import Session
from agentfuse.fuse.tally import Tally
from agentfuse.home.quota import Account
from agentfuse.objectstore.counted import Traffic
from agentfuse.sync.absent import Absent
from agentfuse.sync.background import RegionSync
from agentfuse.timings import number_of


class Reading(NamedTuple):
    """One sample of the family ``name``; a timing (see ``agentfuse.timings``) is one of a histogram."""

    name: str
    labels: tuple[str, ...]
    value: float | tuple[int, ...]


def of_mount(record: MountRecord) -> Iterator[Reading]:
    """What the mount is, and what its process takes."""
    yield Reading("agentfuse_mount_info", (record.mountpoint, __version__), 1)
    yield Reading("agentfuse_mount_start_time_seconds", (), record.started_at)
    yield Reading("agentfuse_process_resident_memory_bytes", (), resident_bytes())
    times = os.times()
    yield Reading("agentfuse_process_cpu_seconds_total", (), times.user + times.system)
    yield Reading("agentfuse_process_open_fds", (), len(os.listdir("/proc/self/fd")))
    yield Reading("agentfuse_process_max_fds", (), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def of_session(session: Session) -> Iterator[Reading]:
    """What the kernel asked."""
    yield from _of_tally(session.tally)
    yield Reading("agentfuse_fuse_open_handles", (), session.handles_open)
    yield Reading("agentfuse_fuse_known_inodes", (), session.inodes_known)


def _of_tally(tally: Tally) -> Iterator[Reading]:
    for operation, requests in tally.requests.items():
        yield Reading("agentfuse_fuse_requests_total", (operation,), requests)
    for (operation, number), times in tally.errors.items():
        name = errno.errorcode.get(number, str(number))
        yield Reading("agentfuse_fuse_errors_total", (operation, name), times)
    for operation, timing in tally.timings.items():
        if number_of(timing):
            yield Reading("agentfuse_fuse_request_duration_seconds", (operation,), tuple(timing))


def of_regions(accounts: Sequence[Account]) -> Iterator[Reading]:
    """What regions hold and may hold."""
    for account in accounts:
        name = (account.name,)
        yield Reading("agentfuse_region_read_bytes_total", name, account.bytes_read)
        yield Reading("agentfuse_region_written_bytes_total", name, account.bytes_written)
        yield Reading("agentfuse_region_used_bytes", name, account.bytes_used)
        yield Reading("agentfuse_region_quota_bytes", name, account.bytes_quota)
        yield Reading("agentfuse_region_used_files", name, account.files_used)
        yield Reading("agentfuse_region_quota_files", name, account.files_quota)
        yield Reading("agentfuse_region_quota_refusals_total", name, account.refusals)


def of_sync(syncs: Sequence[RegionSync], absent: Absent) -> Iterator[Reading]:
    """What is not in the store yet, and what is only there."""
    for sync in syncs:
        name, now = (sync.name,), sync.gauges()
        yield Reading("agentfuse_sync_dirty_files", name, now.dirty_files)
        yield Reading("agentfuse_sync_dirty_bytes", name, now.dirty_bytes)
        yield Reading("agentfuse_sync_oldest_change_age_seconds", name, now.oldest_unsynced_s)
        yield Reading("agentfuse_sync_snapshots_total", name, now.snapshots)
        yield Reading("agentfuse_sync_last_success_timestamp_seconds", name, now.synced_at or 0)
        yield Reading("agentfuse_sync_failures", name, now.failures)
    yield Reading("agentfuse_hydrate_absent_files", (), absent.files)
    yield Reading("agentfuse_hydrate_absent_bytes", (), absent.bytes)
    yield Reading("agentfuse_hydrate_failed_files", (), absent.hopeless_files)


def of_traffic(traffic: Traffic) -> Iterator[Reading]:
    """What went to the store and to the cache before it."""
    for kind, timing in traffic.timings.items():
        requests = number_of(timing)
        yield Reading("agentfuse_store_requests_total", (kind,), requests)
        if requests:
            yield Reading("agentfuse_store_request_duration_seconds", (kind,), tuple(timing))
    for (kind, error), times in list(traffic.errors.items()):
        yield Reading("agentfuse_store_errors_total", (kind, error), times)
    yield Reading("agentfuse_store_sent_bytes_total", (), traffic.bytes_sent)
    yield Reading("agentfuse_store_received_bytes_total", (), traffic.bytes_received)
    yield Reading("agentfuse_cache_hits_total", (), traffic.cache_hits)
    yield Reading("agentfuse_cache_misses_total", (), traffic.cache_misses)
    yield Reading("agentfuse_cache_read_bytes_total", (), traffic.cache_bytes)


def of_events(feed: EventFeed, webhooks: Webhooks) -> Iterator[Reading]:
    """What was told, and to whom."""
    for (region, kind), times in feed.told.items():
        yield Reading("agentfuse_events_total", (region, kind), times)
    now = feed.as_dict()
    yield Reading("agentfuse_events_waiting", (), now["waiting"])
    yield Reading("agentfuse_events_followers", (), now["followers"])
    for hook in webhooks.senders:
        name = (hook.name,)
        yield Reading("agentfuse_webhook_backlog_events", name, hook.backlog)
        yield Reading("agentfuse_webhook_delivered_events_total", name, hook.delivered)
        yield Reading("agentfuse_webhook_failures_total", name, hook.failed)


def of_inboxes(inboxes: Inboxes) -> Iterator[Reading]:
    """What came from directories outside."""
    for inbox in inboxes.as_list():
        name = (str(inbox["directory"]),)
        yield Reading("agentfuse_inbox_taken_files_total", name, cast(int, inbox["taken"]))
        yield Reading("agentfuse_inbox_left_files", name, cast(int, inbox["left"]))


def resident_bytes() -> int:
    """Memory of this process that is not swapped out."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
