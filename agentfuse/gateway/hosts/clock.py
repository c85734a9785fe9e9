"""The clock that leases are judged by: this host's own, which nobody sets and which goes on in suspend."""

from __future__ import annotations

import time


def boot_time() -> float:
    """Seconds since this machine began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
