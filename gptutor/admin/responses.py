"""Responses of the administrators' API: `{"data": …}`, and its errors in the form of all others (contract B1)."""

from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from gptutor.errors import ApiError
from gptutor.money.administration import ReasonMissing
from gptutor.money.amounts import InvalidAmount
from gptutor.money.bookings import AlreadyBooked, Uncovered
from gptutor.money.key_limits import InvalidLimit
from gptutor.money.keyring import KEYS_MAX, NoSuchKey, TooManyKeys
from gptutor.money.users import NoSuchUser, NotErasable, UserErased

# Exceptions of the administration → code and text of the error; None: the exception's own text.
ERRORS: dict[type[Exception], tuple[str, str | None]] = {
    NoSuchUser: ("not_found", "There is no user with this id"),
    NoSuchKey: ("not_found", "The user has no active key with this id"),
    TooManyKeys: ("invalid_request", f"The user already has {KEYS_MAX} active keys; revoke one first"),
    AlreadyBooked: ("already_booked", None),
    Uncovered: ("invalid_request", "The refund exceeds the available balance; an adjustment can take more"),
    InvalidAmount: ("invalid_request", None),
    InvalidLimit: ("invalid_request", None),
    ReasonMissing: ("invalid_request", None),
    NotErasable: ("invalid_request", None),
    UserErased: ("invalid_request", None),
}


@web.middleware
async def administration_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Translates the administration's exceptions. Raises ApiError."""
    try:
        return await handler(request)
    except tuple(ERRORS) as error:
        code, text = ERRORS[type(error)]
        own = f"A booking with the reference {error} exists already" if isinstance(error, AlreadyBooked) else str(error)
        raise ApiError(code, text or own) from error


def data_response(value: Any, status: int = 200, **beside: Any) -> web.Response:
    """`{"data": value}`, with the members of `beside` next to `data`."""
    return web.Response(body=orjson.dumps({"data": value, **beside}), status=status, content_type="application/json")
