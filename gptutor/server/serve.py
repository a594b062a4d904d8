"""`gptutor serve` in a single process: the database and OpenRouter, the listeners, and the stop.

Without DATABASE_URL the embedded PostgreSQL is started, without OPENROUTER_API_KEY the simulator: the service runs on a bare
machine (contract F9).
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from gptutor import __version__
from gptutor.admin.app import build_admin
from gptutor.app import build_app
from gptutor.config.schema import Config, SimulatorSettings
from gptutor.config.secrets import secret_keys
from gptutor.database import migrations
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.money.vault import Vault
from gptutor.server import service_manager
from gptutor.server.account_line import account_line
from gptutor.server.banner import banner
from gptutor.server.demo import demo_key
from gptutor.server.listener import StartError, listening_on, listening_on_unix_socket
from gptutor.server.process import report_descriptor_exhaustion, tune_garbage_collection
from gptutor.server.reload import LastReload, SettingsCheck, own_command
from gptutor.server.runners import admin_runner, connection_factory, public_runner, require_c_parser
from gptutor.simulator.server import Simulator
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.console import print_notice
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import LoggerService
from gptutor.telemetry.metrics_page import build_metrics, process_metrics

LOGGER = logging.getLogger("gptutor.serve")
SERVES = f"GPTutor {__version__}, one process serves"


async def serve(config: Config) -> None:
    """Runs until SIGINT or SIGTERM, or a SIGHUP after which it can be started again. Raises StartError, ConfigError."""
    stop, last_reload = asyncio.Event(), LastReload()
    loop, checks = asyncio.get_running_loop(), BackgroundTasks()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: len(checks) or checks.start(_reload(stop, last_reload)))
    last_reload.export()
    report_descriptor_exhaustion(loop)
    secrets = secret_keys(config)
    with logging_of(config) as log, resolved_database(config) as resolved:
        await prepare_database(resolved, embedded=config.embedded)
        async with service_manager.watched_event_loop(), AsyncExitStack() as stack:
            metrics = await stack.enter_async_context(process_metrics(config.paths.data, is_served=config.serves_metrics))
            if config.simulated:
                simulator = Simulator(word_s=config.simulator.word_s, first_word_s=config.simulator.first_word_s)
                base_url = await stack.enter_async_context(simulated_openrouter(simulator, config.simulator))
                resolved = with_simulator(resolved, base_url)
            url = await stack.enter_async_context(listening(build_app(resolved, log=log, secrets=secrets), resolved))
            if config.metrics.port:
                runner = web.AppRunner(build_metrics(metrics), access_log=None, shutdown_timeout=1)
                listener = listening_on(
                    runner, config.metrics.host, config.metrics.port, connection_factory(config), setting="GPTUTOR_METRICS__PORT"
                )
                await stack.enter_async_context(listener)
            if config.admin.is_enabled:
                admin = build_admin(resolved, log=log, secrets=secrets, metrics=metrics)
                await stack.enter_async_context(admin_listening(admin, resolved))
            key = await demo_key(resolved, Vault(secrets)) if config.embedded and config.simulated else None
            tune_garbage_collection()
            LOGGER.info("GPTutor %s has started", __version__)
            account = await account_line(config) if not config.simulated else None
            print(banner(config, url=url, demo_key=key, account=account), flush=True)
            service_manager.notify_ready(SERVES)
            await stop.wait()
            service_manager.notify_stopping()
            print_notice("Stopping: running requests are finished and their charges are settled …")


async def _reload(stop: asyncio.Event, last_reload: LastReload) -> None:
    """A single process ends, so that the service manager starts it again, but not if it could not start any more."""
    service_manager.notify_reloading()
    try:
        refusal = await asyncio.to_thread(SettingsCheck().wait)
    except OSError as error:
        refusal = f"{own_command()[0]} cannot be run: {error.strerror}."
    last_reload.record(succeeded=refusal is None)
    if refusal is None:
        stop.set()
        return
    LOGGER.error("The reload is refused, and the previous settings stay in effect: %s", refusal)
    service_manager.notify_ready(f"{SERVES}. The last reload failed: {refusal}")


def logging_of(config: Config) -> AbstractContextManager[LoggerService]:
    """`logging_to` with the settings."""
    logs = config.logs
    return logging_to(
        config.paths.logs,
        level=logs.level,
        retention_days=logs.retention_days,
        bytes_max=logs.bytes_max,
        file_bytes_max=logs.file_bytes_max,
        stdout=logs.stdout,
        compresses=True,
        warnings_per_minute=logs.warnings_per_minute,
        refused_per_minute=logs.refused_per_minute,
    )


# -- the database and OpenRouter


@contextmanager
def resolved_database(config: Config) -> Iterator[Config]:
    """`config` with `database.url` filled in: without DATABASE_URL, the embedded PostgreSQL runs meanwhile. Raises StartError."""
    if not config.embedded:
        yield config
        return
    # Imported only here: with DATABASE_URL set, the embedded PostgreSQL's package need not be installed.
    from gptutor.database.embedded import EmbeddedPostgresError, embedded_postgres

    try:
        with embedded_postgres(config.paths.data / "postgres") as url:
            yield msgspec.structs.replace(config, database=msgspec.structs.replace(config.database, url=url))
    except EmbeddedPostgresError as error:
        raise StartError(str(error)) from error


async def prepare_database(config: Config, *, embedded: bool) -> None:
    """Migrates the embedded database, and requires of another one that it is migrated.

    A database that does not answer yet is no error: the service waits for it. Raises StartError.
    """
    try:
        if embedded:
            await migrations.migrate(config.database.url, accept_newer=True)
        elif pending := await migrations.pending_migrations(config.database.url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
    except DatabaseRefused:
        raise
    except DatabaseUnavailable as error:
        if embedded:
            raise
        print(f"PostgreSQL does not answer at DATABASE_URL yet ({error.__cause__ or error}): waiting for it.", flush=True)


@asynccontextmanager
async def simulated_openrouter(simulator: Simulator, settings: SimulatorSettings) -> AsyncIterator[str]:
    """Runs the simulator on its port and yields the base URL of its API. Raises StartError."""
    runner = web.AppRunner(simulator.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1)
    async with listening_on(runner, settings.host, settings.port, setting="GPTUTOR_SIMULATOR__PORT") as url:
        yield url + "/api/v1"


def with_simulator(config: Config, base_url: str) -> Config:
    """`config` with the simulator's address in place of OpenRouter's: nothing real is sold, so test payments are credited."""
    openrouter = msgspec.structs.replace(config.openrouter, base_url=base_url, api_key="sk-or-simulator", proxy="")
    yookassa = msgspec.structs.replace(config.yookassa, test_mode=True)
    return msgspec.structs.replace(config, openrouter=openrouter, yookassa=yookassa)


# -- the listeners


@asynccontextmanager
async def listening(app: web.Application, config: Config) -> AsyncIterator[str]:
    """The public application on `server.port`; yields its URL. At the end, running requests are finished. Raises StartError."""
    require_c_parser()
    server = config.server
    runner = public_runner(app, server.shutdown_s)
    async with listening_on(runner, server.host, server.port, connection_factory(config), setting="PORT") as url:
        yield url


@asynccontextmanager
async def admin_listening(app: web.Application, config: Config) -> AsyncIterator[None]:
    """The administrators' application, on `admin.socket` or on `admin.port` of 127.0.0.1. Raises StartError."""
    runner = admin_runner(app)
    connection = connection_factory(config)
    listener: AbstractAsyncContextManager[Any] = (
        listening_on_unix_socket(runner, Path(config.admin.socket), connection)
        if config.admin.socket
        else listening_on(runner, "127.0.0.1", config.admin.port, connection, setting="GPTUTOR_ADMIN__PORT")
    )
    async with listener:
        yield
