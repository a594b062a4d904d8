"""Snapshots of the metrics of one process, and what several of them add up to.

A snapshot is a JSON document: family → its kind, and the value of each sample. The name of a sample is what Prometheus' text
format has before the value, such as `gptutor_errors_total{code="not_found"}`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gptutor.telemetry.loop_metrics import number
from gptutor.telemetry.metrics import SMALLEST, SUMMED

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ADDED_UP = ("counter", "histogram", "summary")
HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})
LABEL_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

Samples = dict[str, float]


@dataclass(slots=True)
class Family:
    """`layout` is the kind, and of a histogram its bounds as well: those with other bounds cannot be added."""

    layout: str
    samples: Samples
    documentation: str = ""

    @property
    def kind(self) -> str:
        return self.layout.partition(" ")[0]


Snapshot = dict[str, Family]


def take_snapshot(registry: Collector = REGISTRY) -> Snapshot:
    """What the metrics of this process are now. Any thread may call it."""
    return {metric.name: _family(metric) for metric in registry.collect()}


def _family(metric: Metric) -> Family:
    samples: Samples = {}
    bounds: dict[str, None] = {}
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue  # when a counter began cannot be added up, and no query needs it
        if "le" in sample.labels:
            bounds[sample.labels["le"]] = None
        labels = ",".join([f'{name}="{value.translate(LABEL_ESCAPES)}"' for name, value in sample.labels.items()])
        samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = float(sample.value)
    return Family(" ".join([metric.type, *bounds]), samples, metric.documentation)


def without_gauges(snapshot: Snapshot) -> Snapshot:
    """What stays true of a process that has ended, without counters that are 0."""
    return {
        name: Family(
            family.layout, {sample: value for sample, value in family.samples.items() if value or family.kind != "counter"}
        )
        for name, family in snapshot.items()
        if family.kind in ADDED_UP
    }


def merge(first: Snapshot, others: Iterable[Snapshot]) -> Snapshot:
    """All of them as one. Families that `first` does not have, or has with other bounds, are of another release: left out."""
    merged = {name: Family(family.layout, dict(family.samples), family.documentation) for name, family in first.items()}
    for other in others:
        for name, family in other.items():
            mine = merged.get(name)
            if mine is None or (mine.layout != family.layout and mine.samples and family.samples):
                continue
            if mine.layout != family.layout and not mine.samples:
                mine.layout = family.layout  # a histogram without observations does not show its bounds
            _add(name, mine, family.samples)
    return merged


def _add(name: str, mine: Family, samples: Samples) -> None:
    is_sum = mine.kind in ADDED_UP or name in SUMMED
    for sample, value in samples.items():
        known = mine.samples.get(sample)
        if known is None:
            mine.samples[sample] = value
        elif is_sum:
            mine.samples[sample] = known + value
        else:
            mine.samples[sample] = min(known, value) if name in SMALLEST else max(known, value)


def to_text(snapshot: Snapshot) -> bytes:
    """In Prometheus' text format."""
    lines: list[str] = []
    for name, family in snapshot.items():
        shown = f"{name}_total" if family.kind == "counter" else name
        lines.append(f"# HELP {shown} {family.documentation.translate(HELP_ESCAPES)}")
        lines.append(f"# TYPE {shown} {family.kind}")
        lines += [f"{sample} {number(value)}" for sample, value in family.samples.items()]
    return "\n".join([*lines, ""]).encode()


def dump(snapshot: Snapshot) -> Any:
    """As JSON has it; `json` also writes infinity, which the age of a model list may be."""
    return {name: [family.layout, family.samples] for name, family in snapshot.items()}


def load(document: Any) -> Snapshot:
    """Raises ValueError."""
    try:
        return {
            name: Family(str(layout), {str(key): float(value) for key, value in samples.items()})
            for name, (layout, samples) in document.items()
        }
    except (AttributeError, TypeError) as error:
        raise ValueError("not a snapshot") from error


def encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def decode(text: bytes) -> Any:
    """Raises ValueError."""
    return json.loads(text)
