"""Applies `sql/migrations` (tables, forward only, never changed once applied) and `sql/functions` (replaced when a file changes).

Each migration has a transaction of its own; then all changed functions are replaced together, in one.

A release works with the schema of the next minor version as well, so that the service can go back to it, and both run side by
side meanwhile: 0.2 with the schemas of 0.2 and 0.3. What a newer release has added or replaced stays as it is: an older one
replaces none of it. (CONTRIBUTING.md has the rules for migrations and functions that make this possible.) The database knows
which release applied each file.

With other parameters, CREATE OR REPLACE makes a second function of the same name. Where the first one was, processes of the
previous release go on calling it; a database that the newer release has made lacks it. So, once a release has a function, other
parameters mean another name. A function whose columns change, or that goes, needs a migration that drops the old one.
"""

import hashlib
import re
from collections.abc import Sequence
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
class Applied:
    """A file that a database has, and the release that applied it."""

    name: str
    checksum: str
    version: str | None


@dataclass(frozen=True, slots=True)
class Pending:
    """What a database lacks. `newer` is the newest release that has migrated it, if that is newer than this one."""

    migrations: list[Migration]
    functions: list[Migration]
    newer: str | None

    @property
    def names(self) -> list[str]:
        return [file.name for file in (*self.migrations, *self.functions)]


def load_migrations(directory: Path = SQL / "migrations") -> list[Migration]:
    return [Migration(path.stem, path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.sql"))]


def load_functions(directory: Path = SQL / "functions") -> list[Migration]:
    return [Migration(f"functions/{path.stem}", path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.sql"))]


async def pending_migrations(url: str) -> list[str]:
    """Names of the migrations and functions that the database lacks. Raises MigrationError, DatabaseUnavailable."""
    return (await find_pending(url)).names


async def find_pending(url: str) -> Pending:
    """What the database lacks. Raises MigrationError, DatabaseUnavailable."""
    with translate_errors():
        connection = await asyncpg.connect(url, timeout=CONNECT_S, command_timeout=CHECK_S)
        try:
            return await _pending(connection)
        finally:
            await connection.close()


async def migrate(url: str, *, accept_newer: bool = False) -> list[str]:
    """Applies what the database lacks, and returns the names.

    Nothing is applied to a database that a newer release has migrated: that is an error, unless `accept_newer` and this version
    works with it as it is. Raises MigrationError, DatabaseUnavailable.
    """
    applied: list[str] = []
    with translate_errors(migrating=True):
        # A statement that waits for a table makes all others wait behind it: better to fail, and be run again.
        connection = await asyncpg.connect(url, timeout=CONNECT_S, server_settings={"lock_timeout": f"{MIGRATION_LOCK_S * 1000}"})
        try:
            while True:
                async with connection.transaction():
                    await connection.execute(STATEMENTS["lock_migrations"])
                    pending = await _pending(connection)
                    if pending.newer is not None and (pending.names or not accept_newer):
                        raise MigrationError(_newer_sentence(pending))
                    if not pending.names:
                        return applied
                    await connection.execute(STATEMENTS["create_migrations_table"])
                    await connection.execute(STATEMENTS["add_version_to_migrations"])
                    await connection.execute(STATEMENTS["create_functions_table"])
                    files = pending.migrations[:1] or pending.functions
                    for file in files:
                        await connection.execute(file.text)
                        if pending.migrations:
                            await connection.execute(STATEMENTS["record_migration"], file.name, file.checksum, __version__)
                        else:
                            await connection.execute(STATEMENTS["record_function"], file.name, file.checksum, __version__)
                applied += [file.name for file in files]
        finally:
            await connection.close()


async def _pending(connection: asyncpg.Connection) -> Pending:
    (tables,) = await connection.fetch(STATEMENTS["find_migrations_tables"])
    migrations = await connection.fetch(STATEMENTS["list_migrations"]) if tables["has_migrations"] else []
    functions = await connection.fetch(STATEMENTS["list_functions"]) if tables["has_functions"] else []
    return pending_files(
        *([Applied(row["name"], row["checksum"], row["version"]) for row in rows] for rows in (migrations, functions))
    )


def pending_files(migrations: Sequence[Applied], functions: Sequence[Applied]) -> Pending:
    """What a database with these files lacks. Raises MigrationError if this version cannot work with them."""
    versions = [file.version for file in (*migrations, *functions) if file.version is not None]
    newer = max(filter(is_newer, versions), key=_numbers, default=None)
    if newer is not None and not works_with(newer):
        raise MigrationError(
            f"The database is newer than this version: {newer} has migrated it, and {__version__} works with the schemas of "
            f"{_next_minor(__version__)} and earlier. Update GPTutor."
        )
    return Pending(_pending_migrations(migrations), _pending_functions(functions), newer)


def _pending_migrations(applied: Sequence[Applied]) -> list[Migration]:
    known = load_migrations()
    checksums = {file.name: file.checksum for file in applied}
    if FIRST_OF_0_1 in checksums:
        raise MigrationError("The database has the schema of GPTutor 0.1: convert it first, with make convert-0.1.")
    for migration in known:
        if checksums.get(migration.name, migration.checksum) != migration.checksum:
            raise MigrationError(f"Migration {migration.name} was changed after it was applied; restore its file.")
    names = {migration.name for migration in known}
    if unknown := [file.name for file in applied if file.name not in names and not is_newer(file.version)]:
        raise MigrationError(f"The database is newer than this version: it has {', '.join(sorted(unknown))}. Update GPTutor.")
    return [migration for migration in known if migration.name not in checksums]


def _pending_functions(applied: Sequence[Applied]) -> list[Migration]:
    """Those that the database lacks, or has in an older form. A newer form has the same parameters and columns."""
    by_name = {file.name: file for file in applied}
    return [
        file
        for file in load_functions()
        if file.name not in by_name or (by_name[file.name].checksum != file.checksum and not is_newer(by_name[file.name].version))
    ]


def _newer_sentence(pending: Pending) -> str:
    sentence = f"The database is newer than this version: {pending.newer} has migrated it. {__version__} changes nothing in it"
    if pending.names:
        return f"{sentence}, and lacks {', '.join(pending.names)}. Update GPTutor."
    return f"{sentence}, and needs no migration: its service works with this schema."


def is_newer(version: str | None) -> bool:
    """Whether another release is newer than this one. None: an early 0.2.0, which did not record it."""
    return version is not None and _numbers(version) > _numbers(__version__)


def works_with(newer: str) -> bool:
    """Whether this version works with the schema of a newer one: up to the next minor version."""
    return _numbers(newer)[:2] <= _numbers(_next_minor(__version__))


def _next_minor(version: str) -> str:
    major, minor, *_ = _numbers(version)
    return f"{major}.{minor + 1}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
