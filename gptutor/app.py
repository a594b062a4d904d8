"""The public application: its middlewares, and the objects that its handlers use, wired in the order in which they start."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.api.auth import VkSignIn, authenticate
from gptutor.api.chat.context import Services
from gptutor.api.chat.event_stream import StreamLimits
from gptutor.api.chat.large_bodies import LargeBodies
from gptutor.api.models import ModelList
from gptutor.api.payment_lookups import PaymentLookups
from gptutor.api.payments import PaymentService
from gptutor.api.verified_keys import VerifiedKeys
from gptutor.config.schema import BillingSettings, Config, OpenRouterSettings, RelaySettings, VkSettings
from gptutor.database import migrations, pool
from gptutor.database.alert_book import AlertBook
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.http import middlewares
from gptutor.http.address_limits import RequestCounter, limit_by_address, parse_networks
from gptutor.http.app_keys import (
    CONFIG,
    DATABASE,
    ERROR_FORM,
    JOURNAL,
    KEYRING,
    MODEL_LIST,
    PAYMENTS,
    READINESS,
    SERVICES,
    TRUSTED_PROXIES,
    VAULT,
    VK_SIGN_IN,
)
from gptutor.http.body import BodyLimits
from gptutor.http.byte_budget import ByteBudget
from gptutor.http.cors import add_cors_headers, cors
from gptutor.http.draining import announce_close
from gptutor.http.errors import errors
from gptutor.http.health import Readiness
from gptutor.http.rate_limit import RateLimit
from gptutor.http.request_counts import count_routes
from gptutor.http.routing import add_routes
from gptutor.integrations import webhook, yookassa
from gptutor.integrations.vk import ExpiredLaunch
from gptutor.money import journal
from gptutor.money.amounts import parse_roubles
from gptutor.money.balance_auditor import BalanceAuditor
from gptutor.money.figures import Figures
from gptutor.money.journal import JOURNALS, AbandonedJournal, Journal
from gptutor.money.keyring import KeyRing
from gptutor.money.ledger import Ledger
from gptutor.money.pending_payments import PendingPayments
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.money.recovery import Recovery, connection_name
from gptutor.money.vault import Vault
from gptutor.openrouter import catalogue, service
from gptutor.openrouter.account import Account
from gptutor.openrouter.headers import FORWARDED_HEADERS, RETURNED_HEADERS
from gptutor.routes import METHODS, ROUTES
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.alerts import ALERTS, Alerter
from gptutor.telemetry.disk import watch_disk
from gptutor.telemetry.logs import LoggerService
from gptutor.telemetry.metrics import IN_FLIGHT_REQUESTS, JOURNAL_BYTES, JOURNAL_FILLED
from gptutor.telemetry.shared_metrics import FOLDER

LOGGER = logging.getLogger("gptutor.app")
HOLD_SLACK_S = 60
"""Added to a request's own timeouts for settling it; after that recovery takes its hold over."""
LAST_RESPONSES_S = 1.0
"""So long before the end of `server.shutdown_s`, requests that are still running get their response."""
DATABASE_RETRY_S = 1.0
LEDGER_DRAIN_S = 5.0
MODELS_FILE = "models.json"


def build_app(config: Config, *, log: LoggerService, secrets: Sequence[bytes]) -> web.Application:
    """`config.database.url` and `config.openrouter` must name real servers, also where they are the embedded ones.

    `secrets`: the current secret first, then the old ones.
    """
    origins = config.server.allowed_origins
    app = web.Application(
        client_max_size=config.server.body_bytes_max,  # for code that reads a body by aiohttp's own methods
        middlewares=[
            middlewares.request_id,  # outermost: every response has an id, and every log line names it
            cors(origins, methods=METHODS, request_headers=FORWARDED_HEADERS),  # preflight requests need no log line
            middlewares.access_log(log),  # sees the final response, errors included
            errors,  # turns every exception into a response; everything below may raise ApiError
            _address_limits(config),  # before any work is done for unauthenticated clients
            middlewares.body_limit(config.server.body_bytes_max),  # before anything reads the body
            # nearest to the handler, so that a 404 or 405 needs no key
            authenticate(RequestCounter(config.rate_limit.account_pages_per_minute, "rate_limit.account_pages_per_minute")),
        ],
    )
    app.on_response_prepare.extend([middlewares.add_request_id, add_cors_headers(origins, RETURNED_HEADERS), announce_close])
    app[CONFIG] = config
    app[TRUSTED_PROXIES] = parse_networks(config.server.trusted_proxies)
    app[ERROR_FORM] = config.errors.form
    app[READINESS] = Readiness()
    app[VAULT] = Vault(secrets)
    app[VK_SIGN_IN] = _vk_sign_in(config.vk)

    async def services_context(app: web.Application) -> AsyncIterator[None]:
        async with running_services(app, log=log, secret=secrets[0]):
            yield

    app.cleanup_ctx.append(services_context)
    app.on_shutdown.append(_stop_accepting)
    add_routes(app, ROUTES)
    count_routes(app)
    return app


def _address_limits(config: Config) -> Middleware:
    limits = config.rate_limit
    return limit_by_address(
        {
            "models_per_minute": RequestCounter(limits.models_per_minute, "rate_limit.models_per_minute"),
            "sign_ins_per_minute": RequestCounter(limits.sign_ins_per_minute, "rate_limit.sign_ins_per_minute"),
            "notifications_per_minute": RequestCounter(limits.notifications_per_minute, "rate_limit.notifications_per_minute"),
        },
        unauthenticated=RequestCounter(limits.unauthenticated_per_minute, "rate_limit.unauthenticated_per_minute"),
        not_found=RequestCounter(limits.not_found_per_minute, "rate_limit.not_found_per_minute"),
        trusted_proxies=parse_networks(config.server.trusted_proxies),
        not_counted=(ExpiredLaunch,),  # a page that was left open
    )


@asynccontextmanager
async def running_services(app: web.Application, *, log: LoggerService, secret: bytes) -> AsyncIterator[None]:
    """Starts what the handlers use, from the journal up, and stops it in reverse: requests are settled before the pool closes."""
    config = app[CONFIG]
    journals = config.paths.data / JOURNALS
    async with AsyncExitStack() as stack:
        app[JOURNAL], abandoned = stack.enter_context(
            journal.opened(
                journals,
                bytes_max=config.recovery.journal_bytes_max,
                kept_bytes_max=config.recovery.journal_kept_bytes_max,
            )
        )

        database = app[DATABASE] = await stack.enter_async_context(
            pool.open_database(
                config.database.url,
                name=connection_name(app[JOURNAL].owner),
                connections_min=0,  # the service starts, and reports that it is not ready, before PostgreSQL answers
                connections_max=config.database.connections_max,
                acquire_s=config.database.acquire_s,
                statement_s=config.database.statement_s,
            )
        )
        app[KEYRING] = KeyRing(database, app[VAULT])
        await stack.enter_async_context(_alerting(config, database, app[JOURNAL]))

        pending_payments = PendingPayments(
            database,
            interval_s=config.yookassa.lookup_interval_s,
            interval_max_s=config.yookassa.lookup_interval_max_s,
            give_up_s=config.yookassa.give_up_s,
        )
        app[PAYMENTS] = await stack.enter_async_context(_payment_service(config, database, pending_payments))
        payment_lookups = PaymentLookups(app[PAYMENTS], pending_payments, config.yookassa.poll_s)

        upstream = await stack.enter_async_context(_openrouter(config.openrouter))
        app[READINESS].account_obstacle = lambda: upstream.account.obstacle
        models = await stack.enter_async_context(
            catalogue.refreshed(upstream, config.openrouter.models_refresh_s, config.paths.data / MODELS_FILE)
        )
        app[MODEL_LIST] = ModelList(models, config.billing.rub_per_usd)

        ledger = Ledger(
            database,
            app[JOURNAL],
            rub_per_usd=config.billing.rub_per_usd,
            hold_ttl_s=config.openrouter.total_s + config.relay.disconnected_drain_s + HOLD_SLACK_S,
            chat_per_minute=config.rate_limit.chat_per_minute,
            chat_concurrent_max=config.rate_limit.chat_concurrent_max,
            overdraft_max=parse_roubles(f"{config.billing.overdraft_max_rub:f}"),
        )
        in_flight = BackgroundTasks()
        IN_FLIGHT_REQUESTS.set_function(in_flight.__len__)
        JOURNAL_BYTES.set_function(app[JOURNAL].size_bytes)
        JOURNAL_FILLED.set_function(app[JOURNAL].filled)
        app[SERVICES] = Services(
            ledger=ledger,
            evaluate=_cost_evaluation(config.billing),
            upstream=upstream,
            catalogue=models,
            log=log,
            in_flight=in_flight,
            large_bodies=LargeBodies(
                stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="large bodies")),
                config.server.large_bodies_per_account,
            ),
            body_limits=BodyLimits(config.server.body_bytes_max, idle_s=config.server.body_idle_s, total_s=config.server.body_s),
            body_budget=ByteBudget(config.server.bodies_bytes_max, account_bytes_min=config.server.body_bytes_max),
            answer_bytes_max=config.openrouter.plain_bytes_max,
            answer_budget=ByteBudget(config.openrouter.plain_bytes_total, account_bytes_min=config.openrouter.plain_bytes_max),
            balance_min=parse_roubles(f"{config.billing.balance_min_rub:f}"),
            verified_keys=VerifiedKeys(),
            refusals=RequestCounter(config.rate_limit.refused_per_minute, "rate_limit.refused_per_minute"),
            free_models=RequestCounter(config.rate_limit.free_models_per_minute, "rate_limit.free_models_per_minute"),
            default_model=config.openrouter.default_model,
            pseudonym_key=derived_key(secret, b"pseudonym"),
            stream_limits=_stream_limits(config.relay),
            rate_limit=RateLimit(config.rate_limit.chat_per_minute),
        )

        recovery = Recovery(
            database,
            ledger,
            journals,
            upstream.cost_of,
            poll_s=config.recovery.poll_s,
            lookup_interval_max_s=config.recovery.lookup_interval_max_s,
            give_up_s=config.recovery.give_up_s,
            kept_s=config.recovery.journal_kept_s,
            kept_bytes_max=config.recovery.journal_kept_bytes_max,
        )
        background = asyncio.create_task(_become_ready(app, recovery, payment_lookups, abandoned), name="startup and recovery")
        yield
        cut_off = await in_flight.drain(config.server.drain_s)
        if cut_off:
            LOGGER.error("%d requests were cut off before they were settled; the journal has what is known of them", cut_off)
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        unreleased = await ledger.drain(LEDGER_DRAIN_S)
        app[JOURNAL].keep_when_empty = bool(cut_off or unreleased)


async def _become_ready(
    app: web.Application, recovery: Recovery, payment_lookups: PaymentLookups, abandoned: list[AbandonedJournal]
) -> None:
    """Waits for a migrated database, replays the journals of dead processes, sets READINESS, then runs the background jobs."""
    config, readiness = app[CONFIG], app[READINESS]
    unreplayed: list[AbandonedJournal] = []
    while readiness.obstacle is not None:
        try:
            if pending := await migrations.pending_migrations(config.database.url):
                raise migrations.MigrationError(f"The database lacks {', '.join(pending)}: gptutor migrate")
            unreplayed = [each for each in abandoned if not await recovery.replay(each)]
            readiness.obstacle = None
        except (DatabaseUnavailable, DatabaseRefused, migrations.MigrationError) as error:
            readiness.obstacle = str(error)
            LOGGER.warning("Not ready yet: %s", error)
            await asyncio.sleep(DATABASE_RETRY_S)
        except Exception as error:
            readiness.obstacle = type(error).__name__
            LOGGER.exception("Not ready yet: unexpected exception")
            await asyncio.sleep(DATABASE_RETRY_S)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(recovery.run(unreplayed), name="recovery")
        tasks.create_task(BalanceAuditor(app[DATABASE], config.recovery.audit_interval_s).run(), name="balance auditor")
        if config.serves_metrics:
            tasks.create_task(Figures(app[DATABASE], config.paths.data / FOLDER).run(), name="figures")
        if app[PAYMENTS].is_configured:
            tasks.create_task(payment_lookups.run(), name="payment look-ups")


async def _stop_accepting(app: web.Application) -> None:
    """The runner waits for running requests, and breaks the connections of those that are left: they get their end before."""
    shutdown_s = app[CONFIG].server.shutdown_s
    left_s = app[READINESS].stop(shutdown_s)
    asyncio.get_running_loop().call_later(left_s - min(LAST_RESPONSES_S, shutdown_s / 4), _end_responses, app[SERVICES])


def _end_responses(services: Services) -> None:
    for exchange in list(services.exchanges):
        services.in_flight.start(exchange.end_at_stop())


# -- settings into objects


def _vk_sign_in(settings: VkSettings) -> VkSignIn:
    return VkSignIn(
        app_id=settings.app_id,
        secret=settings.secret_key,
        age_s_max=settings.launch_age_s,
        bonus=parse_roubles(f"{settings.bonus_rub:f}"),
    )


@asynccontextmanager
async def _payment_service(config: Config, database: Database, pending: PendingPayments) -> AsyncIterator[PaymentService]:
    """With a YooKassa client if the shop is configured."""
    settings = config.yookassa
    async with AsyncExitStack() as stack:
        client = None
        if settings.is_set:
            client = await stack.enter_async_context(
                yookassa.connected(
                    shop_id=settings.shop_id,
                    secret_key=settings.secret_key,
                    base_url=settings.base_url,
                    return_url=settings.return_url,
                    timeout_s=settings.timeout_s,
                )
            )
        payments = PaymentService(
            client,
            database,
            pending,
            amount_min_rub=settings.payment_min_rub,
            amount_max_rub=settings.payment_max_rub,
            concurrent_max=settings.concurrent_max,
            credits_tests=settings.test_mode,
            unknown_ids=RequestCounter(config.rate_limit.unknown_payments_per_minute, "rate_limit.unknown_payments_per_minute"),
            trusted_proxies=parse_networks(config.server.trusted_proxies),
        )
        yield payments
        await payments.drain()


@asynccontextmanager
async def _openrouter(settings: OpenRouterSettings) -> AsyncIterator[service.OpenRouterService]:
    limits = service.UpstreamLimits(
        connect_s=settings.connect_s,
        total_s=settings.total_s,
        first_byte_s=settings.first_byte_s,
        idle_s=settings.idle_s,
        end_s=settings.end_s,
        attempts_max=settings.attempts_max,
    )
    account = Account(
        poll_s=settings.account_poll_s,
        probe_s=settings.account_probe_s,
        credit_warning_usd=settings.credit_warning_usd,
        management_key=settings.management_key,
    )
    async with service.connected(
        settings.base_url,
        settings.api_key,
        limits,
        referer=settings.referer,
        title=settings.title,
        connections_max=settings.connections_max,
        proxy=settings.proxy,
        old_api_keys=settings.old_api_keys.split(),
        account=account,
    ) as openrouter:
        watching = asyncio.create_task(account.watch(lambda path, headers: openrouter.get(path, headers=headers)), name="account")
        yield openrouter
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@asynccontextmanager
async def _alerting(config: Config, database: Database, journal: Journal) -> AsyncIterator[None]:
    """Tells the operator what goes wrong, as long as the database is open."""
    settings, paths = config.alerts, config.paths
    ALERTS.clear()
    async with webhook.connected(settings) as receiver:
        alerter = Alerter(
            ALERTS,
            AlertBook(database),
            receiver.send if receiver is not None else None,
            poll_s=settings.poll_s,
            unavailable=(DatabaseUnavailable,),
        )
        disk = watch_disk({paths.data, paths.logs}, settings.disk_free_bytes_min, journal.filled, every_s=settings.poll_s)
        tasks = [asyncio.create_task(alerter.run(), name="alerts"), asyncio.create_task(disk, name="disk")]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await alerter.close()


def _cost_evaluation(settings: BillingSettings) -> LLMCostEvaluate:
    return LLMCostEvaluate(
        rub_per_usd=settings.rub_per_usd,
        balance_min_rub=settings.balance_min_rub,
        margin=settings.margin,
        output_tokens_min=settings.output_tokens_min,
        output_media_tokens=settings.output_media_tokens,
        hold_default_rub=settings.hold_default_rub,
        image_tokens=settings.image_tokens,
        paid_tool_usd=settings.paid_tool_usd,
        tool_prompt_tokens=settings.tool_prompt_tokens,
        server_tool_steps=settings.server_tool_steps,
        ocr_document_usd=settings.ocr_document_usd,
        research_searches=settings.research_searches,
        cache_write_factor=settings.cache_write_factor,
        priority_tier_factor=settings.priority_tier_factor,
        provider_price_factor=settings.provider_price_factor,
        unlisted_prompt_usd=settings.unlisted_prompt_usd,
        unlisted_completion_usd=settings.unlisted_completion_usd,
    )


def _stream_limits(settings: RelaySettings) -> StreamLimits:
    return StreamLimits(
        heartbeat_s=settings.heartbeat_s,
        buffer_bytes=settings.buffer_bytes,
        write_timeout_s=settings.write_timeout_s,
        disconnected_drain_s=settings.disconnected_drain_s,
        disconnected_drain_bytes=settings.disconnected_drain_bytes,
    )


def derived_key(secret: bytes, purpose: bytes) -> bytes:
    """A key for one purpose; knowing it reveals neither the secret nor the keys for other purposes."""
    return hmac.new(secret, b"gptutor " + purpose, hashlib.sha256).digest()
