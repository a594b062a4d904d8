"""What is logged (contract F1, F2); how it is written stands in `log_writer.py`.

What may be logged of a request is decided here, in the methods for its lines: no key, no message text, no signature can reach a
line, because none is a parameter.
"""

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import Any

LOGGER = logging.getLogger("gptutor")
WIRE = logging.getLogger("gptutor.wire")
"""What the HTTP server says of malformed requests. Its tracebacks quote the request's bytes, keys included: they are cut off."""


def _without_traceback(record: logging.LogRecord) -> bool:
    cause = record.exc_info[0] if record.exc_info else None
    record.exc_info = None
    record.cause = cause.__name__ if cause is not None else None
    return True


WIRE.addFilter(_without_traceback)
AUDIT = logging.getLogger("gptutor.audit")
"""Who changed what. Its lines are written at every `logs.level`."""
AUDIT.setLevel(logging.INFO)


Say = Callable[[int, str, dict[str, Any]], None]
"""Takes a line of a request: its level, its message, and its fields."""


def say_by_logging(level: int, message: str, fields: dict[str, Any]) -> None:
    """The standard's way, to whatever listens; `log_writer.py` has one that costs a fraction of it."""
    LOGGER.log(level, message, extra=fields)


class LoggerService:
    """The lines of a request. Amounts are roubles and durations milliseconds."""

    def __init__(self, say: Say = say_by_logging) -> None:
        self._say = say

    def llm_request(self, *, model: str, user_id: int, request_id: str, stream: bool, messages: int) -> None:
        self._say(
            logging.INFO,
            f"LLM Request: {model}",
            {
                "type": "llm",
                "model": model,
                "userId": str(user_id),
                "requestId": request_id,
                "stream": stream,
                "messagesCount": messages,
            },
        )

    def llm_response(
        self,
        *,
        model: str,
        user_id: int,
        request_id: str,
        stream: bool,
        outcome: str,
        duration_ms: int,
        generation_id: str | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        cost_usd: Decimal | None,
        cost_rub: str | None,
        cause: str | None,
    ) -> None:
        """`outcome` is `settled`, `released` or `awaiting_evidence` for an answer, else the code of the refusal."""
        self._say(
            logging.INFO if cause is None else logging.WARNING,
            f"LLM Response: {model}",
            {
                "type": "llm",
                "model": model,
                "userId": str(user_id),
                "requestId": request_id,
                "stream": stream,
                "outcome": outcome,
                "durationMs": duration_ms,
                "generationId": generation_id,
                "promptTokens": prompt_tokens,
                "completionTokens": completion_tokens,
                "costUsd": None if cost_usd is None else str(cost_usd),
                "costRub": cost_rub,
                "cause": cause,
            },
        )

    def http(self, *, method: str, path: str, status: int, request_id: str, duration_ms: int, code: str | None) -> None:
        self._say(
            logging.INFO,
            f"HTTP {method} {path} {status}",
            {
                "type": "http",
                "method": method,
                "path": path,
                "status": status,
                "requestId": request_id,
                "durationMs": duration_ms,
                "code": code,
            },
        )


def audit(
    who: str,
    what: str,
    *,
    user_id: int | None = None,
    amount_rub: str | None = None,
    reference: str | None = None,
    reason: str | None = None,
    key_id: int | None = None,
    limits: dict[str, object] | None = None,
) -> None:
    """One line for each change by hand or by a payment. Of a key there is only its number."""
    AUDIT.info(
        "Audit: %s",
        what,
        extra={
            "type": "audit",
            "who": who,
            "what": what,
            "userId": None if user_id is None else str(user_id),
            "amount": amount_rub,
            "reference": reference,
            "reason": reason,
            "keyId": key_id,
            **({} if limits is None else {"limits": limits}),
        },
    )
