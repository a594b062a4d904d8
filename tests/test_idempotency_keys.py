"""An idempotency key is free again when nothing was bought under it, and after 24 hours; marks of failed requests end after three
minutes (contract B8, C10)."""

import asyncio
import hashlib
from pathlib import Path

import asyncpg
import pytest

from gptutor.database.pool import Database
from gptutor.money import recovery
from gptutor.money.amounts import parse_roubles
from gptutor.money.holds import HandOver, Hold, HoldRequest, Mark, OutcomeUnknown, Release, RepeatedRequest, new_id
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Ceiling
from tests.support.gateway import Client, make_client
from tests.support.ledger import assert_invariants_hold, claim, settlement
from tests.support.recovery import mortal, process


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


# -- what frees a key


BODY, OTHER_BODY = hashlib.sha256(b"body").digest(), hashlib.sha256(b"other body").digest()


async def place(
    ledger: Ledger, client: Client, key: str | None = "order 66", body_hash: bytes = BODY, request_id: str = "r"
) -> Hold:
    ceiling = Ceiling(hold_max=parse_roubles("1"), available_min=parse_roubles("1"))
    return await ledger.hold_funds(HoldRequest(claim(client), new_id(), ceiling, "a/b", request_id, key, body_hash))


async def test_a_release_frees_the_key_only_if_nothing_was_bought(database: Database, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    with process(database, tmp_path / "own") as own:
        for _ in range(2):
            held = await place(own.ledger, client)
            with pytest.raises(RepeatedRequest):
                await place(own.ledger, client)
            await own.ledger.release(Release(held.account_id, held.hold_id))
        held = await place(own.ledger, client, body_hash=OTHER_BODY)
        await own.ledger.release(
            Release(held.account_id, held.hold_id, unresolved=True)
        )  # nobody knows whether it bought anything
        with pytest.raises(RepeatedRequest) as rejected:
            await place(own.ledger, client)
        assert not rejected.value.same_body
    await assert_invariants_hold(database)


async def test_recovery_frees_the_key_of_a_request_that_was_never_sent(database: Database, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    dead = mortal(database, tmp_path / "journals")
    await place(dead, client, "never sent")
    sent = await place(dead, client, "sent")
    dead.journal.record_sent(sent.account_id, sent.hold_id)
    with process(database, tmp_path / "journals") as living:
        running = asyncio.create_task(living.recovery.run())
        async with asyncio.timeout(20):
            while True:
                try:
                    await place(living.ledger, client, "never sent")
                    break
                except RepeatedRequest:
                    await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(RepeatedRequest):
            await place(living.ledger, client, "sent")


async def test_many_processes_that_use_one_key_at_once_place_one_hold(database: Database, tmp_path: Path) -> None:
    """While it is freed again and again: at no moment are two holds open under it."""
    client = await make_client(database, "100")
    open_holds = 0

    async def use(ledger: Ledger) -> None:
        nonlocal open_holds
        for _ in range(20):
            try:
                held = await place(ledger, client)
            except RepeatedRequest:
                continue
            open_holds += 1
            assert open_holds == 1
            await asyncio.sleep(0)
            open_holds -= 1
            await ledger.release(Release(held.account_id, held.hold_id))

    with process(database, tmp_path / "one") as one, process(database, tmp_path / "other") as other:
        await asyncio.gather(*(use(each.ledger) for each in (one, other) for _ in range(5)))
    await assert_invariants_hold(database)


# -- marks


async def test_a_mark_rejects_the_same_body_until_it_ends(database: Database, database_url: str, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    with process(database, tmp_path / "own") as own:
        first = await place(own.ledger, client, None, request_id="the-first")
        await own.ledger.mark_outcome_unknown(Mark(first.account_id, first.hold_id, BODY))
        await own.ledger.hand_over(HandOver(first.account_id, first.hold_id, None))
        keyed = await place(own.ledger, client, "order 66", OTHER_BODY)
        await own.ledger.mark_outcome_unknown(Mark(keyed.account_id, keyed.hold_id, OTHER_BODY))
        with pytest.raises(OutcomeUnknown, match="the-first"):
            await place(own.ledger, client, None)
        await own.recovery.clear_idempotency_keys()
        with pytest.raises(OutcomeUnknown):
            await place(own.ledger, client, None)

        connection = await asyncpg.connect(database_url)
        await connection.execute("UPDATE holds SET repeats_rejected_until = now() WHERE repeats_rejected_until IS NOT NULL")
        await place(own.ledger, client, None, OTHER_BODY)
        own.recovery._keys_cleared_until = 0
        await own.recovery.clear_idempotency_keys()
        rows = await connection.fetch("SELECT repeats_rejected_until, idempotency_key, body_hash FROM holds ORDER BY created_at")
        assert [tuple(row) for row in rows] == [(None, None, None), (None, "order 66", OTHER_BODY), (None, None, None)]
        await connection.close()
    await assert_invariants_hold(database)


async def test_a_request_that_turns_out_to_have_bought_nothing_loses_its_mark(database: Database, tmp_path: Path) -> None:
    client = await make_client(database, "100")
    with process(database, tmp_path / "own") as own:
        first = await place(own.ledger, client, None)
        await own.ledger.mark_outcome_unknown(Mark(first.account_id, first.hold_id, BODY))
        await own.ledger.release(Release(first.account_id, first.hold_id))
        await place(own.ledger, client, None)
