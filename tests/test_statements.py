"""The hand-written SQL: every statement is valid on the migrated schema, used, documented, and declares its types."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from gptutor.database import migrations
from gptutor.database.migrations import MigrationError, load_functions, load_migrations, migrate, pending_migrations
from gptutor.database.statements import STATEMENTS, load_statements

PACKAGE = Path(__file__).parent.parent / "gptutor"
SOURCES = {path: path.read_text() for path in PACKAGE.rglob("*.py")}


async def test_every_statement_is_valid_and_declares_the_type_of_each_parameter(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    for name, text in STATEMENTS.items():
        prepared = await connection.prepare(text)
        placeholders = {int(number) for number in re.findall(r"\$(\d+)", _code(text))}
        assert placeholders == set(range(1, len(prepared.get_parameters()) + 1)), name
        assert all(f"${number}::" in _code(text) for number in placeholders), f"{name}: a parameter without its type"
    await connection.close()


def _code(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--"))


def test_every_statement_is_used_and_every_used_one_exists() -> None:
    used = {name for text in SOURCES.values() for name in re.findall(r'(?:fetch|fetchrow|pages)\(\s*"([a-z_]+)"', text)}
    used |= {name for text in SOURCES.values() for name in re.findall(r'STATEMENTS\["([a-z_]+)"\]', text)}
    assert used == set(STATEMENTS)


def test_every_statement_says_what_it_is_for() -> None:
    assert [name for name, text in STATEMENTS.items() if not text.startswith("-- ")] == []


def test_no_sql_in_python() -> None:
    pattern = re.compile(r"[\"']\s*(SELECT|INSERT|UPDATE|DELETE|WITH|CREATE|ALTER)\s+[A-Za-z]")
    assert [(path.name, found[0]) for path, text in SOURCES.items() if (found := pattern.search(text))] == []


def test_a_duplicate_name_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("-- name: one\nSELECT 1;\n")
    (tmp_path / "b.sql").write_text("-- name: one\nSELECT 2;\n")
    with pytest.raises(ValueError, match="one exists twice"):
        load_statements(tmp_path)


async def test_migrations_are_applied_once_and_their_text_is_remembered(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row operator-4: a second run finds nothing to do."""
    url = postgres.replace("/postgres?", "/migrations?")
    server = await asyncpg.connect(postgres)
    await server.execute("CREATE DATABASE migrations")
    names = [file.name for file in (*load_migrations(), *load_functions())]
    assert await pending_migrations(url) == names
    assert await migrate(url) == names
    assert await migrate(url) == []
    assert await pending_migrations(url) == []

    changed = [migrations.Migration(names[0], "SELECT 1"), *load_migrations()[1:]]
    monkeypatch.setattr(migrations, "load_migrations", lambda: changed)
    with pytest.raises(MigrationError, match="changed after it was applied"):
        await pending_migrations(url)
    monkeypatch.setattr(migrations, "load_migrations", lambda: load_migrations()[:1])
    with pytest.raises(MigrationError, match="newer than this version"):
        await migrate(url)
    await server.execute("DROP DATABASE migrations WITH (FORCE)")
    await server.close()


async def test_two_migrators_at_once_apply_each_migration_once(postgres: str) -> None:
    """Row operator-4: one waits for the other, and finds nothing to do."""
    url = postgres.replace("/postgres?", "/migrations_at_once?")
    server = await asyncpg.connect(postgres)
    await server.execute("CREATE DATABASE migrations_at_once")
    applied = await asyncio.gather(*(migrate(url) for _ in range(4)))
    assert sorted(name for names in applied for name in names) == sorted(
        file.name for file in (*load_migrations(), *load_functions())
    )
    await server.execute("DROP DATABASE migrations_at_once WITH (FORCE)")
    await server.close()


async def test_a_failing_migration_leaves_nothing_behind(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row operator-4: a migration is applied whole or not at all."""
    broken = migrations.Migration("9999_broken", "CREATE TABLE half (id integer); SELECT nonsense;")
    monkeypatch.setattr(migrations, "load_migrations", lambda: [*load_migrations(), broken])
    with pytest.raises(asyncpg.PostgresError):
        await migrate(database_url)
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT to_regclass('half')") is None
    await connection.close()
    assert await pending_migrations(database_url) == ["9999_broken"]
