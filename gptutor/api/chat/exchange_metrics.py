"""What one exchange adds to the metrics, at its end and in one place."""

from typing import NamedTuple

from gptutor.telemetry.metrics import (
    COMPLETION_DURATION,
    COMPLETIONS,
    FIRST_BYTE,
    OUTCOME_GROUPS,
    OVERHEAD,
    SETTLE_LAG,
    STREAM,
    UPSTREAM_FIRST_BYTE,
)
from gptutor.telemetry.model_labels import MODEL_LABELS


class ExchangeTimes(NamedTuple):
    """On the monotonic clock, in seconds; None for what did not take place."""

    arrived: float
    called: float | None
    """OpenRouter was called."""
    answered: float | None
    """The headers of its response were here."""
    first_byte: float | None
    """The first byte of a stream was written to the client; None for a response that is written as a whole, at its end."""
    ended: float
    """The response had ended, for the client."""
    closed: float
    """The hold was closed."""


def count_exchange(model: str, *, stream: bool, outcome: str, times: ExchangeTimes) -> None:
    """`model` is what the client named; `outcome` is an outcome of a hold, or an error code."""
    family = MODEL_LABELS.family(model)
    labels = (family, STREAM[stream], OUTCOME_GROUPS[outcome])
    COMPLETIONS.add((outcome,))
    COMPLETION_DURATION.observe(times.ended - times.arrived, labels)
    FIRST_BYTE.observe((times.first_byte or times.ended) - times.arrived, labels)
    SETTLE_LAG.observe(times.closed - times.ended)
    if times.called is not None:
        OVERHEAD.observe(times.called - times.arrived)
        if times.answered is not None:
            UPSTREAM_FIRST_BYTE.observe(times.answered - times.called, (family,))
