"""The rim at which aiohttp's exceptions become ours, by what they prove about the purchase: `UpstreamError`."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import msgspec

from gptutor.openrouter.bill import sane_generation_id
from gptutor.openrouter.retry import Failure

ERROR_BYTES_MAX = 64 * 1024
ERROR_BODY_S = 5.0
MESSAGE_CHARACTERS_MAX = 1000

NEVER_SENT = (
    aiohttp.ClientConnectorError,  # refused, no such host, a certificate that is none, a proxy that is away
    aiohttp.ConnectionTimeoutError,
)


class UpstreamError(Exception):
    """OpenRouter gave no answer. `message` is its own text for the caller, where it has one."""

    def __init__(self, failure: Failure, message: str | None = None) -> None:
        super().__init__(f"{failure.kind} {failure.status or ''}".strip())
        self.failure = failure
        self.message = message


@dataclass(slots=True)
class Progress:
    """How far an attempt has come: whoever has no connection yet has bought nothing, whatever the exception is."""

    has_queued: bool = False
    is_connected: bool = False


def noting_progress() -> aiohttp.TraceConfig:
    async def queued(session: aiohttp.ClientSession, request: Any, event: Any) -> None:
        if request.trace_request_ctx is not None:
            request.trace_request_ctx.has_queued = True

    async def connected(session: aiohttp.ClientSession, request: Any, event: Any) -> None:
        if request.trace_request_ctx is not None:
            request.trace_request_ctx.is_connected = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_queued_start.append(queued)
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    return trace


class translated:  # noqa: N801 - reads as a statement
    """Turns aiohttp's exceptions into UpstreamError, by what they prove about the purchase.

    Those that quote the proxy's address, and its password with it, are not kept as the cause.
    """

    def __init__(self, generation_id: str | None = None, *, progress: Progress | None = None) -> None:
        self._generation_id = generation_id
        self._progress = progress

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (aiohttp.ClientHttpProxyError, aiohttp.InvalidURL)):
            raise UpstreamError(Failure("unreachable")) from None
        never_connected = self._progress is not None and not self._progress.is_connected
        if isinstance(error, NEVER_SENT) or (never_connected and isinstance(error, (aiohttp.ClientError, OSError, ValueError))):
            raise UpstreamError(Failure("unreachable")) from error
        if isinstance(error, TimeoutError):
            raise UpstreamError(Failure("timeout", generation_id=self._generation_id)) from error
        if isinstance(error, (aiohttp.ClientError, OSError)):
            raise UpstreamError(Failure("broken", generation_id=self._generation_id)) from error


async def read_refusal(response: aiohttp.ClientResponse) -> UpstreamError:
    """The error that a status of refusal means, with OpenRouter's sentence if the body has one."""
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(ERROR_BODY_S):
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > ERROR_BYTES_MAX:
                    break
    is_ours, message = _read_error(body)
    from_the_edge = response.status >= 500 and not is_ours
    return UpstreamError(_failure(response, "broken" if from_the_edge else "status"), message)


def _failure(response: aiohttp.ClientResponse, kind: Literal["status", "broken"]) -> Failure:
    return Failure(
        kind,
        status=response.status,
        retry_after_s=_seconds(response.headers.get("Retry-After")),
        generation_id=generation_id_of(response),
    )


def generation_id_of(response: aiohttp.ClientResponse) -> str | None:
    return sane_generation_id(response.headers.get("X-Generation-Id"))


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
    return error is not None, message[:MESSAGE_CHARACTERS_MAX] if message else None
