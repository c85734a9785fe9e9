"""Readings in Prometheus' text format. For a thread: some hundred samples take milliseconds.

prometheus_client is imported when somebody first asks, for it takes memory that most mounts need not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from agentfuse.metrics.families import FAMILIES, Family
from agentfuse.metrics.readings import Reading
from agentfuse.timings import buckets, seconds_of

if TYPE_CHECKING:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

_FIRST_BITS, _LAST_BITS = 13, 33
"""The buckets of histograms, in powers of two of nanoseconds: 8.2 µs to 8.6 s."""


def render(readings: Iterable[Reading], *, agent: str, execution: str) -> bytes:
    """The text that a scrape gets."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415  see above

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(readings), (_text(agent), _text(execution))))
    return generate_latest(registry)


class _Collector:
    """One moment of one mount, as the library wants it."""

    def __init__(self, readings: Sequence[Reading], whose: tuple[str, str]) -> None:
        self._readings = readings
        self._whose = whose

    def collect(self) -> Iterator[Metric]:
        """Every family; one without samples says at least that it exists."""
        by_name: dict[str, list[Reading]] = {}
        for reading in self._readings:
            by_name.setdefault(reading.name, []).append(reading)
        for family in FAMILIES:
            yield self._metric(family, by_name.get(family.name, []))

    def _metric(self, family: Family, readings: list[Reading]) -> Metric:
        from prometheus_client import metrics_core  # noqa: PLC0415  see above

        labels = ("agent", "execution", *family.labels)
        if family.kind == "histogram":
            histogram = metrics_core.HistogramMetricFamily(family.name, family.help, labels=labels)
            for reading in readings:
                assert isinstance(reading.value, tuple)
                counted = [
                    (f"{bound:g}".replace("inf", "+Inf"), number)
                    for bound, number in buckets(reading.value, _FIRST_BITS, _LAST_BITS)
                ]
                histogram.add_metric(self._values(reading), counted, seconds_of(reading.value))
            return histogram
        is_counter = family.kind == "counter"
        made = metrics_core.CounterMetricFamily if is_counter else metrics_core.GaugeMetricFamily
        metric: CounterMetricFamily | GaugeMetricFamily = made(family.name, family.help, labels=labels)
        for reading in readings:
            assert not isinstance(reading.value, tuple)
            metric.add_metric(self._values(reading), reading.value)
        return metric

    def _values(self, reading: Reading) -> tuple[str, ...]:
        return (*self._whose, *map(_text, reading.labels))


def _text(value: str) -> str:
    """A label's value as UTF-8: a mountpoint may be none."""
    return value.encode(errors="replace").decode()
