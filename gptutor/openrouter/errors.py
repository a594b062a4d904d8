"""How OpenRouter fails us: `UpstreamError`, and what an error response says. No I/O."""

import re
from collections.abc import Mapping

import msgspec

from gptutor.openrouter.bill import sane_generation_id
from gptutor.openrouter.retry import Failure

MESSAGE_CHARACTERS_MAX = 1000
KEY = re.compile(r"sk-[A-Za-z0-9_-]+")
"""A sentence about our key may quote it; it must get neither into the log nor to a caller."""


class UpstreamError(Exception):
    """OpenRouter gave no answer. `message` is its own text for the caller, where it has one."""

    def __init__(self, failure: Failure, message: str | None = None) -> None:
        super().__init__(f"{failure.kind} {failure.status or ''}".strip())
        self.failure = failure
        self.message = message


class PoolExhausted(UpstreamError):
    """All our connections are in use: it says nothing of OpenRouter."""

    def __init__(self) -> None:
        super().__init__(Failure("unreachable"))


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """The error that a error status means, with OpenRouter's sentence if the body has one."""
    is_ours, message = _read_error(body)
    failure = Failure(
        "broken" if status >= 500 and not is_ours else "status",  # the edge's own page
        status=status,
        retry_after_s=_seconds(headers.get("retry-after")),
        generation_id=sane_generation_id(headers.get("x-generation-id")),
    )
    return UpstreamError(failure, message)


def _seconds(text: str | None) -> float | None:
    """Retry-After in its form of seconds; its form of a date is rare and read as no hint."""
    return float(text) if text is not None and text.isdecimal() and len(text) < 6 else None


class _Error(msgspec.Struct):
    message: str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _Error | str | None = None


def _read_error(document: bytes) -> tuple[bool, str | None]:
    """Whether a body is OpenRouter's word of an error, and not its edge's page; and its sentence about it, if it has one."""
    try:
        error = msgspec.json.decode(document, type=_ErrorAnswer).error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False, None
    message = error.message if isinstance(error, _Error) else error
    return error is not None, KEY.sub("sk-…", message)[:MESSAGE_CHARACTERS_MAX] if message else None
