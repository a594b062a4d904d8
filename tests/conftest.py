"""What the tests stand on: a real PostgreSQL, the simulator as OpenRouter, and the gateway on a real socket."""

import asyncio
import contextlib
import faulthandler
import functools
import gc
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop
from aiohttp import web
from hypothesis import settings as hypothesis_settings

from gptutor.config import schema
from gptutor.config.files import ENV_FILE
from gptutor.database import pool
from gptutor.openrouter import catalogue
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support import javascript
from tests.support.gateway import Gateway, config_for, gateway_on
from tests.support.postgres import BINARIES, CLUSTER, ArrayTypes, TestDatabase, running_postgres
from tests.support.service import Service, start

TEARDOWN_S = 60
"""Longer than any cleanup of a test, the shutdown of a service included."""

LONG = (
    "::test_an_operators_month_passes_without_a_lost_request_or_rouble_and_with_each_alert_told_once",
    "::test_no_kill_crash_or_lost_reply_loses_duplicates_or_invents_a_charge",
    "::test_any_history_of_deaths_and_recoveries_agrees_with_a_model_of_it",
    "::test_statements_and_ledger_pass_on_postgresql_15",
    "::test_without_free_descriptors_open_connections_are_served_and_the_service_recovers",
    "::test_a_connection_that_is_never_established[limits0]",
    "::test_a_host_that_falls_silent_is_left_within_seconds",
    "::test_memory_stays_within_the_documented_bound",
    "::test_an_export_of_any_length_takes_little_memory",
    "::test_at_the_start_a_silent_host_is_left_within_seconds",
    "::test_the_wheel_is_complete_and_has_the_version",
    "::test_any_bytes_pass_unchanged_and_their_bill_is_charged",
    "::test_the_guided_fuzzer_runs",
    "::test_five_replacements_under_load_lose_no_request",
    "::test_a_reload_that_cannot_succeed_keeps_what_serves_and_says_why",
    "::test_two_releases_serve_side_by_side_and_the_earlier_one_goes_on_alone",
    "::test_no_kind_of_request_takes_a_balance_below_the_setting",
    "::test_a_hung_event_loop_stops_the_messages_of_the_watchdog_until_it_is_replaced[options0]",
)
"""The longest tests, each of 8 seconds or more on a machine with two cores."""

hypothesis_settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis_settings.load_profile("tests")


def pytest_sessionstart() -> None:
    """The services that tests start read the `gptutor.env` of their folder, as every service does."""
    if Path(ENV_FILE).exists():
        pytest.exit(f"{Path(ENV_FILE).absolute()} has the settings of a living service: run the tests in another folder.", 1)


def pytest_configure() -> None:
    """What the collection makes stays until the end: the collector of garbage has nothing to find in it …"""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-xdist gives each process the next part of the list: the long tests come first in the parts, so that none is left alone
    at the end. (They are tests that share nothing with the others of their module.)"""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    long = [item for item in items if item.nodeid.endswith(LONG)]
    rest = [item for item in items if not item.nodeid.endswith(LONG)]
    total = len(items)
    ordered: list[pytest.Item] = []
    for process in range(processes):
        first = long[process::processes]
        size = (total - len(ordered)) // (processes - process)
        ordered += first + rest[: size - len(first)]
        del rest[: size - len(first)]
    items[:] = ordered


def pytest_collection_finish() -> None:
    """… and need not search it during the tests."""
    gc.freeze()
    gc.enable()


def pytest_report_header() -> str:
    return f"PostgreSQL: {os.environ.get(BINARIES, 'embedded')}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """pytest-timeout stops counting when a test fails, and what a failed test leaves open can keep its event loop from closing."""
    faulthandler.dump_traceback_later(TEARDOWN_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the service runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """What is the same for every gateway: the simulator's models are parsed once, and PostgreSQL's types are described once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "parse_models", functools.lru_cache(maxsize=8)(catalogue.parse_models))
        array_types = ArrayTypes()
        patch.setattr(asyncpg.Connection, "_introspect_types", lambda *arguments: array_types.types(*arguments))
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder that pytest-xdist's workers share is the one above their own."""
    own = tmp_path_factory.getbasetemp()
    CLUSTER.folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def test_database() -> Iterator[TestDatabase]:
    """A server of this process alone (pytest-xdist's workers have one each), with a migrated database."""
    with running_postgres() as url, contextlib.closing(TestDatabase(url)) as database:
        yield database


@pytest.fixture(scope="session")
def postgres(test_database: TestDatabase) -> str:
    """The URL of the server's database, whatever is in it."""
    return test_database.url


@pytest.fixture
def database_url(test_database: TestDatabase) -> str:
    """The URL of the migrated database, empty. (Emptying it is much quicker than cloning a template.)"""
    test_database.empty()
    return test_database.url


@pytest.fixture
def new_tables(test_database: TestDatabase) -> None:
    """Tables and indexes without the pages of earlier tests, for a test that counts pages."""
    test_database.truncate()


@pytest.fixture
def covered_bills(test_database: TestDatabase) -> Iterator[None]:
    """In no test is the simulator's bill above what was held for it (contract C4)."""
    yield
    assert test_database.overruns() == []


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[pool.Database]:
    async with pool.open_database(database_url, connections_min=0, connections_max=8) as connected:
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
    database_url: str, covered_bills: None, database: pool.Database, simulator: Simulator, tuned: dict[str, Any], tmp_path: Path
) -> AsyncIterator[Gateway]:
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url,
        gateway_on(config_for(database_url, base_url, tmp_path, tuned), database, simulator, is_migrated=True) as running,
    ):
        yield running
        await running.idle()


@pytest.fixture
async def scripted(
    database_url: str, database: pool.Database, simulator: Simulator, aiohttp_server: Any, tmp_path: Path, tuned: dict[str, Any]
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
    async with gateway_on(config, database, simulator, is_migrated=True) as running:
        yield plays, running


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Node, with the clients for JavaScript installed beside its scripts."""
    return javascript.install(tmp_path_factory.getbasetemp().parent / "npm.lock")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`gptutor serve`, whole, on a bare directory."""
    running = start(tmp_path_factory.mktemp("service"), GPTUTOR_LOGS__STDOUT="false")
    yield running
    assert running.stop() == 0
