"""The application: its rooms are wired here, and a request's way through them can be read in one place."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.api import auth, models, payments, sign_in
from gptutor.api.chat import completions
from gptutor.api.chat.context import Services
from gptutor.api.chat.event_stream import StreamLimits
from gptutor.config.schema import Config
from gptutor.database import migrations, pool
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.http import health, middlewares
from gptutor.http.address_limits import RequestCounter, limit_by_address, networks
from gptutor.http.body import BodyLimits, defer_continue
from gptutor.http.cors import cors, open_to_pages
from gptutor.http.rate_limit import RateLimit
from gptutor.integrations import yookassa
from gptutor.money import journal
from gptutor.money.amounts import parse_roubles
from gptutor.money.balance_auditor import BalanceAuditor
from gptutor.money.journal import Journal, Leftover
from gptutor.money.keyring import KeyRing
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.money.recovery import Recovery, connection_name
from gptutor.money.vault import Vault
from gptutor.openrouter import catalogue, service
from gptutor.routes import KEYED, PERSONAL, ROUTES
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry import metrics
from gptutor.telemetry.logs import LoggerService

LOGGER = logging.getLogger("gptutor.app")
HOLD_SLACK_S = 60
"""Beyond a request's own time limits, for settling it; then recovery looks at its hold."""
DATABASE_RETRY_S = 1.0
ORPHANS_DRAIN_S = 5.0
JOURNALS = "journal"
MODELS_FILE = "models.json"

CONFIG = web.AppKey("config", Config)
LOG = web.AppKey("log", LoggerService)
UPSTREAM = web.AppKey("upstream", service.OpenRouterService)
CATALOGUE = web.AppKey("catalogue", catalogue.Catalogue)
JOURNAL = web.AppKey("journal", Journal)
LEFTOVERS = web.AppKey("leftovers", list[Leftover])
RECOVERY = web.AppKey("recovery", Recovery)
SECRET = web.AppKey("secret", bytes)
VAULT = web.AppKey("vault", Vault)
PARSER_THREAD = web.AppKey("slow_lane", ThreadPoolExecutor)
IN_FLIGHT = web.AppKey("in_flight", BackgroundTasks)


def build_app(config: Config, *, log: LoggerService, secrets: Sequence[bytes]) -> web.Application:
    """One application. `config.database.url` and `config.openrouter` name real ends here: embedded ones were filled in before.

    Of the secrets the first is today's, the others are those before it.
    """
    app = web.Application(
        client_max_size=config.server.body_bytes_max,  # for whatever reads by aiohttp's own means
        middlewares=[
            middlewares.request_id,  # outermost: every answer has an id, and every line names it
            cors(config.server.allowed_origins),  # a browser asks leave before it asks; that needs no line in the log
            middlewares.access_log(log),  # sees the final answer, refusals included
            middlewares.errors,  # turns every failure into an answer; all below it may raise a Refusal
            _address_limits(config),  # those without an account, before anything is done for them
            middlewares.body_limit(config.server.body_bytes_max),  # before anything reads the body
            # nearest to the handler: a 404 or 405 needs no key
            auth.authenticate(KEYED, PERSONAL, RequestCounter(config.rate_limit.own_pages_per_minute)),
        ],
    )
    app.on_response_prepare.extend([middlewares.name_response, open_to_pages(config.server.allowed_origins)])
    app[CONFIG] = config
    app[LOG] = log
    app[SECRET] = secrets[0]
    app[VAULT] = Vault(secrets)
    app[auth.VK_SIGN_IN] = auth.VkSignIn(
        app_id=config.vk.app_id,
        secret=config.vk.secret_key,
        age_s_max=config.vk.launch_age_s,
        bonus=parse_roubles(f"{config.vk.bonus_rub:f}"),
    )
    app[health.READINESS] = health.Readiness()

    # Entered in this order, left in the reverse: money under way is closed before the sessions and the pool that it needs.
    app.cleanup_ctx.extend(
        [journal_context, database_context, payments_context, upstream_context, slow_lane_context, exchanges_context]
    )
    app.on_shutdown.append(close_the_door)

    for method, path, handler in ROUTES:
        if method == "GET":
            app.router.add_get(path, handler, expect_handler=defer_continue)  # and HEAD
        else:
            app.router.add_route(method, path, handler, expect_handler=defer_continue)
    return app


def _address_limits(config: Config) -> Middleware:
    limits = config.rate_limit
    models_read, sign_ins = RequestCounter(limits.models_per_minute), RequestCounter(limits.sign_ins_per_minute)
    arrivals = {
        models.list_models: models_read,
        models.show_model: models_read,
        sign_in.vk_test: sign_ins,
        sign_in.update_token: sign_ins,
        payments.notified: RequestCounter(limits.notifications_per_minute),
    }
    return limit_by_address(
        arrivals,
        RequestCounter(limits.strangers_per_minute),
        KEYED | PERSONAL | {sign_in.vk_test, sign_in.update_token},
        networks(config.server.trusted_proxies),
    )


async def journal_context(app: web.Application) -> AsyncIterator[None]:
    with journal.opened(app[CONFIG].paths.data / JOURNALS, bytes_max=app[CONFIG].recovery.journal_bytes_max) as (own, leftovers):
        app[JOURNAL] = own
        app[LEFTOVERS] = leftovers
        yield


async def database_context(app: web.Application) -> AsyncIterator[None]:
    limits = app[CONFIG].database
    async with pool.open_database(
        limits.url,
        name=connection_name(app[JOURNAL].owner),
        connections_min=0,  # the service starts, and says so, before PostgreSQL answers
        connections_max=limits.connections_max,
        acquire_s=limits.acquire_s,
        statement_s=limits.statement_s,
    ) as connected:
        app[health.DATABASE] = connected
        app[auth.KEYRING] = KeyRing(connected, app[VAULT])
        yield


async def payments_context(app: web.Application) -> AsyncIterator[None]:
    """The cashier, with YooKassa behind it where it is set up."""
    shop = app[CONFIG].yookassa
    async with AsyncExitStack() as stack:
        client = None
        if shop.is_set:
            client = await stack.enter_async_context(
                yookassa.connected(
                    shop_id=shop.shop_id,
                    secret_key=shop.secret_key,
                    base_url=shop.base_url,
                    return_url=shop.return_url,
                    timeout_s=shop.timeout_s,
                )
            )
        app[payments.PAYMENTS] = payments.PaymentService(
            client, least_rub=shop.payment_min_rub, most_rub=shop.payment_max_rub, at_once=shop.at_once
        )
        yield
        await app[payments.PAYMENTS].drain()


async def upstream_context(app: web.Application) -> AsyncIterator[None]:
    config = app[CONFIG]
    openrouter = config.openrouter
    limits = service.UpstreamLimits(
        connect_s=openrouter.connect_s,
        total_s=openrouter.total_s,
        first_byte_s=openrouter.first_byte_s,
        idle_s=openrouter.idle_s,
        end_s=openrouter.end_s,
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
            proxy=openrouter.proxy,
            old_api_keys=openrouter.old_api_keys.split(),
        ) as upstream,
        catalogue.refreshed(upstream, openrouter.models_refresh_s, config.paths.data / MODELS_FILE) as models_known,
    ):
        app[UPSTREAM] = upstream
        app[CATALOGUE] = models_known
        app[models.MODELS] = models.ModelList(models_known, config.billing.rub_per_usd)
        yield


async def slow_lane_context(app: web.Application) -> AsyncIterator[None]:
    with ThreadPoolExecutor(1, thread_name_prefix="large bodies") as lane:
        app[PARSER_THREAD] = lane
        yield


async def exchanges_context(app: web.Application) -> AsyncIterator[None]:
    config = app[CONFIG]
    ledger = Ledger(
        app[health.DATABASE],
        app[JOURNAL],
        rub_per_usd=config.billing.rub_per_usd,
        hold_ttl_s=config.openrouter.total_s + config.relay.disconnected_drain_s + HOLD_SLACK_S,
        chat_per_minute=config.rate_limit.chat_per_minute,
        chat_at_once=config.rate_limit.chat_at_once,
    )
    app[IN_FLIGHT] = BackgroundTasks()
    metrics.IN_FLIGHT_REQUESTS.set_function(app[IN_FLIGHT].__len__)
    app[completions.SERVICES] = Services(
        ledger=ledger,
        evaluate=LLMCostEvaluate(**{name: getattr(config.billing, name) for name in config.billing.__struct_fields__}),
        upstream=app[UPSTREAM],
        catalogue=app[CATALOGUE],
        log=app[LOG],
        in_flight=app[IN_FLIGHT],
        readiness=app[health.READINESS],
        keyring=app[auth.KEYRING],
        parser_thread=app[PARSER_THREAD],
        body_limits=BodyLimits(config.server.body_bytes_max, idle_s=config.server.body_idle_s, total_s=config.server.body_s),
        default_model=config.openrouter.default_model,
        pseudonym_key=derived_key(app[SECRET], b"pseudonym"),
        stream_limits=StreamLimits(**{name: getattr(config.relay, name) for name in config.relay.__struct_fields__}),
        rate_limit=RateLimit(config.rate_limit.chat_per_minute),
    )
    app[RECOVERY] = Recovery(
        app[health.DATABASE],
        ledger,
        config.paths.data / JOURNALS,
        app[UPSTREAM].cost_of,
        poll_s=config.recovery.poll_s,
        look_max_s=config.recovery.look_max_s,
        give_up_s=config.recovery.give_up_s,
    )
    opening = asyncio.create_task(open_for_business(app), name="open for business")
    yield
    late = await app[IN_FLIGHT].drain(config.server.drain_s)
    if late:
        LOGGER.error("%d requests were cut off before their money was closed; the journal has what is known of them", late)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    unfreed = await ledger.drain(ORPHANS_DRAIN_S)
    app[JOURNAL].proves_something = bool(late or unfreed)


async def open_for_business(app: web.Application) -> None:
    """Waits for a migrated database, replays what dead processes left, opens the door, and goes on recovering and watching."""
    readiness = app[health.READINESS]
    left: list[Leftover] = []
    while readiness.obstacle is not None:
        try:
            if pending := await migrations.pending_migrations(app[CONFIG].database.url):
                raise migrations.MigrationError(f"The database lacks {', '.join(pending)}: gptutor migrate")
            left = [leftover for leftover in app[LEFTOVERS] if not await app[RECOVERY].replay(leftover)]
            readiness.obstacle = None
        except (DatabaseUnavailable, DatabaseRefused, migrations.MigrationError) as error:
            readiness.obstacle = str(error)
            LOGGER.warning("Not ready yet: %s", error)
            await asyncio.sleep(DATABASE_RETRY_S)
        except Exception as error:
            readiness.obstacle = type(error).__name__
            LOGGER.exception("Not ready yet, by a fault of ours")
            await asyncio.sleep(DATABASE_RETRY_S)
    async with asyncio.TaskGroup() as for_ever:
        for_ever.create_task(app[RECOVERY].run(left), name="recovery")
        for_ever.create_task(
            BalanceAuditor(app[health.DATABASE], app[CONFIG].recovery.watch_s).run(), name="watch over the books"
        )


async def close_the_door(app: web.Application) -> None:
    app[health.READINESS].obstacle = "the service is stopping"


def derived_key(secret: bytes, purpose: bytes) -> bytes:
    """A key for one purpose only: none of them reveals another, or the secret."""
    return hmac.new(secret, b"gptutor " + purpose, hashlib.sha256).digest()
