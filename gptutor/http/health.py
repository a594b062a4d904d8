"""`GET /health`: the process lives. `GET /ready`: it can take money and requests. No key for either."""

from dataclasses import dataclass

from aiohttp import web

from gptutor.database.pool import Database
from gptutor.errors import ApiError


@dataclass(slots=True)
class Readiness:
    """Why requests that cost money are refused; None when they are not. It changes while the process lives."""

    obstacle: str | None = "the database has not answered yet"

    def require(self) -> None:
        """Raises ApiError."""
        if self.obstacle is not None:
            raise ApiError("not_ready", cause=self.obstacle)


DATABASE = web.AppKey("database", Database)
READINESS = web.AppKey("readiness", Readiness)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Raises DatabaseUnavailable, which the `errors` middleware turns into 503, as it does with the ApiError."""
    request.app[READINESS].require()
    await request.app[DATABASE].fetchrow("ping")
    return web.json_response({"status": "ready"})
