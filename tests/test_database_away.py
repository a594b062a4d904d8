"""PostgreSQL that is not there, or comes and goes (contract C3, B6; rows db-1 to db-7, db-10, db-11)."""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import asyncpg
import pytest

from gptutor.app import build_app
from gptutor.config import schema
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable, RowsLocked, translate_errors
from gptutor.database.migrations import migrate, pending_migrations
from gptutor.database.pool import Database, open_database
from gptutor.http.app_keys import JOURNAL, READINESS
from gptutor.server.serve import listening, simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import LoggerService
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import SECRET, Gateway, config_for, gateway_on, make_client
from tests.support.service import environment

ASK = {"messages": [{"role": "user", "content": "Hello"}]}


class Door:
    """A TCP door in front of the database's socket, which can be shut: then connections break and no new one is made.

    `swallow` lets the next reply of at least so many bytes disappear, and breaks its connection: a commit without a word.
    """

    def __init__(self, url: str) -> None:
        directory = parse_qs(urlsplit(url).query)["host"][0]
        self._socket = f"{directory}/.s.PGSQL.5432"
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.swallow = 0
        self.is_silent = False
        """Accepts connections, and passes nothing: a firewall that drops packets."""

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, upstream_writer}
        try:
            await asyncio.gather(self._pass(reader, upstream_writer, False), self._pass(upstream_reader, writer, True))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in (writer, upstream_writer):
                each.transport.abort()
                self._writers.discard(each)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_server: bool) -> None:
        while data := await reader.read(65_536):
            if self.is_silent:
                continue
            if from_server and self.swallow and b"C" in data and len(data) >= self.swallow:
                self.swallow = 0
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@pytest.fixture
async def door(database_url: str) -> AsyncIterator[Door]:
    made = Door(database_url)
    await made.open()
    yield made
    await made.shut()


@asynccontextmanager
async def gateway_behind(door: Door, database: Database, directory: Path) -> AsyncIterator[Gateway]:
    simulator = Simulator()
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        config = config_for(door.url, base_url, directory)
        app = build_app(config, log=LoggerService(), secrets=[SECRET])
        async with listening(app, config) as url, aiohttp.ClientSession() as session:
            yield Gateway(url, app, simulator, database, session)


async def status_of(gateway: Gateway, path: str) -> int:
    async with gateway.session.get(gateway.url + path) as response:
        return response.status


async def test_at_the_start_the_service_waits_and_says_so(door: Door, database: Database, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    await door.shut()
    async with gateway_behind(door, database, tmp_path) as gateway:
        assert (await status_of(gateway, "/health"), await status_of(gateway, "/ready")) == (200, 503)
        async with gateway.session.post(gateway.chat_url, json=ASK, headers=client.headers) as response:
            assert (response.status, response.headers["X-Error-Code"], response.headers["Retry-After"]) == (503, "not_ready", "1")
        await door.open()
        await gateway.ready()
        assert await status_of(gateway, "/ready") == 200
        assert (await gateway.chat(client))[0].status == 200
        await assert_charges_match_bills(gateway, client)


async def test_before_the_hold_nothing_is_bought_and_all_goes_on_when_it_returns(
    door: Door, database: Database, tmp_path: Path
) -> None:
    async with gateway_behind(door, database, tmp_path) as gateway:
        await gateway.ready()
        client = await make_client(database, "100")
        assert (await gateway.chat(client))[0].status == 200
        await door.shut()
        response, document = await gateway.chat(client)
        assert (response.status, response.headers["X-Error-Code"]) == (503, "database_unavailable")
        assert json.loads(document) == {"error": "Service temporarily unavailable"}
        assert await status_of(gateway, "/ready") == 503
        assert len(gateway.simulator.billing.records) == 1
        await door.open()
        assert (await gateway.chat(client))[0].status == 200
        await assert_charges_match_bills(gateway, client)


async def test_at_settlement_the_journal_holds_it_and_all_is_settled_after_the_return(
    door: Door, database: Database, tmp_path: Path
) -> None:
    async with gateway_behind(door, database, tmp_path) as gateway:
        await gateway.ready()
        gateway.simulator.word_s = 0.01
        clients = [await make_client(database, "100") for _ in range(3)]

        async def send_one(index: int) -> int:
            body = {**ASK, "stream": bool(index % 2)}
            async with gateway.session.post(gateway.chat_url, json=body, headers=clients[index % 3].headers) as response:
                await response.read()
                return response.status

        sending = asyncio.gather(*(send_one(index) for index in range(12)))
        while len(gateway.app[JOURNAL].open_holds) < 12:
            await asyncio.sleep(0.005)
        await door.shut()
        assert await sending == [200] * 12  # the clients notice nothing
        assert len(gateway.app[JOURNAL].open_holds) == 12
        assert all(record.charge is not None for record in gateway.app[JOURNAL].open_holds.values())
        assert sum([await client.held() for client in clients]) > 0
        await door.open()
        await gateway.idle()
        assert not gateway.app[JOURNAL].open_holds
        spent = sum([100 - await client.balance() for client in clients])
        assert spent == gateway.billed_usd() * 90


async def test_what_was_not_settled_before_a_death_is_settled_after_it(door: Door, database: Database, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    async with gateway_behind(door, database, tmp_path) as first:
        await first.ready()
        first.simulator.first_word_s = 0.2
        running = asyncio.create_task(first.chat(client))
        while not first.app[JOURNAL].open_holds:
            await asyncio.sleep(0.005)
        await door.shut()
        await asyncio.sleep(0.4)  # the answer comes, its settlement cannot; then this process is stopped
        bill = first.billed_usd()
        running.cancel()
    assert bill > 0
    assert await client.balance() == 100
    await door.open()
    async with gateway_behind(door, database, tmp_path) as second:
        await second.ready()
        await second.recovered(client)
        assert await client.balance() == 100 - bill * 90


@pytest.mark.parametrize("size", [60])
async def test_a_hold_whose_commit_was_not_acknowledged_is_released(
    door: Door, database: Database, tmp_path: Path, size: int
) -> None:
    async with gateway_behind(door, database, tmp_path) as gateway:
        await gateway.ready()
        client = await make_client(database, "100")
        assert (await gateway.chat(client))[0].status == 200  # the statements are prepared now: one reply for each
        bought = len(gateway.simulator.billing.records)
        await asyncio.sleep(0.2)
        door.swallow = size
        response, _ = await gateway.chat(client)
        if response.status == 200:
            pytest.skip("recovery's own statement lost its reply, not the hold's")
        assert response.headers["X-Error-Code"] == "database_unavailable"
        assert len(gateway.simulator.billing.records) == bought
        await gateway.recovered(client)
        await assert_charges_match_bills(gateway, client)


async def test_a_locked_account_holds_up_nobody_else(gateway: Gateway, database_url: str) -> None:
    blocked, free = await gateway.client(), await gateway.client()
    connection = await asyncpg.connect(database_url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT 1 FROM accounts WHERE account_id = $1 FOR UPDATE", blocked.account_id)
    try:
        waiting = asyncio.create_task(gateway.chat(blocked))
        await asyncio.sleep(0.2)
        for _ in range(3):
            async with gateway.session.post(gateway.chat_url, json=ASK, headers=free.headers) as quick:
                assert quick.status == 200
        assert not waiting.done()
        slow, _ = await waiting
    finally:
        await transaction.rollback()
        await connection.close()
    assert (slow.status, slow.headers["X-Error-Code"]) == (503, "database_unavailable")
    await gateway.recovered(blocked)
    assert (await gateway.chat(blocked))[0].status == 200


async def test_deadlocks_are_repeated_and_nobody_hears_of_them(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[int] = []
    fetch = asyncpg.Connection.fetch

    async def unlucky(self: Any, *arguments: Any, **options: Any) -> Any:
        struck.append(1)
        if len(struck) < 4:
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        return await fetch(self, *arguments, **options)

    monkeypatch.setattr(asyncpg.Connection, "fetch", unlucky)
    assert await database.fetch("ping")
    assert len(struck) == 4
    monkeypatch.setattr(asyncpg.Connection, "fetch", lambda *_, **__: (_ for _ in ()).throw(asyncpg.SerializationError("x")))
    with pytest.raises(DatabaseUnavailable, match="Serialization"):
        await database.fetch("ping")


async def test_a_pool_that_is_used_up_is_an_overload_and_not_a_queue(database_url: str) -> None:
    async with open_database(database_url, connections_max=1, acquire_s=0.1) as narrow, narrow.snapshot():
        with pytest.raises(DatabaseUnavailable):
            await narrow.fetch("ping")


async def test_the_wrong_door_is_said_to_be_so(postgres: str) -> None:
    nowhere = postgres.replace("/postgres?", "/no_such_database?")
    environ = {**os.environ, "DATABASE_URL": nowhere, "GPTUTOR_SECRET_KEY": "A" * 43 + "=", "PORT": "0"}
    for command in (["migrate"], ["serve"], ["user", "list"]):
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "gptutor", *command],
            env=environ,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 1
        assert "PostgreSQL rejects DATABASE_URL" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_the_process_waits_for_the_database_and_dies_politely(tmp_path: Path) -> None:
    environ = environment(tmp_path, DATABASE_URL="postgresql://postgres@127.0.0.1:9/none", GPTUTOR_SECRET_KEY="A" * 43 + "=")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptutor", "serve"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "gptutor user create" in line:
            break
    assert "waiting for it" in said
    url = next(word for word in said.split() if word.startswith("http://localhost")).removesuffix("/v1")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url + "/ready", timeout=10)
    assert refused.value.code == 503
    refused.value.close()
    with urllib.request.urlopen(url + "/health", timeout=10) as healthy:
        assert healthy.status == 200
    process.terminate()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


async def test_stopping_is_not_ready(gateway: Gateway) -> None:
    gateway.app[READINESS].stop()
    assert (await status_of(gateway, "/health"), await status_of(gateway, "/ready")) == (200, 503)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), DatabaseUnavailable),
        (asyncpg.LockNotAvailableError("canceling statement due to lock timeout"), RowsLocked),
        (asyncpg.InsufficientPrivilegeError("permission denied for schema public"), DatabaseRefused),
        (asyncpg.ClientConfigurationError("invalid sslmode"), DatabaseRefused),
        (asyncpg.UndefinedObjectError('unrecognized configuration parameter "foo"'), DatabaseRefused),
    ],
)
def test_what_asyncpg_says_is_told_in_our_words(error: Exception, meaning: type[Exception]) -> None:
    with pytest.raises(Exception) as caught, translate_errors(migrating=True):  # noqa: PT011
        raise error
    assert type(caught.value) is meaning


@asynccontextmanager
async def a_database_of_its_own(postgres: str) -> AsyncIterator[tuple[str, "asyncpg.Connection[Any]"]]:
    """The URL of a new migrated database, reached through the role `visitor`, and a connection of the server's owner."""
    server = await asyncpg.connect(postgres)
    await server.execute("DROP DATABASE IF EXISTS visited WITH (FORCE)")
    await server.execute("DROP ROLE IF EXISTS visitor")
    await server.execute("CREATE ROLE visitor LOGIN")
    await server.execute("CREATE DATABASE visited OWNER visitor")
    await server.execute("REVOKE CONNECT ON DATABASE visited FROM PUBLIC")
    url = postgres.replace("/postgres?", "/visited?").replace("//postgres:", "//visitor:")
    await migrate(url)
    try:
        yield url, server
    finally:
        await server.execute("DROP DATABASE IF EXISTS visited WITH (FORCE)")
        await server.execute("DROP ROLE IF EXISTS visitor")
        await server.close()


@asynccontextmanager
async def gateway_of(url: str, directory: Path) -> AsyncIterator[Gateway]:
    """A gateway on the database, ready, with its log in `directory`."""
    simulator = Simulator()
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url,
        open_database(url, connections_min=0) as database,
    ):
        config = config_for(url, base_url, directory)
        with logging_to(config.paths.logs, level="info", retention_days=1, stdout=False) as log:
            async with gateway_on(config, database, simulator, log=log) as running:
                yield running


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """What the gateway logged, but for the lines of requests."""
    (path,) = (directory / "logs").glob("combined-*.log")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("type") not in ("http", "llm")]


async def test_a_server_that_became_read_only_is_left_and_used_again_when_it_is_not(postgres: str, tmp_path: Path) -> None:
    """Row sum-7."""
    async with a_database_of_its_own(postgres) as (url, server), gateway_of(url, tmp_path) as gateway:
        client = await gateway.client()
        for read_only in ("on", "off"):
            # Sessions that exist keep what they had, as those with a demoted server do: only new ones see the change.
            await server.execute(f"ALTER DATABASE visited SET default_transaction_read_only = {read_only}")
            if read_only == "on":
                await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'visited'")
                statuses = [(await gateway.chat(client))[0] for _ in range(3)]
                assert [(each.status, each.headers["Retry-After"]) for each in statuses] == [(503, "1")] * 3
                assert await status_of(gateway, "/ready") == 503
        assert await status_of(gateway, "/ready") == 200
        assert (await gateway.chat(client))[0].status == 200


async def test_ready_finds_a_read_only_server_by_itself(postgres: str, tmp_path: Path) -> None:
    async with a_database_of_its_own(postgres) as (url, server), gateway_of(url, tmp_path) as gateway:
        await server.execute("ALTER DATABASE visited SET default_transaction_read_only = on")
        await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'visited'")
        assert [await status_of(gateway, "/ready") for _ in range(3)] == [503] * 3
        await server.execute("ALTER DATABASE visited SET default_transaction_read_only = off")
        assert await status_of(gateway, "/ready") == 200


@pytest.mark.parametrize(
    "statements",
    [
        ["ALTER ROLE visitor NOLOGIN"],
        ["ALTER DATABASE visited ALLOW_CONNECTIONS false"],
        ["ALTER DATABASE visited OWNER TO postgres"],  # the right to connect goes with it
        ["DROP DATABASE visited WITH (FORCE)"],
        ["DROP DATABASE visited WITH (FORCE)", "CREATE DATABASE visited OWNER visitor"],
    ],
    ids=["no login", "no connections", "no right to connect", "dropped", "empty"],
)
async def test_a_database_that_refuses_is_503_and_one_quiet_line(postgres: str, tmp_path: Path, statements: list[str]) -> None:
    async with a_database_of_its_own(postgres) as (url, server), gateway_of(url, tmp_path) as gateway:
        client = await gateway.client()
        for statement in statements:
            await server.execute(statement)
        await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'visited'")
        await asyncio.sleep(0.1)
        for path in ("/v1/chat/completions", "/v1/credits", "/ready"):
            for _ in range(3):
                method = "POST" if "chat" in path else "GET"
                async with gateway.session.request(method, gateway.url + path, json=ASK, headers=client.headers) as response:
                    assert (response.status, response.headers["Retry-After"]) == (503, "1"), await response.text()
        await asyncio.sleep(1)  # recovery looks twenty times
    lines = lines_of(tmp_path)
    assert not [line for line in lines if "exc_info" in line or "never retrieved" in line["message"]]
    kinds = [line["message"] for line in lines if not line.get("repeated")]
    assert kinds
    assert len(kinds) == len(set(kinds)) <= 6, kinds


async def test_while_the_database_is_away_at_the_start_a_stop_is_for_good(door: Door, tmp_path: Path, database: Database) -> None:
    await door.shut()
    async with gateway_behind(door, database, tmp_path) as gateway:
        await gateway.app.shutdown()  # the first step of a stop
        await door.open()
        for _ in range(30):
            assert await status_of(gateway, "/ready") == 503
            await asyncio.sleep(0.1)


async def test_a_host_that_falls_silent_is_left_within_seconds(door: Door, database: Database, tmp_path: Path) -> None:
    """Row sum-7."""
    async with gateway_behind(door, database, tmp_path) as gateway:
        await gateway.ready()
        client = await make_client(database, "100")
        assert (await gateway.chat(client))[0].status == 200
        door.is_silent = True
        started = time.monotonic()
        response, _ = await gateway.chat(client)
        assert (response.status, response.headers["X-Error-Code"]) == (503, "database_unavailable")
        assert time.monotonic() - started < 8
        assert await status_of(gateway, "/ready") == 503
        door.is_silent = False
        started = time.monotonic()
        assert await status_of(gateway, "/ready") == 200
        assert (await gateway.chat(client))[0].status == 200
        door.is_silent = True
        started = time.monotonic()
    assert time.monotonic() - started < 15  # the stop does not wait for it either


async def test_a_cancelled_statement_does_not_wait_for_a_silent_host(door: Door) -> None:
    async with open_database(door.url) as database:
        await database.fetch("ping")
        door.is_silent = True
        statement = asyncio.create_task(database.fetch("ping"))
        await asyncio.sleep(0.1)
        statement.cancel()
        done, _ = await asyncio.wait({statement}, timeout=5)
        assert done
        door.is_silent = False
        assert (await database.fetch("ping"))[0]["alive"] == 1


async def test_at_the_start_a_silent_host_is_left_within_seconds(door: Door, database: Database, tmp_path: Path) -> None:
    door.is_silent = True
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await pending_migrations(door.url)
    assert time.monotonic() - started < 12
