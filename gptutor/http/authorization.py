"""The Authorization header of a request."""

import re

from aiohttp import web

from gptutor.errors import ApiError

PUBLIC_PART = re.compile(r"sk-user-[1-9][0-9]{0,18}-[a-z2-7]{4}(?=[a-z2-7]{8})")
"""What `money.keys.display_prefix` shows of a key, also of one with a typo."""


def bearer_token(request: web.Request) -> str:
    """The token of the one Authorization header. Raises ApiError."""
    headers = request.headers.getall("Authorization", [])
    if not headers:
        raise ApiError("invalid_key", cause="there is no Authorization header")
    if len(headers) > 1:
        raise ApiError("invalid_key", cause="there are several Authorization headers")
    scheme, _, token = headers[0].partition(" ")
    token = token.strip()
    if not token or scheme.lower() != "bearer":
        raise ApiError("invalid_key", cause="the Authorization header does not have the form Bearer <key>")
    return token


def public_key_part(request: web.Request) -> str | None:
    """The part of the request's API key that may be logged, by which its owner recognises it; None without a key of ours."""
    _, _, token = request.headers.get("Authorization", "").partition(" ")
    found = PUBLIC_PART.match(token.strip())
    return found[0] if found else None


def credential_hash(request: web.Request) -> int:
    """By Python's hash, which is seeded for each process and not reversible."""
    return hash(request.headers.get("Authorization", ""))
