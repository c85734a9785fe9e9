"""The metrics there are. docs/operate.md has the same table, and a test compares the two.

Names and units as Prometheus' own conventions want them. Every sample has the labels ``agent`` and
``execution`` besides those named here; no label's values come from what an agent writes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Family(NamedTuple):
    """One metric: its labels are those that come after ``agent`` and ``execution``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


FAMILIES: tuple[Family, ...] = (
    Family("agentfuse_mount_info", "gauge", ("mountpoint", "version"), "A mount; always 1"),
    Family("agentfuse_mount_start_time_seconds", "gauge", (), "When the mount began, in Unix time"),
    Family("agentfuse_fuse_requests_total", "counter", ("operation",), "Requests of the kernel"),
    Family(
        "agentfuse_fuse_errors_total", "counter", ("operation", "errno"), "Requests answered with an errno"
    ),
    Family(
        "agentfuse_fuse_request_duration_seconds",
        "histogram",
        ("operation",),
        "How long requests took; operations that were never asked for have none",
    ),
    Family("agentfuse_fuse_open_handles", "gauge", (), "Open files"),
    Family("agentfuse_fuse_known_inodes", "gauge", (), "Inodes that the kernel holds on to"),
    Family(
        "agentfuse_region_read_bytes_total",
        "counter",
        ("region",),
        "Bytes read through the mount, without what the kernel has in its cache",
    ),
    Family("agentfuse_region_written_bytes_total", "counter", ("region",), "Bytes written"),
    Family("agentfuse_region_used_bytes", "gauge", ("region",), "Bytes charged to the quota"),
    Family("agentfuse_region_quota_bytes", "gauge", ("region",), "The quota of bytes"),
    Family("agentfuse_region_used_files", "gauge", ("region",), "Files charged to the quota"),
    Family("agentfuse_region_quota_files", "gauge", ("region",), "The quota of files"),
    Family("agentfuse_region_quota_refusals_total", "counter", ("region",), "How often the quota said no"),
    Family("agentfuse_sync_dirty_files", "gauge", ("region",), "Changed files that no snapshot has"),
    Family("agentfuse_sync_dirty_bytes", "gauge", ("region",), "Bytes of these files"),
    Family(
        "agentfuse_sync_oldest_change_age_seconds",
        "gauge",
        ("region",),
        "Age of the oldest change that no snapshot has; 0: there is none",
    ),
    Family("agentfuse_sync_snapshots_total", "counter", ("region",), "Snapshots committed during the run"),
    Family(
        "agentfuse_sync_last_success_timestamp_seconds",
        "gauge",
        ("region",),
        "When the region was last synced, in Unix time; 0: not yet",
    ),
    Family(
        "agentfuse_sync_failures", "gauge", ("region",), "How often in a row syncing has failed; 0: it works"
    ),
    Family(
        "agentfuse_store_requests_total",
        "counter",
        ("request",),
        "Requests to the object store; a listing counts once",
    ),
    Family(
        "agentfuse_store_errors_total",
        "counter",
        ("request", "error"),
        "Those that failed: not_found, integrity or failed",
    ),
    Family(
        "agentfuse_store_request_duration_seconds",
        "histogram",
        ("request",),
        "How long they took; kinds that were never made have none",
    ),
    Family("agentfuse_store_sent_bytes_total", "counter", (), "Bytes written to the store"),
    Family("agentfuse_store_received_bytes_total", "counter", (), "Bytes read from the store"),
    Family("agentfuse_cache_hits_total", "counter", (), "Reads that the host's cache answered"),
    Family("agentfuse_cache_misses_total", "counter", (), "Reads that took a request"),
    Family("agentfuse_cache_read_bytes_total", "counter", (), "Bytes that came from the cache"),
    Family("agentfuse_hydrate_absent_files", "gauge", (), "Files whose contents are still in the store only"),
    Family("agentfuse_hydrate_absent_bytes", "gauge", (), "Bytes of these files"),
    Family("agentfuse_hydrate_failed_files", "gauge", (), "Those whose contents cannot be had"),
    Family("agentfuse_events_total", "counter", ("region", "kind"), "Events in the log, since the mount"),
    Family("agentfuse_events_waiting", "gauge", (), "What happened and is not in the log yet"),
    Family("agentfuse_events_followers", "gauge", (), "Subscribers at the control socket"),
    Family("agentfuse_webhook_backlog_events", "gauge", ("webhook",), "Events that it has not taken yet"),
    Family("agentfuse_webhook_delivered_events_total", "counter", ("webhook",), "Events that it took"),
    Family("agentfuse_webhook_failures_total", "counter", ("webhook",), "Attempts that failed"),
    Family("agentfuse_inbox_taken_files_total", "counter", ("inbox",), "Files moved into the home"),
    Family("agentfuse_inbox_left_files", "gauge", ("inbox",), "Files that stay outside: no room, or refused"),
    Family("agentfuse_process_resident_memory_bytes", "gauge", (), "Memory of the daemon"),
    Family("agentfuse_process_cpu_seconds_total", "counter", (), "Processor time of the daemon"),
    Family("agentfuse_process_open_fds", "gauge", (), "Descriptors that the daemon has open"),
    Family("agentfuse_process_max_fds", "gauge", (), "How many it may have"),
)
