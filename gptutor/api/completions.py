"""`POST /v1/chat/completions`: the ask is read and checked here; `exchange.py` does the rest."""

from aiohttp import web

from gptutor.api.ask import read_ask
from gptutor.api.exchange import Exchanges
from gptutor.api.middlewares import CLAIM, LOGGED, REQUEST_ID
from gptutor.errors import Refusal

EXCHANGES = web.AppKey("exchanges", Exchanges)
DEFAULT_MODEL = web.AppKey("default_model", str)


async def complete(request: web.Request) -> web.StreamResponse:
    if request.content_type not in (
        "application/json",
        "application/octet-stream",
    ):  # the latter stands for a missing header
        raise Refusal("unsupported_media_type")
    ask = read_ask(await request.read(), default_model=request.app[DEFAULT_MODEL])
    request[LOGGED] = True
    return await request.app[EXCHANGES].begin(request, request[REQUEST_ID], request[CLAIM], ask)
