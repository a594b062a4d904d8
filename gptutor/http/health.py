"""`GET /health`: the process is alive. `GET /ready`: it accepts requests. No key is needed for either."""

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from gptutor import __version__
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
        self.is_draining = False
        """Whether other processes take new connections already; requests on those that are open are still accepted."""
        self._is_stopping = False
        self._ends_at: float | None = None

    def drain(self, within_s: float) -> None:
        """`within_s`: until the last responses must have ended."""
        self.is_draining = True
        self._ends_at = asyncio.get_running_loop().time() + within_s

    def stop(self, within_s: float = 0.0) -> float:
        """For good: a database that answers during the stop changes nothing. Returns how long responses may go on: `within_s`, or
        what is left of the time for draining."""
        self._is_stopping = True
        return within_s if self._ends_at is None else max(0.0, self._ends_at - asyncio.get_running_loop().time())

    def require(self) -> None:
        """Raises ApiError."""
        obstacle = "the service is stopping" if self._is_stopping else self.obstacle
        if obstacle is not None:
            raise ApiError("not_ready", cause=obstacle)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok", "version": __version__})


async def ready(request: web.Request) -> web.Response:
    """Raises ApiError and DatabaseUnavailable; the `errors` middleware turns both into 503."""
    readiness = request.app[READINESS]
    readiness.require()
    if readiness.is_draining:
        raise ApiError("not_ready", "This process is draining: it has a successor", cause="the process drains")
    await request.app[DATABASE].check()
    if (obstacle := readiness.account_obstacle()) is not None:
        raise ApiError("upstream_account_refused", f"Completions are rejected: {obstacle}", cause=obstacle)
    return web.json_response({"status": "ready"})
