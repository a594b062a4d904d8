"""Reading a request's body, within limits of size and time.

`middlewares.body_limit` rejects a declared length that is too large before anything is read. Here a body without a declared
length is counted while it arrives, a slow one times out, and a client that sent `Expect: 100-continue` is told to go on only
once its key has been accepted.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from aiohttp import HttpVersion11, StreamReader, web

from gptutor.errors import ApiError
from gptutor.http.app_keys import AWAITS_CONTINUE
from gptutor.http.errors import error_response
from gptutor.http.json_body import Body, parse_json_body


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes; seconds between two reads; seconds in total."""

    bytes_max: int
    idle_s: float
    total_s: float


SMALL_BODY_LIMITS = BodyLimits(64 * 1024, idle_s=10, total_s=30)


async def defer_continue(request: web.Request) -> web.Response | None:
    """Handles `Expect` in place of aiohttp, which would send `100 Continue` before any middleware runs."""
    if request.headers["Expect"].lower() == "100-continue":
        request[AWAITS_CONTINUE] = request.version >= HttpVersion11  # HTTP/1.0 has no interim responses
        return None
    return error_response(ApiError("expectation_failed"), request)


def awaits_continue(request: web.Request) -> bool:
    return "Expect" in request.headers and request.get(AWAITS_CONTINUE) is True


def require_json(request: web.Request) -> None:
    """Raises ApiError if Content-Type names another type. A missing header is accepted."""
    if request.content_type not in ("application/json", "application/octet-stream"):  # the latter is aiohttp's for a missing one
        raise ApiError("unsupported_media_type")


class BodyObserver(Protocol):
    """Learns of a body's bytes as they arrive."""

    async def receive(self, size: int) -> None:
        """So many more bytes of the body have arrived. Raises ApiError to reject the body."""


async def read_body(request: web.Request, limits: BodyLimits, observer: BodyObserver | None = None) -> bytes:
    """The whole body. Raises ApiError."""
    if awaits_continue(request):
        request[AWAITS_CONTINUE] = False
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the response proper nothing has been written
    content = request.content
    try:
        if content.is_eof():  # the body came with the headers, as nearly every body does
            body = content.read_nowait()
            if observer is not None:
                await observer.receive(len(body))
        else:
            async with asyncio.timeout(limits.total_s):
                body = await _read_chunks(content, limits, observer)
    except TimeoutError:
        raise ApiError("body_too_slow") from None
    except web.RequestPayloadError as error:
        raise ApiError("malformed_request", cause=type(error).__name__) from error
    if len(body) > limits.bytes_max:
        raise ApiError("body_too_large")
    return body


async def _read_chunks(content: StreamReader, limits: BodyLimits, observer: BodyObserver | None) -> bytes:
    """The body, or somewhat more than `bytes_max` of it. Raises TimeoutError."""
    chunks, size = [], 0
    while size <= limits.bytes_max:
        async with asyncio.timeout(limits.idle_s):
            chunk = await content.readany()
        if not chunk:
            break
        if observer is not None:
            await observer.receive(len(chunk))
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


async def read_json_body(request: web.Request, struct: type[Body], limits: BodyLimits = SMALL_BODY_LIMITS) -> Body:
    """A small JSON body, decoded as `struct`. Raises ApiError."""
    require_json(request)
    if request.content_length is not None and request.content_length > limits.bytes_max:
        raise ApiError("body_too_large", f"Request body is larger than {limits.bytes_max} bytes")
    return parse_json_body(await read_body(request, limits), struct)
