"""The invariants of the money (contract C9; row operator-6): each is silent on sound data, and fires when a row is corrupted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from gptutor.database.pool import Database
from gptutor.money.invariants import check, load_invariants
from tests.support.corruptions import CORRUPTIONS
from tests.support.gateway import make_client
from tests.support.ledger import hold, ledger_of, release, settlement


async def broken(database: Database) -> set[str]:
    return {finding.invariant.name async for finding in check(database) if finding.rows}


async def healthy(database: Database) -> None:
    client = await make_client(database, "100")
    ledger = ledger_of(database)
    await ledger.settle(settlement(await hold(database, client, "5"), "0.01"))
    await ledger.release(release(await hold(database, client, "5")))
    await hold(database, client, "5")


def test_every_invariant_has_its_corruption() -> None:
    assert set(CORRUPTIONS) == {invariant.name for invariant in load_invariants()}
    assert len(CORRUPTIONS) == 16


async def test_an_empty_and_a_sound_database_break_no_invariant(database: Database) -> None:
    assert await broken(database) == set()
    await healthy(database)
    assert await broken(database) == set()


@asynccontextmanager
async def without_constraint(url: str, table: str, constraint: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection without triggers, to a table that lacks the constraint meanwhile."""
    connection = await asyncpg.connect(url)
    await connection.execute("SET session_replication_role = replica")
    definition = await connection.fetchval("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1", constraint)
    await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {constraint}")
    try:
        yield connection
    finally:
        await connection.execute(f"TRUNCATE {table}")
        await connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT {constraint} {definition}")
        await connection.close()


@pytest.mark.parametrize("invariant", CORRUPTIONS)
async def test_a_corrupted_row_breaks_its_invariant(database: Database, database_url: str, invariant: str) -> None:
    await healthy(database)
    async with without_constraint(database_url, "ledger", "contra_is_the_counter_account_of_the_kind") as connection:
        status = await connection.execute(CORRUPTIONS[invariant])
        assert not status.endswith(" 0")
        assert invariant in await broken(database)


@pytest.mark.parametrize(
    "corruption",
    [
        "UPDATE ledger SET contra = 'nowhere' WHERE kind = 'topup'",
        "UPDATE ledger SET contra = CASE kind WHEN 'charge' THEN 'payments' ELSE 'revenue' END",
        "UPDATE ledger SET amount_nano = amount_nano - 1 WHERE kind = 'topup'",
        "UPDATE accounts SET balance_nano = balance_nano + 1",
        "DELETE FROM ledger",
    ],
)
async def test_both_legs_of_an_entry_are_checked(database: Database, database_url: str, corruption: str) -> None:
    await healthy(database)
    async with without_constraint(database_url, "ledger", "contra_is_the_counter_account_of_the_kind") as connection:
        await connection.execute(corruption)
        assert "13_accounts_and_counter_accounts_sum_to_zero" in await broken(database)


async def test_the_database_accepts_no_entry_with_the_counter_account_of_another_kind(
    database: Database, database_url: str
) -> None:
    client = await make_client(database, "100")
    connection = await asyncpg.connect(database_url)
    with pytest.raises(asyncpg.CheckViolationError, match="contra_is_the_counter_account_of_the_kind"):
        await connection.execute(
            "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra) VALUES ($1, gen_random_uuid(), 'topup', 1, 'revenue')",
            client.account_id,
        )
    await connection.close()


async def test_a_finding_shows_the_offending_row(database: Database, database_url: str) -> None:
    await healthy(database)
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE accounts SET balance_nano = balance_nano + 7")
    await connection.close()
    findings = [finding async for finding in check(database)]
    (row,) = findings[1].rows
    assert row["balance_nano"] - row["entries_nano"] == 7
    assert findings[1].invariant.meaning == "A balance is the sum of its ledger entries, and nothing else."
