"""Natural batching, and the ledger's batches (contract C2, C3; rows money-3, money-4, db-3 to db-6, db-10,
process-1, process-2, process-12): items that arrive while a statement is running form the next one, no item waits without need, and
no item fails because of another."""

import asyncio
import hashlib
import logging
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptutor.database.errors import ConstraintViolated, DatabaseUnavailable, RowsLocked
from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano, parse_roubles
from gptutor.money.batch import Batcher
from gptutor.money.holds import Hold, HoldRequest, InsufficientFunds, Release, RepeatedRequest, Settlement, UnknownKey, new_id
from gptutor.money.keys import KeyClaim, make_key, parse_key
from gptutor.money.pricing import Ceiling, Charge
from tests.support.gateway import Client, make_client
from tests.support.ledger import assert_invariants_hold, claim, hold, ledger_of, release, settlement
from tests.support.statements import Statements

Item = tuple[int, Any]
"""An account, and a label."""


@dataclass
class Executor:
    """Runs batches: records them, and waits where a test wants it to. An item's result is the item itself."""

    batches: list[list[Item]] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    failures: dict[Any, BaseException] = field(default_factory=dict)
    gates: dict[Any, asyncio.Event] = field(default_factory=dict)
    """For an item that is alone in its batch: the event that it waits for."""
    running: Counter[int] = field(default_factory=Counter)
    overlapping: list[int] = field(default_factory=list)
    """Accounts that were in two running statements."""
    abandoned: list[tuple[Item, Any]] = field(default_factory=list)

    async def execute(self, items: list[Item]) -> list[Item]:
        self.batches.append(items)
        accounts = {account for account, _ in items}
        self.overlapping += [account for account in accounts if self.running[account]]
        self.running.update(accounts)
        try:
            await self.open.wait()
            if len(items) == 1 and items[0][1] in self.gates:
                await self.gates[items[0][1]].wait()
            for _, what in items:
                if what in self.failures:
                    raise self.failures[what]
            return items
        finally:
            self.running.subtract(accounts)

    @property
    def served(self) -> list[Item]:
        return [item for batch in self.batches for item in batch]

    def batcher(
        self,
        concurrent_max: int = 1,
        batch_max: int = 100,
        overtake_after_s: float = 60,
        *,
        one_account_per_batch: bool = False,
    ) -> Batcher[Item, Item]:
        return Batcher(
            self.execute,
            lambda item: item[0],
            concurrent_max=concurrent_max,
            batch_max=batch_max,
            overtake_after_s=overtake_after_s,
            one_account_per_batch=one_account_per_batch,
            on_abandoned=lambda item, result: self.abandoned.append((item, result)),
        )


def submitted(batcher: Batcher[Item, Item], *items: Item) -> list[asyncio.Task[Item]]:
    return [asyncio.create_task(batcher.submit(item)) for item in items]


async def run_pending() -> None:
    """Runs everything that is ready."""
    for _ in range(20):
        await asyncio.sleep(0)


async def outcomes(tasks: list[asyncio.Task[Item]]) -> list[Any]:
    """Results and exceptions, in order; a submitter that never gets a result is a failure."""
    async with asyncio.timeout(5):
        return await asyncio.gather(*tasks, return_exceptions=True)


# -- the batcher alone


async def test_one_at_a_time_is_one_statement_each_and_starts_at_once() -> None:
    """No timer: a lone request pays nothing for batching."""
    executor = Executor()
    executor.open.set()
    batcher = executor.batcher()
    for number in range(5):
        assert await batcher.submit((1, number)) == (1, number)
    assert executor.batches == [[(1, number)] for number in range(5)]

    executor.open.clear()
    task = asyncio.create_task(batcher.submit((1, "x")))
    await asyncio.sleep(0)  # the submitter runs, and starts its batch …
    await asyncio.sleep(0)  # … which begins in the next turn of the loop, not after a while
    assert executor.batches[-1] == [(1, "x")]
    executor.open.set()
    await task


async def test_items_that_arrive_while_a_statement_runs_are_the_next_batch_and_no_batch_is_too_large() -> None:
    executor = Executor()
    batcher = executor.batcher(batch_max=10)
    tasks = submitted(batcher, (1, 0))
    await run_pending()
    tasks += submitted(batcher, *((1, number) for number in range(1, 26)))
    await run_pending()
    assert len(executor.batches) == 1
    executor.open.set()
    assert await outcomes(tasks) == [(1, number) for number in range(26)]
    assert [len(batch) for batch in executor.batches] == [1, 10, 10, 5]
    assert executor.served == [(1, number) for number in range(26)]


async def test_items_behind_a_slow_statement_overtake_it_and_no_account_is_in_two_statements() -> None:
    """Two statements of one process must not wait for each other's rows; one that waits for a lock must not delay other accounts."""
    executor = Executor()
    batcher = executor.batcher(concurrent_max=2, overtake_after_s=0.02)
    tasks = submitted(batcher, (1, "a"))
    await run_pending()
    tasks += submitted(batcher, (1, "b"), (2, "c"), (1, "d"), (3, "e"))
    await run_pending()
    assert executor.batches == [[(1, "a")]]  # not overtaken yet
    await asyncio.sleep(0.05)
    assert executor.batches == [[(1, "a")], [(2, "c"), (3, "e")]]
    tasks += submitted(batcher, (4, "f"))
    await asyncio.sleep(0.05)
    assert len(executor.batches) == 2  # `concurrent_max` are running
    executor.open.set()
    await outcomes(tasks)
    assert executor.batches[2:] == [[(1, "b"), (1, "d"), (4, "f")]]
    assert executor.overlapping == []


async def test_a_statement_of_normal_duration_is_not_overtaken() -> None:
    executor = Executor()
    batcher = executor.batcher(concurrent_max=3, overtake_after_s=0.05)
    tasks = submitted(batcher, (1, 0))
    for number in range(1, 8):
        await asyncio.sleep(0.02)
        tasks += submitted(batcher, (number, number))
        await run_pending()
        executor.open.set()
        await run_pending()
        executor.open.clear()
        assert sum(executor.running.values()) <= 1
    executor.open.set()
    await outcomes(tasks)


async def test_with_one_account_per_batch_no_account_waits_for_another() -> None:
    executor = Executor()
    batcher = executor.batcher(concurrent_max=3, overtake_after_s=0, one_account_per_batch=True)
    tasks = submitted(batcher, (1, "a"), (2, "b"), (1, "c"), (3, "d"), (4, "e"))
    async with asyncio.timeout(2):
        while len(executor.batches) < 3:
            await asyncio.sleep(0.001)
    assert executor.batches == [[(1, "a"), (1, "c")], [(2, "b")], [(3, "d")]]
    tasks += submitted(batcher, (1, "f"))
    await run_pending()
    executor.open.set()
    await outcomes(tasks)
    assert executor.batches[3:] in ([[(4, "e")], [(1, "f")]], [[(1, "f")], [(4, "e")]])
    assert executor.overlapping == []


async def test_an_item_that_arrives_while_a_worker_ends_is_not_forgotten() -> None:
    """All workers were busy when the item arrived, and the worker that has ended since has not seen it."""
    executor = Executor(gates={"stuck": asyncio.Event()})
    executor.open.set()
    batcher = executor.batcher(concurrent_max=2, overtake_after_s=0.01)
    tasks = submitted(batcher, (1, "stuck"))
    await run_pending()
    async with asyncio.timeout(2):
        for number in range(5):  # each is submitted when the previous one has its result
            assert await batcher.submit((2, number)) == (2, number)
    executor.gates["stuck"].set()
    await outcomes(tasks)


async def test_an_item_that_can_only_wait_starts_no_workers_in_vain() -> None:
    executor = Executor()
    batcher = executor.batcher(concurrent_max=3, overtake_after_s=0, one_account_per_batch=True)
    tasks = submitted(batcher, (1, "a"))
    await run_pending()
    with patch.object(batcher, "_start_worker", wraps=batcher._start_worker) as start:
        tasks += submitted(batcher, (1, "b"))
        await asyncio.sleep(0.02)
    assert start.call_count <= 1
    executor.open.set()
    await outcomes(tasks)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 7), max_size=60),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([0, 60]),
    st.integers(0, 2**32),
)
def test_in_any_order_of_arrival_all_are_served_in_their_accounts_order(
    accounts: list[int], concurrent_max: int, batch_max: int, overtake_after_s: float, seed: int
) -> None:
    async def play() -> None:
        dice = random.Random(seed)
        executor = Executor()
        batcher = executor.batcher(concurrent_max, batch_max, overtake_after_s)
        tasks = []
        for number, account in enumerate(accounts):
            tasks += submitted(batcher, (account, number))
            if dice.random() < 0.3:
                executor.open.set() if dice.random() < 0.5 else executor.open.clear()
                await asyncio.sleep(0)
        executor.open.set()
        assert await outcomes(tasks) == [(account, number) for number, account in enumerate(accounts)]
        assert executor.overlapping == []
        served: dict[int, list[int]] = defaultdict(list)
        for batch in executor.batches:
            assert 1 <= len(batch) <= batch_max
            for account, number in batch:
                served[account].append(number)
        assert all(numbers == sorted(numbers) for numbers in served.values())
        assert sum(map(len, served.values())) == len(accounts)  # each once

    asyncio.run(play())


async def test_one_bad_item_fails_alone() -> None:
    """A rejected item does not fail the other items, and each of them takes effect once."""
    executor = Executor(failures={"bad": ConstraintViolated("constraint"), "worse": ValueError("nonsense")})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "first"), (1, "a"), (1, "bad"), (1, "b"), (1, "worse"), (1, "c"))
    executor.open.set()
    results = await outcomes(tasks)
    assert [type(result) for result in results] == [tuple, tuple, ConstraintViolated, tuple, ValueError, tuple]
    assert (await outcomes(submitted(batcher, (1, "after"))))[0] == (1, "after")


async def test_an_unavailable_database_fails_the_whole_batch_and_nothing_is_retried_one_by_one() -> None:
    """Row db-2: a statement whose outcome is unknown is not simply repeated by the batcher."""
    executor = Executor(failures={"b": DatabaseUnavailable("gone")})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "first"))
    await run_pending()
    tasks += submitted(batcher, (1, "a"), (1, "b"), (1, "c"))
    await run_pending()
    executor.open.set()
    first, *others = await outcomes(tasks)
    assert first == (1, "first")
    assert [type(error) for error in others] == [DatabaseUnavailable] * 3
    assert [len(batch) for batch in executor.batches] == [1, 3]
    assert await batcher.submit((1, "after")) == (1, "after")


async def test_a_locked_row_fails_the_items_of_its_account_only() -> None:
    """Row db-11: also if the lock is not on the account row, which a statement would skip."""
    executor = Executor(failures={"locked": RowsLocked("gone")})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "first"))
    await run_pending()
    tasks += submitted(batcher, (1, "a"), (2, "locked"), (3, "c"))
    await run_pending()
    executor.open.set()
    first, *others = await outcomes(tasks)
    assert first == (1, "first")
    assert [type(result) for result in others] == [tuple, RowsLocked, tuple]


async def test_an_item_whose_submitter_is_cancelled_in_the_queue_is_dropped() -> None:
    executor = Executor()
    batcher = executor.batcher(batch_max=2)
    tasks = submitted(batcher, (1, 0), (1, 1), (1, 2), (1, 3), (1, 4))
    await run_pending()
    for number in (2, 3):  # a whole batch of them
        tasks[number].cancel()
    executor.open.set()
    results = await outcomes(tasks)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [False, False, True, True, False]
    assert executor.served == [(1, 0), (1, 1), (1, 4)]
    assert executor.abandoned == []


async def test_a_result_whose_submitter_was_cancelled_is_passed_to_on_abandoned() -> None:
    """A client that disconnects at the wrong moment must not leave a hold behind."""
    executor = Executor()
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "left"), (1, "stayed"))
    await run_pending()
    tasks[0].cancel()
    await run_pending()
    executor.open.set()
    assert (await outcomes(tasks))[1] == (1, "stayed")
    assert executor.abandoned == [((1, "left"), (1, "left"))]


async def test_without_on_abandoned_a_result_whose_submitter_was_cancelled_is_dropped() -> None:
    executor = Executor()
    batcher: Batcher[Item, Item] = Batcher(executor.execute, lambda item: item[0], concurrent_max=1, batch_max=9)
    tasks = submitted(batcher, (1, "left"), (1, "stayed"))
    await run_pending()
    tasks[0].cancel()
    await run_pending()
    executor.open.set()
    assert (await outcomes(tasks))[1] == (1, "stayed")


async def test_a_failure_whose_submitter_was_cancelled_affects_no_other_item() -> None:
    executor = Executor(failures={"left": DatabaseUnavailable("gone")})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "left"), (1, "stayed"))
    await run_pending()
    tasks[0].cancel()
    await run_pending()
    executor.open.set()
    assert isinstance((await outcomes(tasks))[1], DatabaseUnavailable)
    assert executor.abandoned == []


async def test_a_cancelled_worker_leaves_no_submitter_of_its_batch_waiting_forever() -> None:
    """Row process-12: the outcome is unknown, and each submitter gets an exception that says so."""
    executor = Executor()
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "a"), (1, "b"))
    await run_pending()
    cancel_worker(batcher)
    assert [type(error) for error in await outcomes(tasks)] == [DatabaseUnavailable] * 2
    executor.open.set()
    assert await batcher.submit((1, "after")) == (1, "after")


def cancel_worker(batcher: Batcher[Item, Item]) -> None:
    (worker,) = batcher._workers
    worker.cancel()


async def test_a_cancelled_worker_leaves_no_queued_submitter_waiting_forever() -> None:
    """Row process-12."""
    executor = Executor()
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "under way"))
    await run_pending()
    tasks += submitted(batcher, (1, "queued"))
    await run_pending()
    cancel_worker(batcher)
    executor.open.set()
    first, queued = await outcomes_or_hanging(tasks)
    assert isinstance(first, DatabaseUnavailable)
    assert queued == (1, "queued") or isinstance(queued, DatabaseUnavailable)


async def outcomes_or_hanging(tasks: list[asyncio.Task[Item]]) -> list[Any]:
    await run_pending()
    hanging = [task for task in tasks if not task.done()]
    for task in hanging:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return ["hangs" if task in hanging else result for task, result in zip(tasks, results, strict=True)]


async def test_a_worker_that_is_cancelled_before_it_begins_does_not_stop_the_batcher() -> None:
    """Row process-12."""
    executor = Executor()
    executor.open.set()
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "first"))
    await asyncio.sleep(0)
    cancel_worker(batcher)
    await run_pending()
    tasks += submitted(batcher, (1, "after"))
    first, after = await outcomes_or_hanging(tasks)
    assert first == (1, "first") or isinstance(first, DatabaseUnavailable)
    assert after == (1, "after")


async def test_a_worker_that_is_cancelled_while_it_retries_one_by_one_leaves_no_submitter_waiting_forever() -> None:
    """Row process-12."""
    executor = Executor(failures={"bad": ValueError("nonsense")}, gates={"b": asyncio.Event()})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "a"), (1, "bad"), (1, "b"), (1, "c"))
    executor.open.set()
    await run_pending()
    assert executor.batches[-1] == [(1, "b")]
    cancel_worker(batcher)
    await run_pending()
    assert [task.done() for task in tasks[:3]] == [True] * 3
    results = await outcomes_or_hanging(tasks)
    assert "hangs" not in results


async def test_an_item_whose_submitter_is_cancelled_while_others_are_retried_is_dropped() -> None:
    executor = Executor(failures={"bad": ValueError("nonsense")})
    batcher = executor.batcher()
    tasks = submitted(batcher, (1, "bad"), (1, "left"))
    await run_pending()
    tasks[1].cancel()
    executor.open.set()
    assert isinstance((await outcomes(tasks))[0], ValueError)
    assert executor.served[2:] == [(1, "bad")]


# -- the batches of the ledger, on real SQL


@pytest.fixture
def statements(database: Database, monkeypatch: pytest.MonkeyPatch) -> Statements:
    return Statements(database, monkeypatch)


def request(
    client: Client, roubles: str, *, key: str | None = None, body: bytes = b"", model: str = "a/b", name: str = "r"
) -> HoldRequest:
    ceiling = Ceiling(hold_max=parse_roubles(roubles), available_min=parse_roubles(roubles))
    body_hash = hashlib.sha256(body).digest() if key else None
    return HoldRequest(claim(client), new_id(), ceiling, model, name, key, body_hash)


async def test_each_of_a_mixed_batch_gets_its_own_outcome(database: Database, statements: Statements) -> None:
    """Contract C2, C10, B3; rows money-1, money-4, auth-4, auth-5, auth-8: one statement, five kinds of outcome, four accounts."""
    rich, poor, other = [await make_client(database, balance) for balance in ("100", "10", "50")]
    unauthenticated = Client(make_key(rich.account_id), rich.account_id, database)
    nobody = Client(make_key(AccountId(10**12)), AccountId(10**12), database)
    ledger = ledger_of(database)
    await ledger.hold_funds(request(other, "1", key="k", body=b"x", name="the-first"))

    items: list[tuple[HoldRequest, str]] = [
        (request(rich, "30"), "granted"),
        (request(poor, "6"), "granted"),
        (request(unauthenticated, "1"), "unknown_key"),
        (request(poor, "5"), "insufficient"),  # 4 are left
        (request(poor, "4"), "granted"),  # the one before took nothing
        (request(nobody, "1"), "unknown_key"),
        (request(other, "1", key="k", body=b"x"), "repeated"),
        (request(other, "1", key="k", body=b"y"), "mismatched"),
        (request(rich, "71"), "insufficient"),
        (request(rich, "2", key="k", body=b"x"), "granted"),  # another account's key is no obstacle
        (request(rich, "2", key="k", body=b"x"), "repeated"),  # within one batch
        (request(rich, "68"), "granted"),
        (request(rich, "0.000000001"), "insufficient"),
    ]
    rows = await ledger._settle_and_hold_batch([item for item, _ in items])
    assert [row["outcome"] for row in rows] == [expected for _, expected in items]
    assert [row["hold_id"] for row in rows] == [item.hold_id for item, _ in items]
    assert rows[6]["earlier_request_id"] == "the-first"
    assert statements.count("settle_and_hold") == 2
    assert [await client.held() for client in (rich, poor, other)] == [100, 10, 1]
    assert [row["amount_nano"] for row in rows if row["outcome"] == "granted"] == [
        parse_roubles(amount) for amount in ("30", "6", "4", "2", "68")
    ]
    await assert_invariants_hold(database)


async def test_every_outcome_of_a_batch_comes_as_its_own_exception(database: Database, statements: Statements) -> None:
    """Contract C2, C10, B3."""
    client = await make_client(database, "10")
    unauthenticated = Client(make_key(client.account_id), client.account_id, database)
    ledger = ledger_of(database)
    statements.unblocked.clear()
    first = asyncio.create_task(ledger.hold_funds(request(client, "1", key="k", body=b"x", name="the-first")))
    await run_pending()
    others = [
        asyncio.create_task(ledger.hold_funds(item))
        for item in (
            request(client, "1", key="k", body=b"x"),
            request(client, "1", key="k", body=b"y"),
            request(client, "10"),
            request(unauthenticated, "1"),
            request(client, "9"),
        )
    ]
    await run_pending()
    statements.unblocked.set()
    assert isinstance(await first, Hold)
    repeated, mismatched, insufficient, unknown, granted = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(repeated, RepeatedRequest)
    assert (repeated.request_id, repeated.same_body) == ("the-first", True)
    assert isinstance(mismatched, RepeatedRequest)
    assert (mismatched.request_id, mismatched.same_body) == ("the-first", False)
    assert isinstance(insufficient, InsufficientFunds)
    assert isinstance(unknown, UnknownKey)
    assert isinstance(granted, Hold)
    assert [size for name, size in statements.seen if name == "settle_and_hold"] == [1, 5]
    assert len(ledger.active) == 2  # only those who hold
    assert (await client.user()).available == 0


async def test_an_item_that_the_database_rejects_fails_alone(database: Database, statements: Statements) -> None:
    """Rows input-11, process-12: text that PostgreSQL rejects fails one request only."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    statements.unblocked.clear()
    items = [request(client, "1"), request(client, "1"), request(client, "1", model="a\0b"), request(client, "1")]
    tasks = [asyncio.create_task(ledger.hold_funds(item)) for item in items]
    await run_pending()
    statements.unblocked.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Hold) for result in results] == [True, True, False, True]
    await ledger.drain(5)
    assert await client.held() == 3
    assert len(ledger.active) == 3
    await assert_invariants_hold(database)


async def test_two_hundred_at_once_never_hold_more_than_the_balance(database: Database, statements: Statements) -> None:
    """Contract C2; row money-3: through one ledger, and in a handful of statements."""
    client = await make_client(database, "37.5")
    ledger = ledger_of(database)
    results = await asyncio.gather(*(hold(database, client, "1", ledger=ledger) for _ in range(200)), return_exceptions=True)
    assert Counter(type(result) for result in results) == {Hold: 37, InsufficientFunds: 163}
    assert (await client.held(), (await client.user()).available) == (37, parse_roubles("0.5"))
    assert statements.count("settle_and_hold") <= 3
    await assert_invariants_hold(database)


async def test_two_hundred_at_once_in_four_processes_never_hold_more_than_the_balance(database: Database) -> None:
    """Contract C2; row money-3: and in different orders of accounts, without a deadlock that anybody sees (row db-6)."""
    clients = [await make_client(database, "10.5") for _ in range(4)]
    ledgers = [ledger_of(database) for _ in range(4)]
    turns = [(ledger, client) for ledger in ledgers for client in clients for _ in range(25)]
    random.Random(7).shuffle(turns)
    results = await asyncio.gather(
        *(hold(database, client, "1", ledger=ledger) for ledger, client in turns), return_exceptions=True
    )
    assert Counter(type(result) for result in results) == {Hold: 40, InsufficientFunds: 360}
    assert [await client.held() for client in clients] == [10] * 4
    await assert_invariants_hold(database)


async def test_settlements_and_releases_at_once_share_statements_and_close_each_hold_once(
    database: Database, statements: Statements
) -> None:
    """Contract C3; row db-6: closings of the same holds in many orders, from two processes."""
    clients = [await make_client(database, "100") for _ in range(4)]
    ledgers = [ledger_of(database), ledger_of(database)]
    holds = [await hold(database, client, "1", ledger=ledgers[0]) for _ in range(10) for client in clients]
    taken = statements.count("settle_and_hold")
    works: list[Any] = [ledger.settle(settlement(held, "0.01")) for held in holds for ledger in ledgers]
    works += [ledgers[0].release(release(held)) for held in holds[::2]]
    random.Random(3).shuffle(works)
    results = await asyncio.gather(*works)
    closed = Counter(result for result in results if result is not None)
    assert closed["settled"] + closed["settled_late"] == 40
    assert closed["already_settled"] == 40
    assert statements.count("settle_and_hold") - taken < 20
    assert [await client.balance() for client in clients] == [91] * 4
    assert [await client.held() for client in clients] == [0] * 4
    await assert_invariants_hold(database)


async def test_a_lock_on_one_account_row_delays_no_other_account(database: Database, database_url: str) -> None:
    """Row db-6: a lock held by hand, or by another process. The items of that account wait, in order, and none is lost."""
    other, client = await make_client(database, "10"), await make_client(database, "10")
    ledger = ledger_of(database)
    held = await hold(database, client, "1", ledger=ledger)
    ledger.journal.record_sent(held.account_id, held.hold_id)
    given_up = [await hold(database, each, "1", ledger=ledger) for each in (other, client)]
    by_hand = await asyncpg.connect(database_url)
    transaction = by_hand.transaction()
    await transaction.start()
    await by_hand.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", client.account_id)
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(ledger.settle(settlement(held, "0.01")))]
    waiting += [asyncio.create_task(hold(database, client, "1", ledger=ledger)) for _ in range(3)]
    releases = [asyncio.create_task(ledger.release(release(each))) for each in given_up]  # which begin with the other's row
    for _ in range(20):
        async with asyncio.timeout(0.5):
            later = await hold(database, other, "0.1", ledger=ledger)
            assert await ledger.settle(settlement(later, "0.0001")) == "settled"
    assert [task.done() for task in waiting] == [False] * 4
    assert list(ledger.journal.open_holds) == [held.hold_id]
    await transaction.rollback()
    await by_hand.close()
    outcome, *holds = await asyncio.gather(*waiting)
    assert outcome == "settled"
    assert all(isinstance(each, Hold) for each in holds)
    await asyncio.gather(*releases)
    assert ledger.journal.open_holds == {}
    assert (await client.balance(), await client.held()) == (Decimal("9.1"), 3)
    await assert_invariants_hold(database)


async def test_only_the_locked_account_is_rejected_when_its_row_stays_locked(database: Database, database_url: str) -> None:
    client, other = await make_client(database, "10"), await make_client(database, "10")
    ledger = ledger_of(database)
    by_hand = await asyncpg.connect(database_url)
    async with by_hand.transaction():
        await by_hand.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", client.account_id)
        results = await asyncio.gather(
            *(hold(database, each, "1", ledger=ledger) for each in (client, other, client, other)), return_exceptions=True
        )
    await by_hand.close()
    assert [type(result) for result in results] == [RowsLocked, Hold, RowsLocked, Hold]
    await ledger.drain(5)
    assert [await each.held() for each in (client, other)] == [0, 2]


async def test_a_request_that_is_cancelled_in_the_queue_takes_no_hold(database: Database, statements: Statements) -> None:
    """Contract C8; row client-1."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    statements.unblocked.clear()
    tasks = [asyncio.create_task(ledger.hold_funds(request(client, "1"))) for _ in range(2)]
    await run_pending()
    tasks.append(asyncio.create_task(ledger.hold_funds(request(client, "1"))))
    await run_pending()
    tasks[2].cancel()
    statements.unblocked.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], asyncio.CancelledError)
    await ledger.drain(5)
    assert sum(size for name, size in statements.seen if name == "settle_and_hold") == 2
    assert await client.held() == 2
    assert len(ledger.active) == 2


async def test_a_request_that_is_cancelled_while_its_hold_is_taken_leaves_none_behind(
    database: Database, statements: Statements
) -> None:
    """Contract C3, C8; rows client-1, process-1: its release may even come before it, and another follows it."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    statements.unblocked.clear()
    task = asyncio.create_task(ledger.hold_funds(request(client, "1")))
    await run_pending()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ledger.drain(5)
    assert statements.count("release_holds") == 1  # too early: there was nothing yet
    statements.unblocked.set()
    async with asyncio.timeout(5):
        while statements.count("release_holds") < 2:
            await asyncio.sleep(0.001)
    await ledger.drain(5)
    assert (await client.held(), await client.balance()) == (0, 10)
    assert ledger.active == set()
    await assert_invariants_hold(database)


async def test_a_hold_whose_response_was_lost_is_rejected_and_released(database: Database, statements: Statements) -> None:
    """Contract C3, C8; row db-3."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    statements.lost_responses += ["settle_and_hold", "release_holds"]
    with pytest.raises(DatabaseUnavailable):
        await ledger.hold_funds(request(client, "1"))
    assert await client.held() == 1  # it was committed all the same
    assert ledger.active == set()
    await ledger.drain(5)
    assert statements.count("release_holds") == 2
    assert (await client.held(), await client.balance()) == (0, 10)


async def test_a_settlement_whose_response_was_lost_is_retried_and_booked_once(
    database: Database, statements: Statements, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract C3; rows db-4, db-5."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    held = await hold(database, client, "1", ledger=ledger)
    ledger.journal.record_sent(held.account_id, held.hold_id)
    statements.lost_requests += ["settle_and_hold"]
    statements.lost_responses += ["settle_and_hold"]
    with caplog.at_level(logging.DEBUG, "gptutor.ledger"):
        assert await ledger.settle(settlement(held, "0.01")) == "already_settled"
    said = [(record.getMessage(), record.levelno) for record in caplog.records if record.name == "gptutor.ledger"]
    assert [text for text, _ in said] == [
        "A hold cannot be closed yet: the request was lost",
        "A hold cannot be closed yet: the response was lost",
    ]
    assert said[0][1] >= logging.WARNING  # visible to the operator
    assert ledger.journal.open_holds == {}
    assert (await client.balance(), await client.held()) == (Decimal("9.1"), 0)
    await assert_invariants_hold(database)


async def test_a_settlement_of_a_lost_hold_of_which_nothing_is_known_is_an_error(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Row operator-5: after a failover to a stale replica, or a restore, a charge has no hold; a journal of an earlier release."""
    client = await make_client(database, "10")
    lost = Settlement(client.account_id, new_id(), Charge(Nano(1), Decimal("0.01")), None)
    with caplog.at_level(logging.ERROR, "gptutor.ledger"):
        assert await ledger_of(database).settle(lost) == "no_hold"
    assert caplog.records[0].getMessage().startswith("A request cannot be charged: the database has lost its hold")
    assert await client.balance() == 10


async def test_a_failure_that_is_not_an_outage_is_not_retried(database: Database, statements: Statements) -> None:
    """Row process-12: a statement that the database rejects would be rejected again."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    held = await hold(database, client, "1", ledger=ledger)
    with pytest.raises(ConstraintViolated, match="charge_is_not_negative"):
        await ledger.settle(Settlement(held.account_id, held.hold_id, Charge(Nano(-1), Decimal("0.01")), None))
    assert statements.count("settle_and_hold") == 2  # the hold's, and one
    assert await client.held() == 1


async def test_a_background_release_that_fails_is_logged(
    database: Database, statements: Statements, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it; recovery finds the hold."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    statements.lost_responses += ["settle_and_hold"]
    statements.rejected += ["release_holds"]
    with pytest.raises(DatabaseUnavailable):
        await ledger.hold_funds(request(client, "1"))
    await ledger.drain(5)
    assert any(record.getMessage().startswith("A hold could not be released: ") for record in caplog.records)
    assert await client.held() == 1


async def test_draining_waits_for_background_releases_but_not_forever(database: Database, statements: Statements) -> None:
    """Rows process-7, db-4: recovery will find the rest."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    await ledger.drain(5)  # nothing to wait for
    statements.lost_responses += ["settle_and_hold"]
    statements.lost_requests += ["release_holds"] * 50
    with pytest.raises(DatabaseUnavailable):
        await ledger.hold_funds(request(client, "1"))
    await ledger.drain(0.01)
    assert len(ledger._background_releases) == 0
    assert await client.held() == 1


async def test_releasing_twice_and_in_one_batch_frees_once(database: Database) -> None:
    """Contract C3: the same hold twice in one statement, and another that does not exist."""
    client = await make_client(database, "10")
    ledger = ledger_of(database)
    held, kept = await hold(database, client, "1"), await hold(database, client, "2")
    unknown = Release(client.account_id, new_id())
    await ledger._release_batch([release(held), unknown, release(held)])
    assert (await client.held(), await client.balance()) == (2, 10)
    assert kept.amount == parse_roubles("2")
    await assert_invariants_hold(database)


async def test_a_key_names_its_account_and_no_other_accounts_row_is_touched(database: Database) -> None:
    """Contract D6; row auth-7, inside a batch beside the account that was meant."""
    client, victim = await make_client(database, "10"), await make_client(database, "10")
    forged = KeyClaim(victim.account_id, claim(client).key_hash)
    ledger = ledger_of(database)
    ceiling = Ceiling(hold_max=Nano(1), available_min=Nano(1))
    results = await asyncio.gather(
        ledger.hold_funds(request(client, "1")),
        ledger.hold_funds(request(victim, "1")),
        ledger.hold_funds(HoldRequest(forged, new_id(), ceiling, "m", "r")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Hold, Hold, UnknownKey]
    assert parse_key(client.key) is not None
    assert [await one.held() for one in (client, victim)] == [1, 1]


async def test_a_statement_that_overtakes_finds_nothing_left_to_do() -> None:
    """Its timer fires after the statement that was running has taken the last item."""

    async def execute(items: list[int]) -> list[int]:
        return items

    batcher = Batcher(execute, lambda item: item, concurrent_max=2, batch_max=10)
    assert await batcher.submit(1) == 1
    await asyncio.sleep(0)
    batcher._overtake()
    assert not batcher._workers


async def test_only_a_granted_hold_is_released_when_nobody_waits_for_it(database: Database) -> None:
    ledger = ledger_of(database)
    client = await make_client(database, "10")
    held = await hold(database, client, "1")
    ledger._release_abandoned(settlement(held, "0.01"), {"outcome": "settled"})  # type: ignore[arg-type]
    assert len(ledger._background_releases) == 0
