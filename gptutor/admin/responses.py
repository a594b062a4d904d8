"""What the listener answers: `{"data": …}`, and what went wrong as a refusal in the form of all others (contract B1)."""

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
from gptutor.money.users import NoSuchUser

# What the administration raises → the code of its refusal, and its text; None: the error's own.
FACTS: dict[type[Exception], tuple[str, str | None]] = {
    NoSuchUser: ("not_found", "There is no such user"),
    NoSuchKey: ("not_found", "The user has no living key of this number"),
    TooManyKeys: ("invalid_request", f"The user has {KEYS_MAX} living keys already"),
    AlreadyBooked: ("already_booked", None),
    Uncovered: ("invalid_request", "Less is available than this refund would take; an adjustment can take more"),
    InvalidAmount: ("invalid_request", None),
    InvalidLimit: ("invalid_request", None),
    ReasonMissing: ("invalid_request", None),
}


@web.middleware
async def administration_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The administration's own errors become refusals."""
    try:
        return await handler(request)
    except tuple(FACTS) as error:
        code, text = FACTS[type(error)]
        own = f"The reference {error} was booked before" if isinstance(error, AlreadyBooked) else str(error)
        raise ApiError(code, text or own) from error


def data_response(value: Any, status: int = 200, **beside: Any) -> web.Response:
    return web.Response(body=orjson.dumps({"data": value, **beside}), status=status, content_type="application/json")
