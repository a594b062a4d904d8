"""Whether and when to ask OpenRouter again (contract F3): a pure decision about one failed attempt.

Only failures that prove that nothing was bought are repeated. A generation id in the answer means that something may have been.
"""

import random
from dataclasses import dataclass
from typing import Literal

# Statuses worth a second attempt, each with its reason; everything else is final.
TRANSIENT = {
    408: "the provider did not begin in time",
    429: "the provider is at its limit",
    502: "the provider is down or answered nonsense",
    503: "no provider is free",
    524: "OpenRouter's edge gave up waiting",
    529: "the provider is overloaded",
}
# A refusal that becomes transient by a Retry-After: 402 while other calls of ours are in flight.
TRANSIENT_WITH_HINT = {402: "our budget for calls in flight is used up for a moment"}

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 8.0
HINT_JITTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed.

    `unreachable`: nothing was sent. `timeout`, `broken`: it was sent, and nothing is known. `status`: OpenRouter's own word,
    which is JSON; an error page of its edge is `broken`, because behind the edge the request may still be running.
    """

    kind: Literal["status", "unreachable", "timeout", "broken"]
    status: int = 0
    retry_after_s: float | None = None
    generation_id: str | None = None

    @property
    def bought_nothing(self) -> bool:
        """Whether this failure proves that OpenRouter charges nothing."""
        return self.kind == "unreachable" or (self.kind == "status" and self.generation_id is None)


def pause_before_retry(
    failure: Failure, *, attempt: int, attempts_max: int, left_s: float, dice: float | None = None
) -> float | None:
    """Seconds to wait before the next attempt, or None to give up.

    `attempt` counts from 1; `left_s` is what remains of the request's time; `dice`, from 0 to 1, is the jitter.
    """
    if attempt >= attempts_max or not failure.bought_nothing:
        return None
    hinted = failure.retry_after_s is not None and failure.status in TRANSIENT_WITH_HINT
    if failure.kind == "status" and failure.status not in TRANSIENT and not hinted:
        return None
    jitter = random.random() if dice is None else dice  # noqa: S311
    if failure.retry_after_s is not None:
        pause = failure.retry_after_s + jitter * HINT_JITTER_S  # all who were told the same must not come back at once
    else:
        pause = min(BACKOFF_FIRST_S * 2 ** (attempt - 1), BACKOFF_MAX_S) * (0.5 + jitter / 2)
    return pause if pause < left_s else None
