"""Recovery: holds left open by a dead process, or by an exchange that ended abnormally, are closed by evidence, once (contract C3, C6, C8;
rows upstream-14, upstream-19, process-2 to process-6, -11, -12, db-5, operator-2). And the client's insurance against paying twice,
Idempotency-Key (contract C10, B8; rows money-4, money-5)."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from gptutor.api.chat.purchase import Purchase
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.database.statements import STATEMENTS
from gptutor.money import journal
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.bookings import Bookings
from gptutor.money.holds import HandOver, Hold
from gptutor.money.journal import Journal, JournalError
from gptutor.money.journal_records import HoldRecord
from gptutor.money.keyring import KeyRing
from gptutor.money.pricing import Charge
from gptutor.money.recovery import Recovery, next_action
from gptutor.openrouter.bill import Bill
from tests.support.gateway import VAULT, Client, Gateway, make_client
from tests.support.ledger import assert_invariants_hold, hold, settlement
from tests.support.recovery import Generations, journals_in, mortal, process

CHARGE = Charge(Nano(9 * 10**8), Decimal("0.01"))  # 0.01 dollars × 90 = 0.9 roubles

NOTHING = None
SENT = HoldRecord(AccountId(1))
WITH_GENERATION_ID = HoldRecord(AccountId(1), "gen-1")
BILLED = HoldRecord(AccountId(1), None, CHARGE)
BILLED_WITH_GENERATION_ID = HoldRecord(AccountId(1), "gen-1", CHARGE)


@pytest.mark.parametrize(
    # what the journal says, whether it was provably never sent, whether it is a day old → the action
    ("record", "never_sent", "too_old", "action"),
    [
        (NOTHING, False, False, "wait"),
        (NOTHING, False, True, "give_up"),
        (NOTHING, True, False, "release"),
        (NOTHING, True, True, "release"),
        (SENT, False, False, "wait"),
        (SENT, False, True, "give_up"),
        (SENT, True, False, "wait"),
        (SENT, True, True, "give_up"),
        (WITH_GENERATION_ID, False, False, "look_up"),
        (WITH_GENERATION_ID, False, True, "look_up"),
        (WITH_GENERATION_ID, True, False, "look_up"),
        (WITH_GENERATION_ID, True, True, "look_up"),
        (BILLED, False, False, "settle"),
        (BILLED, False, True, "settle"),
        (BILLED, True, False, "settle"),
        (BILLED, True, True, "settle"),
        (BILLED_WITH_GENERATION_ID, False, False, "settle"),
        (BILLED_WITH_GENERATION_ID, False, True, "settle"),
        (BILLED_WITH_GENERATION_ID, True, False, "settle"),
        (BILLED_WITH_GENERATION_ID, True, True, "settle"),
    ],
)
def test_the_next_action(record: HoldRecord | None, never_sent: bool, too_old: bool, action: str) -> None:
    """Contract C6: the table of `next_action`, every combination."""
    assert next_action(record, never_sent=never_sent, too_old=too_old) == action


# -- a process of the test's own


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def row_of(database: Database, which: Hold) -> asyncpg.Record:
    async with database.snapshot() as connection:
        row = await connection.fetchrow("SELECT * FROM holds WHERE hold_id = $1", which.hold_id)
    assert isinstance(row, asyncpg.Record)
    return row


@pytest.fixture
async def change(database_url: str) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Runs SQL directly, mostly to let time pass."""
    connection = await asyncpg.connect(database_url)
    yield connection.execute
    await connection.close()


DUE = "UPDATE holds SET due_at = now() WHERE state = 'open'"
OLD = "UPDATE holds SET due_at = now(), created_at = now() - interval '25 hours' WHERE state = 'open'"
Change = Callable[..., Awaitable[str]]


# -- the journals of dead processes


async def test_a_bill_recorded_by_a_dead_process_is_settled_once_however_often_it_is_replayed(
    database: Database, directory: Path
) -> None:
    """Contract C3, C6; rows upstream-14, process-5, process-6."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    dead.journal.record_sent(held.account_id, held.hold_id)
    dead.journal.record_generation_id(held.hold_id, "gen-1")
    dead.journal.record_charge(held.hold_id, CHARGE, "gen-1")
    with process(database, directory) as survivor:
        (abandoned,), (again,) = journals_in(directory), journals_in(directory)
        await asyncio.gather(survivor.recovery.replay(abandoned), survivor.recovery.replay(again))
        await survivor.recovery.replay(again)
    assert (await client.balance(), await client.held()) == (Decimal("99.1"), 0)
    entry, _ = await Bookings(database).entries(client.account_id, 10)
    assert (entry.entry_id, entry.cost_usd, entry.generation_id) == (held.hold_id, CHARGE.cost_usd, "gen-1")
    assert journals_in(directory) == []
    await assert_invariants_hold(database)


async def test_a_generation_id_recorded_by_a_dead_process_is_looked_up_and_settled(database: Database, directory: Path) -> None:
    """Contract C6; rows process-4, upstream-19: without a cost the hold stays open, with a cost it is charged."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    dead.journal.record_sent(held.account_id, held.hold_id)
    dead.journal.record_generation_id(held.hold_id, "gen-1")
    with process(database, directory) as survivor:
        (abandoned,) = journals_in(directory)
        await survivor.recovery.replay(abandoned)
        row = await row_of(database, held)
        assert (row["state"], row["is_handed_over"], row["generation_id"]) == ("open", True, "gen-1")
        assert journals_in(directory) == []

        assert await survivor.recovery.process_due_holds() == 1
        assert (await client.balance(), await client.held()) == (100, 5)
        assert await survivor.recovery.process_due_holds() == 0  # not due again yet

        survivor.generations.costs["gen-1"] = Decimal("0.01")
        await make_due(database)
        assert await survivor.recovery.process_due_holds() == 1
    assert survivor.generations.lookups == ["gen-1", "gen-1"]
    assert (await client.balance(), await client.held()) == (Decimal("99.1"), 0)
    await assert_invariants_hold(database)


@pytest.mark.parametrize("is_handed_over", [True, False])
async def test_recovery_reports_a_charge_above_its_hold_once(
    database: Database, directory: Path, caplog: pytest.LogCaptureFixture, is_handed_over: bool
) -> None:
    """Contract C5: whether the cost was looked up or is in the journal."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "0.5", ledger=dead)
    record(dead.journal, held, "named" if is_handed_over else "billed")
    with caplog.at_level(logging.WARNING, "gptutor.overruns"), process(database, directory) as survivor:
        survivor.generations.costs["gen-1"] = CHARGE.cost_usd
        (abandoned,) = journals_in(directory)
        for _ in range(2):
            await survivor.recovery.replay(abandoned)
            await make_due(database)
            await survivor.recovery.process_due_holds()
    assert await client.balance() == Decimal("99.1")
    (line,) = [vars(each) for each in caplog.records if each.name == "gptutor.overruns"]
    assert (line["holdRub"], line["costRub"]) == ("0.5", "0.9")


async def make_due(database: Database) -> None:
    """A claim postpones a hold; this makes it due now."""
    async with database._connections._pool.acquire() as connection:
        await connection.execute(DUE)


async def test_a_sent_request_without_a_generation_id_waits(database: Database, directory: Path) -> None:
    """Contract C6; row process-3: never silently free, never silently estimated."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    dead.journal.record_sent(held.account_id, held.hold_id)
    with process(database, directory) as survivor:
        await survivor.recovery.replay(*journals_in(directory))
        assert await survivor.recovery.process_due_holds() == 1
        await make_due(database)
        assert await survivor.recovery.process_due_holds() == 1
    row = await row_of(database, held)
    assert (row["state"], row["is_handed_over"], row["recovery_attempts"]) == ("open", True, 2)
    assert (await client.balance(), await client.held()) == (100, 5)
    assert survivor.generations.lookups == []


async def test_a_hold_that_a_complete_journal_lacks_was_never_sent_and_is_released(database: Database, directory: Path) -> None:
    """Contract C8; row process-2."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    with process(database, directory) as survivor:
        (abandoned,) = journals_in(directory)
        assert abandoned.is_complete
        await survivor.recovery.replay(abandoned)
    row = await row_of(database, held)
    assert (row["state"], row["is_unresolved"]) == ("released", False)
    assert (await client.balance(), await client.held()) == (100, 0)


async def test_a_hold_that_cannot_be_closed_delays_no_other_account(
    database: Database, database_url: str, directory: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows db-11, process-11: one account was changed by hand, the row of another is locked; the rest is retried."""
    monkeypatch.setattr("gptutor.money.closings.CLOSE_TIMEOUT_S", 0.5)
    broken, locked, other = [await make_client(database, "100") for _ in range(3)]
    dead = mortal(database, directory)
    for client in (broken, locked, other):
        await hold(database, client, "5", ledger=dead)
    record(dead.journal, await hold(database, other, "5", ledger=dead), "billed")
    await change("UPDATE accounts SET held_nano = 0 WHERE account_id = $1", broken.account_id)
    hand = await asyncpg.connect(database_url)
    with process(database, directory) as survivor:
        (abandoned,) = journals_in(directory)
        async with hand.transaction():
            await hand.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", locked.account_id)
            assert not await survivor.recovery.replay(abandoned)
            assert (await other.balance(), await other.held()) == (Decimal("99.1"), 0)
            assert journals_in(directory) != []
        running = asyncio.create_task(survivor.recovery.run([abandoned]))
        await until_held(locked, 0)
        await change("UPDATE accounts SET held_nano = 5000000000 WHERE account_id = $1", broken.account_id)
        await until(lambda: journals_in(directory) == [])
        await stopped(running)
    await hand.close()
    assert await broken.held() == 0
    await assert_invariants_hold(database)


async def test_very_many_orphaned_holds_are_closed_a_bounded_number_at_a_time(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract C6; row sum-6: recorded and unrecorded ones, in page after page."""
    for module in ("closings", "recovery"):
        monkeypatch.setattr(f"gptutor.money.{module}.CONCURRENT_MAX", 10)
    client, dead = await make_client(database, "100"), mortal(database, directory)
    holds = [await hold(database, client, "0.1", ledger=dead) for _ in range(45)]
    for held in holds[:22]:
        record(dead.journal, held, "billed")
    with process(database, directory) as survivor:
        running = most = 0

        def counted(method: Any) -> Any:
            async def wrapper(item: Any) -> Any:
                nonlocal running, most
                running += 1
                most = max(most, running)
                try:
                    return await method(item)
                finally:
                    running -= 1

            return wrapper

        for name in ("settle", "release"):
            monkeypatch.setattr(survivor.ledger, name, counted(getattr(survivor.ledger, name)))
        assert await survivor.recovery.replay(*journals_in(directory))
    assert most == 10
    assert (await client.balance(), await client.held()) == (Decimal("100") - 22 * Decimal("0.9"), 0)


async def test_a_replay_ends_early_if_the_database_goes_away(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Row db-4: a hundred thousand holds do not wait for it one after the other."""
    monkeypatch.setattr("gptutor.money.closings.CONCURRENT_MAX", 5)
    monkeypatch.setattr("gptutor.money.closings.CLOSE_TIMEOUT_S", 0.05)
    client, dead = await make_client(database, "100"), mortal(database, directory)
    for _ in range(20):
        record(dead.journal, await hold(database, client, "0.1", ledger=dead), "billed")
    with process(database, directory) as survivor:
        tried = 0

        async def unavailable(item: Any) -> None:
            nonlocal tried
            tried += 1
            await asyncio.sleep(60)

        monkeypatch.setattr(survivor.ledger, "settle", unavailable)
        assert not await survivor.recovery.replay(*journals_in(directory))
    assert tried == 5
    assert journals_in(directory) != []


async def test_a_hold_that_an_incomplete_journal_lacks_may_have_been_sent_and_waits(database: Database, directory: Path) -> None:
    """Contract C6; row process-11: a line that was lost may have said that the request went upstream."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    with process(database, directory) as survivor:
        (abandoned,) = journals_in(directory)
        abandoned.is_complete = False
        await survivor.recovery.replay(abandoned)
        assert await survivor.recovery.process_due_holds() == 1
    row = await row_of(database, held)
    assert (row["state"], row["is_handed_over"]) == ("open", True)
    assert await client.held() == 5


async def test_each_hold_of_a_dead_process_is_closed_by_its_own_evidence(database: Database, directory: Path) -> None:
    """Contract C3, C6; rows process-2 to process-5, together: no hold is mistaken for another, and another process's holds are not touched."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    billed, named, sent, never_sent, closed = [await hold(database, client, "5", ledger=dead) for _ in range(5)]
    for one in (billed, named, sent, closed):
        dead.journal.record_sent(one.account_id, one.hold_id)
    for one in (billed, named, closed):
        dead.journal.record_generation_id(one.hold_id, f"gen-{one.hold_id}")
    for one in (billed, closed):
        dead.journal.record_charge(one.hold_id, CHARGE, None)
    await dead.settle(settlement(closed, "0.01"))
    with process(database, directory) as survivor:
        alive = await hold(database, client, "5", ledger=survivor.ledger)
        (abandoned,) = journals_in(directory)
        assert set(abandoned.open_holds) == {billed.hold_id, named.hold_id, sent.hold_id}
        await survivor.recovery.replay(abandoned)
        await survivor.recovery.process_due_holds()
    states = [(await row_of(database, one))["state"] for one in (billed, named, sent, never_sent, closed, alive)]
    assert states == ["settled", "open", "open", "released", "settled", "open"]
    assert survivor.generations.lookups == [f"gen-{named.hold_id}"]
    assert (await client.balance(), await client.held()) == (Decimal("98.2"), 15)
    await assert_invariants_hold(database)


async def test_a_running_process_replays_the_journals_of_processes_that_die(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract C6; rows process-5, operator-2: without a restart; and the journal of a living process is left alone."""
    client = await make_client(database, "100")
    rounds, process_due_holds = 0, Recovery.process_due_holds

    async def counted(recovery: Recovery) -> int:
        nonlocal rounds
        rounds += 1
        return await process_due_holds(recovery)

    monkeypatch.setattr(Recovery, "process_due_holds", counted)
    with process(database, directory) as survivor, process(database, directory) as neighbour:
        own = await hold(database, client, "5", ledger=neighbour.ledger)
        record(neighbour.journal, own, "billed")
        dying = mortal(database, directory)
        lock = journal._lock(directory / "50")
        assert lock is not None
        held = await hold(database, client, "5", ledger=dying)
        record(dying.journal, held, "billed")
        running = asyncio.create_task(survivor.recovery.run())
        await until(lambda: rounds >= 3)
        assert await client.balance() == 100  # its slot is locked
        os.close(lock)  # as the kernel does for a dead process
        await until(lambda: journals_in(directory) == [])
        await stopped(running)
        assert [(await row_of(database, one))["state"] for one in (held, own)] == ["settled", "open"]
        assert neighbour.journal.open_holds
    assert await client.balance() == Decimal("99.1")


async def test_recovery_continues_after_any_failure(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract C6; rows db-4, process-11, process-13."""
    client = await make_client(database, "100")
    held = await hold(database, client, "5")
    failures: list[Exception] = [DatabaseUnavailable("away"), JournalError("no directory"), RuntimeError("a bug")]
    fetch = database.fetch

    async def failing(statement: str, *arguments: Any) -> Any:
        if statement == "claim_due_holds" and failures:
            raise failures.pop(0)
        return await fetch(statement, *arguments)

    monkeypatch.setattr(database, "fetch", failing)
    generations = Generations({"gen-1": Decimal("0.01")})
    with process(database, directory, generations=generations) as living, caplog.at_level(logging.WARNING, "gptutor.recovery"):
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        running = asyncio.create_task(living.recovery.run())
        await until(lambda: generations.lookups != [])
        await until_held(client, 0)
        await stopped(running)
    said = [record.getMessage() for record in caplog.records if record.name == "gptutor.recovery"]
    assert said == ["Recovery waits: away", "Recovery waits: no directory", "Recovery failed, and continues"]
    assert await client.balance() == Decimal("99.1")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def until_held(client: Client, amount: int) -> None:
    async with asyncio.timeout(20):
        while await client.held() != amount:
            await asyncio.sleep(0.005)


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- due holds


@pytest.mark.parametrize(
    ("is_sent", "expected"),
    [
        (True, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]),
        (False, [1, 2, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]),  # only its own process may release it, and must get its turn
    ],
)
async def test_the_pause_between_attempts_doubles_up_to_its_bound(
    database: Database, database_url: str, is_sent: bool, expected: list[int]
) -> None:
    """Contract C6; row upstream-19. In one transaction time stands still, so the pauses are exact."""
    client = await make_client(database, "100")
    await hold(database, client, "5")
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE holds SET is_handed_over = $1", is_sent)
    pauses = []
    for count in range(1, 14):
        async with connection.transaction():
            await connection.execute(DUE)
            assert len(await connection.fetch(STATEMENTS["claim_due_holds"], 50, 600.0)) == 1
            assert await connection.fetchval("SELECT recovery_attempts FROM holds") == count
            pauses.append(await connection.fetchval("SELECT extract(EPOCH FROM due_at - now()) FROM holds"))
    assert pauses == expected
    await connection.execute("UPDATE holds SET recovery_attempts = 2000000000, due_at = now()")  # it never overflows
    assert len(await connection.fetch(STATEMENTS["claim_due_holds"], 50, 600.0)) == 1
    await connection.close()


async def test_the_oldest_holds_are_processed_first_and_at_most_fifty_at_a_time(
    database: Database, directory: Path, change: Change
) -> None:
    """Row upstream-19: a thousand holds that wait are not a thousand look-ups at once."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        holds = [await hold(database, client, "0.1") for _ in range(60)]
        for number, held in enumerate(holds):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number:02d}"))
        await change("UPDATE holds SET due_at = now() - interval '1 second' * right(generation_id, 2)::integer")
        assert await living.recovery.process_due_holds() == 50
        assert sorted(living.generations.lookups) == [f"gen-{number:02d}" for number in range(10, 60)]
        assert await living.recovery.process_due_holds() == 10
    assert len(set(living.generations.lookups)) == 60


async def test_two_recoveries_never_process_the_same_hold_at_once(database: Database, directory: Path) -> None:
    """Contract C3: a claim of due holds belongs to one process."""
    client = await make_client(database, "100")
    with process(database, directory) as one, process(database, directory) as other:
        for number in range(40):
            held = await hold(database, client, "0.1")
            await one.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number}"))
        processed = await asyncio.gather(*(which.recovery.process_due_holds() for which in (one, other, one, other)))
    assert sum(processed) == 40
    lookups = one.generations.lookups + other.generations.lookups
    assert sorted(lookups) == sorted(f"gen-{number}" for number in range(40))


async def test_a_hold_that_another_recovery_is_claiming_is_skipped_without_waiting(
    database: Database, directory: Path, database_url: str
) -> None:
    """Contract C3; row db-11: SKIP LOCKED, or this would wait for the lock and fail."""
    client = await make_client(database, "100")
    taken, free = await hold(database, client, "1"), await hold(database, client, "1")
    connection = await asyncpg.connect(database_url)
    with process(database, directory) as living:
        for held, name in ((taken, "gen-taken"), (free, "gen-free")):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, name))
        async with connection.transaction():
            await connection.execute("SELECT FROM holds WHERE hold_id = $1 FOR UPDATE", taken.hold_id)
            assert await living.recovery.process_due_holds() == 1
        assert living.generations.lookups == ["gen-free"]
        assert await living.recovery.process_due_holds() == 1
        assert living.generations.lookups == ["gen-free", "gen-taken"]
    await connection.close()


@pytest.mark.parametrize("known", ["nothing", "sent", "named", "billed"])
async def test_the_hold_of_a_running_exchange_is_left_alone(
    database: Database, directory: Path, change: Change, known: str
) -> None:
    """Contract C3: a long completion is not a lost one, whatever the clock says."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        record(living.journal, held, known)
        await change(OLD)
        assert await living.recovery.process_due_holds() == 1
    assert (await row_of(database, held))["state"] == "open"
    assert living.generations.lookups == []
    assert (await client.balance(), await client.held()) == (100, 5)


def record(journal: Journal, held: Hold, known: str) -> None:
    """Records what an exchange knew of its purchase when it ended abnormally."""
    if known != "nothing":
        journal.record_sent(held.account_id, held.hold_id, held.facts)
    if known in ("named", "billed"):
        journal.record_generation_id(held.hold_id, "gen-1")
    if known == "billed":
        journal.record_charge(held.hold_id, CHARGE, "gen-1")


@pytest.mark.parametrize(
    # what the journal has → the hold's state, the balance, whether the generation id was looked up
    ("known", "state", "balance", "lookups"),
    [
        ("nothing", "released", "100", []),
        ("sent", "open", "100", []),
        ("named", "settled", "98.2", ["gen-1"]),  # /generation says 0.02
        ("billed", "settled", "99.1", []),  # the bill said 0.01, and is believed
    ],
)
async def test_the_hold_of_an_exchange_that_ended_abnormally_is_closed_by_the_journal(
    database: Database, directory: Path, change: Change, known: str, state: str, balance: str, lookups: list[str]
) -> None:
    """Contract C3, C6, C8; row process-12: the process is alive, its exchange is not."""
    client = await make_client(database, "100")
    with process(database, directory, generations=Generations({"gen-1": Decimal("0.02")})) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        record(living.journal, held, known)
        living.ledger.deactivate(held.hold_id)
        await living.recovery.process_due_holds()  # the journal has it and no exchange does: there is nothing to wait for
        if known == "nothing":
            assert (await row_of(database, held))["state"] == "open"  # not due yet
            await change(DUE)
            await living.recovery.process_due_holds()
        row = await row_of(database, held)
        assert (row["state"], row["is_unresolved"]) == (state, False)
        assert await client.balance() == Decimal(balance)
        assert living.generations.lookups == lookups
        assert living.journal.open_holds == {}
        assert await client.held() == (5 if state == "open" else 0)
    await assert_invariants_hold(database)


async def test_a_hold_that_cannot_be_settled_does_not_stop_the_others(database: Database, directory: Path) -> None:
    """Contract C6; row process-13."""
    client = await make_client(database, "100")
    with process(database, directory, generations=Generations({"gen-1": Decimal("0.01")})) as living:
        poisoned, held = [await hold(database, client, "5", ledger=living.ledger) for _ in range(2)]
        living.journal.record_sent(poisoned.account_id, poisoned.hold_id)
        living.journal.record_charge(
            poisoned.hold_id, Charge(Nano(10**18 + 1), Decimal("0.01")), None
        )  # more than the ledger takes
        living.ledger.deactivate(poisoned.hold_id)
        living.ledger.deactivate(held.hold_id)
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        await living.recovery.process_due_holds()
    assert [(await row_of(database, one))["state"] for one in (poisoned, held)] == ["open", "settled"]


async def test_an_abandoned_journal_is_deleted_only_when_all_of_it_is_in_the_database(
    database: Database, directory: Path
) -> None:
    """Contract C3, C6; row process-13: what cannot be settled now stays in the journal, and does not delay the rest."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    poisoned, held = [await hold(database, client, "5", ledger=dead) for _ in range(2)]
    record(dead.journal, held, "billed")
    dead.journal.record_sent(poisoned.account_id, poisoned.hold_id)
    dead.journal.record_charge(poisoned.hold_id, Charge(Nano(10**18 + 1), Decimal("0.01")), None)  # more than the ledger takes
    with process(database, directory) as survivor:
        for _ in range(2):
            await survivor.recovery.replay(*journals_in(directory))
        assert [(await row_of(database, one))["state"] for one in (poisoned, held)] == ["open", "settled"]
        (abandoned,) = journals_in(directory)
        assert poisoned.hold_id in abandoned.open_holds
    assert await client.balance() == Decimal("99.1")
    await assert_invariants_hold(database)


@pytest.mark.parametrize("is_old", [False, True])
async def test_the_hold_of_a_process_elsewhere_is_not_released_by_another(
    database: Database, directory: Path, change: Change, is_old: bool
) -> None:
    """Contract C6: its process may be alive on another machine; recovery gives up only after a day."""
    client = await make_client(database, "100")
    held = await hold(database, client, "5")  # by a ledger whose journal is not in this directory
    await change(OLD if is_old else DUE)
    with process(database, directory) as living:
        assert await living.recovery.process_due_holds() == 1
    row = await row_of(database, held)
    assert (row["state"], row["is_unresolved"]) == (("released", True) if is_old else ("open", False))


async def test_the_hold_of_a_lost_machine_does_not_count_as_a_running_request(
    database: Database, directory: Path, change: Change
) -> None:
    client = await make_client(database, "100")
    held = await hold(database, client, "5")  # by a ledger whose journal is not in this directory
    with process(database, directory) as living:
        await change(DUE)
        assert await living.recovery.process_due_holds() == 1
        assert (await row_of(database, held))["is_handed_over"] is False  # its process may still be alive
        await change("UPDATE holds SET due_at = now(), created_at = now() - interval '2 hours'")
        assert await living.recovery.process_due_holds() == 1
    row = await row_of(database, held)
    assert (row["state"], row["is_handed_over"]) == ("open", True)
    async with database.snapshot() as connection:
        assert await connection.fetchval("SELECT open_requests FROM accounts WHERE account_id = $1", held.account_id) == 0
    assert await client.held() == 5
    await assert_invariants_hold(database)


@pytest.mark.parametrize("name", [None, "gen-1"])
async def test_after_a_day_without_evidence_a_hold_is_given_up_and_late_evidence_still_charges_once(
    database: Database, directory: Path, change: Change, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    """Contract C3, C6; row upstream-19: released, marked and logged for the operator; never silently free."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, name))
        await change(OLD)
        await change("UPDATE holds SET recovery_attempts = 10")
        with caplog.at_level(logging.ERROR, "gptutor.recovery"):
            assert await living.recovery.process_due_holds() == 1
        (record,) = caplog.records
        assert record.getMessage() == "Recovery gives up a hold: no evidence of what it bought"
        row = await row_of(database, held)
        assert (row["state"], row["is_unresolved"], row["generation_id"]) == ("released", True, name)
        assert (await client.balance(), await client.held()) == (100, 0)
        (waiting,) = await database.fetch("list_waiting_holds", 1000)
        assert (waiting["account_id"], waiting["state"], waiting["generation_id"]) == (held.account_id, "unresolved", name)
        await assert_invariants_hold(database)

        assert await living.ledger.settle(settlement(held, "0.01")) == "settled_late"
        assert await living.ledger.settle(settlement(held, "0.01")) == "already_settled"
        row = await row_of(database, held)
        assert (row["state"], row["is_unresolved"], row["is_late"]) == ("settled", False, True)
        assert (await client.balance(), await client.held()) == (Decimal("99.1"), 0)
        assert await living.recovery.process_due_holds() == 0
        assert await database.fetch("list_waiting_holds", 1000) == []
    await assert_invariants_hold(database)


async def test_a_slow_look_up_is_not_cut_off_by_the_timeout_of_closings(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short timeout is for closings, which a lock may delay; a look-up has a timeout of its own."""
    monkeypatch.setattr("gptutor.money.closings.CLOSE_TIMEOUT_S", 0.5)
    client, generations = await make_client(database, "100"), Generations({"gen-1": Decimal("0.01")})
    answered = generations.cost_of

    async def slowly(generation_id: str) -> Decimal | None:
        await asyncio.sleep(0.8)
        return await answered(generation_id)

    monkeypatch.setattr(generations, "cost_of", slowly)
    with process(database, directory, generations=generations) as living:
        held = await hold(database, client, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        assert await living.recovery.process_due_holds() == 1
    assert await client.balance() == Decimal("99.1")


async def test_a_generation_id_is_looked_up_more_than_once_however_old_the_hold_is(
    database: Database, directory: Path, change: Change
) -> None:
    """Contract C6; row db-4: after an outage of a day OpenRouter may stay unavailable for a while."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        await change(OLD)
        await living.recovery.process_due_holds()
        await assert_invariants_hold(database)
        living.generations.costs["gen-1"] = Decimal("0.01")
        await make_due(database)
        await living.recovery.process_due_holds()
    assert await client.balance() == Decimal("99.1")


async def test_a_generation_id_is_looked_up_at_least_once_however_old_the_hold_is(
    database: Database, directory: Path, change: Change
) -> None:
    """Contract C6; row db-4: the service was down over the weekend, and OpenRouter has known the cost all the time."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    record(dead.journal, held, "named")
    await change(OLD)
    with process(database, directory, generations=Generations({"gen-1": Decimal("0.01")})) as survivor:
        await survivor.recovery.replay(*journals_in(directory))
        await survivor.recovery.process_due_holds()
    assert survivor.generations.lookups == ["gen-1"]
    assert await client.balance() == Decimal("99.1")


@pytest.mark.parametrize("handed_over", [True, False])
async def test_a_hold_whose_exchange_ends_while_it_is_claimed_does_not_count_as_never_sent(
    database: Database, directory: Path, change: Change, monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    """Contract C6: the row is as old as the claim, and the journal is current; together they prove nothing."""
    client = await make_client(database, "100")
    with process(database, directory, generations=Generations({"gen-1": Decimal("0.01")})) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        record(living.journal, held, "named")
        await change(DUE)  # a stream longer than its hold's time
        fetch = database.fetch

        async def meanwhile(statement: str, *arguments: Any) -> Any:
            rows = await fetch(statement, *arguments)
            if statement == "claim_due_holds":  # the exchange ends right after the claim
                monkeypatch.setattr(database, "fetch", fetch)
                if handed_over:
                    await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
                living.ledger.deactivate(held.hold_id)
            return rows

        monkeypatch.setattr(database, "fetch", meanwhile)
        await living.recovery.process_due_holds()
        await change(DUE)
        await living.recovery.process_due_holds()
    assert (await row_of(database, held))["state"] == "settled"
    assert (await client.balance(), await client.held()) == (Decimal("99.1"), 0)


async def test_the_rate_of_the_hold_is_charged_whatever_the_rate_is_now(database: Database, directory: Path) -> None:
    """Contract C1; row money-16: the hold stores the rate."""
    client = await make_client(database, "100")
    with process(database, directory, rate=Decimal("81.25")) as early:
        held = await hold(database, client, "5", ledger=early.ledger)
        await early.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
    with process(database, directory, rate=Decimal("123.45"), generations=Generations({"gen-1": Decimal("0.01")})) as late:
        assert await late.recovery.process_due_holds() == 1
    entry, _ = await Bookings(database).entries(client.account_id, 10)
    assert (entry.amount, entry.rub_per_usd) == (-812_500_000, Decimal("81.25"))
    await assert_invariants_hold(database)


async def test_a_look_up_that_fails_does_not_stop_the_others(
    database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract C6; row process-13."""
    client = await make_client(database, "100")
    generations = Generations({f"gen-{number}": Decimal("0.01") for number in range(5)})
    generations.costs["gen-2"] = RuntimeError("a bug in one of five")
    with process(database, directory, generations=generations) as living:
        holds = [await hold(database, client, "5") for _ in range(5)]
        for number, held in enumerate(holds):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number}"))
        with caplog.at_level(logging.ERROR, "gptutor.recovery"):
            assert await living.recovery.process_due_holds() == 5
        assert [record.getMessage() for record in caplog.records] == [
            "A hold could not be closed: RuntimeError('a bug in one of five')"
        ]
        states = [(await row_of(database, held))["state"] for held in holds]
        assert states == ["settled", "settled", "open", "settled", "settled"]
        assert await client.balance() == Decimal("96.4")

        generations.costs["gen-2"] = Decimal("0.02")
        await make_due(database)
        assert await living.recovery.process_due_holds() == 1
    assert await client.balance() == Decimal("94.6")
    await assert_invariants_hold(database)


async def test_a_hold_closed_meanwhile_is_not_charged_again(
    database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract C3; row process-6: the exchange and recovery settle at the same time."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))

        async def cost_of(generation_id: str) -> Decimal:
            await living.ledger.settle(settlement(held, "0.01"))
            return Decimal("0.01")

        monkeypatch.setattr(living.recovery, "_cost_of", cost_of)
        assert await living.recovery.process_due_holds() == 1
    assert await client.balance() == Decimal("99.1")
    await assert_invariants_hold(database)


async def test_a_hand_over_of_a_closed_hold_changes_nothing(database: Database, directory: Path) -> None:
    """Contract C3; row process-6: a replay of what is long settled or released."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5")
        await living.ledger.settle(settlement(held, "0.01"))
        before = await row_of(database, held)
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-other"))
        assert await row_of(database, held) == before
        assert await living.recovery.process_due_holds() == 0


# -- Idempotency-Key


async def complete(
    gateway: Gateway, client: Client, key: str, text: str = "Hello", *, request_id: str | None = None, **members: Any
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """A request with an idempotency key: status, headers, decoded response."""
    headers = {**client.headers, "Idempotency-Key": key, **({"X-Request-ID": request_id} if request_id else {})}
    body = {"messages": [{"role": "user", "content": text}], **members}
    async with gateway.session.post(gateway.chat_url, json=body, headers=headers) as response:
        document = await response.read()
    await gateway.idle()
    return response.status, dict(response.headers), json.loads(document)


async def assert_bought(gateway: Gateway, client: Client, times: int) -> None:
    """Something was bought and charged so many times, and nothing is held."""
    await gateway.recovered(client)
    charges = [entry for entry in await Bookings(gateway.database).entries(client.account_id, 100) if entry.kind == "charge"]
    assert len(charges) == times
    assert all(charge.amount < 0 for charge in charges)
    assert await client.held() == 0
    await assert_invariants_hold(gateway.database)


async def test_the_same_key_and_body_is_rejected_and_the_error_has_the_first_request_id(gateway: Gateway) -> None:
    """Contract C10, B8; row money-5."""
    client = await gateway.client()
    first, _, _ = await complete(gateway, client, "order 66", request_id="the-first")
    status, headers, answer = await complete(gateway, client, "order 66", request_id="the-second")
    assert (first, status) == (200, 409)
    assert headers["X-Error-Code"] == "duplicate_request"
    assert headers["x-should-retry"] == "false"
    assert headers["X-Request-ID"] == "the-second"
    assert answer == {"error": "A request with this Idempotency-Key was already made: the-first"}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, client, 1)


async def test_the_same_key_with_another_body_is_rejected_as_a_mistake(gateway: Gateway) -> None:
    """Contract C10, B8; row money-5."""
    client = await gateway.client()
    await complete(gateway, client, "order 66", "Hello", request_id="the-first")
    status, headers, answer = await complete(gateway, client, "order 66", "Something else")
    assert (status, headers["X-Error-Code"], headers["x-should-retry"]) == (422, "idempotency_mismatch", "false")
    assert answer == {"error": "This Idempotency-Key was used for a different request: the-first"}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, client, 1)


async def test_two_at_once_under_one_key_are_one(gateway: Gateway) -> None:
    """Contract C10; row money-4."""
    client = await gateway.client()
    gateway.simulator.first_word_s = 0.1
    replies = await asyncio.gather(*(complete(gateway, client, "order 66") for _ in range(2)))
    assert sorted(status for status, _, _ in replies) == [200, 409]
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, client, 1)


async def test_ten_at_once_under_one_key_are_one(gateway: Gateway) -> None:
    """Contract C10; row money-4, in one batch."""
    client = await gateway.client()
    replies = await asyncio.gather(*(complete(gateway, client, "order 66", f"text {number % 3}") for number in range(10)))
    statuses = sorted(status for status, _, _ in replies)
    assert statuses[0] == 200
    assert set(statuses[1:]) <= {409, 422}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, client, 1)


async def test_two_accounts_may_use_the_same_key(gateway: Gateway) -> None:
    """Contract C10, C2: a key belongs to its account."""
    one, other = await gateway.client(), await gateway.client()
    replies = await asyncio.gather(complete(gateway, one, "order 66"), complete(gateway, other, "order 66"))
    assert [status for status, _, _ in replies] == [200, 200]
    await assert_bought(gateway, one, 1)
    await assert_bought(gateway, other, 1)


async def test_a_key_is_forgotten_after_a_day_and_not_before(gateway: Gateway, change: Change) -> None:
    """Contract C10: kept 24 h."""
    client = await gateway.client()
    await complete(gateway, client, "order 66")
    await change("UPDATE holds SET created_at = created_at - interval '23 hours 59 minutes'")
    assert (await complete(gateway, client, "order 66"))[0] == 409
    await change("UPDATE holds SET created_at = created_at - interval '2 minutes'")
    assert (await complete(gateway, client, "order 66"))[0] == 200
    assert (await complete(gateway, client, "order 66"))[0] == 409  # the key belongs to the new request now
    await assert_bought(gateway, client, 2)


async def test_an_error_before_the_hold_does_not_use_the_key_up(gateway: Gateway) -> None:
    """Contract C8, C10: what was never begun may be begun."""
    client = await gateway.client("0")
    assert (await complete(gateway, client, "order 66"))[0] == 402
    await Bookings(gateway.database).book(client.account_id, "topup", Nano(100 * 10**9))
    assert (await complete(gateway, client, "order 66"))[0] == 200
    await assert_bought(gateway, client, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_bought_nothing_leaves_its_key_free(gateway: Gateway, stream: bool) -> None:
    """Contract C10: whatever the body of the next request is."""
    client = await gateway.client()
    assert (await complete(gateway, client, "order 66", "fault:status=400", stream=stream))[0] == 400
    assert (await complete(gateway, client, "order 66", "fault:status=400", stream=stream))[0] == 400
    assert (await complete(gateway, client, "order 66"))[0] == 200
    assert (await complete(gateway, client, "order 66"))[0] == 409
    await assert_bought(gateway, client, 1)


@pytest.mark.parametrize(
    ("key", "status"),
    [
        ("k" * 255, 200),
        ("k" * 256, 400),
        ("k" * 5000, 400),
        ("ключ", 400),
        ("кey", 400),
        ("a\tb", 400),
        ("", 400),
        ("~ !\"'; DROP TABLE holds --", 200),
    ],
)
async def test_a_key_is_up_to_255_printable_characters(gateway: Gateway, key: str, status: int) -> None:
    """Contract C10, B2; row auth-6."""
    client = await gateway.client()
    answered, headers, answer = await complete(gateway, client, key)
    assert answered == status
    if status == 400:
        assert headers["X-Error-Code"] == "invalid_request"
        assert answer == {"error": "Idempotency-Key must be 1 to 255 printable ASCII characters"}
    else:
        assert (await complete(gateway, client, key))[0] == 409
    await assert_bought(gateway, client, int(status == 200))


async def test_an_idempotency_key_reveals_nothing_to_a_revoked_api_key(gateway: Gateway) -> None:
    """Contract B3, C10, D6: a revoked key learns nothing of the requests that it made."""
    client = await gateway.client()
    await complete(gateway, client, "order 66")
    await KeyRing(gateway.database, VAULT).renew(client.account_id)
    status, headers, answer = await complete(gateway, client, "order 66")
    assert (status, headers["X-Error-Code"]) == (401, "invalid_key")
    assert "Idempotency" not in answer["error"]


@pytest.mark.parametrize(("head", "name"), [("gen-head", "gen-head"), (None, "gen-event")])
async def test_the_generation_id_in_the_headers_wins_over_the_one_in_the_bill(
    database: Database, directory: Path, head: str | None, name: str
) -> None:
    """Contract D5: the client looks the request up by that id. A bill that arrives with the headers comes before any other id."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        evaluate: Any = SimpleNamespace(charge=lambda cost: Nano(9 * 10**8))
        purchase = Purchase(living.ledger, evaluate, await hold(database, client, "5"))
        purchase.mark_sent()
        purchase.record_bill(Bill(Decimal("0.01"), generation_id="gen-event"), head)
        assert await purchase.close() == "settled"
    entry, _ = await Bookings(database).entries(client.account_id, 10)
    assert entry.generation_id == name
