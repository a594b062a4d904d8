"""Holds that were not granted → what the caller is told (contract B3, B4, A8)."""

from gptutor.api.pace import UNTOLD, Pace
from gptutor.errors import Refusal
from gptutor.money.holds import (
    InsufficientFunds,
    KeyCapReached,
    NotHeld,
    RateLimited,
    RepeatedRequest,
    TooManyAtOnce,
    UnknownKey,
)

CODES: dict[type[NotHeld], str] = {
    UnknownKey: "invalid_key",
    InsufficientFunds: "insufficient_balance",
    KeyCapReached: "key_cap_reached",
    TooManyAtOnce: "too_many_at_once",
}


def refusal_of_hold(error: NotHeld, pace: Pace) -> Refusal:
    """`pace` is the account's limit; of a key's own limit no figures are told."""
    if isinstance(error, RateLimited):
        return (UNTOLD if error.of_key else pace).refusal()
    if isinstance(error, RepeatedRequest):
        code = "repeated_request" if error.same_body else "mismatched_request"
        return Refusal(code, f"{Refusal(code).text}: {error.request_id}")
    return Refusal(CODES[type(error)])
