"""`GET /health`: the process lives. `GET /ready`: it can take money and requests. No key for either."""

from aiohttp import web

from gptutor.database import Database

DATABASE = web.AppKey("database", Database)


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Raises DatabaseUnavailable, which the `errors` middleware turns into 503."""
    await request.app[DATABASE].fetchrow("ping")
    return web.json_response({"status": "ready"})
