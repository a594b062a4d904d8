"""Callers in browsers (CORS): which pages may ask, what they may send, what they may read.

No cookie and no other credential of a browser's is ever used here, a key stands in a header that only the page itself can set. So
any page may be allowed, which is the default, as at OpenRouter.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.http.middlewares import Handler
from gptutor.openrouter.service import FORWARDED_HEADERS

METHODS = "GET, POST, PATCH, DELETE, OPTIONS"
SENT = frozenset(
    {"accept", "authorization", "content-type", "http-referer", "idempotency-key", "user-agent", "x-request-id", "x-title"}
) | frozenset(name.lower() for name in FORWARDED_HEADERS)
SENT_PREFIXES = ("x-stainless-", "openai-", "x-openrouter-")  # what the SDKs say of themselves
READ = (
    "Retry-After, X-Error-Code, X-Generation-Id, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-ID, "
    "x-should-retry"
)
PREFLIGHT_S = "7200"  # no browser remembers for longer
ANY = "*"


def cors(allowed: frozenset[str]) -> Middleware:
    """Answers preflights. `allowed` are origins, or `*`."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not is_preflight or not _is_allowed(request, allowed):
            return await handler(request)
        names = (name.strip().lower() for name in request.headers.get("Access-Control-Request-Headers", "").split(","))
        sent = [name for name in names if name in SENT or name.startswith(SENT_PREFIXES)]
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": METHODS,
                "Access-Control-Allow-Headers": ", ".join(sent),
                "Access-Control-Max-Age": PREFLIGHT_S,
            },
        )

    return middleware


def open_to_pages(allowed: frozenset[str]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """The other half: a signal, because the headers of a stream are sent inside its handler."""

    async def signal(request: web.Request, response: web.StreamResponse) -> None:
        if "Origin" not in request.headers:
            return
        if ANY not in allowed:
            response.headers["Vary"] = "Origin"
        if _is_allowed(request, allowed):
            response.headers["Access-Control-Allow-Origin"] = ANY if ANY in allowed else request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = READ

    return signal


def _is_allowed(request: web.Request, allowed: frozenset[str]) -> bool:
    return ANY in allowed or request.headers.get("Origin") in allowed
