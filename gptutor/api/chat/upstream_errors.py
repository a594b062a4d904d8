"""What the caller is told when OpenRouter gave no answer (contract B6): one table, a reason in each row.

Trouble of our own account upstream is never shown as the caller's: 401, 402 and a key's limit are 500 for him, and an error in
the log for the operator.
"""

import logging

from gptutor.errors import DO_NOT_RETRY, ApiError
from gptutor.openrouter.errors import UpstreamError
from gptutor.telemetry.metrics import UPSTREAM_ACCOUNT_ERRORS

LOGGER = logging.getLogger("gptutor.upstream")

# Upstream status → (code of ours, whether OpenRouter's own message is passed on)
BY_STATUS: dict[int, tuple[str, bool]] = {
    400: ("upstream_rejected", True),  # the caller's own mistake
    404: ("upstream_rejected", True),  # no such model, or no provider under his conditions
    413: ("upstream_rejected", True),  # more than the model takes
    422: ("upstream_rejected", True),  # well-formed, but not what the model takes
    401: ("upstream_account", False),  # our key is wrong
    402: ("upstream_account", False),  # our credit is used up
    403: ("moderated", True),  # moderation; a key's limit is told apart below
    408: ("upstream_timeout", False),
    429: ("rate_limited_upstream", False),
    504: ("upstream_timeout", False),
    524: ("upstream_timeout", False),
}
BY_KIND = {
    "unreachable": "upstream_unreachable",
    "timeout": "upstream_timeout",
    "broken": "upstream_outcome_unknown",
}
KEY_LIMIT_WORDS = ("key limit", "limit exceeded", "insufficient", "guardrail budget")


def to_api_error(error: UpstreamError) -> ApiError:
    failure = error.failure
    cause = f"upstream: {error}"
    if failure.kind != "status":
        return ApiError(BY_KIND[failure.kind], cause=cause)
    code, told = BY_STATUS.get(failure.status, ("upstream_error", False))
    if failure.status == 403 and any(word in (error.message or "").lower() for word in KEY_LIMIT_WORDS):
        code, told = "upstream_account", False
    if code == "upstream_account":
        UPSTREAM_ACCOUNT_ERRORS.labels(failure.status).inc()
        LOGGER.error("OpenRouter refuses our account: %d %s", failure.status, error.message)
    headers = {}
    if code == "rate_limited_upstream" and failure.retry_after_s is not None:
        headers["Retry-After"] = f"{failure.retry_after_s:.0f}"
    if not failure.bought_nothing:
        headers.update(DO_NOT_RETRY)
    return ApiError(code, error.message if told else None, headers=headers, cause=cause)
