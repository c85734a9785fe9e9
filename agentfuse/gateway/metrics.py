"""What operators count of a gateway, in Prometheus' text format. No label comes from what clients write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agentfuse.gateway import describe

_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)


class Metrics:
    """The counters of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "agentfuse_gateway_requests", "Requests", ["api", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "agentfuse_gateway_request_duration_seconds",
            "How long requests took, until the answer's last byte",
            ["api"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._under_way = Gauge(
            "agentfuse_gateway_requests_in_progress", "Requests under way", registry=self.registry
        )
        self._swept = Counter(
            "agentfuse_gateway_staged_files_swept",
            "Staged files that expired and were removed",
            registry=self.registry,
        )

    def watch_executions(self, count: Callable[[str], int], phases: Iterable[str]) -> None:
        """Tell of how many executions of this host are in which phase."""
        gauge = Gauge(
            "agentfuse_gateway_executions",
            "Executions of this host that have not ended, by where their files are",
            ["phase"],
            registry=self.registry,
        )
        for phase in phases:
            gauge.labels(phase).set_function(partial(count, phase))

    def begun(self) -> None:
        """A request came."""
        self._under_way.inc()

    def ended(self, api: str, status: int, seconds: float) -> None:
        """It is answered; status 0: it was cut off before."""
        self._under_way.dec()
        self._requests.labels(api, str(status) if status else "cut off").inc()
        self._seconds.labels(api).observe(seconds)

    def swept(self, files: int) -> None:
        """Staged files were removed."""
        self._swept.inc(files)


def router(metrics: Metrics) -> APIRouter:
    """The route of the scraper."""
    routes = APIRouter(tags=["Operation"])

    @routes.get("/metrics", **describe.route("text/plain"))
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return routes
