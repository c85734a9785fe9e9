"""The bodies of requests and answers of the control API. Paths are text; bytes that are no UTF-8 in them
are lone surrogates, as ``os.fsdecode`` makes them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """A request that says nothing more."""


class AnyQuery(msgspec.Struct):
    """A query that nobody reads."""


class EventsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which events are wanted: numbered higher than ``since``, of one region, and those to come."""

    since: Annotated[int, msgspec.Meta(ge=0)] | None = None
    region: str | None = None
    follow: bool = False


class SyncRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How long a sync may take."""

    timeout_s: _Seconds | None = None


class UnmountRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``lazy``: do not wait for who holds files open. ``timeout_s``: how long the store is tried."""

    lazy: bool = False
    timeout_s: _Seconds | None = None
