"""The Authorization header of a request."""

from aiohttp import web

from gptutor.errors import ApiError


def bearer_token(request: web.Request) -> str:
    """The token of the one Authorization header. Raises ApiError."""
    headers = request.headers.getall("Authorization", [])
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    token = token.strip()
    if not token or scheme.lower() != "bearer":
        raise ApiError("invalid_key")
    return token


def credential_hash(request: web.Request) -> int:
    """By Python's hash, which is seeded for each process and not reversible."""
    return hash(request.headers.get("Authorization", ""))
