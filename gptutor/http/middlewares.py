"""Middlewares that every request passes; their order is in `app.py`, and `errors` is in `errors.py`."""

import asyncio
import re
import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gptutor.errors import ApiError
from gptutor.http.address_limits import caller_of
from gptutor.http.app_keys import ERROR_CAUSE, ERROR_CODE, LOGGED, REQUEST_ID, USER
from gptutor.http.request_counts import count_request
from gptutor.http.request_ids import new_request_id
from gptutor.telemetry.logs import REFUSED, LoggerService

NO_ENCODING = ("", "identity")
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request an id: the client's X-Request-ID if it is well-formed, else a new one."""
    given = request.headers.get("X-Request-ID", "")
    request[REQUEST_ID] = given if given and REQUEST_ID_PATTERN.fullmatch(given) else new_request_id()
    return await handler(request)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal: sets X-Request-ID on the response. A middleware would come too late, because a stream's headers leave earlier."""
    try:
        current = request[REQUEST_ID]
    except KeyError:  # the server rejected the request before the middlewares, such as an unknown `Expect`
        current = new_request_id()
    response.headers["X-Request-ID"] = current


def access_log(log: LoggerService) -> Middleware:
    """Counts each request, and logs one line for it, unless the handler logs the request itself (LOGGED)."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            count_request(request, None)
            raise
        count_request(request, response.status)
        if LOGGED not in request:
            user = request.get(USER)
            log.http(
                method=request.method,
                path=request.path,
                status=response.status,
                request_id=request[REQUEST_ID],
                duration_ms=round((time.monotonic() - started) * 1000),
                code=request.get(ERROR_CODE),
                cause=request.get(ERROR_CAUSE),
                caller=caller_of(request) if response.status >= REFUSED else None,
                user_id=None if user is None else user.account_id,
            )
        return response

    return middleware


def body_limit(bytes_max: int) -> Middleware:
    """Rejects a body by its declared length or encoding, before it is read; `read_body` counts bodies of unknown length."""
    text = f"Request body is larger than {bytes_max} bytes"

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (request.content_length or 0) > bytes_max:
            raise ApiError("body_too_large", text)
        if any(value.strip().lower() not in NO_ENCODING for value in request.headers.getall("Content-Encoding", ())):
            raise ApiError("unsupported_encoding")
        return await handler(request)

    return middleware
