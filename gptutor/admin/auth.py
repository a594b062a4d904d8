"""Authentication of administrators: `Authorization: Bearer <token>`; the token's name stands in the audit lines.

Every token is compared, each in constant time, so that timing tells nothing about them.
"""

import hmac
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE, VAULT
from gptutor.http.authorization import bearer_token
from gptutor.money.administration import Administration

WHO = web.RequestKey("who", str)
UNAUTHENTICATED = "Invalid administrator token"


def authenticate_administrator(tokens: Mapping[str, str]) -> Middleware:
    """`tokens` by name. Without any, every request is rejected."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            token = bearer_token(request).encode(errors="surrogateescape")
        except ApiError as error:
            raise ApiError("invalid_key", UNAUTHENTICATED, cause=error.cause) from None
        names = [name for name, known in tokens.items() if hmac.compare_digest(token, known.encode())]
        if not names:
            raise ApiError("invalid_key", UNAUTHENTICATED, cause="the token is none of admin.token")
        request[WHO] = f"admin:{names[0]}"
        return await handler(request)

    return middleware


def administration_of(request: web.Request) -> Administration:
    """The administration in the name of the administrator who sent the request."""
    return Administration(request.app[DATABASE], request.app[VAULT], request[WHO])
