"""Counts all requests by route and status. The label is the route's pattern: a client's path must not make a time series."""

from aiohttp import web

from gptutor.errors import ERRORS
from gptutor.telemetry.metrics import HTTP_REQUESTS

UNKNOWN = "unknown"
DISCONNECTED = "disconnected"
STATUSES = sorted({"200", DISCONNECTED, *(str(error.status) for error in ERRORS.values())})


def count_request(request: web.Request, status: int | None) -> None:
    """`status` None: the client went before the response."""
    resource = request.match_info.route.resource
    route = UNKNOWN if resource is None else resource.canonical
    HTTP_REQUESTS.add((route, DISCONNECTED if status is None else str(status)))


def count_routes(app: web.Application) -> None:
    """All routes of the application are present with 0."""
    routes = [UNKNOWN, *(resource.canonical for resource in app.router.resources())]
    HTTP_REQUESTS.begin((route, status) for route in routes for status in STATUSES)
