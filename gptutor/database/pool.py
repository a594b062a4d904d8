"""PostgreSQL: the connections, and the named statements of `sql/queries`.

This is the rim at which asyncpg's exceptions become ours; nothing above it sees one.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg

SQL = Path(__file__).parent.parent / "sql"
ATTEMPTS_MAX = 8
PAGE = 1000
KEPT_S = 60.0
NAME_LINE = re.compile(r"^-- name: ([a-z_]+)\n", re.MULTILINE)

Row = asyncpg.Record


class DatabaseUnavailable(Exception):
    """PostgreSQL did not answer in time, or not at all. The statement may or may not have been carried out."""


class TransactionLost(DatabaseUnavailable):
    """A deadlock or a serialisation failure: the statement was certainly not carried out, and may be repeated."""


class RowsLocked(DatabaseUnavailable):
    """Somebody has rows that were needed, for longer than they were waited for."""


class DatabaseRefused(Exception):
    """PostgreSQL answers, and lets us not in, or has not our tables; the text is a sentence for the operator."""


class ConstraintViolated(Exception):
    """The database refused to break one of its laws; `name` is the constraint's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def load_statements(directory: Path = SQL / "queries") -> dict[str, str]:
    """Every `-- name: …` statement below the directory. Raises ValueError on a name that stands twice."""
    statements: dict[str, str] = {}
    for path in sorted(directory.glob("*.sql")):
        _, *parts = NAME_LINE.split(path.read_text(encoding="utf-8"))
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            if name in statements:
                raise ValueError(f"{path}: the statement {name} exists twice")
            statements[name] = text.strip().rstrip(";")
    return statements


STATEMENTS = load_statements()


class Connections:
    """asyncpg's pool, before which those connections are kept that were used last: a way through the pool costs the client more
    than the statement itself."""

    def __init__(self, pool: asyncpg.Pool, *, acquire_s: float) -> None:
        self._pool = pool
        self._acquire_s = acquire_s
        self._kept: list[tuple[Any, float]] = []
        """Each with the time since when it is idle."""
        self._waiting = 0
        self._is_closing = False

    async def take(self) -> Any:
        """Raises asyncpg's errors, and TimeoutError."""
        while self._kept:
            connection, since = self._kept.pop()
            try:
                if time.monotonic() - since < KEPT_S and not connection.is_closed():
                    return connection
                connection.terminate()  # what lies between may have forgotten a silent connection, and would not say so
                await self._pool.release(connection)
            except asyncpg.InterfaceError:
                continue  # the server ended it, and the pool has it back
        self._waiting += 1
        try:
            return await self._pool.acquire(timeout=self._acquire_s)
        finally:
            self._waiting -= 1

    async def give_back(self, connection: Any, *, is_sound: bool) -> None:
        """To whoever waits for one; one on which a statement did not end well is the pool's to look after."""
        if self._waiting or self._is_closing or not is_sound:
            await self._pool.release(connection)
        else:
            self._kept.append((connection, time.monotonic()))

    async def close(self) -> None:
        """Once all statements have ended."""
        self._is_closing = True
        while self._kept:
            await self._pool.release(self._kept.pop()[0])
        await self._pool.close()


class Database:
    """Statements by name. Raises DatabaseUnavailable, DatabaseRefused and ConstraintViolated, nothing of asyncpg's."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def fetch(self, statement: str, *arguments: Any) -> list[Row]:
        attempt = 1
        while True:
            try:
                with translated():
                    return await self._fetched(STATEMENTS[statement], arguments)
            except TransactionLost:
                if attempt == ATTEMPTS_MAX:
                    raise
            await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - jitter
            attempt += 1

    async def _fetched(self, text: str, arguments: Sequence[Any]) -> list[Row]:
        connection = await self._connections.take()
        is_sound = False
        try:
            rows: list[Row] = await connection.fetch(text, *arguments)
            is_sound = True
            return rows
        finally:
            await self._connections.give_back(connection, is_sound=is_sound)

    async def fetchrow(self, statement: str, *arguments: Any) -> Row | None:
        """The first row, of statements that return at most one."""
        rows = await self.fetch(statement, *arguments)
        return rows[0] if rows else None

    async def pages(self, statement: str, *arguments: Any) -> AsyncIterator[list[Row]]:
        """All rows of one snapshot, piece by piece, by a cursor of the server's: however many there are, few are in memory."""
        async with self.snapshot() as connection:
            cursor = await connection.cursor(STATEMENTS[statement], *arguments)
            while rows := await cursor.fetch(PAGE):
                yield rows

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Any]:
        """A connection that sees one moment of the database, read-only."""
        with translated():
            connection = await self._connections.take()
            try:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    yield connection
            finally:
                await self._connections.give_back(connection, is_sound=False)


@contextmanager
def translated(*, migrating: bool = False) -> Iterator[None]:
    """asyncpg's exceptions as ours. Whoever is `migrating` may lack tables, and sees asyncpg's own error for it."""
    try:
        yield
    except asyncpg.IntegrityConstraintViolationError as error:
        raise ConstraintViolated(error.constraint_name or "") from error
    except asyncpg.TransactionRollbackError as error:
        raise TransactionLost(type(error).__name__) from error
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise DatabaseRefused(f"PostgreSQL refuses DATABASE_URL: {error}") from error
    except asyncpg.UndefinedObjectError as error:
        if migrating and "configuration parameter" not in str(error):
            raise
        raise DatabaseRefused(f"PostgreSQL does not know what DATABASE_URL asks for: {error}") from error
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError) as error:
        if migrating:
            raise
        raise DatabaseRefused(f"The database lacks what this version needs ({error}): gptutor migrate") from error
    except asyncpg.LockNotAvailableError as error:
        raise RowsLocked(type(error).__name__) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseRefused(
            f"The role of DATABASE_URL has not the rights for this ({error}). The owner of the database grants them: see "
            "sql/roles.sql; migrations are the owner's to apply."
        ) from error
    except asyncpg.ClientConfigurationError as error:
        raise DatabaseRefused(f"DATABASE_URL is wrong: {error}.") from error
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(type(error).__name__) from error


# TimeoutError is the builtin one, and would otherwise look like a slow upstream.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that the server has ended, before asyncpg knows
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
)


async def _left_as_it_is(connection: asyncpg.Connection) -> None:
    """Nothing of ours outlives its transaction, so a connection that is given back needs no statement to forget it."""


@asynccontextmanager
async def connected(
    url: str,
    *,
    name: str = "gptutor",
    connections_min: int = 1,
    connections_max: int = 2,
    acquire_s: float = 10,
    statement_s: float = 60,
    idle_s: float = 10,
) -> AsyncIterator[Database]:
    """Opens a pool on `url`, under a name that the server shows, and closes it at the end.

    With `connections_min` 0 it opens even where nothing answers yet. A transaction may be idle for `idle_s` seconds: so long may
    a reader of `pages` take for one of them.

    Raises DatabaseUnavailable, DatabaseRefused.
    """
    with translated():
        pool = await asyncpg.create_pool(
            url,
            min_size=connections_min,
            max_size=connections_max,
            timeout=acquire_s,
            reset=_left_as_it_is,
            command_timeout=statement_s + 1,  # the server's own limit should speak first: it says why
            server_settings={
                "application_name": name,
                "timezone": "UTC",
                "statement_timeout": f"{statement_s * 1000:.0f}",
                "lock_timeout": f"{min(statement_s, 2) * 1000:.0f}",
                "idle_in_transaction_session_timeout": f"{idle_s * 1000:.0f}",
            },
        )
    connections = Connections(pool, acquire_s=acquire_s)
    try:
        yield Database(connections)
    finally:
        await connections.close()
