"""Connections to PostgreSQL, and the execution of named statements on them."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from gptutor.database.errors import USELESS_CONNECTION, TransactionLost, translate_errors
from gptutor.database.statements import STATEMENTS
from gptutor.telemetry.metrics import POOL_WAIT, STATEMENT_DURATION

ATTEMPTS_MAX = 8
PAGE_ROWS = 1000
IDLE_MAX_S = 60.0
CLOSE_S = 5.0
"""The longest wait for statements under way and for the server to end its sessions when the pool closes."""

Row = asyncpg.Record


class IdleConnectionCache:
    """Recently used connections, in front of asyncpg's pool: acquiring from the pool costs more than a statement does."""

    def __init__(self, pool: asyncpg.Pool, *, acquire_s: float) -> None:
        self._pool = pool
        self._acquire_s = acquire_s
        self._idle: list[tuple[Any, float]] = []
        """Connections, each with the time since which it is idle."""
        self._waiting = 0
        self._is_closing = False

    async def acquire(self) -> Any:
        """Raises asyncpg's exceptions, and TimeoutError."""
        while self._idle:
            connection, since = self._idle.pop()
            try:
                if time.monotonic() - since < IDLE_MAX_S and not connection.is_closed():
                    return connection
                connection.terminate()  # a firewall may have dropped a silent connection without telling either side
                await self._pool.release(connection)
            except asyncpg.InterfaceError:
                continue  # the server closed it, and the pool has taken it back
        self._waiting += 1
        since = time.monotonic()
        try:
            return await self._pool.acquire(timeout=self._acquire_s)
        finally:
            self._waiting -= 1
            POOL_WAIT.observe(time.monotonic() - since)

    async def release(self, connection: Any, *, is_sound: bool) -> None:
        """Caches the connection, or returns it to the pool: if somebody waits there, or (not `is_sound`) a statement failed."""
        if self._waiting or self._is_closing or not is_sound:
            with contextlib.suppress(asyncpg.InterfaceError):  # it was closed, and the pool has taken it back
                await self._pool.release(connection)
        else:
            self._idle.append((connection, time.monotonic()))

    async def discard(self, connection: Any) -> None:
        """Closes a connection that is of no use any more, and with it all idle ones, which lead to the same server."""
        useless = [connection, *(idle for idle, _ in self._idle)]
        self._idle.clear()  # before the first await: other requests acquire and release meanwhile
        for each in useless:
            with contextlib.suppress(asyncpg.InterfaceError):  # it was closed, and the pool has taken it back
                each.terminate()
                await self._pool.release(each)

    async def close(self) -> None:
        """Waits for the statements under way, but not for a server that hangs: the stop of the service must not fail."""
        self._is_closing = True
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._idle:
                    await self._pool.release(self._idle.pop()[0])
                await self._pool.close()
        except (OSError, asyncpg.InterfaceError, asyncpg.PostgresError):  # TimeoutError is an OSError too
            self._pool.terminate()


class Database:
    """Executes statements by name. Raises DatabaseUnavailable, DatabaseRefused and ConstraintViolated, nothing of asyncpg's."""

    def __init__(self, connections: IdleConnectionCache) -> None:
        self._connections = connections

    async def fetch(self, statement: str, *arguments: Any) -> list[Row]:
        """All rows. Repeats what a deadlock or a serialisation failure rolled back."""
        attempt = 1
        while True:
            try:
                with translate_errors():
                    return await self._fetch_once(statement, arguments)
            except TransactionLost:
                if attempt == ATTEMPTS_MAX:
                    raise
            await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - jitter
            attempt += 1

    async def _fetch_once(self, statement: str, arguments: Sequence[Any]) -> list[Row]:
        connection = await self._connections.acquire()
        async with self._returned(connection):
            since = time.monotonic()
            rows: list[Row] = await connection.fetch(STATEMENTS[statement], *arguments)
            STATEMENT_DURATION.observe(time.monotonic() - since, (statement,))
            return rows

    async def check(self) -> None:
        """Whether requests can be served: the login is accepted, the schema is there, and the server can be written to.

        Raises DatabaseUnavailable, DatabaseRefused.
        """
        with translate_errors():
            connection = await self._connections.acquire()
            async with self._returned(connection):
                (row,) = await connection.fetch(STATEMENTS["ping"])
                if row["is_read_only"]:
                    raise asyncpg.ReadOnlySQLTransactionError("the server is read-only")

    async def fetchrow(self, statement: str, *arguments: Any) -> Row | None:
        """The first row, of statements that return at most one."""
        rows = await self.fetch(statement, *arguments)
        return rows[0] if rows else None

    async def pages(self, statement: str, *arguments: Any) -> AsyncIterator[list[Row]]:
        """All rows of one snapshot, page by page through a server-side cursor: memory holds one page."""
        async with self.snapshot() as connection:
            cursor = await connection.cursor(STATEMENTS[statement], *arguments)
            while rows := await cursor.fetch(PAGE_ROWS):
                yield rows

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Any]:
        """A connection in a read-only transaction that sees the database at one moment."""
        with translate_errors():
            connection = await self._connections.acquire()
            transaction = connection.transaction(isolation="repeatable_read", readonly=True)
            async with self._returned(connection, is_cached=False), transaction:
                yield connection

    @asynccontextmanager
    async def _returned(self, connection: Any, *, is_cached: bool = True) -> AsyncIterator[None]:
        """Returns the connection at the end: to the cache, or after an error to the pool, or closed, if it is of no more use."""
        is_sound = False
        try:
            yield
            is_sound = is_cached
        except USELESS_CONNECTION:
            await self._connections.discard(connection)
            raise
        except asyncio.CancelledError:
            # asyncpg would wait until the server has cancelled the statement, which a silent one never does. And the server may
            # have begun a transaction for a statement that was prepared, and not executed yet.
            connection.terminate()
            raise
        finally:
            await self._connections.release(connection, is_sound=is_sound)


async def _no_reset(connection: asyncpg.Connection) -> None:
    """Session state that we set never outlives its transaction, so a released connection needs no `RESET ALL` round trip."""


@asynccontextmanager
async def open_database(
    url: str,
    *,
    name: str = "gptutor",
    connections_min: int = 1,
    connections_max: int = 2,
    acquire_s: float = 10,
    statement_s: float = 60,
    idle_s: float = 10,
) -> AsyncIterator[Database]:
    """Opens a pool on `url`, with `name` as the application_name of its connections, and closes it at the end.

    With `connections_min` 0, it opens even if the server does not respond yet. A transaction may be idle for `idle_s` seconds:
    the time that a reader of `pages` has for one page.

    Raises DatabaseUnavailable, DatabaseRefused.
    """
    with translate_errors():
        pool = await asyncpg.create_pool(
            url,
            min_size=connections_min,
            max_size=connections_max,
            timeout=acquire_s,
            reset=_no_reset,
            command_timeout=statement_s + 1,  # the server's own limit should come first: its error says why
            server_settings={
                "application_name": name,
                "timezone": "UTC",
                "statement_timeout": f"{statement_s * 1000:.0f}",
                "lock_timeout": f"{min(statement_s, 2) * 1000:.0f}",
                "idle_in_transaction_session_timeout": f"{idle_s * 1000:.0f}",
            },
        )
    connections = IdleConnectionCache(pool, acquire_s=acquire_s)
    try:
        yield Database(connections)
    finally:
        await connections.close()
