"""How OpenRouter fails: `UpstreamError`, and what an error response says. No I/O."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from gptutor.openrouter.account_state import Trouble, trouble_of
from gptutor.openrouter.bill import valid_generation_id
from gptutor.openrouter.retry import Failure

REFUSALS = frozenset({400, 401, 402, 403, 404, 408, 413, 422, 429, 503})
"""Statuses of OpenRouter's own errors that prove that nothing was bought. They have a generation id too, but only of the refusal
itself: `/generation` never knows it."""
MESSAGE_CHARACTERS_MAX = 1000
API_KEY = re.compile(r"sk-[A-Za-z0-9_-]+")
"""An error message about our key may quote the key; it must reach neither the log nor a client."""


class UpstreamError(Exception):
    """OpenRouter gave no usable response. `message` is OpenRouter's own text for the client, where there is one.

    `trouble` is what the error says of our own account.
    """

    def __init__(self, failure: Failure, message: str | None = None, trouble: Trouble | None = None) -> None:
        super().__init__(f"{failure.kind} {failure.status or ''}".strip())
        self.failure = failure
        self.message = message
        self.trouble = trouble


class PoolExhausted(UpstreamError):
    """All connections of the pool are in use, which says nothing about OpenRouter."""

    def __init__(self) -> None:
        super().__init__(Failure("unreachable"))


class AccountRefused(UpstreamError):
    """OpenRouter refuses our account, so the request is not sent. `message` says why, `retry_after_s` when more is known."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(Failure("unreachable", retry_after_s=retry_after_s), reason)


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """The error for an error status, with OpenRouter's message if the body has one."""
    error = _read_error(body)
    is_refusal = status in REFUSALS and isinstance(error, _Error)
    retry_after_s = _seconds(headers.get("retry-after"))
    failure = Failure(
        "broken" if status >= 500 and error is None else "status",  # without an error of OpenRouter's: a page of its edge
        status=status,
        retry_after_s=retry_after_s,
        generation_id=None if is_refusal else valid_generation_id(headers.get("x-generation-id")),
    )
    metadata = error.metadata if isinstance(error, _Error) and isinstance(error.metadata, dict) else {}
    message = _message(error)
    trouble = trouble_of(status, message, metadata, has_retry_after=retry_after_s is not None, is_own=isinstance(error, _Error))
    return UpstreamError(failure, message, trouble)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; as a date, which is rare, it is ignored."""
    return float(text) if text is not None and text.isdecimal() and len(text) < 6 else None


class _Error(msgspec.Struct):
    message: str | None = None
    metadata: Any = None


class _ErrorBody(msgspec.Struct):
    error: _Error | str | None = None


def _read_error(body: bytes) -> _Error | str | None:
    """The error that the body states; None if it is not an error of OpenRouter's, such as a page of its edge."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _message(error: _Error | str | None) -> str | None:
    message = error.message if isinstance(error, _Error) else error
    return API_KEY.sub("sk-…", message)[:MESSAGE_CHARACTERS_MAX] if message else None
