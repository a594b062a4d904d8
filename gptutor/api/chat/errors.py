"""What the client gets when there is no completion: our error for a rejected hold (contract B3, B4, A8) and for a failure of
OpenRouter's (contract B6). Each mapping is a table; a row that needs a reason has the reason beside it.

Trouble of our own account at OpenRouter is never shown as the client's: 401, 402 and a limit of our key are 500 for the client,
and an error in the log for the operator.
"""

import logging
import math

from gptutor.api.verified_keys import UNKNOWN
from gptutor.errors import DO_NOT_RETRY, ApiError
from gptutor.http.rate_limit import UNDISCLOSED, RateLimit
from gptutor.money.holds import (
    ConcurrencyLimitReached,
    HoldRejected,
    InsufficientFunds,
    KeyLimitReached,
    OutcomeUnknown,
    RateLimited,
    RepeatedRequest,
    UnknownKey,
)
from gptutor.openrouter.errors import AccountRefused, UpstreamError
from gptutor.telemetry.metrics import UPSTREAM_ACCOUNT_ERRORS

LOGGER = logging.getLogger("gptutor.upstream")

BY_HOLD_ERROR: dict[type[HoldRejected], str] = {
    UnknownKey: "invalid_key",
    InsufficientFunds: "insufficient_balance",
    KeyLimitReached: "key_limit_reached",
    ConcurrencyLimitReached: "too_many_concurrent_requests",
}
# Upstream status → (our error code, whether OpenRouter's message is passed on)
BY_UPSTREAM_STATUS: dict[int, tuple[str, bool]] = {
    400: ("upstream_rejected", True),  # the client's own mistake
    404: ("upstream_rejected", True),  # no such model, or no provider under the client's conditions
    413: ("upstream_rejected", True),  # more than the model takes
    422: ("upstream_rejected", True),  # well-formed, but not what the model takes
    401: ("upstream_account", False),  # our key is wrong
    402: ("upstream_account", False),  # our credit is used up
    403: ("moderated", True),  # moderation, unless it says that the limit of our key is used up
    408: ("upstream_timeout", False),
    429: ("rate_limited_upstream", False),
    504: ("upstream_timeout", False),
    524: ("upstream_timeout", False),
}
BY_UPSTREAM_FAILURE = {
    "unreachable": "upstream_unreachable",
    "timeout": "upstream_timeout",
    "broken": "upstream_outcome_unknown",
}


def error_for_hold(error: HoldRejected, rate_limit: RateLimit) -> ApiError:
    """`rate_limit` is the account's; the numbers of a key's own limit are not disclosed."""
    if isinstance(error, RateLimited):
        if error.of_key:
            return UNDISCLOSED.error(cause="the key's own requests_per_minute")
        return rate_limit.error("rate_limit.chat_per_minute")
    if isinstance(error, RepeatedRequest):
        code = "duplicate_request" if error.same_body else "idempotency_mismatch"
        return ApiError(code, f"{ApiError(code).text}: {error.request_id}")
    if isinstance(error, OutcomeUnknown):
        code = "outcome_unknown"
        return ApiError(code, f"{ApiError(code).text}: {error.request_id}")
    return ApiError(BY_HOLD_ERROR[type(error)], cause=UNKNOWN if isinstance(error, UnknownKey) else None)


def error_for_refusal(error: AccountRefused) -> ApiError:
    headers = {"Retry-After": str(math.ceil(error.failure.retry_after_s or 1))}
    return ApiError("upstream_account_refused", headers=headers, cause=error.message)


def error_for_upstream(error: UpstreamError, request_id: str) -> ApiError:
    failure = error.failure
    cause = f"upstream: {error}"
    if isinstance(error, AccountRefused):
        return error_for_refusal(error)
    headers = {} if failure.bought_nothing else dict(DO_NOT_RETRY)
    if failure.kind != "status":
        return ApiError(BY_UPSTREAM_FAILURE[failure.kind], headers=headers, cause=cause)
    code, shows_message = BY_UPSTREAM_STATUS.get(failure.status, ("upstream_error", False))
    if error.trouble is not None:
        code, shows_message = "upstream_account", False
    if code == "upstream_account":
        UPSTREAM_ACCOUNT_ERRORS.labels(failure.status).inc()
        LOGGER.error(
            "OpenRouter rejects our account: %d %s",
            failure.status,
            error.message,
            extra={"type": "upstream_account", "requestId": request_id, "status": failure.status},
        )
    if code == "rate_limited_upstream" and failure.retry_after_s is not None:
        headers["Retry-After"] = f"{failure.retry_after_s:.0f}"
    return ApiError(code, error.message if shows_message else None, headers=headers, cause=cause)
