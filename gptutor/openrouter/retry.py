"""Whether and when to retry a request to OpenRouter (contract F3): a pure decision about one failed attempt.

Only failures that prove that nothing was bought are retried. A generation id means that something may have been; a refusal of
OpenRouter's own has none here, whatever its headers say (`errors.REFUSALS`).
"""

import random
from dataclasses import dataclass
from typing import Literal

# Statuses worth a retry, each with its reason; all others are final.
RETRYABLE = {
    408: "the provider did not respond in time",
    429: "the provider is at its rate limit",
    502: "the provider is down, or its response was invalid",
    503: "no provider is available",
    524: "OpenRouter's edge timed out",
    529: "the provider is overloaded",
}
# Statuses worth a retry only with a Retry-After header.
RETRYABLE_WITH_RETRY_AFTER = {402: "our credit is held for requests in flight, for a moment"}

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 8.0
RETRY_AFTER_JITTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed.

    `unreachable`: the request was not sent. `timeout`, `broken`: the request was sent, and its result is unknown. `status`: an
    error of OpenRouter's own, in JSON; an error page of its edge is `broken`, because behind the edge the request may still run.
    """

    kind: Literal["status", "unreachable", "timeout", "broken"]
    status: int = 0
    retry_after_s: float | None = None
    generation_id: str | None = None

    @property
    def bought_nothing(self) -> bool:
        """Whether this failure proves that OpenRouter charges nothing."""
        return self.kind == "unreachable" or (self.kind == "status" and self.generation_id is None)


def retry_delay_s(
    failure: Failure, *, attempt: int, attempts_max: int, left_s: float, jitter: float | None = None
) -> float | None:
    """Seconds to back off before the next attempt, or None for no further attempt.

    `attempt` counts from 1; `left_s` is the rest of the request's time; `jitter` is from 0 to 1 (default: random).
    """
    if attempt >= attempts_max or not failure.bought_nothing:
        return None
    is_retryable = failure.status in RETRYABLE or (
        failure.retry_after_s is not None and failure.status in RETRYABLE_WITH_RETRY_AFTER
    )
    if failure.kind == "status" and not is_retryable:
        return None
    if jitter is None:
        jitter = random.random()  # noqa: S311
    if failure.retry_after_s is not None:
        delay_s = failure.retry_after_s + jitter * RETRY_AFTER_JITTER_S  # clients given the same time must not return together
    else:
        delay_s = min(BACKOFF_FIRST_S * 2 ** (attempt - 1), BACKOFF_MAX_S) * (0.5 + jitter / 2)
    return delay_s if delay_s < left_s else None
