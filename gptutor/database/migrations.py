"""The migrations of `sql/migrations`: forward only, each in a transaction of its own; none is changed after it was applied."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from gptutor.database.pool import SQL, STATEMENTS, translated

MIGRATION_LOCK_S = 10


class MigrationError(Exception):
    """The schema is not what this version needs; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_migrations(directory: Path = SQL / "migrations") -> list[Migration]:
    return [Migration(path.stem, path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.sql"))]


async def pending_migrations(url: str) -> list[str]:
    """Names of the migrations that the database lacks. Raises MigrationError, DatabaseUnavailable."""
    with translated():
        connection = await asyncpg.connect(url)
        try:
            if not await connection.fetchval(STATEMENTS["has_migrations_table"]):
                return [migration.name for migration in load_migrations()]
            return [migration.name for migration in await _missing(connection, load_migrations())]
        finally:
            await connection.close()


async def migrate(url: str) -> list[str]:
    """Applies what is missing, each migration in a transaction of its own, and returns the names."""
    applied: list[str] = []
    with translated(migrating=True):
        # Whoever waits for a table makes all others wait behind him: better to give up, and to be asked again.
        connection = await asyncpg.connect(url, server_settings={"lock_timeout": f"{MIGRATION_LOCK_S * 1000}"})
        try:
            while True:
                async with connection.transaction():
                    await connection.execute(STATEMENTS["lock_migrations"])
                    await connection.execute(STATEMENTS["create_migrations_table"])
                    missing = await _missing(connection, load_migrations())
                    if not missing:
                        return applied
                    await connection.execute(missing[0].text)
                    await connection.execute(STATEMENTS["record_migration"], missing[0].name, missing[0].checksum)
                applied.append(missing[0].name)
        finally:
            await connection.close()


async def _missing(connection: asyncpg.Connection, known: list[Migration]) -> list[Migration]:
    applied = {row["name"]: row["checksum"] for row in await connection.fetch(STATEMENTS["list_migrations"])}
    for migration in known:
        if applied.get(migration.name, migration.checksum) != migration.checksum:
            raise MigrationError(f"Migration {migration.name} was changed after it was applied; restore its file.")
    if unknown := applied.keys() - {migration.name for migration in known}:
        raise MigrationError(f"The database is newer than this version: it has {', '.join(sorted(unknown))}. Update GPTutor.")
    return [migration for migration in known if migration.name not in applied]
