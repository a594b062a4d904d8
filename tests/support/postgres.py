"""The PostgreSQL of one test process, and its database emptied between tests."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import fasteners

from gptutor.database import migrations
from gptutor.database.embedded import embedded_postgres

BINARIES = "TEST_POSTGRES_BINARIES"
"""Names the folder of another PostgreSQL's binaries, which is then tested instead of the embedded one."""

PAGES_MAX = 16
"""Tables up to this many pages are emptied row by row, which is quicker; above, they are truncated, so that no dead rows pile up."""


class Cluster:
    """A migrated and stopped embedded PostgreSQL, made once for all test processes and copied by each: `initdb` and the migrations
    take two seconds of CPU, a copy a tenth. (Tests of the first start have no copy.)"""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """One that all processes of the test run share; without it, nothing is copied."""

    def copy(self, directory: Path) -> None:
        """Makes the data directory, with the owner and the permissions that PostgreSQL requires."""
        if self.folder is None:
            return
        template = self.folder / "cluster" / "postgres"
        with fasteners.InterProcessLock(self.folder / "cluster.lock"):
            if not template.exists():
                made = self.folder / "cluster-being-made"
                with embedded_postgres(made / "postgres") as url, asyncio.Runner() as runner:
                    runner.run(migrations.migrate(url))
                made.rename(template.parent)
        directory.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", template, directory], check=True)


CLUSTER = Cluster()


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server in a temporary folder; gives its URL. It is the embedded one, or of the binaries that the environment names."""
    with tempfile.TemporaryDirectory(prefix="gptutor-tests-", ignore_cleanup_errors=True) as directory:
        binaries = os.environ.get(BINARIES)
        if not binaries:
            CLUSTER.copy(Path(directory) / "postgres")
        with (
            installed_postgres(Path(binaries), Path(directory))
            if binaries
            else embedded_postgres(Path(directory) / "postgres") as url
        ):
            yield url


@contextmanager
def installed_postgres(binaries: Path, directory: Path) -> Iterator[str]:
    """A server of PostgreSQL binaries, on a socket in `directory`. As root, it runs as the user `postgres`, as Debian's do."""
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(directory, user)

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [binaries / program, "-D", directory / "data", *arguments],
            cwd=directory,
            user=user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
    run("pg_ctl", "start", "-w", "-l", str(directory / "log"), "-o", f"-c listen_addresses='' -k {directory}")
    try:
        yield f"postgresql://postgres:@/postgres?host={directory}"
    finally:
        run("pg_ctl", "stop", "-w", "-m", "immediate")


class ArrayTypes:
    """What PostgreSQL says of its built-in array types, which is the same on every server: asked once, and not by each connection.
    asyncpg's question costs a new connection more than all its other statements, and tests make thousands of connections."""

    BUILT_IN_MAX = 16_383
    """The highest id of a type that no migration has made."""
    name = "known"
    """asyncpg takes this object for the statement with its question: one with a name has not replaced the unnamed one."""

    def __init__(self) -> None:
        self._ask: Any = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]
        self._known: dict[tuple[int, ...], Any] = {}

    async def types(self, connection: Any, ids: Iterable[int], timeout_s: float) -> Any:
        """The rows for these types, and the statement that was prepared for the question."""
        types = tuple(sorted(ids))
        if types not in self._known:
            found, statement = await self._ask(connection, types, timeout_s)
            if types[-1] > self.BUILT_IN_MAX:
                return found, statement
            self._known[types] = found
        return self._known[types], self


class TestDatabase:
    """One migrated database, used by one test after another over one connection of its own (on a loop of its own, which runs only
    between tests)."""

    __test__ = False  # not a class of tests, whatever its name

    def __init__(self, url: str) -> None:
        self.url = url
        self._loop = asyncio.new_event_loop()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._tables: list[str] = []
        self._loop.run_until_complete(self._prepare())

    def empty(self) -> None:
        """Deletes all rows, and starts all sequences again."""
        self._loop.run_until_complete(self._run(self._empty))

    def truncate(self) -> None:
        """Makes all tables and indexes as small as new ones, for a test that counts the pages that are read."""
        self._loop.run_until_complete(self._run(self._truncate))

    def overruns(self) -> list[tuple[Any, ...]]:
        """The simulator's bills that were above what was held for them: there are none, in any test (contract C4)."""
        return self._loop.run_until_complete(self._run(self._overruns))

    def close(self) -> None:
        if self._connection is not None:
            self._loop.run_until_complete(self._connection.close())
        self._loop.close()

    async def _prepare(self) -> None:
        server = await asyncpg.connect(self.url)
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            await server.execute(f"ALTER SYSTEM SET {setting} = off")  # a test's database need not survive a power cut
        # Its snapshots would keep dead rows in the way of tests that count the pages of a statement.
        await server.execute("ALTER SYSTEM SET autovacuum = off")
        await server.execute("SELECT pg_reload_conf()")
        await server.close()
        await migrations.migrate(self.url)

    async def _run(self, work: Any) -> Any:
        """A test may have cut all connections: then there is a new one."""
        try:
            return await work(await self._connected())
        except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError):
            self._connection = None
            return await work(await self._connected())

    async def _connected(self) -> "asyncpg.Connection[asyncpg.Record]":
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(self.url, server_settings={"application_name": "emptied between tests"})
            # Disables triggers and foreign keys: the ledger is append-only to everyone else.
            await self._connection.execute("SET session_replication_role = replica")
        return self._connection

    async def _empty(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        await connection.execute(EMPTY.format(pages_max=PAGES_MAX))

    async def _truncate(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        await connection.execute(EMPTY.format(pages_max=-1))

    async def _overruns(self, connection: "asyncpg.Connection[asyncpg.Record]") -> list[tuple[Any, ...]]:
        rows = await connection.fetch(
            "SELECT model, amount_nano, charge_nano FROM holds WHERE charge_nano > amount_nano AND generation_id LIKE 'gen-%-%'"
        )
        return [tuple(row) for row in rows]


# The sizes are those of the files: relpages in pg_class and the counts of pg_stat_user_tables are out of date.
EMPTY = """
DO $$
DECLARE
    tables text[] := ARRAY(
        SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public' AND tablename NOT LIKE 'schema%'
    );
    each text;
BEGIN
    IF EXISTS (SELECT FROM unnest(tables) AS name WHERE pg_relation_size(name::regclass) > {pages_max} * 8192) THEN
        EXECUTE 'TRUNCATE ' || array_to_string(tables, ', ') || ' RESTART IDENTITY CASCADE';
    ELSE
        FOREACH each IN ARRAY tables LOOP
            IF pg_relation_size(each::regclass) > 0 THEN
                EXECUTE 'DELETE FROM ' || each;
            END IF;
        END LOOP;
        PERFORM setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
            FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL;
    END IF;
END $$
"""
