"""What the tests stand on: a real PostgreSQL, the simulator as OpenRouter, and the gateway on a real socket."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop
from aiohttp import web
from hypothesis import settings as hypothesis_settings

from gptutor.config import schema
from gptutor.config.files import ENV_FILE
from gptutor.database import migrations, pool
from gptutor.database.embedded import embedded_postgres
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.books import overruns
from tests.support.gateway import Gateway, config_for, gateway_on
from tests.support.service import Service, start

hypothesis_settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis_settings.load_profile("tests")


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
    tables = await server.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename NOT LIKE 'schema%'")
    await server.execute("SET session_replication_role = replica")  # the ledger's guard sleeps for a moment
    await server.execute(f"TRUNCATE {', '.join(table['tablename'] for table in tables)} RESTART IDENTITY CASCADE")
    await server.close()
    return postgres


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[pool.Database]:
    async with pool.open_database(database_url, connections_max=8) as connected:
        yield connected


@pytest.fixture
def tuned() -> dict[str, Any]:
    """Sections of settings that differ from the defaults; a test parametrizes this fixture to change them."""
    return {}


@pytest.fixture
async def simulator() -> Simulator:
    return Simulator()


@pytest.fixture
async def gateway(
    database_url: str, books: pool.Database, simulator: Simulator, tuned: dict[str, Any], tmp_path: Path
) -> AsyncIterator[Gateway]:
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url,
        gateway_on(config_for(database_url, base_url, tmp_path, tuned), books, simulator) as running,
    ):
        yield running
        await running.idle()
        assert await overruns(database_url) == []


@pytest.fixture
async def scripted(
    database_url: str, books: pool.Database, simulator: Simulator, aiohttp_server: Any, tmp_path: Path, tuned: dict[str, Any]
) -> AsyncIterator[Any]:
    """A gateway whose OpenRouter is a function of the test's; gives (set the function, the gateway)."""
    plays: list[Any] = []

    async def play(request: web.Request) -> web.StreamResponse:
        await request.read()
        result: web.StreamResponse = await plays[-1](request)
        return result

    async def models(request: web.Request) -> web.Response:
        return web.Response(body=simulator.model_list, content_type="application/json")

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
