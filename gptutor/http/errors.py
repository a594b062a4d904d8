"""Errors as responses, with the code in the header X-Error-Code (contract B1); `error_form.py` has the forms of their bodies."""

import functools
import json
import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.errors import ApiError
from gptutor.http.app_keys import AWAITS_CONTINUE, ERROR_CAUSE, ERROR_CODE, ERROR_FORM, REQUEST_ID
from gptutor.http.error_form import error_document
from gptutor.telemetry.logs import PATH_CHARACTERS_MAX
from gptutor.telemetry.metrics import ERROR_RESPONSES

LOGGER = logging.getLogger("gptutor.http")

compact_json = functools.partial(json.dumps, separators=(",", ":"))
"""Clients search the object's text for `"code":402`."""


def error_response(error: ApiError, request: web.Request | None = None) -> web.Response:
    """In the form for the client that sent `request`; as a text without one, if its headers could not be read."""
    ERROR_RESPONSES.labels(error.code).inc()
    if request is None:
        document = error_document(error, "text", {})
    else:
        document = error_document(error, request.app.get(ERROR_FORM, "text"), request.headers)
    return web.json_response(
        document,
        status=error.status,
        headers={**error.headers, "X-Error-Code": error.code},
        dumps=json.dumps if isinstance(document["error"], str) else compact_json,
    )


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception into an error response; the only broad `except` of the service."""
    try:
        return await handler(request)
    except ApiError as error:
        return _respond(request, error)
    except web.HTTPMethodNotAllowed as error:
        return _respond(request, ApiError("method_not_allowed", headers={"Allow": ", ".join(sorted(error.allowed_methods))}))
    except web.HTTPNotFound:
        return _respond(request, ApiError("not_found"))
    except DatabaseRefused as error:
        LOGGER.error("%s", error)  # identical for all requests, so that one line per minute is written
        return _respond(request, ApiError("database_unavailable", cause=str(error)))
    except DatabaseUnavailable as error:
        return _respond(request, ApiError("database_unavailable", cause=str(error)))
    except Exception as error:
        LOGGER.exception(
            "Unexpected exception", extra={"requestId": request[REQUEST_ID], "path": request.path[:PATH_CHARACTERS_MAX]}
        )
        return _respond(request, ApiError("internal_error", cause=type(error).__name__))


def _respond(request: web.Request, error: ApiError) -> web.Response:
    request[ERROR_CODE], request[ERROR_CAUSE] = error.code, error.cause
    response = error_response(error, request)
    if request.get(AWAITS_CONTINUE):
        response.force_close()  # the client may or may not send the body now: the next bytes on this connection are ambiguous
    return response
