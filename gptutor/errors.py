"""The closed list of errors that a client can get (contract B).

An ApiError is raised anywhere above money/, openrouter/ and database/, and becomes a response in one place, the `errors`
middleware. The response body is `{"error": "<text>"}`, or for SDKs an object with that text (`http/error_form.py`); the code, one
word of this list, is in the header X-Error-Code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the list: HTTP status, default text, and headers that say whether and when to retry."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


DO_NOT_RETRY = {"x-should-retry": "false"}
"""The OpenAI SDKs obey this header; without it they repeat every 409, 429 and 5xx."""

RETRY_SOON = {"Retry-After": "1"}

ERRORS: dict[str, ErrorKind] = {
    # the request
    "malformed_request": ErrorKind(400, "Malformed HTTP request"),
    "invalid_json": ErrorKind(400, "Request body is not valid JSON"),
    "duplicate_field": ErrorKind(400, "A JSON object has a duplicated field"),
    "invalid_request": ErrorKind(400, "Invalid request"),
    "model_not_found": ErrorKind(400, "Unknown model"),
    "upstream_rejected": ErrorKind(400, "OpenRouter rejected the request"),
    "body_too_large": ErrorKind(413, "Request body is too large"),
    "body_too_slow": ErrorKind(408, "Request body did not arrive in time"),
    "unsupported_encoding": ErrorKind(415, "Request body must not be compressed"),
    "unsupported_media_type": ErrorKind(415, "Content-Type must be application/json"),
    # the client and its account
    "invalid_key": ErrorKind(401, "Invalid API key or inactive user", {"WWW-Authenticate": "Bearer"}),
    "insufficient_balance": ErrorKind(402, "Insufficient balance", DO_NOT_RETRY),
    "key_limit_reached": ErrorKind(402, "The spending limit of this API key is reached", DO_NOT_RETRY),
    "too_many_keys": ErrorKind(409, "The account has reached its maximum number of API keys", DO_NOT_RETRY),
    "main_key_required": ErrorKind(403, "Only the main API key or a sign-in may change keys"),
    "duplicate_request": ErrorKind(409, "A request with this Idempotency-Key was already made", DO_NOT_RETRY),
    "idempotency_mismatch": ErrorKind(422, "This Idempotency-Key was used for a different request", DO_NOT_RETRY),
    "outcome_unknown": ErrorKind(
        422, "The same request has just failed here, and may have been bought; a new Idempotency-Key buys it again", DO_NOT_RETRY
    ),
    "already_booked": ErrorKind(409, "This reference was already booked", DO_NOT_RETRY),
    "moderated": ErrorKind(403, "OpenRouter's moderation refused the request"),
    "rate_limited": ErrorKind(429, "Too Many Requests"),
    "too_many_concurrent_requests": ErrorKind(429, "Too many requests at the same time", RETRY_SOON),
    "rate_limited_upstream": ErrorKind(429, "The model is overloaded, try again later", {"Retry-After": "5"}),
    # the route
    "not_found": ErrorKind(404, "Not found"),
    "method_not_allowed": ErrorKind(405, "Method not allowed"),
    "expectation_failed": ErrorKind(417, "The only supported expectation is 100-continue"),
    # the gateway and OpenRouter
    "internal_error": ErrorKind(500, "Internal server error"),
    "upstream_error": ErrorKind(500, "Internal server error"),
    "upstream_unreachable": ErrorKind(500, "Internal server error"),
    "upstream_account": ErrorKind(500, "Internal server error", DO_NOT_RETRY),
    "upstream_account_refused": ErrorKind(503, "Service temporarily unavailable", {"Retry-After": "15"}),
    "upstream_outcome_unknown": ErrorKind(500, "Internal server error", DO_NOT_RETRY),
    "upstream_timeout": ErrorKind(504, "OpenRouter did not answer in time"),
    "database_unavailable": ErrorKind(503, "Service temporarily unavailable", RETRY_SOON),
    "overloaded": ErrorKind(503, "The service has too many bytes in memory, try again in a moment", RETRY_SOON),
    "not_ready": ErrorKind(503, "Service is starting or stopping", RETRY_SOON),
    "journal_unavailable": ErrorKind(503, "Service temporarily unavailable", RETRY_SOON),
    "audit_log_unavailable": ErrorKind(503, "The audit log cannot be written; nothing was changed"),
    "payments_unavailable": ErrorKind(503, "The payment provider does not answer, try again later", RETRY_SOON),
}


class ApiError(Exception):
    """An error for the client. `extra` are fields beside `error` in the body; `cause`, by default the text, is for the log."""

    def __init__(
        self,
        code: str,
        text: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, str | int] | None = None,
        cause: str | None = None,
    ) -> None:
        kind = ERRORS[code]
        self.code = code
        self.status = kind.status
        self.text = text or kind.text
        self.headers = {**kind.headers, **(headers or {})}
        self.extra = extra or {}
        self.cause = cause or self.text
        super().__init__(self.text)
