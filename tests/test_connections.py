"""Connections that are kept at hand: whoever waits gets one, and none is used again that may be dead."""

import asyncio

import asyncpg
import pytest

from gptutor.database import pool
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import IdleConnectionCache

WHO = "SELECT pg_backend_pid() AS pid"


async def who(connections: IdleConnectionCache) -> int:
    connection = await connections.acquire()
    pid: int = await connection.fetchval(WHO)
    await connections.release(connection, is_sound=True)
    return pid


async def test_the_same_connection_serves_again(books: pool.Database) -> None:
    connections = books._connections
    assert await who(connections) == await who(connections)


async def test_who_waits_for_the_pool_gets_a_connection_that_another_would_keep(database_url: str) -> None:
    async with pool.open_database(database_url, connections_max=1, acquire_s=5) as books:
        rows = await asyncio.gather(*(books.fetch("ping") for _ in range(20)))
    assert [row[0]["alive"] for row in rows] == [1] * 20


async def test_one_that_was_idle_for_long_is_not_trusted(books: pool.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await who(books._connections)
    monkeypatch.setattr("gptutor.database.pool.IDLE_MAX_S", 0)
    assert await who(books._connections) != first


async def test_one_that_the_server_has_ended_is_not_used(books: pool.Database, database_url: str) -> None:
    first = await who(books._connections)
    server = await asyncpg.connect(database_url)
    await server.execute("SELECT pg_terminate_backend($1)", first)
    await server.close()
    await asyncio.sleep(0.1)
    assert await who(books._connections) != first


async def test_one_whose_statement_was_broken_off_goes_back_to_the_pool(books: pool.Database) -> None:
    with pytest.raises((DatabaseUnavailable, TimeoutError)):
        async with asyncio.timeout(0.1), books.snapshot() as connection:
            await connection.execute("SELECT pg_sleep(5)")
    assert not books._connections._idle
    assert (await books.fetch("ping"))[0]["alive"] == 1


async def test_a_statement_that_ends_after_the_closing_has_begun_does_not_hold_it_up(database_url: str) -> None:
    async with asyncio.timeout(5), pool.open_database(database_url) as books:
        connection = await books._connections.acquire()
        asyncio.get_running_loop().call_later(
            0.1, lambda: asyncio.ensure_future(books._connections.release(connection, is_sound=True))
        )
