"""Whether the gateway lives, and whether it can serve."""

from __future__ import annotations

from itertools import islice

import trio
from fastapi import APIRouter, Response

from agentfuse.errors import StoreError
from agentfuse.gateway import describe
from agentfuse.gateway.bodies import JsonAnswer
from agentfuse.gateway.hosts.cluster import Hosts
from agentfuse.objectstore.base import ObjectStore
from agentfuse.objectstore.probe import PROBE_PREFIX

_PATIENCE_S = 5.0
_FRESH_S = 1.0


class Readiness:
    """Asks the store at most once a second, however many want to know.

    The store was probed before the gateway began to listen; here it is asked whether it still answers. A host
    of a cluster must also have its lease.
    """

    def __init__(self, store: ObjectStore, hosts: Hosts) -> None:
        self._store = store
        self._hosts = hosts
        self._limiter = trio.CapacityLimiter(1)
        self._lock = trio.Lock()
        self._asked_at = -_FRESH_S
        self._problem: str | None = None

    async def problem(self) -> str | None:
        """Why requests cannot be served now; None if they can."""
        async with self._lock:
            if trio.current_time() - self._asked_at >= _FRESH_S:
                self._problem = await self._ask()
                self._asked_at = trio.current_time()
        return self._problem or self._hosts.problem()

    async def _ask(self) -> str | None:
        try:
            with trio.fail_after(_PATIENCE_S):
                await trio.to_thread.run_sync(
                    lambda: list(islice(self._store.list(PROBE_PREFIX), 1)),
                    limiter=self._limiter,
                    abandon_on_cancel=True,
                )
        except trio.TooSlowError:
            return f"the object store does not answer within {_PATIENCE_S:g} s"
        except StoreError:
            return "the object store failed or cannot be reached"
        return None


def router(readiness: Readiness) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Operation"])

    @routes.get("/healthz", **describe.route("text/plain"))
    async def healthz() -> Response:
        """Whether the process answers."""
        return Response("ok\n", media_type="text/plain")

    @routes.get("/readyz", **describe.route(describe.Ready, errors=describe.Ready, codes=(503,)))
    async def readyz() -> Response:
        """Whether requests can be served: the store is there and keeps its promises."""
        problem = await readiness.problem()
        if problem is None:
            return JsonAnswer({"ready": True})
        return JsonAnswer({"ready": False, "problem": problem}, 503)

    return routes
