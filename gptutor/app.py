"""The application: its rooms are wired here, and a request's way through them can be read in one place."""

import hashlib
import hmac
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from gptutor.api import completions, health, middlewares, models
from gptutor.api.exchange import Exchanges
from gptutor.api.inflight import InFlight
from gptutor.config import Config
from gptutor.database import connected as database_connected
from gptutor.logs import LoggerService
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.openrouter import catalogue, service

LOGGER = logging.getLogger("gptutor.app")
HOLD_SLACK_S = 60
"""Beyond a request's own time limits: for looking its bill up and settling it."""

CONFIG = web.AppKey("config", Config)
LOG = web.AppKey("log", LoggerService)
UPSTREAM = web.AppKey("upstream", service.OpenRouterService)
CATALOGUE = web.AppKey("catalogue", catalogue.Catalogue)
IN_FLIGHT = web.AppKey("in_flight", InFlight)

KEYED = frozenset({completions.complete})
"""The handlers that need an API key."""


def build_app(config: Config, *, log: LoggerService, secret: bytes) -> web.Application:
    """One application. `config.database.url` and `config.openrouter` name real ends here: embedded ones were filled in before."""
    app = web.Application(
        client_max_size=config.server.body_bytes_max,
        middlewares=[
            middlewares.request_id,  # outermost: every answer has an id, and every line names it
            middlewares.access_log(log),  # sees the final answer, refusals included
            middlewares.errors,  # the only broad except; all below it may raise a Refusal
            middlewares.body_limit(config.server.body_bytes_max),  # before anything reads the body
            middlewares.authenticate(KEYED),  # nearest to the handler: a 404 or 405 needs no key
        ],
    )
    app.on_response_prepare.append(middlewares.name_response)
    app[CONFIG] = config
    app[LOG] = log
    app[completions.DEFAULT_MODEL] = config.openrouter.default_model

    # Entered in this order, left in the reverse: money under way is closed before the sessions and the pool that it needs.
    app.cleanup_ctx.extend([database_context, upstream_context, exchanges_context(secret)])

    app.add_routes(
        [
            web.post("/v1/chat/completions", completions.complete),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{model_id:.+}", models.show_model),
            web.get("/health", health.health),
            web.get("/ready", health.ready),
        ]
    )
    return app


async def database_context(app: web.Application) -> AsyncIterator[None]:
    limits = app[CONFIG].database
    async with database_connected(
        limits.url,
        connections_max=limits.connections_max,
        acquire_s=limits.acquire_s,
        statement_s=limits.statement_s,
    ) as database:
        app[health.DATABASE] = database
        yield


async def upstream_context(app: web.Application) -> AsyncIterator[None]:
    openrouter = app[CONFIG].openrouter
    limits = service.Limits(
        connect_s=openrouter.connect_s,
        total_s=openrouter.total_s,
        first_byte_s=openrouter.first_byte_s,
        idle_s=openrouter.idle_s,
        attempts_max=openrouter.attempts_max,
    )
    async with (
        service.connected(
            openrouter.base_url,
            openrouter.api_key,
            limits,
            referer=openrouter.referer,
            title=openrouter.title,
            connections_max=openrouter.connections_max,
        ) as upstream,
        catalogue.refreshed(upstream, openrouter.models_refresh_s) as models_known,
    ):
        app[UPSTREAM] = upstream
        app[CATALOGUE] = models_known
        app[models.MODELS] = models.ModelList(models_known, app[CONFIG].billing.rub_per_usd)
        yield


def exchanges_context(secret: bytes):  # type: ignore[no-untyped-def] # aiohttp's own type for cleanup contexts is wider than it says
    async def context(app: web.Application) -> AsyncIterator[None]:
        config = app[CONFIG]
        billing = config.billing
        app[IN_FLIGHT] = InFlight()
        app[completions.EXCHANGES] = Exchanges(
            ledger=Ledger(
                app[health.DATABASE],
                rub_per_usd=billing.rub_per_usd,
                hold_ttl_s=config.openrouter.total_s + config.relay.leaver_drain_s + config.relay.lookup_s + HOLD_SLACK_S,
            ),
            evaluate=LLMCostEvaluate(
                rub_per_usd=billing.rub_per_usd,
                balance_min_rub=billing.balance_min_rub,
                margin=billing.margin,
                output_tokens_typical=billing.output_tokens_typical,
                output_tokens_min=billing.output_tokens_min,
                reserve=billing.reserve,
                hold_default_rub=billing.hold_default_rub,
                media_tokens=billing.media_tokens,
            ),
            upstream=app[UPSTREAM],
            catalogue=app[CATALOGUE],
            log=app[LOG],
            in_flight=app[IN_FLIGHT],
            pseudonym_key=derived_key(secret, b"pseudonym"),
            write_s=config.relay.write_s,
            leaver_drain_s=config.relay.leaver_drain_s,
            lookup_s=config.relay.lookup_s,
        )
        yield
        if late := await app[IN_FLIGHT].drain(config.server.drain_s):
            LOGGER.error("%d requests were cut off before their money was closed; their holds stay open", late)

    return context


def derived_key(secret: bytes, purpose: bytes) -> bytes:
    """A key for one purpose only: none of them reveals another, or the secret."""
    return hmac.new(secret, b"gptutor " + purpose, hashlib.sha256).digest()
