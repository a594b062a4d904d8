"""A database of which a copy is taken, and put back later: what a backup, or a server that lags behind, does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from gptutor.database.migrations import migrate

LIVE, COPY = "live", "copy"


class RestorableDatabase:
    """A migrated database on the tests' server. Both ways end all connections to it, as a failover does."""

    def __init__(self, server: "asyncpg.Connection[asyncpg.Record]", url: str) -> None:
        self._server = server
        self.url = url.replace("/postgres?", f"/{LIVE}?")

    async def back_up(self) -> None:
        while True:
            # The service connects again at once, and a database that is copied must have no connections.
            await self._server.execute(f"ALTER DATABASE {LIVE} WITH ALLOW_CONNECTIONS false")
            try:
                await self.disconnect()
                await self._server.execute(f"CREATE DATABASE {COPY} TEMPLATE {LIVE} STRATEGY file_copy")
                return
            except asyncpg.ObjectInUseError:
                continue
            finally:
                await self._server.execute(f"ALTER DATABASE {LIVE} WITH ALLOW_CONNECTIONS true")

    async def restore(self) -> None:
        """The database is again what it was when the copy was taken."""
        await self._server.execute(f"DROP DATABASE {LIVE} WITH (FORCE)")
        await self._server.execute(f"ALTER DATABASE {COPY} RENAME TO {LIVE}")

    async def disconnect(self) -> None:
        await self._server.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", LIVE)


@asynccontextmanager
async def restorable(url: str) -> AsyncIterator[RestorableDatabase]:
    """`url` is that of another database of the server."""
    server = await asyncpg.connect(url)
    database = RestorableDatabase(server, url)
    try:
        await server.execute(f"CREATE DATABASE {LIVE}")
        await migrate(database.url)
        yield database
    finally:
        for name in (LIVE, COPY):
            await server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await server.close()
