"""What is logged (contract F1, F2); `log_writer.py` writes it to files.

LoggerService decides what is logged about a request: no key, no message text and no signature can reach a log line, because no
method has a parameter for them.
"""

import logging
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

LOGGER = logging.getLogger("gptutor")
HTTP_SERVER_LOGGER = logging.getLogger("gptutor.http_server")
"""Used by the HTTP server, for malformed requests. Tracebacks are removed: they quote bytes of the request, API keys included."""


def _without_traceback(record: logging.LogRecord) -> bool:
    cause = record.exc_info[0] if record.exc_info else None
    record.exc_info = None
    record.cause = cause.__name__ if cause is not None else None
    return True


HTTP_SERVER_LOGGER.addFilter(_without_traceback)
AUDIT_LOGGER = logging.getLogger("gptutor.audit")
"""Audit lines: who changed what. They are written whatever `logs.level` is."""
AUDIT_LOGGER.setLevel(logging.INFO)


PATH_CHARACTERS_MAX = 200
CAUSE_CHARACTERS_MAX = 200
API_KEY = re.compile(r"sk-[A-Za-z0-9_-]+")
"""A client may put a key into the path or another field by mistake; the log must not have it."""
REFUSED = 400
"""The lowest HTTP status of a refused request."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a refused request: the address as the rate limits see it, and the public part of the key; None where unknown."""

    address: str | None
    key: str | None

    @property
    def fields(self) -> dict[str, str | None]:
        return {"address": self.address, "key": self.key}


class WriteLine(Protocol):
    """Writes one log line. Lines with a `kind`, those of refused requests, are limited per kind and minute."""

    def __call__(self, level: int, message: str, fields: dict[str, Any], kind: str | None = None) -> None: ...


def write_line_by_logging(level: int, message: str, fields: dict[str, Any], kind: str | None = None) -> None:
    """Passes the line to the handlers of the standard `logging`. `LogWriter.write_line` is a much cheaper equivalent."""
    LOGGER.log(level, message, extra=fields)


class LoggerService:
    """The log lines of a request. Amounts are in roubles, durations in milliseconds."""

    def __init__(self, write_line: WriteLine = write_line_by_logging) -> None:
        self._write_line = write_line

    def llm_request(
        self, *, model: str, user_id: int, request_id: str, stream: bool, messages: int, refusal: str | None = None
    ) -> None:
        """`refusal` is the code of the error if nothing was held for the request: such lines are limited per minute."""
        self._write_line(
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
            None if refusal is None else f"LLM Request: {refusal}",
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
        caller: Caller | None = None,
        refusal: str | None = None,
    ) -> None:
        """`outcome` is `settled`, `released` or `awaiting_evidence`, or the code of the error that the client received.

        `caller` is given if there is a cause. `refusal`: see `llm_request`.
        """
        self._write_line(
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
                "cause": None if cause is None else _bounded(cause, CAUSE_CHARACTERS_MAX),
                **({} if caller is None else caller.fields),
            },
            None if refusal is None else f"LLM Response: {refusal}",
        )

    def http(
        self,
        *,
        method: str,
        path: str,
        status: int,
        request_id: str,
        duration_ms: int,
        code: str | None,
        cause: str | None = None,
        caller: Caller | None = None,
        user_id: int | None = None,
    ) -> None:
        """A long path or cause is cut: a client chooses it. `caller` is given for refused requests."""
        path = _bounded(path, PATH_CHARACTERS_MAX)
        self._write_line(
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
                **({} if cause is None else {"cause": _bounded(cause, CAUSE_CHARACTERS_MAX)}),
                **({} if user_id is None else {"userId": str(user_id)}),
                **({} if caller is None else caller.fields),
            },
            f"HTTP {status} {code}" if status >= REFUSED else None,
        )


def _bounded(text: str, characters_max: int) -> str:
    """Without API keys, and cut."""
    text = API_KEY.sub("sk-…", text)
    return text if len(text) <= characters_max else f"{text[:characters_max]}…"


def audit(
    actor: str,
    action: str,
    *,
    user_id: int | None = None,
    amount_rub: str | None = None,
    reference: str | None = None,
    reason: str | None = None,
    key_id: int | None = None,
    limits: dict[str, object] | None = None,
    fields: list[str] | None = None,
) -> None:
    """Writes the audit line of a change made by `actor` (an administrator, the CLI, a payment). Keys appear by `key_id` only.

    `fields` are the names of what was changed, without the values.
    """
    AUDIT_LOGGER.info(
        "Audit: %s",
        action,
        extra={
            "type": "audit",
            "who": actor,
            "what": action,
            "userId": None if user_id is None else str(user_id),
            "amount": amount_rub,
            "reference": reference,
            "reason": reason,
            "keyId": key_id,
            **({} if limits is None else {"limits": limits}),
            **({} if fields is None else {"fields": fields}),
        },
    )
