"""The hosts as the rest of the gateway knows them: who we are, whether we may own executions, who else is
there.

A gateway without ``advertise`` is alone: it has an identity and nothing else of this, and is judged by
nobody.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import trio
from starlette.types import Receive, Scope, Send

from agentfuse.admission import Gateway
from agentfuse.gateway.edge import StatedError
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.hosts.clock import boot_time
from agentfuse.gateway.hosts.forwarding import Forwarder
from agentfuse.gateway.hosts.identity import Identity
from agentfuse.gateway.hosts.lease import BEATS, LEASE_FILE, Lease, Tenure, Terms
from agentfuse.gateway.hosts.lost import settle
from agentfuse.gateway.hosts.peers import Peers, watch
from agentfuse.gateway.hosts.proof import Proofs
from agentfuse.gateway.hosts.roster import Host, Roster
from agentfuse.gateway.secret_files import secret_in
from agentfuse.objectstore import open_store
from agentfuse.objectstore.base import ObjectStore

_MOST_PAUSE_S = 3600.0


class Hosts:
    """This host and the others. ``proofs`` is None where there is no cluster."""

    def __init__(
        self,
        identity: Identity,
        store: ObjectStore,
        settings: Gateway,
        *,
        directory: Path,
    ) -> None:
        self._identity = identity
        self._records = Records(store)
        self._lease_file = directory / LEASE_FILE
        self._limiter = trio.CapacityLimiter(1)
        self._settled: dict[str, tuple[str, float, float]] = {}
        self.executes = settings.executes
        self.proofs: Proofs | None = None
        self._lease: Lease | None = None
        self._roster = Roster(store)
        if settings.advertise and settings.cluster_secret_file:
            # One request that hangs must not cost the lease.
            impatient = open_store(store.url, is_known=True, patience_s=settings.lease_s / BEATS)
            self._roster = Roster(impatient)
            secret = secret_in(settings.cluster_secret_file, "cluster_secret_file")
            self.proofs = Proofs(secret, identity.id, lambda: identity.epoch)
            self._forwarder = Forwarder(self.proofs)
            terms = Terms(settings.advertise, settings.lease_s, settings.on_host_lost, settings.executes)
            self._lease = Lease(identity, self._roster, terms, directory=directory)
        gap_s = settings.lease_s / 2
        self._peers = Peers(identity.id, gap_s=gap_s)

    @property
    def id(self) -> str:
        """This host's id."""
        return self._identity.id

    @property
    def epoch(self) -> int:
        """What executions that are begun or adopted now are to bear."""
        return self._identity.epoch

    def problem(self) -> str | None:
        """Why this host may not own executions now; None if it may."""
        return self._lease.problem() if self._lease else None

    def check_owning(self) -> None:
        """Pass if this host may own executions now. Raises ``StatedError`` 503."""
        problem = self.problem()
        if problem is not None:
            raise StatedError(f"no execution can begin on this host now: {problem}", 503)

    def find(self, host: str) -> Host | None:
        """Another host that is not known to be dead."""
        return self._peers.find(host)

    def least_busy(self) -> Host | None:
        """Another host that begins executions, the one with the fewest."""
        return self._peers.least_busy()

    async def forward(self, scope: Scope, receive: Receive, send: Send, host: Host) -> None:
        """Have another host answer a request, see ``Forwarder``."""
        try:
            await self._forwarder.forward(scope, receive, send, host, self._peers.lost(host.id))
        except StatedError:
            self._peers.doubt()
            raise

    async def begin(self, tenure: Tenure) -> None:
        """Before executions are adopted: begin an epoch, and the lease of it where there is a cluster."""
        if self._lease is not None:
            await self._lease.acquire(tenure)
            return
        self._identity.begin_epoch()
        self._lease_file.unlink(missing_ok=True)
        # The record of a cluster that this host has left would have others take it for dead.
        await trio.to_thread.run_sync(self._roster.remove, self.id, limiter=self._limiter)

    async def run(
        self, tenure: Tenure, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """After :meth:`begin`: ready when what was here is adopted; then keep the lease, watch the others."""
        if self._lease is None:
            await tenure.adopt()
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            await nursery.start(self._lease.keep, tenure)
            task_status.started()
            nursery.start_soon(
                partial(watch, self._peers, self._roster, self._settle, every_s=self._lease.beat_s)
            )

    async def _settle(self, host: Host) -> None:
        """At once, then ever more seldom: it looks through all records, and late ones are few."""
        incarnation, due, pause_s = self._settled.get(host.id, ("", 0.0, 0.0))
        if incarnation != host.incarnation:
            due, pause_s = 0.0, host.lease_s
        if boot_time() < due:
            return
        settled = partial(settle, self._records, self._roster, host)
        await trio.to_thread.run_sync(settled, limiter=self._limiter, abandon_on_cancel=True)
        self._settled[host.id] = host.incarnation, boot_time() + pause_s, min(2 * pause_s, _MOST_PAUSE_S)
