"""CORS: which web pages may call the API, which headers they may send, and which ones they may read.

The API uses no cookies and no other credentials that a browser adds by itself: a key is in a header that only the page can set.
So all origins can be allowed, which is the default, as it is at OpenRouter.
"""

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

REQUEST_HEADERS = frozenset(
    {"accept", "authorization", "content-type", "http-referer", "idempotency-key", "user-agent", "x-request-id", "x-title"}
    | {"traceparent", "tracestate", "x-api-key"}  # OpenRouter allows them too, so clients send them
)
REQUEST_HEADER_PREFIXES = ("x-stainless-", "openai-", "x-openrouter-")  # what the SDKs say about themselves
RESPONSE_HEADERS = (
    "Retry-After, X-Error-Code, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-ID, x-should-retry"
)
PREFLIGHT_MAX_AGE_S = "7200"  # the most that browsers accept
ANY = "*"


def cors(origins: frozenset[str], *, methods: Iterable[str], request_headers: Iterable[str]) -> Middleware:
    """Answers preflight requests. `origins` may contain `*`; `request_headers` are allowed beside REQUEST_HEADERS."""
    allowed_methods = ", ".join(methods)
    allowed_headers = REQUEST_HEADERS.union(name.lower() for name in request_headers)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not is_preflight or not _is_allowed(request, origins):
            return await handler(request)
        names = (name.strip().lower() for name in request.headers.get("Access-Control-Request-Headers", "").split(","))
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": allowed_methods,
                "Access-Control-Allow-Headers": ", ".join(
                    name for name in names if name in allowed_headers or name.startswith(REQUEST_HEADER_PREFIXES)
                ),
                "Access-Control-Max-Age": PREFLIGHT_MAX_AGE_S,
            },
        )

    return middleware


def add_cors_headers(
    origins: frozenset[str], response_headers: Iterable[str]
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Signal: lets the page read the response, with RESPONSE_HEADERS and `response_headers`.

    A middleware would come too late, because a stream's headers leave earlier.
    """
    exposed = ", ".join([RESPONSE_HEADERS, *response_headers])

    async def signal(request: web.Request, response: web.StreamResponse) -> None:
        if "Origin" not in request.headers:
            return
        if ANY not in origins:
            response.headers["Vary"] = "Origin"
        if _is_allowed(request, origins):
            response.headers["Access-Control-Allow-Origin"] = ANY if ANY in origins else request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = exposed

    return signal


def _is_allowed(request: web.Request, origins: frozenset[str]) -> bool:
    return ANY in origins or request.headers.get("Origin") in origins
