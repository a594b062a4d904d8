"""Recovery: what a process that died, or an exchange that was broken off, left open is closed by evidence, once (contract C3, C6, C8;
rows upstream-14, upstream-19, process-2 to process-6, -11, -12, db-5, operator-2). And the caller's own insurance against paying twice,
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
from gptutor.money.journal_records import Charge, HoldRecord
from gptutor.money.keyring import KeyRing
from gptutor.money.recovery import Recovery, decide
from gptutor.openrouter.bill import Bill
from tests.support.gateway import VAULT, Caller, Gateway, make_caller
from tests.support.ledger import assert_books_hold, hold, settlement
from tests.support.recovery import Generations, leftovers_in, mortal, process

PRICE = Charge(Nano(9 * 10**8), Decimal("0.01"))  # 0.01 dollars × 90 = 0.9 roubles

NOTHING = None
SENT = HoldRecord(AccountId(1))
NAMED = HoldRecord(AccountId(1), "gen-1")
PRICED = HoldRecord(AccountId(1), None, PRICE)
PRICED_AND_NAMED = HoldRecord(AccountId(1), "gen-1", PRICE)


@pytest.mark.parametrize(
    # what is known, whether it was provably never sent, whether it is a day old → what is done
    ("knowledge", "never_sent", "too_old", "decision"),
    [
        (NOTHING, False, False, "wait"),
        (NOTHING, False, True, "give_up"),
        (NOTHING, True, False, "release"),
        (NOTHING, True, True, "release"),
        (SENT, False, False, "wait"),
        (SENT, False, True, "give_up"),
        (SENT, True, False, "wait"),
        (SENT, True, True, "give_up"),
        (NAMED, False, False, "look_up"),
        (NAMED, False, True, "look_up"),
        (NAMED, True, False, "look_up"),
        (NAMED, True, True, "look_up"),
        (PRICED, False, False, "settle"),
        (PRICED, False, True, "settle"),
        (PRICED, True, False, "settle"),
        (PRICED, True, True, "settle"),
        (PRICED_AND_NAMED, False, False, "settle"),
        (PRICED_AND_NAMED, False, True, "settle"),
        (PRICED_AND_NAMED, True, False, "settle"),
        (PRICED_AND_NAMED, True, True, "settle"),
    ],
)
def test_the_decision(knowledge: HoldRecord | None, never_sent: bool, too_old: bool, decision: str) -> None:
    """Contract C6: the table of `decide`, every combination."""
    assert decide(knowledge, never_sent=never_sent, too_old=too_old) == decision


# -- a process of the test's own


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def row_of(books: Database, which: Hold) -> asyncpg.Record:
    async with books.snapshot() as connection:
        return await connection.fetchrow("SELECT * FROM holds WHERE hold_id = $1", which.hold_id)


@pytest.fixture
async def change(database_url: str) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Changes rows behind the service's back: time passes only so."""
    connection = await asyncpg.connect(database_url)
    yield connection.execute
    await connection.close()


DUE = "UPDATE holds SET due_at = now() WHERE state = 'open'"
OLD = "UPDATE holds SET due_at = now(), created_at = now() - interval '25 hours' WHERE state = 'open'"
Change = Callable[..., Awaitable[str]]


# -- the journals of the dead


async def test_a_bill_that_a_dead_process_saw_is_settled_once_however_often_it_is_replayed(
    books: Database, directory: Path
) -> None:
    """Contract C3, C6; rows upstream-14, process-5, process-6."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    dead.journal.sent(held.account_id, held.hold_id)
    dead.journal.named(held.hold_id, "gen-1")
    dead.journal.billed(held.hold_id, PRICE, "gen-1")
    with process(books, directory) as heir:
        (leftover,), (again,) = leftovers_in(directory), leftovers_in(directory)
        await asyncio.gather(heir.recovery.replay(leftover), heir.recovery.replay(again))
        await heir.recovery.replay(again)
    assert (await caller.balance(), await caller.held()) == (Decimal("99.1"), 0)
    entry, _ = await Bookings(books).entries(caller.account_id, 10)
    assert (entry.entry_id, entry.cost_usd, entry.generation_id) == (held.hold_id, PRICE.cost_usd, "gen-1")
    assert leftovers_in(directory) == []
    await assert_books_hold(books)


async def test_a_name_that_a_dead_process_knew_is_asked_for_and_then_settled(books: Database, directory: Path) -> None:
    """Contract C6; rows process-4, upstream-19: no answer leaves the hold, an answer charges it."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    dead.journal.sent(held.account_id, held.hold_id)
    dead.journal.named(held.hold_id, "gen-1")
    with process(books, directory) as heir:
        (leftover,) = leftovers_in(directory)
        await heir.recovery.replay(leftover)
        row = await row_of(books, held)
        assert (row["state"], row["is_handed_over"], row["generation_id"]) == ("open", True, "gen-1")
        assert leftovers_in(directory) == []

        assert await heir.recovery.look() == 1
        assert (await caller.balance(), await caller.held()) == (100, 5)
        assert await heir.recovery.look() == 0  # not due again yet

        heir.generations.says["gen-1"] = Decimal("0.01")
        await make_due(books)
        assert await heir.recovery.look() == 1
    assert heir.generations.asked == ["gen-1", "gen-1"]
    assert (await caller.balance(), await caller.held()) == (Decimal("99.1"), 0)
    await assert_books_hold(books)


async def make_due(books: Database) -> None:
    """A claim puts a hold off; here its time comes at once."""
    async with books._connections._pool.acquire() as connection:
        await connection.execute(DUE)


async def test_what_was_sent_and_has_no_name_waits(books: Database, directory: Path) -> None:
    """Contract C6; row process-3: never silently free, never silently estimated."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    dead.journal.sent(held.account_id, held.hold_id)
    with process(books, directory) as heir:
        await heir.recovery.replay(*leftovers_in(directory))
        assert await heir.recovery.look() == 1
        await make_due(books)
        assert await heir.recovery.look() == 1
    row = await row_of(books, held)
    assert (row["state"], row["is_handed_over"], row["recovery_attempts"]) == ("open", True, 2)
    assert (await caller.balance(), await caller.held()) == (100, 5)
    assert heir.generations.asked == []


async def test_what_a_complete_journal_does_not_know_was_never_sent_and_is_released(books: Database, directory: Path) -> None:
    """Contract C8; row process-2."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    with process(books, directory) as heir:
        (leftover,) = leftovers_in(directory)
        assert leftover.complete
        await heir.recovery.replay(leftover)
    row = await row_of(books, held)
    assert (row["state"], row["is_unresolved"]) == ("released", False)
    assert (await caller.balance(), await caller.held()) == (100, 0)


async def test_an_account_that_cannot_be_closed_keeps_no_other_waiting(
    books: Database, database_url: str, directory: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows db-11, process-11: one was changed by hand, of another somebody has the row; what is left is brought later."""
    monkeypatch.setattr("gptutor.money.recovery.CLOSING_S", 0.5)
    broken, locked, other = [await make_caller(books, "100") for _ in range(3)]
    dead = mortal(books, directory)
    for caller in (broken, locked, other):
        await hold(books, caller, "5", ledger=dead)
    learn(dead.journal, await hold(books, other, "5", ledger=dead), "billed")
    await change("UPDATE accounts SET held_nano = 0 WHERE account_id = $1", broken.account_id)
    hand = await asyncpg.connect(database_url)
    with process(books, directory) as heir:
        (leftover,) = leftovers_in(directory)
        async with hand.transaction():
            await hand.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", locked.account_id)
            assert not await heir.recovery.replay(leftover)
            assert (await other.balance(), await other.held()) == (Decimal("99.1"), 0)
            assert leftovers_in(directory) != []
        running = asyncio.create_task(heir.recovery.run([leftover]))
        await until_held(locked, 0)
        await change("UPDATE accounts SET held_nano = 5000000000 WHERE account_id = $1", broken.account_id)
        await until(lambda: leftovers_in(directory) == [])
        await stopped(running)
    await hand.close()
    assert await broken.held() == 0
    await assert_books_hold(books)


async def test_what_an_incomplete_journal_does_not_know_may_have_been_sent_and_waits(books: Database, directory: Path) -> None:
    """Contract C6; row process-11: a line that was lost may have said that the request went upstream."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    with process(books, directory) as heir:
        (leftover,) = leftovers_in(directory)
        leftover.complete = False
        await heir.recovery.replay(leftover)
        assert await heir.recovery.look() == 1
    row = await row_of(books, held)
    assert (row["state"], row["is_handed_over"]) == ("open", True)
    assert await caller.held() == 5


async def test_each_hold_of_a_dead_process_is_closed_by_what_is_known_of_it(books: Database, directory: Path) -> None:
    """Contract C3, C6; rows process-2 to process-5, together: none is taken for another, and another process's holds are not touched."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    billed, named, sent, never_sent, closed = [await hold(books, caller, "5", ledger=dead) for _ in range(5)]
    for one in (billed, named, sent, closed):
        dead.journal.sent(one.account_id, one.hold_id)
    for one in (billed, named, closed):
        dead.journal.named(one.hold_id, f"gen-{one.hold_id}")
    for one in (billed, closed):
        dead.journal.billed(one.hold_id, PRICE, None)
    await dead.settle(settlement(closed, "0.01"))
    with process(books, directory) as heir:
        alive = await hold(books, caller, "5", ledger=heir.ledger)
        (leftover,) = leftovers_in(directory)
        assert set(leftover.known) == {billed.hold_id, named.hold_id, sent.hold_id}
        await heir.recovery.replay(leftover)
        await heir.recovery.look()
    states = [(await row_of(books, one))["state"] for one in (billed, named, sent, never_sent, closed, alive)]
    assert states == ["settled", "open", "open", "released", "settled", "open"]
    assert heir.generations.asked == [f"gen-{named.hold_id}"]
    assert (await caller.balance(), await caller.held()) == (Decimal("98.2"), 15)
    await assert_books_hold(books)


async def test_a_running_process_adopts_those_who_die_beside_it(
    books: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract C6; rows process-5, operator-2: nobody has to restart; and the journal of the living is left alone."""
    caller = await make_caller(books, "100")
    rounds, look = 0, Recovery.look

    async def counted(recovery: Recovery) -> int:
        nonlocal rounds
        rounds += 1
        return await look(recovery)

    monkeypatch.setattr(Recovery, "look", counted)
    with process(books, directory) as heir, process(books, directory) as neighbour:
        own = await hold(books, caller, "5", ledger=neighbour.ledger)
        learn(neighbour.journal, own, "billed")
        dying = mortal(books, directory)
        lock = journal._lock(directory / "50")
        assert lock is not None
        held = await hold(books, caller, "5", ledger=dying)
        learn(dying.journal, held, "billed")
        running = asyncio.create_task(heir.recovery.run())
        await until(lambda: rounds >= 3)
        assert await caller.balance() == 100  # nobody touches what is locked
        os.close(lock)  # as the kernel does for the dead
        await until(lambda: leftovers_in(directory) == [])
        await stopped(running)
        assert [(await row_of(books, one))["state"] for one in (held, own)] == ["settled", "open"]
        assert neighbour.journal.known
    assert await caller.balance() == Decimal("99.1")


async def test_recovery_goes_on_after_any_failure(
    books: Database, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract C6; rows db-4, process-11, process-13."""
    caller = await make_caller(books, "100")
    held = await hold(books, caller, "5")
    failures: list[Exception] = [DatabaseUnavailable("away"), JournalError("no directory"), RuntimeError("a bug")]
    fetch = books.fetch

    async def failing(statement: str, *arguments: Any) -> Any:
        if statement == "claim_due_holds" and failures:
            raise failures.pop(0)
        return await fetch(statement, *arguments)

    monkeypatch.setattr(books, "fetch", failing)
    generations = Generations({"gen-1": Decimal("0.01")})
    with process(books, directory, generations=generations) as living, caplog.at_level(logging.WARNING, "gptutor.recovery"):
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        running = asyncio.create_task(living.recovery.run())
        await until(lambda: generations.asked != [])
        await until_held(caller, 0)
        await stopped(running)
    said = [record.getMessage() for record in caplog.records if record.name == "gptutor.recovery"]
    assert said == ["Recovery waits: away", "Recovery waits: no directory", "Recovery failed, and goes on"]
    assert await caller.balance() == Decimal("99.1")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def until_held(caller: Caller, amount: int) -> None:
    async with asyncio.timeout(20):
        while await caller.held() != amount:
            await asyncio.sleep(0.005)


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- looking


@pytest.mark.parametrize(
    ("is_sent", "expected"),
    [
        (True, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]),
        (False, [1, 2, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]),  # its own process alone may free it, and must get its turn
    ],
)
async def test_the_pause_between_looks_doubles_up_to_its_bound(
    books: Database, database_url: str, is_sent: bool, expected: list[int]
) -> None:
    """Contract C6; row upstream-19. In one transaction time stands still, so the pauses are exact."""
    caller = await make_caller(books, "100")
    await hold(books, caller, "5")
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


async def test_the_oldest_are_looked_at_first_and_no_more_than_a_handful_at_once(
    books: Database, directory: Path, change: Change
) -> None:
    """Row upstream-19: a thousand holds that wait are not a thousand look-ups at once."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        holds = [await hold(books, caller, "0.1") for _ in range(60)]
        for number, held in enumerate(holds):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number:02d}"))
        await change("UPDATE holds SET due_at = now() - interval '1 second' * right(generation_id, 2)::integer")
        assert await living.recovery.look() == 50
        assert sorted(living.generations.asked) == [f"gen-{number:02d}" for number in range(10, 60)]
        assert await living.recovery.look() == 10
    assert len(set(living.generations.asked)) == 60


async def test_two_recoveries_never_look_at_the_same_hold_at_once(books: Database, directory: Path) -> None:
    """Contract C3: a claim of due holds belongs to one process."""
    caller = await make_caller(books, "100")
    with process(books, directory) as one, process(books, directory) as other:
        for number in range(40):
            held = await hold(books, caller, "0.1")
            await one.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number}"))
        looked = await asyncio.gather(*(which.recovery.look() for which in (one, other, one, other)))
    assert sum(looked) == 40
    asked = one.generations.asked + other.generations.asked
    assert sorted(asked) == sorted(f"gen-{number}" for number in range(40))


async def test_a_hold_that_another_recovery_is_claiming_is_passed_over_without_waiting(
    books: Database, directory: Path, database_url: str
) -> None:
    """Contract C3; row db-11: SKIP LOCKED, or this would wait for the lock and fail."""
    caller = await make_caller(books, "100")
    taken, free = await hold(books, caller, "1"), await hold(books, caller, "1")
    connection = await asyncpg.connect(database_url)
    with process(books, directory) as living:
        for held, name in ((taken, "gen-taken"), (free, "gen-free")):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, name))
        async with connection.transaction():
            await connection.execute("SELECT FROM holds WHERE hold_id = $1 FOR UPDATE", taken.hold_id)
            assert await living.recovery.look() == 1
        assert living.generations.asked == ["gen-free"]
        assert await living.recovery.look() == 1
        assert living.generations.asked == ["gen-free", "gen-taken"]
    await connection.close()


@pytest.mark.parametrize("known", ["nothing", "sent", "named", "billed"])
async def test_a_hold_that_an_exchange_still_has_in_its_hands_is_left_alone(
    books: Database, directory: Path, change: Change, known: str
) -> None:
    """Contract C3: a long answer is no lost one, whatever the clock says."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        held = await hold(books, caller, "5", ledger=living.ledger)
        learn(living.journal, held, known)
        await change(OLD)
        assert await living.recovery.look() == 1
    assert (await row_of(books, held))["state"] == "open"
    assert living.generations.asked == []
    assert (await caller.balance(), await caller.held()) == (100, 5)


def learn(journal: Journal, held: Hold, known: str) -> None:
    """What an exchange had learnt of its purchase when it was broken off."""
    if known != "nothing":
        journal.sent(held.account_id, held.hold_id)
    if known in ("named", "billed"):
        journal.named(held.hold_id, "gen-1")
    if known == "billed":
        journal.billed(held.hold_id, PRICE, "gen-1")


@pytest.mark.parametrize(
    # what the journal knows → the hold's state, the balance, whether the name was asked for
    ("known", "state", "balance", "asked"),
    [
        ("nothing", "released", "100", []),
        ("sent", "open", "100", []),
        ("named", "settled", "98.2", ["gen-1"]),  # /generation says 0.02
        ("billed", "settled", "99.1", []),  # the bill said 0.01, and is believed
    ],
)
async def test_an_exchange_that_was_broken_off_is_closed_by_what_its_journal_knows(
    books: Database, directory: Path, change: Change, known: str, state: str, balance: str, asked: list[str]
) -> None:
    """Contract C3, C6, C8; row process-12: the process lives, its exchange does not."""
    caller = await make_caller(books, "100")
    with process(books, directory, generations=Generations({"gen-1": Decimal("0.02")})) as living:
        held = await hold(books, caller, "5", ledger=living.ledger)
        learn(living.journal, held, known)
        living.ledger.let_go(held.hold_id)
        await living.recovery.look()  # what is known is known to be nobody's: there is nothing to wait for
        if known == "nothing":
            assert (await row_of(books, held))["state"] == "open"  # its time has not come
            await change(DUE)
            await living.recovery.look()
        row = await row_of(books, held)
        assert (row["state"], row["is_unresolved"]) == (state, False)
        assert await caller.balance() == Decimal(balance)
        assert living.generations.asked == asked
        assert living.journal.known == {}
        assert await caller.held() == (5 if state == "open" else 0)
    await assert_books_hold(books)


async def test_a_hold_that_cannot_be_settled_does_not_stop_the_others(books: Database, directory: Path) -> None:
    """Contract C6; row process-13."""
    caller = await make_caller(books, "100")
    with process(books, directory, generations=Generations({"gen-1": Decimal("0.01")})) as living:
        poisoned, held = [await hold(books, caller, "5", ledger=living.ledger) for _ in range(2)]
        living.journal.sent(poisoned.account_id, poisoned.hold_id)
        living.journal.billed(poisoned.hold_id, Charge(Nano(10**18 + 1), Decimal("0.01")), None)  # more than the ledger takes
        living.ledger.let_go(poisoned.hold_id)
        living.ledger.let_go(held.hold_id)
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        await living.recovery.look()
    assert [(await row_of(books, one))["state"] for one in (poisoned, held)] == ["open", "settled"]


async def test_a_leftover_is_forgotten_only_when_all_of_it_is_in_the_database(books: Database, directory: Path) -> None:
    """Contract C3, C6; row process-13: what cannot be settled now stays written down, and the rest is not kept waiting."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    poisoned, held = [await hold(books, caller, "5", ledger=dead) for _ in range(2)]
    learn(dead.journal, held, "billed")
    dead.journal.sent(poisoned.account_id, poisoned.hold_id)
    dead.journal.billed(poisoned.hold_id, Charge(Nano(10**18 + 1), Decimal("0.01")), None)  # more than the ledger takes
    with process(books, directory) as heir:
        for _ in range(2):
            await heir.recovery.replay(*leftovers_in(directory))
        assert [(await row_of(books, one))["state"] for one in (poisoned, held)] == ["open", "settled"]
        (leftover,) = leftovers_in(directory)
        assert poisoned.hold_id in leftover.known
    assert await caller.balance() == Decimal("99.1")
    await assert_books_hold(books)


@pytest.mark.parametrize("is_old", [False, True])
async def test_a_hold_of_a_process_elsewhere_is_nobody_elses_to_release(
    books: Database, directory: Path, change: Change, is_old: bool
) -> None:
    """Contract C6: its process may be alive on another machine; only after a day is it given up."""
    caller = await make_caller(books, "100")
    held = await hold(books, caller, "5")  # by a ledger whose journal is not in this directory
    await change(OLD if is_old else DUE)
    with process(books, directory) as living:
        assert await living.recovery.look() == 1
    row = await row_of(books, held)
    assert (row["state"], row["is_unresolved"]) == (("released", True) if is_old else ("open", False))


async def test_a_hold_of_a_machine_that_is_lost_does_not_count_as_running(
    books: Database, directory: Path, change: Change
) -> None:
    caller = await make_caller(books, "100")
    held = await hold(books, caller, "5")  # by a ledger whose journal is not in this directory
    with process(books, directory) as living:
        await change(DUE)
        assert await living.recovery.look() == 1
        assert (await row_of(books, held))["is_handed_over"] is False  # its process may be alive yet
        await change("UPDATE holds SET due_at = now(), created_at = now() - interval '2 hours'")
        assert await living.recovery.look() == 1
    row = await row_of(books, held)
    assert (row["state"], row["is_handed_over"]) == ("open", True)
    async with books.snapshot() as connection:
        assert await connection.fetchval("SELECT open_requests FROM accounts WHERE account_id = $1", held.account_id) == 0
    assert await caller.held() == 5
    await assert_books_hold(books)


@pytest.mark.parametrize("name", [None, "gen-1"])
async def test_after_a_day_without_evidence_a_hold_is_given_up_and_late_evidence_still_charges_once(
    books: Database, directory: Path, change: Change, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    """Contract C3, C6; row upstream-19: released, marked and told to the operator; never silently free."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        held = await hold(books, caller, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, name))
        await change(OLD)
        await change("UPDATE holds SET recovery_attempts = 10")
        with caplog.at_level(logging.ERROR, "gptutor.recovery"):
            assert await living.recovery.look() == 1
        (record,) = caplog.records
        assert record.getMessage() == "A hold is given up: nobody learnt what it bought"
        row = await row_of(books, held)
        assert (row["state"], row["is_unresolved"], row["generation_id"]) == ("released", True, name)
        assert (await caller.balance(), await caller.held()) == (100, 0)
        (waiting,) = await books.fetch("list_waiting_holds", 1000)
        assert (waiting["account_id"], waiting["state"], waiting["generation_id"]) == (held.account_id, "unresolved", name)
        await assert_books_hold(books)

        assert await living.ledger.settle(settlement(held, "0.01")) == "settled_late"
        assert await living.ledger.settle(settlement(held, "0.01")) == "already_settled"
        row = await row_of(books, held)
        assert (row["state"], row["is_unresolved"], row["is_late"]) == ("settled", False, True)
        assert (await caller.balance(), await caller.held()) == (Decimal("99.1"), 0)
        assert await living.recovery.look() == 0
        assert await books.fetch("list_waiting_holds", 1000) == []
    await assert_books_hold(books)


async def test_openrouter_may_take_its_time_to_say_a_price(
    books: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the closing has little time, for it can be held up; a question has its own."""
    monkeypatch.setattr("gptutor.money.recovery.CLOSING_S", 0.5)
    caller, generations = await make_caller(books, "100"), Generations({"gen-1": Decimal("0.01")})
    answered = generations.cost_of

    async def slowly(generation_id: str) -> Decimal | None:
        await asyncio.sleep(0.8)
        return await answered(generation_id)

    monkeypatch.setattr(generations, "cost_of", slowly)
    with process(books, directory, generations=generations) as living:
        held = await hold(books, caller, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        assert await living.recovery.look() == 1
    assert await caller.balance() == Decimal("99.1")


async def test_a_name_is_asked_for_more_than_once_however_old_it_is(books: Database, directory: Path, change: Change) -> None:
    """Contract C6; row db-4: after an outage of a day OpenRouter may be as far away as before, for a while."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        held = await hold(books, caller, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
        await change(OLD)
        await living.recovery.look()
        await assert_books_hold(books)
        living.generations.says["gen-1"] = Decimal("0.01")
        await make_due(books)
        await living.recovery.look()
    assert await caller.balance() == Decimal("99.1")


async def test_a_name_is_asked_for_at_least_once_however_old_it_is(books: Database, directory: Path, change: Change) -> None:
    """Contract C6; row db-4: the service was down over the weekend, and OpenRouter has known the price all the time."""
    caller, dead = await make_caller(books, "100"), mortal(books, directory)
    held = await hold(books, caller, "5", ledger=dead)
    learn(dead.journal, held, "named")
    await change(OLD)
    with process(books, directory, generations=Generations({"gen-1": Decimal("0.01")})) as heir:
        await heir.recovery.replay(*leftovers_in(directory))
        await heir.recovery.look()
    assert heir.generations.asked == ["gen-1"]
    assert await caller.balance() == Decimal("99.1")


@pytest.mark.parametrize("handed_over", [True, False])
async def test_a_hold_whose_exchange_ends_while_it_is_claimed_is_not_taken_for_one_that_was_never_sent(
    books: Database, directory: Path, change: Change, monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    """Contract C6: the row says what was true when it was claimed, the journal what is true now; together they say nothing at all."""
    caller = await make_caller(books, "100")
    with process(books, directory, generations=Generations({"gen-1": Decimal("0.01")})) as living:
        held = await hold(books, caller, "5", ledger=living.ledger)
        learn(living.journal, held, "named")
        await change(DUE)  # a stream longer than its hold's time
        fetch = books.fetch

        async def meanwhile(statement: str, *arguments: Any) -> Any:
            rows = await fetch(statement, *arguments)
            if statement == "claim_due_holds":  # the exchange ends between the claim and the look
                monkeypatch.setattr(books, "fetch", fetch)
                if handed_over:
                    await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
                living.ledger.let_go(held.hold_id)
            return rows

        monkeypatch.setattr(books, "fetch", meanwhile)
        await living.recovery.look()
        await change(DUE)
        await living.recovery.look()
    assert (await row_of(books, held))["state"] == "settled"
    assert (await caller.balance(), await caller.held()) == (Decimal("99.1"), 0)


async def test_the_rate_that_was_promised_is_charged_whatever_the_rate_is_now(books: Database, directory: Path) -> None:
    """Contract C1; row money-16: the rate stands on the hold."""
    caller = await make_caller(books, "100")
    with process(books, directory, rate=Decimal("81.25")) as early:
        held = await hold(books, caller, "5", ledger=early.ledger)
        await early.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))
    with process(books, directory, rate=Decimal("123.45"), generations=Generations({"gen-1": Decimal("0.01")})) as late:
        assert await late.recovery.look() == 1
    entry, _ = await Bookings(books).entries(caller.account_id, 10)
    assert (entry.amount, entry.rub_per_usd) == (-812_500_000, Decimal("81.25"))
    await assert_books_hold(books)


async def test_a_look_up_that_fails_does_not_stop_the_others(
    books: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract C6; row process-13."""
    caller = await make_caller(books, "100")
    generations = Generations({f"gen-{number}": Decimal("0.01") for number in range(5)})
    generations.says["gen-2"] = RuntimeError("a bug in one of five")
    with process(books, directory, generations=generations) as living:
        holds = [await hold(books, caller, "5") for _ in range(5)]
        for number, held in enumerate(holds):
            await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, f"gen-{number}"))
        with caplog.at_level(logging.ERROR, "gptutor.recovery"):
            assert await living.recovery.look() == 5
        assert [record.getMessage() for record in caplog.records] == [
            "A hold could not be closed: RuntimeError('a bug in one of five')"
        ]
        states = [(await row_of(books, held))["state"] for held in holds]
        assert states == ["settled", "settled", "open", "settled", "settled"]
        assert await caller.balance() == Decimal("96.4")

        generations.says["gen-2"] = Decimal("0.02")
        await make_due(books)
        assert await living.recovery.look() == 1
    assert await caller.balance() == Decimal("94.6")
    await assert_books_hold(books)


async def test_a_hold_closed_meanwhile_is_not_charged_again(
    books: Database, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract C3; row process-6: the exchange's own settlement and recovery's meet."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        held = await hold(books, caller, "5")
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-1"))

        async def cost_of(generation_id: str) -> Decimal:
            await living.ledger.settle(settlement(held, "0.01"))
            return Decimal("0.01")

        monkeypatch.setattr(living.recovery, "_cost_of", cost_of)
        assert await living.recovery.look() == 1
    assert await caller.balance() == Decimal("99.1")
    await assert_books_hold(books)


async def test_a_hand_over_of_a_closed_hold_changes_nothing(books: Database, directory: Path) -> None:
    """Contract C3; row process-6: a replay of what is long settled or released."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        held = await hold(books, caller, "5")
        await living.ledger.settle(settlement(held, "0.01"))
        before = await row_of(books, held)
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, "gen-other"))
        assert await row_of(books, held) == before
        assert await living.recovery.look() == 0


# -- Idempotency-Key


async def ask(
    gateway: Gateway, caller: Caller, key: str, text: str = "Hello", *, request_id: str | None = None, **members: Any
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """A request under the caller's own name for it: status, headers, decoded answer."""
    headers = {**caller.headers, "Idempotency-Key": key, **({"X-Request-ID": request_id} if request_id else {})}
    body = {"messages": [{"role": "user", "content": text}], **members}
    async with gateway.session.post(gateway.chat_url, json=body, headers=headers) as response:
        document = await response.read()
    await gateway.idle()
    return response.status, dict(response.headers), json.loads(document)


async def assert_bought(gateway: Gateway, caller: Caller, times: int) -> None:
    """So often was something bought and charged, and no more is held."""
    await gateway.recovered(caller)
    charges = [entry for entry in await Bookings(gateway.books).entries(caller.account_id, 100) if entry.kind == "charge"]
    assert len(charges) == times
    assert all(charge.amount < 0 for charge in charges)
    assert await caller.held() == 0
    await assert_books_hold(gateway.books)


async def test_the_same_key_and_body_is_refused_and_names_the_first_request(gateway: Gateway) -> None:
    """Contract C10, B8; row money-5."""
    caller = await gateway.caller()
    first, _, _ = await ask(gateway, caller, "order 66", request_id="the-first")
    status, headers, answer = await ask(gateway, caller, "order 66", request_id="the-second")
    assert (first, status) == (200, 409)
    assert headers["X-Error-Code"] == "repeated_request"
    assert headers["x-should-retry"] == "false"
    assert headers["X-Request-ID"] == "the-second"
    assert answer == {"error": "A request with this Idempotency-Key was made before: the-first"}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, caller, 1)


async def test_the_same_key_with_another_body_is_refused_as_a_mistake(gateway: Gateway) -> None:
    """Contract C10, B8; row money-5."""
    caller = await gateway.caller()
    await ask(gateway, caller, "order 66", "Hello", request_id="the-first")
    status, headers, answer = await ask(gateway, caller, "order 66", "Something else")
    assert (status, headers["X-Error-Code"], headers["x-should-retry"]) == (422, "mismatched_request", "false")
    assert answer == {"error": "This Idempotency-Key was used for a different request: the-first"}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, caller, 1)


async def test_two_at_once_under_one_key_are_one(gateway: Gateway) -> None:
    """Contract C10; row money-4."""
    caller = await gateway.caller()
    gateway.simulator.first_word_s = 0.1
    replies = await asyncio.gather(*(ask(gateway, caller, "order 66") for _ in range(2)))
    assert sorted(status for status, _, _ in replies) == [200, 409]
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, caller, 1)


async def test_ten_at_once_under_one_key_are_one(gateway: Gateway) -> None:
    """Contract C10; row money-4, in one batch."""
    caller = await gateway.caller()
    replies = await asyncio.gather(*(ask(gateway, caller, "order 66", f"text {number % 3}") for number in range(10)))
    statuses = sorted(status for status, _, _ in replies)
    assert statuses[0] == 200
    assert set(statuses[1:]) <= {409, 422}
    assert len(gateway.simulator.billing.records) == 1
    await assert_bought(gateway, caller, 1)


async def test_two_accounts_may_use_the_same_key(gateway: Gateway) -> None:
    """Contract C10, C2: a key is a name among the account's own requests."""
    one, other = await gateway.caller(), await gateway.caller()
    replies = await asyncio.gather(ask(gateway, one, "order 66"), ask(gateway, other, "order 66"))
    assert [status for status, _, _ in replies] == [200, 200]
    await assert_bought(gateway, one, 1)
    await assert_bought(gateway, other, 1)


async def test_a_key_is_forgotten_after_a_day_and_not_before(gateway: Gateway, change: Change) -> None:
    """Contract C10: kept 24 h."""
    caller = await gateway.caller()
    await ask(gateway, caller, "order 66")
    await change("UPDATE holds SET created_at = created_at - interval '23 hours 59 minutes'")
    assert (await ask(gateway, caller, "order 66"))[0] == 409
    await change("UPDATE holds SET created_at = created_at - interval '2 minutes'")
    assert (await ask(gateway, caller, "order 66"))[0] == 200
    assert (await ask(gateway, caller, "order 66"))[0] == 409  # it names the new one now
    await assert_bought(gateway, caller, 2)


async def test_a_refusal_before_the_hold_does_not_use_the_key_up(gateway: Gateway) -> None:
    """Contract C8, C10: what was never begun may be begun."""
    caller = await gateway.caller("0")
    assert (await ask(gateway, caller, "order 66"))[0] == 402
    await Bookings(gateway.books).book(caller.account_id, "topup", Nano(100 * 10**9))
    assert (await ask(gateway, caller, "order 66"))[0] == 200
    await assert_bought(gateway, caller, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_bought_nothing_is_still_not_bought_again_under_its_key(gateway: Gateway, stream: bool) -> None:
    """Contract C10: never bought twice means never sent twice; the caller takes a new key."""
    caller = await gateway.caller()
    assert (await ask(gateway, caller, "order 66", "fault:status=400", stream=stream))[0] == 400
    assert (await ask(gateway, caller, "order 66", "fault:status=400", stream=stream))[0] == 409
    assert (await ask(gateway, caller, "order 67"))[0] == 200
    await assert_bought(gateway, caller, 1)


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
    caller = await gateway.caller()
    answered, headers, answer = await ask(gateway, caller, key)
    assert answered == status
    if status == 400:
        assert headers["X-Error-Code"] == "invalid_request"
        assert answer == {"error": "Idempotency-Key must be 1 to 255 printable ASCII characters"}
    else:
        assert (await ask(gateway, caller, key))[0] == 409
    await assert_bought(gateway, caller, int(status == 200))


async def test_a_key_tells_nothing_to_somebody_whose_api_key_is_dead(gateway: Gateway) -> None:
    """Contract B3, C10, D6: a revoked key learns nothing of the requests that it made."""
    caller = await gateway.caller()
    await ask(gateway, caller, "order 66")
    await KeyRing(gateway.books, VAULT).renew(caller.account_id)
    status, headers, answer = await ask(gateway, caller, "order 66")
    assert (status, headers["X-Error-Code"]) == (401, "invalid_key")
    assert "Idempotency" not in answer["error"]


@pytest.mark.parametrize(("head", "name"), [("gen-head", "gen-head"), (None, "gen-event")])
async def test_an_answer_has_the_name_in_its_head_however_it_comes(
    books: Database, directory: Path, head: str | None, name: str
) -> None:
    """Contract D5: by that one the caller looks it up. One whose bill comes with its head was not named before."""
    caller = await make_caller(books, "100")
    with process(books, directory) as living:
        purchase = Purchase(living.ledger, SimpleNamespace(charge=lambda cost: Nano(9 * 10**8)), await hold(books, caller, "5"))  # type: ignore[arg-type]
        purchase.mark_sent()
        purchase.record_bill(Bill(Decimal("0.01"), generation_id="gen-event"), head)
        assert await purchase.close() == "settled"
    entry, _ = await Bookings(books).entries(caller.account_id, 10)
    assert entry.generation_id == name
