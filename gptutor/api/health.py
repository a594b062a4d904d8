"""`GET /health`: the process lives. `GET /ready`: it can take money and requests. No key for either."""

from dataclasses import dataclass

from aiohttp import web

from gptutor.database import Database
from gptutor.errors import Refusal


@dataclass(slots=True)
class Readiness:
    """Why requests that cost money are refused; None when they are not. It changes while the process lives."""

    obstacle: str | None = "the database has not answered yet"

    def require(self) -> None:
        """Raises Refusal."""
        if self.obstacle is not None:
            raise Refusal("not_ready", cause=self.obstacle)


DATABASE = web.AppKey("database", Database)
READINESS = web.AppKey("readiness", Readiness)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Raises DatabaseUnavailable, which the `errors` middleware turns into 503, as it does with the Refusal."""
    request.app[READINESS].require()
    await request.app[DATABASE].fetchrow("ping")
    return web.json_response({"status": "ready"})
