"""Holds that were not granted → what the caller is told (contract B3, B4, A8)."""

from gptutor.errors import ApiError
from gptutor.http.rate_limit import UNDISCLOSED, RateLimit
from gptutor.money.holds import (
    ConcurrencyLimitReached,
    HoldRejected,
    InsufficientFunds,
    KeyLimitReached,
    RateLimited,
    RepeatedRequest,
    UnknownKey,
)

CODES: dict[type[HoldRejected], str] = {
    UnknownKey: "invalid_key",
    InsufficientFunds: "insufficient_balance",
    KeyLimitReached: "key_cap_reached",
    ConcurrencyLimitReached: "too_many_at_once",
}


def hold_error(error: HoldRejected, pace: RateLimit) -> ApiError:
    """`pace` is the account's limit; of a key's own limit no figures are told."""
    if isinstance(error, RateLimited):
        return (UNDISCLOSED if error.of_key else pace).refusal()
    if isinstance(error, RepeatedRequest):
        code = "repeated_request" if error.same_body else "mismatched_request"
        return ApiError(code, f"{ApiError(code).text}: {error.request_id}")
    return ApiError(CODES[type(error)])
