"""A rate limit in requests per clock minute, as clients see it: response headers, and the error 429 (contract A8)."""

import time
from dataclasses import dataclass

from gptutor.errors import ApiError

MINUTE_S = 60


@dataclass(frozen=True, slots=True)
class RateLimit:
    """`per_minute` 0: no limit."""

    per_minute: int

    def headers(self, requests: int) -> dict[str, str]:
        """X-RateLimit-*, after so many `requests` in this minute; none if there is no limit."""
        if not self.per_minute:
            return {}
        return {
            "X-RateLimit-Limit": str(self.per_minute),
            "X-RateLimit-Remaining": str(max(0, self.per_minute - requests)),
            "X-RateLimit-Reset": str(_until_next_minute_s()),
        }

    def error(self, cause: str | None = None) -> ApiError:
        """For a request above the limit. `cause`, for the log, says which limit that is."""
        retry_after_s = _until_next_minute_s()
        return ApiError(
            "rate_limited",
            cause=cause,
            headers={**self.headers(self.per_minute), "Retry-After": str(retry_after_s)},
            extra={
                "message": f"The limit of requests per minute is used up. Try again in {retry_after_s} s.",
                "retryAfter": retry_after_s,
            },
        )


def _until_next_minute_s() -> int:
    """Whole seconds by this machine's clock; PostgreSQL counts by its own, which may differ slightly."""
    return MINUTE_S - int(time.time()) % MINUTE_S


UNDISCLOSED = RateLimit(0)
"""A limit whose numbers are not known here: its error says only when to retry."""
