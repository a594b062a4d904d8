"""What the tests stand on: a real PostgreSQL, the simulator as OpenRouter, and the gateway on a real socket."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import uvloop
from aiohttp import web
from hypothesis import settings as hypothesis_settings

from gptutor import database, migrations, settings
from gptutor.api.health import READINESS
from gptutor.app import IN_FLIGHT, build_app
from gptutor.config_files import ENV_FILE
from gptutor.embedded import embedded_postgres
from gptutor.logs import LoggerService
from gptutor.money.amounts import AccountId, parse_roubles, roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import User, UserRepository
from gptutor.money.vault import Vault
from gptutor.openrouter.simulator.server import Simulator
from gptutor.serve import listening, simulated_openrouter
from tests.service import Service, start

hypothesis_settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis_settings.load_profile("tests")

SECRET = bytes(range(32))
VAULT = Vault([SECRET])


def pytest_sessionstart() -> None:
    """The services that tests start read the `gptutor.env` of their folder, as every service does."""
    if Path(ENV_FILE).exists():
        pytest.exit(f"{Path(ENV_FILE).absolute()} has the settings of a living service: run the tests in another folder.", 1)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the service runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A server of the session's own, migrated; gives its URL."""
    with (
        tempfile.TemporaryDirectory(prefix="gptutor-tests-", ignore_cleanup_errors=True) as directory,
        embedded_postgres(Path(directory) / "postgres") as url,
    ):
        asyncio.run(_prepare(url))
        yield url


async def _prepare(url: str) -> None:
    server = await asyncpg.connect(url)
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        await server.execute(f"ALTER SYSTEM SET {setting} = off")  # a test's database need not survive a power cut
    await server.execute("SELECT pg_reload_conf()")
    await server.close()
    await migrations.migrate(url)


@pytest.fixture
async def database_url(postgres: str) -> str:
    """The migrated database, empty. (Emptying it is much quicker than cloning a template.)"""
    server = await asyncpg.connect(postgres)
    tables = await server.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migrations'"
    )
    await server.execute("SET session_replication_role = replica")  # the ledger's guard sleeps for a moment
    await server.execute(f"TRUNCATE {', '.join(table['tablename'] for table in tables)} RESTART IDENTITY CASCADE")
    await server.close()
    return postgres


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[database.Database]:
    async with database.connected(database_url, connections_max=8) as connected:
        yield connected


@dataclass
class Caller:
    """A user with a key, seen from both sides of the counter."""

    key: str
    account_id: AccountId
    books: database.Database

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def user(self) -> User:
        return await UserRepository(self.books).find(self.account_id)

    async def balance(self) -> Decimal:
        return Decimal(roubles((await self.user()).balance))

    async def held(self) -> Decimal:
        return Decimal(roubles((await self.user()).held))


async def make_caller(books: database.Database, balance: str) -> Caller:
    users = UserRepository(books)
    user = await users.create()
    if Decimal(balance):
        await Bookings(books).book(user.account_id, "topup", parse_roubles(balance))
    key, _ = await KeyRing(books, VAULT).issue(user.account_id)
    return Caller(key, user.account_id, books)


@dataclass
class Gateway:
    """The service on a socket, with the simulator behind it."""

    url: str
    app: web.Application
    simulator: Simulator
    books: database.Database
    session: aiohttp.ClientSession
    chat_url: str = field(init=False)

    def __post_init__(self) -> None:
        self.chat_url = f"{self.url}/v1/chat/completions"

    async def caller(self, balance: str = "100") -> Caller:
        return await make_caller(self.books, balance)

    async def chat(self, caller: Caller, text: str = "Hello", **members: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        """Asks, and waits until the money is closed too."""
        body = {"messages": [{"role": "user", "content": text}], **members}
        async with self.session.post(self.chat_url, json=body, headers=caller.headers) as response:
            document = await response.read()
        await self.idle()
        return response, document

    async def idle(self) -> None:
        """Waits until no request's money is under way."""
        async with asyncio.timeout(20):
            while len(self.app[IN_FLIGHT]):
                await asyncio.sleep(0.005)

    async def recovered(self, caller: Caller) -> None:
        """Waits until recovery has closed all that the caller's requests left open."""
        await self.idle()
        async with asyncio.timeout(20):
            while await caller.held():
                await asyncio.sleep(0.02)

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            while self.app[READINESS].obstacle is not None:
                await asyncio.sleep(0.005)

    def billed_usd(self) -> Decimal:
        return self.simulator.books.total_usd()


@pytest.fixture
def tuned() -> dict[str, Any]:
    """Sections of settings that differ from the defaults; a test parametrizes this fixture to change them."""
    return {}


def config_for(database_url: str, base_url: str, directory: Path, tuned: dict[str, Any] | None = None) -> settings.Config:
    """The settings of a gateway under test: all defaults, but for its ends, its patience at the end, and what a test tunes."""
    changed = tuned or {}
    return settings.Config(
        server=settings.Server(**{"port": 0, "shutdown_s": 1, "drain_s": 5, **changed.get("server", {})}),
        paths=settings.Paths(data=directory / "var", logs=directory / "logs"),
        database=settings.Database(url=database_url),
        openrouter=settings.OpenRouter(base_url=base_url, api_key="sk-or-test", **changed.get("openrouter", {})),
        billing=settings.Billing(**changed.get("billing", {})),
        rate_limit=settings.RateLimit(**changed.get("rate_limit", {})),
        vk=settings.Vk(**changed.get("vk", {})),
        relay=settings.Relay(**changed.get("relay", {})),
        recovery=settings.Recovery(**{"poll_s": 0.05, **changed.get("recovery", {})}),
    )


@asynccontextmanager
async def gateway_on(config: settings.Config, books: database.Database, simulator: Simulator) -> AsyncIterator[Gateway]:
    """A gateway with these settings, ready. Only one at a time may have a database whose OpenRouter is not the other's: recovery
    looks up whatever is due, and would ask the wrong one."""
    app = build_app(config, log=LoggerService(), secrets=[SECRET])
    async with listening(app, config) as url, aiohttp.ClientSession(auto_decompress=False) as session:
        running = Gateway(url, app, simulator, books, session)
        await running.ready()
        yield running


@pytest.fixture
async def simulator() -> Simulator:
    return Simulator()


@pytest.fixture
async def gateway(
    database_url: str, books: database.Database, simulator: Simulator, tuned: dict[str, Any], tmp_path: Path
) -> AsyncIterator[Gateway]:
    async with (
        simulated_openrouter(simulator, settings.Simulator(port=0)) as base_url,
        gateway_on(config_for(database_url, base_url, tmp_path, tuned), books, simulator) as running,
    ):
        yield running
        await running.idle()
        assert await overruns(database_url) == []


async def overruns(database_url: str) -> list[tuple[Any, ...]]:
    """The simulator's bills that were above what was held for them: there are none, in any test (contract C4)."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch(
            "SELECT model, amount_nano, charge_nano FROM holds WHERE charge_nano > amount_nano AND generation_id LIKE 'gen-%-%'"
        )
    finally:
        await connection.close()
    return [tuple(row) for row in rows]


@pytest.fixture
async def scripted(
    database_url: str, books: database.Database, simulator: Simulator, aiohttp_server: Any, tmp_path: Path, tuned: dict[str, Any]
) -> AsyncIterator[Any]:
    """A gateway whose OpenRouter is a function of the test's; gives (set the function, the gateway)."""
    plays: list[Any] = []

    async def play(request: web.Request) -> web.StreamResponse:
        await request.read()
        result: web.StreamResponse = await plays[-1](request)
        return result

    async def models(request: web.Request) -> web.Response:
        return web.Response(body=simulator._models, content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/chat/completions", play), web.get("/models", models)])
    server = await aiohttp_server(app)
    config = config_for(database_url, str(server.make_url("/")), tmp_path / "scripted", tuned)
    async with gateway_on(config, books, simulator) as running:
        yield plays, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`gptutor serve`, whole, on a bare directory."""
    running = start(tmp_path_factory.mktemp("service"), GPTUTOR_LOGS__STDOUT="false")
    yield running
    assert running.stop() == 0
