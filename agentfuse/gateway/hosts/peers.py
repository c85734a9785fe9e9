"""The other hosts, as this one sees them: who lives, and who has been silent for too long.

Only this host's clock is asked. While the store could not be read, or this process did not run, nobody was
observed: silence is counted anew from then on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from agentfuse.errors import StoreError
from agentfuse.gateway.hosts.clock import boot_time
from agentfuse.gateway.hosts.roster import Host, Roster

_LOG = logging.getLogger(__name__)

_SELDOM_S = 3600.0

OnLost = Callable[[Host], Awaitable[None]]


@dataclass(slots=True)
class _Seen:
    host: Host
    changed_at: float
    is_dead: bool = False
    lost: trio.Event = field(default_factory=trio.Event)


class Peers:
    """What was seen of the others. ``here`` is this host's id. Plain methods act in one breath."""

    def __init__(self, here: str, *, gap_s: float) -> None:
        self._here = here
        self._gap_s = gap_s
        self._seen: dict[str, _Seen] = {}
        self._looked_at = float("-inf")
        self.doubted = trio.Event()

    def saw(self, hosts: Iterable[Host], *, asked_at: float, now: float) -> list[Host]:
        """These records are in the store, as was asked at a time; returns those who are dead."""
        is_anew = asked_at - self._looked_at > self._gap_s
        self._looked_at = now
        there = {host.id: host for host in hosts if host.id != self._here}
        for gone in self._seen.keys() - there.keys():
            self._seen.pop(gone).lost.set()
        for host in there.values():
            seen = self._seen.get(host.id)
            if seen is None or (seen.host.incarnation, seen.host.beat) != (host.incarnation, host.beat):
                if seen is not None and seen.is_dead:
                    _LOG.warning("host %s at %s is back", host.id, host.url)
                    seen = None
                lost = trio.Event() if seen is None else seen.lost
                self._seen[host.id] = _Seen(host, now, lost=lost)
            elif is_anew and not seen.is_dead:
                seen.changed_at = now
            elif asked_at - seen.changed_at >= host.lease_s and not seen.is_dead:
                seen.is_dead = True
                seen.lost.set()
                _LOG.warning("host %s at %s is lost: silent for %g s", host.id, host.url, host.lease_s)
        return [seen.host for seen in self._seen.values() if seen.is_dead]

    def doubt(self) -> None:
        """What was seen may be out of date: look again now."""
        self.doubted.set()

    def find(self, host: str) -> Host | None:
        """A host that is not known to be dead."""
        seen = self._seen.get(host)
        return None if seen is None or seen.is_dead else seen.host

    def lost(self, host: str) -> trio.Event:
        """Set when a host that :meth:`find` found is dead or gone."""
        seen = self._seen.get(host)
        if seen is not None:
            return seen.lost
        gone = trio.Event()
        gone.set()
        return gone

    def least_busy(self) -> Host | None:
        """The host that has the fewest executions, of those that begin any."""
        hosts = [seen.host for seen in self._seen.values() if not seen.is_dead and seen.host.executes]
        return min(hosts, key=lambda host: (host.executions, host.id), default=None)


async def watch(
    peers: Peers, roster: Roster, on_lost: OnLost, *, every_s: float, now: Callable[[], float] = boot_time
) -> None:
    """Look at the others' records now and then, for ever. ``on_lost`` is called with each dead one at once,
    and then again, ever more seldom: it looks through everything, and what a host began in the moment of its
    death turns up soon. Nobody waits for it: who does not look judges nobody."""
    limiter = trio.CapacityLimiter(1)
    cares: dict[str, _Care] = {}
    async with trio.open_nursery() as nursery:
        while True:
            asked_at, peers.doubted = now(), trio.Event()
            try:
                with trio.fail_after(every_s * 4):
                    hosts = await trio.to_thread.run_sync(roster.all, limiter=limiter, abandon_on_cancel=True)
            except (trio.TooSlowError, StoreError) as error:
                _LOG.warning("the other hosts cannot be seen: %s", error or "the store does not answer")
            else:
                dead = peers.saw(hosts, asked_at=asked_at, now=now())
                cares = {host.id: cares.get(host.id) or _Care(now()) for host in dead}
                for host in dead:
                    care = cares[host.id]
                    if care.due <= now():
                        care.due = math.inf  # until it is done
                        nursery.start_soon(_care_for, host, care, on_lost, every_s, now)
            await trio.sleep(every_s / 10)
            with trio.move_on_after(every_s * 9 / 10):
                await peers.doubted.wait()


class _Care:
    """For a host that is dead ``since`` a time; ``due``: when it is looked after next."""

    def __init__(self, since: float) -> None:
        self.since = self.due = since


async def _care_for(
    host: Host, care: _Care, on_lost: OnLost, every_s: float, now: Callable[[], float]
) -> None:
    wait_s = every_s
    try:
        await on_lost(host)
        wait_s = min(max(every_s, now() - care.since), _SELDOM_S)
    except StoreError as error:
        _LOG.warning("what host %s had is not settled yet: %s", host.id, error)
    care.due = now() + wait_s
