"""Applies `sql/migrations` (tables, forward only, never changed once applied) and `sql/functions` (replaced when a file changes).

Each migration has a transaction of its own; then all changed functions are replaced together, in one. A function whose parameters
change stays beside the new one of the same name: processes of the previous release go on calling it. A function whose columns
change, or that goes, needs a migration that drops the old one.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from gptutor import __version__
from gptutor.database.errors import translate_errors
from gptutor.database.statements import SQL, STATEMENTS

MIGRATION_LOCK_S = 10
CONNECT_S = 10.0
CHECK_S = 10.0
"""The longest time that reading the list of migrations takes; then the host is silent."""
FIRST_OF_0_1 = "0001_accounts_holds_ledger"


class MigrationError(Exception):
    """The schema is not what this version needs; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A file of `sql/migrations` or `sql/functions`."""

    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Pending:
    """What a database lacks."""

    migrations: list[Migration]
    functions: list[Migration]

    @property
    def names(self) -> list[str]:
        return [file.name for file in (*self.migrations, *self.functions)]


def load_migrations(directory: Path = SQL / "migrations") -> list[Migration]:
    return [Migration(path.stem, path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.sql"))]


def load_functions(directory: Path = SQL / "functions") -> list[Migration]:
    return [Migration(f"functions/{path.stem}", path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.sql"))]


async def pending_migrations(url: str) -> list[str]:
    """Names of the migrations and functions that the database lacks. Raises MigrationError, DatabaseUnavailable."""
    with translate_errors():
        connection = await asyncpg.connect(url, timeout=CONNECT_S, command_timeout=CHECK_S)
        try:
            return (await _pending(connection)).names
        finally:
            await connection.close()


async def migrate(url: str) -> list[str]:
    """Applies what the database lacks, and returns the names. Raises MigrationError, DatabaseUnavailable."""
    applied: list[str] = []
    with translate_errors(migrating=True):
        # A statement that waits for a table makes all others wait behind it: better to fail, and be run again.
        connection = await asyncpg.connect(url, timeout=CONNECT_S, server_settings={"lock_timeout": f"{MIGRATION_LOCK_S * 1000}"})
        try:
            while True:
                async with connection.transaction():
                    await connection.execute(STATEMENTS["lock_migrations"])
                    pending = await _pending(connection)
                    if not pending.names:
                        return applied
                    await connection.execute(STATEMENTS["create_migrations_table"])
                    await connection.execute(STATEMENTS["create_functions_table"])
                    files = pending.migrations[:1] or pending.functions
                    for file in files:
                        await connection.execute(file.text)
                        if pending.migrations:
                            await connection.execute(STATEMENTS["record_migration"], file.name, file.checksum)
                        else:
                            await connection.execute(STATEMENTS["record_function"], file.name, file.checksum, __version__)
                applied += [file.name for file in files]
        finally:
            await connection.close()


async def _pending(connection: asyncpg.Connection) -> Pending:
    (tables,) = await connection.fetch(STATEMENTS["find_migrations_tables"])
    migrations = await connection.fetch(STATEMENTS["list_migrations"]) if tables["has_migrations"] else []
    functions = await connection.fetch(STATEMENTS["list_functions"]) if tables["has_functions"] else []
    return Pending(
        _pending_migrations({row["name"]: row["checksum"] for row in migrations}),
        _pending_functions({row["name"]: (row["checksum"], row["version"]) for row in functions}),
    )


def _pending_migrations(applied: dict[str, str]) -> list[Migration]:
    known = load_migrations()
    if FIRST_OF_0_1 in applied:
        raise MigrationError("The database has the schema of GPTutor 0.1: convert it first, with make convert-0.1.")
    for migration in known:
        if applied.get(migration.name, migration.checksum) != migration.checksum:
            raise MigrationError(f"Migration {migration.name} was changed after it was applied; restore its file.")
    if unknown := applied.keys() - {migration.name for migration in known}:
        raise MigrationError(f"The database is newer than this version: it has {', '.join(sorted(unknown))}. Update GPTutor.")
    return [migration for migration in known if migration.name not in applied]


def _pending_functions(applied: dict[str, tuple[str, str]]) -> list[Migration]:
    newest = max((version for _, version in applied.values()), key=_numbers, default=__version__)
    if _numbers(newest) > _numbers(__version__):
        raise MigrationError(f"The database is newer than this version: its functions are of {newest}. Update GPTutor.")
    return [file for file in load_functions() if applied.get(file.name, ("", ""))[0] != file.checksum]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
