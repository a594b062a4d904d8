"""The request's body: invited, counted and timed while it arrives.

The limit of its declared length is in `middlewares.body_limit`, before anything is read. Here is the rest: a client that asks
first (`Expect: 100-continue`) is invited only once his key has been found good, a body without a declared length is counted, and
one that drips is not waited for.
"""

import asyncio
from dataclasses import dataclass

from aiohttp import HttpVersion11, StreamReader, web

from gptutor.errors import ApiError
from gptutor.http.error_response import error_response
from gptutor.http.json_body import Form, parse_json_body

WAITS_TO_BE_INVITED = web.RequestKey("awaits_continue", bool)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes and seconds; the names are those of `config.yaml`, section `server`, without their `body_`."""

    bytes_max: int
    idle_s: float
    total_s: float


SMALL_BODY_LIMITS = BodyLimits(64 * 1024, idle_s=10, total_s=30)


async def defer_continue(request: web.Request) -> web.Response | None:
    """Takes the place of aiohttp's answer to `Expect`, which comes before any check."""
    if request.headers["Expect"].lower() == "100-continue":
        request[WAITS_TO_BE_INVITED] = request.version >= HttpVersion11  # HTTP/1.0 knows no answer before the answer
        return None
    return error_response(ApiError("expectation_failed"))


def awaits_continue(request: web.Request) -> bool:
    return "Expect" in request.headers and request.get(WAITS_TO_BE_INVITED) is True


def require_json(request: web.Request) -> None:
    """Raises ApiError for a body that says it is something else; one that says nothing is looked at."""
    if request.content_type not in ("application/json", "application/octet-stream"):  # the latter stands for a missing header
        raise ApiError("unsupported_media_type")


async def read_body(request: web.Request, limits: BodyLimits) -> bytes:
    """The whole body. Raises ApiError."""
    if awaits_continue(request):
        request[WAITS_TO_BE_INVITED] = False
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun
    content = request.content
    try:
        if content.is_eof():  # it came with the head, as nearly every body does: nothing to wait for
            body = content.read_nowait()
        else:
            async with asyncio.timeout(limits.total_s):
                body = await _arriving(content, limits)
    except TimeoutError:
        raise ApiError("body_too_slow") from None
    except web.RequestPayloadError as error:
        raise ApiError("malformed_request", cause=type(error).__name__) from error
    if len(body) > limits.bytes_max:
        raise ApiError("body_too_large")
    return body


async def _arriving(content: StreamReader, limits: BodyLimits) -> bytes:
    pieces, size = [], 0
    while size <= limits.bytes_max:
        async with asyncio.timeout(limits.idle_s):
            piece = await content.readany()
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


async def read_json_body(request: web.Request, form: type[Form], limits: BodyLimits = SMALL_BODY_LIMITS) -> Form:
    """A small body as `form`. Raises ApiError."""
    require_json(request)
    if request.content_length is not None and request.content_length > limits.bytes_max:
        raise ApiError("body_too_large", f"Request body is larger than {limits.bytes_max} bytes")
    return parse_json_body(await read_body(request, limits), form)
