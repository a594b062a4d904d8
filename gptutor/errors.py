"""The closed list of refusals: what a caller can be told when there is no answer (contract B).

A refusal is raised anywhere above the rims and becomes a response in one place, the `errors` middleware. Its body is
`{"error": "<text>"}`; its code, one word of this list, stands in the header X-Error-Code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the list: HTTP status, default text, and whether a second attempt could be charged twice."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


DO_NOT_RETRY = {"x-should-retry": "false"}
"""Obeyed by the OpenAI SDKs, which otherwise repeat every 409, 429 and 5xx."""

RETRY_SOON = {"Retry-After": "1"}

ERRORS: dict[str, ErrorKind] = {
    # the ask
    "malformed_request": ErrorKind(400, "Malformed HTTP request"),
    "invalid_json": ErrorKind(400, "Request body is not valid JSON"),
    "duplicate_key": ErrorKind(400, "A key stands twice in one JSON object"),
    "invalid_request": ErrorKind(400, "Invalid request"),
    "model_not_found": ErrorKind(400, "Unknown model"),
    "upstream_rejected": ErrorKind(400, "OpenRouter rejected the request"),
    "body_too_large": ErrorKind(413, "Request body is too large"),
    "body_too_slow": ErrorKind(408, "Request body did not arrive in time"),
    "unsupported_encoding": ErrorKind(415, "Request body must not be compressed"),
    "unsupported_media_type": ErrorKind(415, "Content-Type must be application/json"),
    # the caller
    "invalid_key": ErrorKind(401, "Invalid API key or inactive user", {"WWW-Authenticate": "Bearer"}),
    "insufficient_balance": ErrorKind(402, "Insufficient balance", DO_NOT_RETRY),
    "key_cap_reached": ErrorKind(402, "The spending cap of this API key is reached", DO_NOT_RETRY),
    "too_many_keys": ErrorKind(409, "The account has as many API keys as it may have", DO_NOT_RETRY),
    "main_key_required": ErrorKind(403, "Only the main API key or a sign-in may change keys"),
    "repeated_request": ErrorKind(409, "A request with this Idempotency-Key was made before", DO_NOT_RETRY),
    "mismatched_request": ErrorKind(422, "This Idempotency-Key was used for a different request", DO_NOT_RETRY),
    "already_booked": ErrorKind(409, "This reference was booked before", DO_NOT_RETRY),
    "moderated": ErrorKind(403, "OpenRouter's moderation refused the request"),
    "rate_limited": ErrorKind(429, "Too Many Requests"),
    "too_many_at_once": ErrorKind(429, "Too many requests at the same time", RETRY_SOON),
    "rate_limited_upstream": ErrorKind(429, "The model is overloaded, try again later", {"Retry-After": "5"}),
    # the route
    "not_found": ErrorKind(404, "Not found"),
    "method_not_allowed": ErrorKind(405, "Method not allowed"),
    "expectation_failed": ErrorKind(417, "The only expectation that is met is 100-continue"),
    # us and upstream
    "internal_error": ErrorKind(500, "Internal server error"),
    "upstream_error": ErrorKind(500, "Internal server error"),
    "upstream_unreachable": ErrorKind(500, "Internal server error"),
    "upstream_account": ErrorKind(500, "Internal server error", DO_NOT_RETRY),
    "upstream_outcome_unknown": ErrorKind(500, "Internal server error", DO_NOT_RETRY),
    "upstream_timeout": ErrorKind(504, "OpenRouter did not answer in time", DO_NOT_RETRY),
    "database_unavailable": ErrorKind(503, "Service temporarily unavailable", RETRY_SOON),
    "not_ready": ErrorKind(503, "Service is starting or stopping", RETRY_SOON),
    "journal_unavailable": ErrorKind(503, "Service temporarily unavailable", RETRY_SOON),
    "payments_unavailable": ErrorKind(503, "The payment provider does not answer, try again later", RETRY_SOON),
}


class ApiError(Exception):
    """A refusal of one request. `more` stands beside the text in its body; `cause` is for the log, and never leaves the house."""

    def __init__(
        self,
        code: str,
        text: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, str | int] | None = None,
        cause: str | None = None,
    ) -> None:
        kind = ERRORS[code]
        self.code = code
        self.status = kind.status
        self.text = text or kind.text
        self.headers = {**kind.headers, **(headers or {})}
        self.more = more or {}
        self.cause = cause
        super().__init__(self.text)
