"""The pool of database connections: a waiter gets a released one, and none that may be dead is reused."""

import asyncio
import os
import signal
import socket
from typing import cast

import asyncpg
import pytest

from gptutor.database import pool
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import IdleConnectionCache

BACKEND_PID = "SELECT pg_backend_pid() AS pid"


async def backend_pid(connections: IdleConnectionCache) -> int:
    connection = await connections.acquire()
    pid: int = await connection.fetchval(BACKEND_PID)
    await connections.release(connection, is_sound=True)
    return pid


async def test_an_idle_connection_is_reused(database: pool.Database) -> None:
    connections = database._connections
    assert await backend_pid(connections) == await backend_pid(connections)


async def test_a_waiter_gets_a_released_connection(database_url: str) -> None:
    async with pool.open_database(database_url, connections_max=1, acquire_s=5) as database:
        rows = await asyncio.gather(*(database.fetch("ping") for _ in range(20)))
    assert [row[0]["alive"] for row in rows] == [1] * 20


async def test_a_connection_that_was_idle_too_long_is_not_reused(
    database: pool.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await backend_pid(database._connections)
    monkeypatch.setattr("gptutor.database.pool.IDLE_MAX_S", 0)
    assert await backend_pid(database._connections) != first


async def test_a_connection_that_the_server_closed_is_not_reused(database: pool.Database, database_url: str) -> None:
    first = await backend_pid(database._connections)
    server = await asyncpg.connect(database_url)
    await server.execute("SELECT pg_terminate_backend($1)", first)
    await server.close()
    await asyncio.sleep(0.1)
    assert await backend_pid(database._connections) != first


async def test_after_a_statement_that_was_cancelled_half_sent_a_transaction_can_begin(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is prepared in one round trip and executed in another; in between the server has begun a transaction for it."""
    prepare = vars(asyncpg.Connection)["_get_statement"]

    async def cancelled_when_prepared(self: asyncpg.Connection, *arguments: object, **options: object) -> None:
        await prepare(self, *arguments, **options)
        raise asyncio.CancelledError

    async with pool.open_database(database_url, connections_max=1) as database:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "_get_statement", cancelled_when_prepared)
            with pytest.raises(asyncio.CancelledError):
                await database.fetch("ping")
        async with database.snapshot() as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_a_connection_whose_statement_was_cancelled_returns_to_the_pool(database: pool.Database) -> None:
    with pytest.raises((DatabaseUnavailable, TimeoutError)):
        async with asyncio.timeout(0.1), database.snapshot() as connection:
            await connection.execute("SELECT pg_sleep(5)")
    assert not database._connections._idle
    assert (await database.fetch("ping"))[0]["alive"] == 1


async def test_a_statement_that_ends_while_the_pool_closes_does_not_delay_the_closing(database_url: str) -> None:
    async with asyncio.timeout(5), pool.open_database(database_url) as database:
        connection = await database._connections.acquire()
        asyncio.get_running_loop().call_later(
            0.1, lambda: asyncio.ensure_future(database._connections.release(connection, is_sound=True))
        )


async def test_the_pool_closes_although_a_server_process_does_not_respond(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop of the service ends, and without an error, if PostgreSQL hangs."""
    monkeypatch.setattr("gptutor.database.pool.CLOSE_S", 0.5)
    stopped = []
    try:
        async with asyncio.timeout(10), pool.open_database(database_url) as database:
            stopped.append(await backend_pid(database._connections))
            os.kill(stopped[0], signal.SIGSTOP)
    finally:
        os.kill(stopped[0], signal.SIGCONT)


async def test_the_pool_closes_although_the_server_is_gone(database_url: str) -> None:
    async with pool.open_database(database_url) as database:
        connection = await database._connections.acquire()
        with socket.socket(fileno=os.dup(connection._transport.get_extra_info("socket").fileno())) as same:
            same.shutdown(socket.SHUT_WR)  # the message that ends the session meets a broken pipe
        await database._connections.release(connection, is_sound=True)


class PoolOfOthers:
    """A pool in which other requests go on while a connection is released."""

    def __init__(self) -> None:
        self.released: list[object] = []

    async def release(self, connection: object) -> None:
        await asyncio.sleep(0)
        self.released.append(connection)


class FakeConnection:
    is_terminated = False

    def terminate(self) -> None:
        self.is_terminated = True

    def is_closed(self) -> bool:
        return self.is_terminated


async def test_a_connection_released_while_others_are_discarded_is_kept() -> None:
    pool = PoolOfOthers()
    connections = IdleConnectionCache(cast("asyncpg.Pool", pool), acquire_s=1)
    idle, useless, running = FakeConnection(), FakeConnection(), FakeConnection()
    await connections.release(idle, is_sound=True)
    discarding = asyncio.ensure_future(connections.discard(useless))
    await asyncio.sleep(0)
    await connections.release(running, is_sound=True)
    await discarding
    assert pool.released == [useless, idle]
    assert await connections.acquire() is running
    assert not running.is_terminated
