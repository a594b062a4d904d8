"""Holds that were not granted → what the caller is told (contract B3, B4, A8)."""

from gptutor.errors import ApiError
from gptutor.http.rate_limit import UNDISCLOSED, RateLimit
from gptutor.money.holds import InsufficientFunds, KeyCapReached, NotHeld, RateLimited, RepeatedRequest, TooManyAtOnce, UnknownKey

CODES: dict[type[NotHeld], str] = {
    UnknownKey: "invalid_key",
    InsufficientFunds: "insufficient_balance",
    KeyCapReached: "key_limit_reached",
    TooManyAtOnce: "too_many_concurrent_requests",
}


def hold_error(error: NotHeld, pace: RateLimit) -> ApiError:
    """`pace` is the account's limit; of a key's own limit no figures are told."""
    if isinstance(error, RateLimited):
        return (UNDISCLOSED if error.of_key else pace).error()
    if isinstance(error, RepeatedRequest):
        code = "duplicate_request" if error.same_body else "idempotency_mismatch"
        return ApiError(code, f"{ApiError(code).text}: {error.request_id}")
    return ApiError(CODES[type(error)])
