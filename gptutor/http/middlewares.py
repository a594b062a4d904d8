"""What happens to every request before its handler; the order is in `app.py`."""

import itertools
import logging
import os
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.errors import ApiError
from gptutor.http.body import awaits_continue
from gptutor.http.error_response import error_response
from gptutor.telemetry.logs import LoggerService

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)
ERROR_CODE = web.RequestKey("error_code", str)
LOGGED = web.RequestKey("logged", bool)

LOGGER = logging.getLogger("gptutor.http")
KEY_IN_PATH = re.compile(r"sk-[A-Za-z0-9_-]+")
"""Somebody may put a key into an address; it must not get into the log."""
REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,128}")


class _Ids:
    """UUIDs of this process: their first half is its own random one, the last counts. A whole new one costs ten times as much."""

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._first = str(uuid.uuid4())[:24]
        self._count = itertools.count(secrets.randbits(40))

    def __call__(self) -> str:
        return f"{self._first}{next(self._count):012x}"


new_request_id = _Ids()


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names the request; a caller's own name is kept if it is harmless."""
    given = request.headers.get("X-Request-ID", "")
    request[REQUEST_ID] = given if given and REQUEST_ID_FORM.fullmatch(given) else new_request_id()
    return await handler(request)


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """The other half of `request_id`: a signal, because the headers of a stream are sent inside its handler."""
    try:
        name = request[REQUEST_ID]
    except KeyError:  # what the server refuses by itself, such as an unknown `Expect`, has not passed the middlewares
        name = new_request_id()
    response.headers["X-Request-ID"] = name


def access_log(log: LoggerService) -> Middleware:
    """One line for each request, unless its handler has taken that over (LOGGED): an exchange writes two of its own."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        response = await handler(request)
        if LOGGED not in request:
            log.http(
                method=request.method,
                path=KEY_IN_PATH.sub("sk-…", request.path),
                status=response.status,
                request_id=request[REQUEST_ID],
                duration_ms=round((time.monotonic() - started) * 1000),
                code=request.get(ERROR_CODE),
            )
        return response

    return middleware


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure becomes `{"error": "<text>"}` here, and nowhere else."""
    try:
        return await handler(request)
    except ApiError as refusal:
        return refused(request, refusal)
    except web.HTTPMethodNotAllowed as error:
        return refused(request, ApiError("method_not_allowed", headers={"Allow": ", ".join(sorted(error.allowed_methods))}))
    except web.HTTPNotFound:
        return refused(request, ApiError("not_found"))
    except DatabaseRefused as error:
        LOGGER.error("%s", error, extra={"requestId": request[REQUEST_ID]})
        return refused(request, ApiError("database_unavailable", cause=str(error)))
    except DatabaseUnavailable as error:
        return refused(request, ApiError("database_unavailable", cause=str(error)))
    except Exception:
        LOGGER.exception("A handler failed", extra={"requestId": request[REQUEST_ID], "path": request.path})
        return refused(request, ApiError("internal_error"))


def refused(request: web.Request, refusal: ApiError) -> web.Response:
    request[ERROR_CODE] = refusal.code
    response = error_response(refusal)
    if awaits_continue(request):
        response.force_close()  # whether his body still comes is his choice: what follows on this connection has no meaning
    return response


def body_limit(body_bytes_max: int) -> Middleware:
    """Refuses what is too large by its own word, before reading it; `read_body` counts what arrives without one."""
    text = f"Request body is larger than {body_bytes_max} bytes"

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (request.content_length or 0) > body_bytes_max:
            raise ApiError("body_too_large", text)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError("unsupported_encoding")
        return await handler(request)

    return middleware
