"""`GET /health`: the process is alive. `GET /ready`: it accepts requests. No key is needed for either."""

from dataclasses import dataclass

from aiohttp import web

from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE, READINESS


@dataclass(slots=True)
class Readiness:
    """`obstacle` says why requests that need the database are rejected; None: they are accepted."""

    obstacle: str | None = "the database has not answered yet"

    def require(self) -> None:
        """Raises ApiError."""
        if self.obstacle is not None:
            raise ApiError("not_ready", cause=self.obstacle)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Raises ApiError and DatabaseUnavailable; the `errors` middleware turns both into 503."""
    request.app[READINESS].require()
    await request.app[DATABASE].fetchrow("ping")
    return web.json_response({"status": "ready"})
