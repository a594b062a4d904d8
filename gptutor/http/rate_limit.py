"""The limit of requests per minute, as a caller is told of it (contract A8)."""

import time
from dataclasses import dataclass

from gptutor.errors import ApiError

MINUTE_S = 60


@dataclass(frozen=True, slots=True)
class RateLimit:
    """`per_minute` requests in each clock minute; 0 is no limit, of which nothing is told."""

    per_minute: int

    def headers(self, requests: int) -> dict[str, str]:
        """After so many requests in this minute."""
        if not self.per_minute:
            return {}
        return {
            "X-RateLimit-Limit": str(self.per_minute),
            "X-RateLimit-Remaining": str(max(0, self.per_minute - requests)),
            "X-RateLimit-Reset": str(_left_s()),
        }

    def refusal(self) -> ApiError:
        """For a request that is too many; it is told when the next minute begins."""
        left_s = _left_s()
        return ApiError(
            "rate_limited",
            headers={**self.headers(self.per_minute), "Retry-After": str(left_s)},
            more={"message": f"The limit of requests per minute is used up. Try again in {left_s} s.", "retryAfter": left_s},
        )


def _left_s() -> int:
    """Whole seconds until the next minute begins, by the clock; PostgreSQL counts by its own, which may differ a little."""
    return MINUTE_S - int(time.time()) % MINUTE_S


UNDISCLOSED = RateLimit(0)
"""Of a limit whose figures are not at hand: only when to come again."""
