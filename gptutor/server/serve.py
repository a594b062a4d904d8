"""Running the service: what it stands on is started first, and a banner says what that is.

Without a database of one's own there is the embedded PostgreSQL, without an OpenRouter key the simulator, so that the whole runs
on a bare machine (contract F9).
"""

import asyncio
import functools
import gc
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy

from gptutor.admin.app import build_admin
from gptutor.app import build_app
from gptutor.config.schema import Config, ServerSettings
from gptutor.config.schema import SimulatorSettings as SimulatorPlace
from gptutor.config.secrets import kept_secret, secret_keys
from gptutor.database import migrations, pool
from gptutor.database.errors import DatabaseUnavailable
from gptutor.http.connection import ClientConnection
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import parse_key
from gptutor.money.users import UserRepository
from gptutor.money.vault import Vault
from gptutor.server.banner import banner
from gptutor.server.listener import Connecting, StartError, complain_calmly, listening_at, listening_on
from gptutor.simulator.server import Simulator
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import HTTP_SERVER_LOGGER
from gptutor.telemetry.metrics import build_metrics

try:
    import uvloop

    run_loop = uvloop.run  # a turn of the loop at half the cost
except ImportError:  # where there is no wheel of it
    run_loop = asyncio.run  # type: ignore[assignment]

YOUNG_OBJECTS = 20_000
DEMO_ROUBLES = "100"
LINE_BYTES_MAX = 8190
HEADERS_MAX = 128


@contextmanager
def database_of(config: Config) -> Iterator[Config]:
    """The configuration with a database that answers: the operator's own, or the embedded one, started and up to date."""
    if not config.embedded:
        yield config
        return
    # Imported only here: a server with its own database need not have the package.
    from gptutor.database.embedded import EmbeddedPostgresError, embedded_postgres

    try:
        with embedded_postgres(config.paths.data / "postgres") as url:
            yield msgspec.structs.replace(config, database=msgspec.structs.replace(config.database, url=url))
    except EmbeddedPostgresError as error:
        raise StartError(str(error)) from error


async def serve(config: Config) -> None:
    """Runs until SIGINT, SIGTERM or SIGHUP. Raises StartError, ConfigError."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    complain_calmly(asyncio.get_running_loop())
    secrets = secret_keys(config)
    with (
        logging_to(
            config.paths.logs,
            level=config.logs.level,
            retention_days=config.logs.retention_days,
            stdout=config.logs.stdout,
        ) as log,
        database_of(config) as grounded,
    ):
        await prepare_database(grounded, embedded=config.embedded)
        async with AsyncExitStack() as stack:
            if config.simulated:
                simulator = Simulator(word_s=config.simulator.word_s, first_word_s=config.simulator.first_word_s)
                base_url = await stack.enter_async_context(simulated_openrouter(simulator, config.simulator))
                grounded = with_upstream(grounded, base_url)
            app = build_app(grounded, log=log, secrets=secrets)
            url = await stack.enter_async_context(listening(app, grounded))
            if config.metrics.port:
                runner = web.AppRunner(build_metrics(), access_log=None, shutdown_timeout=1)
                metrics = listening_on(runner, config.metrics.host, config.metrics.port, setting="GPTUTOR_METRICS__PORT")
                await stack.enter_async_context(metrics)
            if config.admin.is_open:
                admin = build_admin(grounded, log=log, secrets=secrets)
                await stack.enter_async_context(administering(admin, grounded))
            demo_key = await demo_user(grounded, Vault(secrets)) if config.embedded and config.simulated else None
            collect_seldom()
            print(banner(config, url=url, demo_key=demo_key), flush=True)
            await stop.wait()
            print("Stopping: running answers are finished, and their money is settled …", flush=True)


def with_upstream(config: Config, base_url: str) -> Config:
    """The configuration with the simulator in OpenRouter's place."""
    upstream = msgspec.structs.replace(config.openrouter, base_url=base_url, api_key="sk-or-simulator", proxy="")
    return msgspec.structs.replace(config, openrouter=upstream)


def collect_seldom() -> None:
    """What is there at the start stays, and need not be looked through for garbage again and again; requests leave hardly any."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)


@asynccontextmanager
async def listening(app: web.Application, config: Config) -> AsyncIterator[str]:
    """The service on its port; gives its address. At the end it stops listening, finishes and settles. Raises StartError."""
    require_c_parser()
    server = config.server
    async with listening_on(service(app, server), server.host, server.port, connection_of(config), setting="PORT") as url:
        yield url


def require_c_parser() -> None:
    """Raises StartError."""
    if HttpRequestParser is HttpRequestParserPy:
        raise StartError(
            "aiohttp runs without its C parser, and its substitute is less strict. Reinstall aiohttp, "
            "or unset AIOHTTP_NO_EXTENSIONS."
        )


def service(app: web.Application, server: ServerSettings) -> web.AppRunner:
    """The application as it runs for its callers: who leaves is noticed, and who is being answered is waited for."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        shutdown_timeout=server.shutdown_s / 2,  # aiohttp waits for it twice
    )


def administrator(app: web.Application) -> web.AppRunner:
    """The administrator's application: who hangs up does not undo, since what is done has its audit line."""
    return web.AppRunner(app, shutdown_timeout=1)


def connection_of(config: Config) -> Connecting:
    """Makes a caller's connection, with its limits."""
    server = config.server
    return functools.partial(
        ClientConnection,
        loop=asyncio.get_running_loop(),
        header_s=server.header_s,
        silent_s=config.relay.write_timeout_s,
        keepalive_timeout=server.keepalive_s,
        lingering_time=server.linger_s,
        max_line_size=LINE_BYTES_MAX,
        max_field_size=LINE_BYTES_MAX,
        max_headers=HEADERS_MAX,
        auto_decompress=False,  # a compressed body is refused, unopened
        access_log=None,
        logger=HTTP_SERVER_LOGGER,
    )


@asynccontextmanager
async def administering(app: web.Application, config: Config) -> AsyncIterator[None]:
    """The administrator's listener, on its socket or its port of this machine. Raises StartError."""
    runner = administrator(app)
    connection = connection_of(config)
    listener: AbstractAsyncContextManager[Any] = (
        listening_at(runner, Path(config.admin.socket), connection)
        if config.admin.socket
        else listening_on(runner, "127.0.0.1", config.admin.port, connection, setting="GPTUTOR_ADMIN__PORT")
    )
    async with listener:
        yield


@asynccontextmanager
async def simulated_openrouter(simulator: Simulator, place: SimulatorPlace) -> AsyncIterator[str]:
    """The simulator on its port; gives the base URL of its API. Raises StartError."""
    runner = web.AppRunner(simulator.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1)
    async with listening_on(runner, place.host, place.port, setting="GPTUTOR_SIMULATOR__PORT") as url:
        yield url + "/api/v1"


async def prepare_database(config: Config, *, embedded: bool) -> None:
    """The embedded database is brought up to date; one's own must be. If it does not answer yet, the service waits for it."""
    try:
        if embedded:
            await migrations.migrate(config.database.url)
        elif pending := await migrations.pending_migrations(config.database.url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
    except DatabaseUnavailable as error:
        if embedded:
            raise
        print(f"PostgreSQL does not answer at DATABASE_URL yet ({error.__cause__ or error}): waiting for it.", flush=True)


async def demo_user(config: Config, vault: Vault) -> str:
    """The key of a user with some roubles to try the service with: made once, and kept while it lives."""
    path = config.paths.data / "demo-key"
    async with pool.open_database(config.database.url) as connected:
        users, keys = UserRepository(connected), KeyRing(connected, vault)
        if path.exists():
            key = path.read_text().strip()
            if (claim := parse_key(key)) and await keys.is_alive(claim):
                return key
            path.unlink()
        user = await users.create("demo")
        await Bookings(connected).book(user.account_id, "bonus", parse_roubles(DEMO_ROUBLES), reason="demo")
        key, _ = await keys.issue(user.account_id, "demo")
        return kept_secret(path, lambda: key)
