"""Structured logs: JSON lines in `logs/combined-YYYY-MM-DD.log` and on standard output (contract F1, F2).

A record is put on a queue by the event loop and written by a thread. What may be logged is decided here, in the two methods for
a request's two lines: no key, no message text, no signature can reach a line, because none is a parameter.
"""

import datetime
import logging
import logging.handlers
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO

from pythonjsonlogger.orjson import OrjsonFormatter

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


class LoggerService:
    """The lines of a request. Amounts are roubles and durations milliseconds."""

    def llm_request(self, *, model: str, user_id: int, request_id: str, stream: bool, messages: int) -> None:
        LOGGER.info(
            "LLM Request: %s",
            model,
            extra={
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
        LOGGER.log(
            logging.INFO if cause is None else logging.WARNING,
            "LLM Response: %s",
            model,
            extra={
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
        LOGGER.info(
            "HTTP %s %s %d",
            method,
            path,
            status,
            extra={
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


class DailyFileHandler(logging.StreamHandler[IO[str]]):
    """Writes to `combined-YYYY-MM-DD.log` of the current day (UTC), and deletes files older than the retention."""

    def __init__(self, directory: Path, retention_days: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._retention = datetime.timedelta(days=retention_days)
        self._day = datetime.datetime.now(datetime.UTC).date()
        super().__init__(self._open())
        self._prune()

    def emit(self, record: logging.LogRecord) -> None:
        day = datetime.datetime.fromtimestamp(record.created, datetime.UTC).date()
        if day > self._day:
            self._day = day
            if (yesterday := self.setStream(self._open())) is not None:
                yesterday.close()
            self._prune()
        super().emit(record)

    def close(self) -> None:
        self.stream.close()
        super().close()

    def _open(self) -> IO[str]:
        path = self._directory / f"combined-{self._day:%Y-%m-%d}.log"
        file = path.open("a", encoding="utf-8")
        owner = self._directory.stat()
        if os.geteuid() == 0 != owner.st_uid:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # a command run by root must not shut the service out
        return file

    def _prune(self) -> None:
        oldest = f"combined-{self._day - self._retention:%Y-%m-%d}.log"
        for path in self._directory.glob("combined-????-??-??.log"):
            if path.name < oldest:
                path.unlink(missing_ok=True)


class LineFormatter(OrjsonFormatter):
    """The field names and the time format of the contract's example."""

    def __init__(self) -> None:
        super().__init__(["message"])

    def add_fields(self, log_data: dict[str, object], record: logging.LogRecord, message_dict: dict[str, object]) -> None:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        log_data["timestamp"] = f"{moment:%Y-%m-%d %H:%M:%S}"
        log_data["level"] = record.levelname.lower()
        super().add_fields(log_data, record, message_dict)


@contextmanager
def logging_to(directory: Path, *, level: str, retention_days: int, stdout: bool) -> Iterator[LoggerService]:
    """Sets up logging for the life of a process; all lines are written when the context ends."""
    handlers: list[logging.Handler] = [DailyFileHandler(directory, retention_days)]
    if stdout:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(LineFormatter())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, *handlers)
    listener.start()
    root = logging.getLogger()
    intake = _Intake(lines)
    root.addHandler(intake)
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    try:
        yield LoggerService()
    finally:
        root.removeHandler(intake)
        listener.stop()
        for handler in handlers:
            handler.close()


class _Intake(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The queue stays inside the process: nothing needs to be formatted or copied on the event loop.
        return record
