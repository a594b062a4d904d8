"""Who may come in: `Authorization: Bearer <token>`, and under which name he stands in the audit lines.

Tokens are compared in constant time, all of them whatever the first one says.
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
NO_ENTRY = "Invalid administrator's token"


def authenticate_administrator(tokens: Mapping[str, str]) -> Middleware:
    """`tokens` by name. Nobody comes in where there are none."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            token = bearer_token(request).encode(errors="surrogateescape")
        except ApiError:
            raise ApiError("invalid_key", NO_ENTRY) from None
        names = [name for name, known in tokens.items() if hmac.compare_digest(token, known.encode())]
        if not names:
            raise ApiError("invalid_key", NO_ENTRY)
        request[WHO] = f"admin:{names[0]}"
        return await handler(request)

    return middleware


def administration_of(request: web.Request) -> Administration:
    """What the administrator who asks may do."""
    return Administration(request.app[DATABASE], request.app[VAULT], request[WHO])
