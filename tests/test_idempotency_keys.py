"""Idempotency keys are cleared after their 24 hours, whether or not they are used again (contract C10)."""

import asyncio
import hashlib
from pathlib import Path

import asyncpg
import pytest

from gptutor.database.pool import Database
from gptutor.money import recovery
from gptutor.money.amounts import parse_roubles
from gptutor.money.holds import HoldRequest, new_id
from gptutor.money.pricing import Ceiling
from tests.support.gateway import make_client
from tests.support.ledger import assert_invariants_hold, claim, settlement
from tests.support.recovery import process


@pytest.fixture
async def keys(database: Database, database_url: str, tmp_path: Path) -> asyncpg.Connection:
    """Five holds with keys, of which three are older than a day; a connection that counts them."""
    client = await make_client(database, "100")
    ceiling = Ceiling(hold_max=parse_roubles("1"), available_min=parse_roubles("1"))
    with process(database, tmp_path / "others") as other:
        for number in range(5):
            key, body = f"order {number}", hashlib.sha256(b"body").digest()
            held = await other.ledger.hold_funds(HoldRequest(claim(client), new_id(), ceiling, "a/b", f"r-{number}", key, body))
            await other.ledger.settle(settlement(held, "0.01"))
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE holds SET created_at = created_at - interval '24 hours 1 second' WHERE idempotency_key < 'order 3'"
    )
    return connection


async def left(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch("SELECT idempotency_key, body_hash FROM holds ORDER BY created_at")
    assert all((row["idempotency_key"] is None) == (row["body_hash"] is None) for row in rows)
    return [row["idempotency_key"] for row in rows if row["idempotency_key"] is not None]


async def test_recovery_clears_what_is_older_than_a_day(database: Database, keys: asyncpg.Connection, tmp_path: Path) -> None:
    with process(database, tmp_path / "own") as own:
        running = asyncio.create_task(own.recovery.run())
        async with asyncio.timeout(20):
            while len(await left(keys)) > 2:
                await asyncio.sleep(0.02)
        running.cancel()
    assert await left(keys) == ["order 3", "order 4"]
    await keys.close()
    await assert_invariants_hold(database)


async def test_it_looks_once_a_minute_unless_there_are_more(
    database: Database, keys: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "CLEARED_KEYS_MAX", 2)
    with process(database, tmp_path / "own") as own:
        await own.recovery.clear_idempotency_keys()
        assert await left(keys) == ["order 2", "order 3", "order 4"]  # the oldest first
        await own.recovery.clear_idempotency_keys()
        assert await left(keys) == ["order 3", "order 4"]
        await keys.execute("UPDATE holds SET created_at = created_at - interval '25 hours'")
        await own.recovery.clear_idempotency_keys()
        assert await left(keys) == ["order 3", "order 4"]
        own.recovery._keys_cleared_until = 0
        await own.recovery.clear_idempotency_keys()
        assert await left(keys) == []
    await keys.close()


async def test_a_hold_that_is_being_closed_is_not_waited_for(
    database: Database, database_url: str, keys: asyncpg.Connection
) -> None:
    """Accounts are locked before holds; this takes holds alone, and must never wait for one."""
    closing = await asyncpg.connect(database_url)
    async with closing.transaction():
        await closing.execute("SELECT FROM holds WHERE idempotency_key = 'order 0' FOR UPDATE")
        assert len(await database.fetch("clear_idempotency_keys", 10)) == 2
    assert await left(keys) == ["order 0", "order 3", "order 4"]
    await closing.close()
    await keys.close()
