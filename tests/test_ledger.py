"""Holds, settlements and bookings on a real PostgreSQL (contract C2, C3, C5, C8, C9, C11, D6; rows money-1 to money-3, -7, -8, -15,
auth-4, auth-5, auth-7, auth-8)."""

import asyncio
import hashlib
import json
import statistics
import uuid
from decimal import Decimal

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptutor.database import pool
from gptutor.database.errors import ConstraintViolated
from gptutor.database.pool import Database
from gptutor.database.statements import STATEMENTS
from gptutor.money.amounts import AccountId, Nano, parse_roubles, roubles
from gptutor.money.bookings import AlreadyBooked, Bookings
from gptutor.money.holds import Hold, HoldId, HoldRequest, InsufficientFunds, RepeatedRequest, UnknownKey, new_id
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import KeyClaim, make_key, parse_key
from gptutor.money.pricing import Ceiling
from gptutor.money.users import NoSuchUser, UserRepository
from tests.support.gateway import VAULT, Client, make_client
from tests.support.ledger import RATE, assert_invariants_hold, claim, hold, ledger_of, release, settlement


async def test_a_hold_sets_money_aside_and_a_settlement_charges(database: Database) -> None:
    client = await make_client(database, "100")
    held = await hold(database, client, "30")
    assert (held.amount, held.available_before) == (parse_roubles("30"), parse_roubles("100"))
    assert (await client.balance(), await client.held()) == (100, 30)

    assert await ledger_of(database).settle(settlement(held, "0.1")) == "settled"
    assert (await client.balance(), await client.held()) == (91, 0)
    entry, _ = await Bookings(database).entries(client.account_id, 10)
    assert (entry.entry_id, entry.kind, roubles(entry.amount)) == (held.hold_id, "charge", "-9")
    assert (entry.cost_usd, entry.rub_per_usd, entry.model, entry.contra) == (Decimal("0.1"), RATE, "a/b", "revenue")
    await assert_invariants_hold(database)


async def test_a_hold_that_may_be_smaller_takes_an_eighth_of_what_is_left(database: Database) -> None:
    client = await make_client(database, "10")
    held = [await hold(database, client, hold_max="30", available_min="2") for _ in range(4)]
    assert [roubles(each.amount) for each in held] == ["3", "2.625", "2.296875", "2.009765625"]  # 2 + (10 - 2) / 8, …
    with pytest.raises(InsufficientFunds):
        await hold(database, client, hold_max="30", available_min="2")
    small = await hold(database, client, hold_max="0.01", available_min="0.000000001")
    assert roubles(small.amount) == "0.008544922"  # (10 - 9.931640625) / 8
    assert (await hold(database, client, hold_max="0.007", available_min="0.000000001")).amount == 7 * 10**6
    await assert_invariants_hold(database)


async def test_a_hold_is_never_larger_than_what_is_available(database: Database) -> None:
    client = await make_client(database, "10")
    ceiling = Ceiling(hold_max=parse_roubles("30"), available_min=parse_roubles("10"))
    held = await ledger_of(database).hold_funds(HoldRequest(claim(client), new_id(), ceiling, "a/b", "r"))
    assert roubles(held.amount) == "10"


@pytest.mark.parametrize(
    ("balance", "amount", "granted"), [("10", "10", True), ("9.999999999", "10", False), ("0", "0.01", False)]
)
async def test_exactly_enough_is_enough(database: Database, balance: str, amount: str, granted: bool) -> None:
    client = await make_client(database, balance)
    if granted:
        await hold(database, client, amount)
    else:
        with pytest.raises(InsufficientFunds):
            await hold(database, client, amount)
    assert await client.held() == (Decimal(amount) if granted else 0)


async def test_a_hundred_at_once_on_money_for_ten_hold_exactly_ten(database: Database) -> None:
    client = await make_client(database, "10.5")
    results = await asyncio.gather(*(hold(database, client, "1") for _ in range(100)), return_exceptions=True)
    assert sum(isinstance(result, Hold) for result in results) == 10
    assert sum(isinstance(result, InsufficientFunds) for result in results) == 90
    assert (await client.user()).available == parse_roubles("0.5")
    await assert_invariants_hold(database)


async def test_settling_is_idempotent_and_one_item_never_affects_another(database: Database) -> None:
    client, other = await make_client(database, "100"), await make_client(database, "100")
    first, second = await hold(database, client, "5"), await hold(database, other, "5")
    unknown = Hold(other.account_id, new_id(), Nano(1), Nano(1), 1)
    ledger = ledger_of(database)
    batch = [settlement(first, "0.01"), settlement(first, "0.01"), settlement(unknown, "0.01"), settlement(second, "0.02")]
    rows = await ledger._settle_and_hold_batch(batch)
    assert [row["outcome"] for row in rows] == ["settled", "settled", "no_hold", "settled"]
    rows = await ledger._settle_and_hold_batch(batch[:2])
    assert [row["outcome"] for row in rows] == ["already_settled", "already_settled"]
    await asyncio.gather(ledger.release(release(first)), ledger.release(release(second)))  # too late: nothing changes
    assert (await client.balance(), await other.balance()) == (Decimal("99.1"), Decimal("98.2"))
    await assert_invariants_hold(database)


async def test_a_settlement_races_with_itself_and_books_once(database: Database) -> None:
    client = await make_client(database, "100")
    held = await hold(database, client, "5")
    outcomes = await asyncio.gather(*(ledger_of(database).settle(settlement(held, "0.01")) for _ in range(16)))
    assert sorted(outcomes) == ["already_settled"] * 15 + ["settled"]
    assert await client.balance() == Decimal("99.1")
    await assert_invariants_hold(database)


async def test_a_release_charges_nothing_and_late_evidence_still_charges_once(database: Database) -> None:
    client = await make_client(database, "100")
    held = await hold(database, client, "5")
    ledger = ledger_of(database)
    await asyncio.gather(*(ledger.release(release(held)) for _ in range(4)))
    assert (await client.balance(), await client.held()) == (100, 0)
    assert await ledger.settle(settlement(held, "0.01")) == "settled_late"
    assert await ledger.settle(settlement(held, "0.01")) == "already_settled"
    assert (await client.balance(), await client.held()) == (Decimal("99.1"), 0)
    await assert_invariants_hold(database)


async def test_a_hold_ends_after_it_begins_even_if_the_clock_of_the_server_is_set_back(
    database: Database, database_url: str
) -> None:
    """Row db-12: the clock steps back by an hour while two requests run, one settled and one released."""
    client = await make_client(database, "100")
    settled, released = [await hold(database, client, "5") for _ in range(2)]
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE holds SET created_at = created_at + interval '1 hour'")
    ledger = ledger_of(database)
    await ledger.settle(settlement(settled, "0.01"))
    await ledger.release(release(released))
    assert await connection.fetchval("SELECT every(closed_at = created_at) FROM holds")
    await connection.close()
    await assert_invariants_hold(database)


async def test_a_cost_above_the_hold_is_charged_in_full(database: Database) -> None:
    client = await make_client(database, "2")
    held = await hold(database, client, "2")
    await ledger_of(database).settle(settlement(held, "0.1"))
    assert await client.balance() == -7
    with pytest.raises(InsufficientFunds):
        await hold(database, client, "0.01")
    await assert_invariants_hold(database)


async def test_a_free_request_is_an_entry_of_nothing(database: Database) -> None:
    client = await make_client(database, "2")
    await ledger_of(database).settle(settlement(await hold(database, client, "0", "1"), "0"))
    assert roubles((await Bookings(database).entries(client.account_id, 1))[0].amount) == "0"
    await assert_invariants_hold(database)


async def test_unknown_revoked_foreign_and_inactive_keys_cannot_be_told_apart(database: Database) -> None:
    client, other = await make_client(database, "100"), await make_client(database, "100")
    users = UserRepository(database)
    own = claim(client)
    ceiling = Ceiling(hold_max=Nano(1), available_min=Nano(1))

    async def rejected(wrong: KeyClaim) -> None:
        with pytest.raises(UnknownKey):
            await ledger_of(database).hold_funds(HoldRequest(wrong, new_id(), ceiling, "m", "r"))

    await rejected(KeyClaim(AccountId(10**12), own.key_hash))
    await rejected(KeyClaim(other.account_id, own.key_hash))
    unknown = parse_key(make_key(client.account_id))
    assert unknown is not None
    await rejected(unknown)

    keys = KeyRing(database, VAULT)
    new_key = await keys.renew(client.account_id)
    await rejected(own)
    assert not await keys.is_alive(own)
    client.key = new_key
    assert await keys.is_alive(claim(client))
    await users.set_active(client.account_id, False)
    await rejected(claim(client))
    await users.set_active(client.account_id, True)
    await hold(database, client, "1")
    assert [key.revoked_at is None for key in await keys.list(client.account_id)] == [True, False]


async def test_a_payment_is_booked_once_under_its_reference(database: Database) -> None:
    client = await make_client(database, "0")
    ledger = Bookings(database)
    results = await asyncio.gather(
        *(ledger.book(client.account_id, "topup", parse_roubles("50"), reference="pay-1") for _ in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, AlreadyBooked) for result in results) == 7
    assert await client.balance() == 50
    await ledger.book(client.account_id, "adjustment", parse_roubles("-20"), reason="a mistake of ours")
    assert await client.balance() == 30
    with pytest.raises(NoSuchUser):
        await ledger.book(AccountId(10**12), "topup", Nano(1))
    await assert_invariants_hold(database)


@pytest.mark.parametrize(
    ("kind", "amount", "constraint"),
    [
        ("topup", -1, "topups_and_bonuses_give"),
        ("bonus", 0, "topups_and_bonuses_give"),
        ("adjustment", 10**18 + 1, "amount_is_bounded"),
    ],
)
async def test_the_database_rejects_a_booking_that_makes_no_sense(
    database: Database, kind: str, amount: int, constraint: str
) -> None:
    client = await make_client(database, "0")
    with pytest.raises(ConstraintViolated, match=constraint):
        await Bookings(database).book(client.account_id, kind, Nano(amount))  # type: ignore[arg-type]
    assert await client.balance() == 0


async def test_the_ledger_is_append_only_for_everyone(database_url: str, database: Database) -> None:
    await make_client(database, "10")
    connection = await asyncpg.connect(database_url)
    for statement in ("UPDATE ledger SET amount_nano = 1", "DELETE FROM ledger", "TRUNCATE ledger"):
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await connection.execute(statement)
    await connection.close()


async def test_ids_are_unique_and_ordered_by_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
    early = new_id()
    await asyncio.sleep(0.002)
    assert early < new_id()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 60)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 90)),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("topup"), st.integers(1, 50)),
    ),
    max_size=25,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_any_history_agrees_with_a_model(database_url: str, history: list[tuple[str, int, int]]) -> None:
    asyncio.run(_play(database_url, history))


async def _play(url: str, history: list[tuple[str, int, int]]) -> None:
    async with pool.open_database(url) as database:
        client, ledger = await make_client(database, "100"), ledger_of(database)
        balance, open_holds, holds, closed = Decimal(100), dict[HoldId, Decimal](), list[Hold](), set[HoldId]()
        for kind, *numbers in history:
            if kind == "hold":
                try:
                    holds.append(await hold(database, client, str(numbers[0]), ledger=ledger))
                    granted = True
                except InsufficientFunds:
                    granted = False
                assert granted == (balance - sum(open_holds.values()) >= numbers[0])
                if granted:
                    open_holds[holds[-1].hold_id] = Decimal(numbers[0])
            elif kind == "topup":
                await Bookings(database).book(client.account_id, "topup", parse_roubles(str(numbers[0])))
                balance += numbers[0]
            elif numbers[0] < len(holds):
                which = holds[numbers[0]]
                if kind == "release":
                    await ledger.release(release(which))
                else:
                    cost = Decimal(numbers[1]) / 100
                    outcome = await ledger.settle(settlement(which, str(cost)))
                    assert (outcome == "already_settled") == (which.hold_id in closed)
                    if which.hold_id not in closed:
                        balance -= cost * RATE
                    closed.add(which.hold_id)
                open_holds.pop(which.hold_id, None)
            assert (await client.balance(), await client.held()) == (balance, sum(open_holds.values()))
        await assert_invariants_hold(database)


async def test_two_under_one_idempotency_key_in_one_batch_are_one(database: Database) -> None:
    client = await make_client(database, "100")
    ledger, ceiling = ledger_of(database), Ceiling(hold_max=parse_roubles("5"), available_min=parse_roubles("5"))

    def hold_request(request_id: str, body: bytes) -> HoldRequest:
        return HoldRequest(claim(client), new_id(), ceiling, "a/b", request_id, "once", hashlib.sha256(body).digest())

    first, again, other = await asyncio.gather(
        *(ledger.hold_funds(hold_request(name, body)) for name, body in (("r-1", b"a"), ("r-2", b"a"), ("r-3", b"b"))),
        return_exceptions=True,
    )
    assert isinstance(first, Hold)
    assert isinstance(again, RepeatedRequest)
    assert isinstance(other, RepeatedRequest)
    assert (again.request_id, again.same_body, other.request_id, other.same_body) == ("r-1", True, "r-1", False)
    assert await client.held() == 5
    await assert_invariants_hold(database)


async def pages_read(connection: asyncpg.Connection, client: Client, times: int) -> float:
    """Pages read by the settlement of one request and the hold of the next, nine kopecks each: the median of the last nine, because
    now and then a statement also prunes or splits a page."""
    of, pages = claim(client), []
    hold_id = new_id()
    for number in range(times + 1):
        charges: tuple[list[object], ...] = (
            [of.account_id],
            [hold_id],
            [9 * 10**7],
            [Decimal("0.001")],
            [f"gen-{hold_id}"],
            [1],
            [1],
            ["response"],
        )
        if number == 0:
            charges = ([],) * 8
        hold_id = new_id()
        holds = ([of.account_id], [of.key_hash], [hold_id], *[[10**8]] * 3, ["a/b"], [f"r-{hold_id}"], [None], [None])
        explained = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {STATEMENTS['settle_and_hold']}"
        (plan,) = json.loads(await connection.fetchval(explained, False, *charges, uuid.uuid4(), 60.0, RATE, 0, 0, *holds))
        pages.append(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])
    return float(statistics.median(pages[-9:]))


async def test_a_long_history_makes_the_next_request_of_an_account_no_slower(
    new_tables: None, database: Database, database_url: str
) -> None:
    """Although planned on a nearly empty table, the statements use the indexes, and read no more pages when the table has grown."""
    client = await make_client(database, "1000")
    connection = await asyncpg.connect(database_url)
    await connection.execute("ANALYZE")
    early = await pages_read(connection, client, 10)
    late = await pages_read(connection, client, 1000)
    await connection.close()
    await assert_invariants_hold(database)
    assert late < 1.5 * early, (early, late)
