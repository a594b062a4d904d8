"""A route as one row: method, path, handler, who may call it, and which limit counts it.

The middlewares find the row of a request with `route_of`. The rows themselves stand in `gptutor/routes.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web
from aiohttp.typedefs import Handler

from gptutor.http.body import defer_continue

Access = Literal["public", "api_key", "account", "vk"]
"""Who may call a route:

- `public`: everybody;
- `api_key`: who presents an API key. The middleware only reads the key; the hold statement verifies it;
- `account`: the owner of an account, with an API key or signed in by VK;
- `vk`: who is signed in by VK.
"""
Limit = Literal[
    "chat_per_minute",  # per account, in the database, by the hold statement
    "models_per_minute",  # per address
    "sign_ins_per_minute",  # per address
    "notifications_per_minute",  # per address
    "account_pages_per_minute",  # per account
]
"""The setting in `rate_limit` that says how often a route may be called. Failed authentication is counted on top of it, on all
routes that are not public, by `unauthenticated_per_minute`; paths that do not exist, by `not_found_per_minute`."""
RefusalLimit = Literal["refused_per_minute"]
"""The setting that says how many requests may be refused: each is counted per account, in memory, before its body is read, and is
taken back when its hold is placed."""


@dataclass(frozen=True, slots=True)
class Route:
    """One row. `limit` None: requests are not counted."""

    method: str
    path: str
    handler: Handler
    access: Access
    limit: Limit | None
    refusals: RefusalLimit | None = None


class _ResourceRoute(web.ResourceRoute):
    """aiohttp's route, with the row that it was made from."""

    def __init__(self, method: str, row: Route, resource: web.Resource) -> None:
        super().__init__(method, row.handler, resource, expect_handler=defer_continue)
        self.row = row


def add_routes(app: web.Application, routes: Iterable[Route]) -> None:
    """Registers the rows; GET answers HEAD as well."""
    for row in routes:
        resource = app.router.add_resource(row.path)
        for method in ("HEAD", "GET") if row.method == "GET" else (row.method,):
            resource.register_route(_ResourceRoute(method, row, resource))


def route_of(request: web.Request) -> Route | None:
    """The row that the request matched; None where the response is 404 or 405."""
    route = request.match_info.route
    return route.row if isinstance(route, _ResourceRoute) else None
