"""Metrics for the path of a request: they have no locks, because only the event loop's thread changes them.

An increment costs a fifth of one of prometheus_client's, whose locks serve programs with many threads. Values are read by the
thread that answers a scrape: it copies a dictionary in one step. Label values are a tuple, in the order of the label names.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]
NO_LABELS: Labels = ()


def number(value: float) -> str:
    """As Prometheus' text format has it."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class LoopCounter(Collector):
    """`begin` are the label values that are present with 0 from the start."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        begin: Iterable[Labels] = (),
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: defaultdict[Labels, float] = defaultdict(float)
        self.begin(begin if labels else [NO_LABELS])
        registry.register(self)

    def begin(self, labels: Iterable[Labels]) -> None:
        """These values are present from now on."""
        for each in labels:
            self._values[each] += 0

    def add(self, labels: Labels = NO_LABELS, amount: float = 1) -> None:
        """`amount` must not be negative."""
        self._values[labels] += amount

    def describe(self) -> list[Metric]:
        return [CounterMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> list[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        return [family]


class LoopHistogram(Collector):
    """`bounds` are the upper bounds of its buckets, in increasing order, without infinity."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._bounds = tuple(bounds)
        self._bounds_shown = [number(bound) for bound in (*bounds, float("inf"))]
        self._values: dict[Labels, list[float]] = {}
        """For each label values: how many observations each bucket has, and last their sum."""
        if not labels:
            self._begin(NO_LABELS)
        registry.register(self)

    def observe(self, value: float, labels: Labels = NO_LABELS) -> None:
        counts = self._values.get(labels) or self._begin(labels)
        counts[bisect_left(self._bounds, value)] += 1
        counts[-1] += value

    def _begin(self, labels: Labels) -> list[float]:
        counts = self._values[labels] = [0.0] * (len(self._bounds) + 2)
        return counts

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> list[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, counts in list(self._values.items()):
            *buckets, total = counts.copy()
            up_to = 0.0
            cumulative = []
            for bound, count in zip(self._bounds_shown, buckets, strict=True):
                up_to += count
                cumulative.append((bound, up_to))
            family.add_metric(labels, cumulative, total)
        return [family]


class OptionalGauge(Collector):
    """A gauge that is absent while its value is not known."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = (), registry: CollectorRegistry = REGISTRY) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: dict[Labels, float] = {}
        registry.register(self)

    def set(self, value: float, labels: Labels = NO_LABELS) -> None:
        self._values[labels] = value

    def clear(self) -> None:
        self._values.clear()

    def describe(self) -> list[Metric]:
        return [GaugeMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> list[Metric]:
        family = GaugeMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        return [family]
