"""`GET /health`: the process is alive. `GET /ready`: it accepts requests. No key is needed for either."""

from typing import TYPE_CHECKING

from aiohttp import web

from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE, READINESS

if TYPE_CHECKING:
    from collections.abc import Callable


class Readiness:
    """`obstacle` says why requests that need the database are rejected; None: they are accepted.

    `account_obstacle` returns why completions are rejected by reason of our account at OpenRouter.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = "the database has not answered yet"
        self.account_obstacle: Callable[[], str | None] = lambda: None
        self._is_stopping = False

    def stop(self) -> None:
        """For good: a database that answers during the stop changes nothing."""
        self._is_stopping = True

    def require(self) -> None:
        """Raises ApiError."""
        obstacle = "the service is stopping" if self._is_stopping else self.obstacle
        if obstacle is not None:
            raise ApiError("not_ready", cause=obstacle)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Raises ApiError and DatabaseUnavailable; the `errors` middleware turns both into 503."""
    request.app[READINESS].require()
    await request.app[DATABASE].check()
    if (obstacle := request.app[READINESS].account_obstacle()) is not None:
        raise ApiError("upstream_account_refused", f"Completions are rejected: {obstacle}", cause=obstacle)
    return web.json_response({"status": "ready"})
