"""What one key may do, and one account at once: caps, pace, end, revocation (contract C2, D6; rows money-1, money-2, auth-5, auth-14).
The hold statement itself keeps the limits, so they hold over processes; here two connection pools, or two gateways, are the processes."""

import asyncio
import datetime
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptutor.database import pool
from gptutor.database.pool import Database
from gptutor.http.app_keys import CONFIG
from gptutor.money.amounts import Nano, parse_roubles, roubles
from gptutor.money.holds import (
    ConcurrencyLimitReached,
    HandOver,
    Hold,
    HoldRequest,
    InsufficientFunds,
    KeyLimitReached,
    RateLimited,
    Release,
    UnknownKey,
    new_id,
)
from gptutor.money.journal import Journal
from gptutor.money.key_limits import InvalidLimit, KeyLimitChanges, changed_limits
from gptutor.money.keyring import Key, KeyLimits, KeyRing, LimitReset, NoSuchKey
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Ceiling
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import VAULT, Client, Gateway, config_for, gateway_on, make_client
from tests.support.ledger import assert_invariants_hold, claim, hold, ledger_of, release, settlement

SMALL = "openai/gpt-4o-mini"
DEAR: dict[str, Any] = {"model": SMALL, "max_tokens": 16_384}
"""Held for with about 0.973 roubles, or the minimum of one: 16 384 tokens × 0.0000006 dollars × 90 roubles × 1.1."""


@dataclass
class Limited(Client):
    """A client with a key that has limits, beside the main key of a rich account."""

    key_id: int = 0

    async def row(self) -> Key:
        keys = await KeyRing(self.database, VAULT).list(self.account_id)
        return next(key for key in keys if key.key_id == self.key_id)

    async def counted(self) -> tuple[Decimal, Decimal]:
        """Spent and held under the cap, in roubles."""
        key = await self.row()
        return Decimal(roubles(key.spent)), Decimal(roubles(key.held))

    async def limit(self, limit: str | None, reset: LimitReset | None = None, **others: Any) -> None:
        limits = KeyLimits(limit=None if limit is None else parse_roubles(limit), limit_reset=reset, **others)
        await KeyRing(self.database, VAULT).limit(self.account_id, self.key_id, limits)


async def limited(owner: Client, limit: str | None = None, reset: LimitReset | None = None, **others: Any) -> Limited:
    limits = KeyLimits(limit=None if limit is None else parse_roubles(limit), limit_reset=reset, **others)
    key, made = await KeyRing(owner.database, VAULT).issue(owner.account_id, "bot", limits)
    assert not made.is_main
    return Limited(key, owner.account_id, owner.database, made.key_id)


@pytest.fixture
async def owner(database: Database) -> Client:
    return await make_client(database, "1000")


@pytest.fixture
async def other_books(database_url: str) -> AsyncIterator[Database]:
    """The database, as another process reaches it."""
    async with pool.open_database(database_url, connections_max=4) as connected:
        yield connected


@pytest.fixture
async def raw(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def open_requests(raw: asyncpg.Connection, client: Client) -> int:
    return int(await raw.fetchval("SELECT open_requests FROM accounts WHERE account_id = $1", client.account_id))


async def same_minute() -> None:
    """Waits for the next minute if this one is nearly over: PostgreSQL counts by the clock."""
    left_s = 60 - datetime.datetime.now(datetime.UTC).timestamp() % 60
    if left_s < 5:
        await asyncio.sleep(left_s + 0.1)


# -- caps


@pytest.mark.parametrize("reset", ["daily", None])
async def test_twenty_at_once_on_a_cap_for_three_hold_exactly_three(
    owner: Client, database: Database, other_books: Database, reset: LimitReset | None
) -> None:
    bot = await limited(owner, "3.5", reset)
    ledgers = [ledger_of(database), ledger_of(database), ledger_of(other_books), ledger_of(other_books)]
    results = await asyncio.gather(
        *(hold(database, bot, "1", ledger=ledgers[number % 4]) for number in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Hold) for result in results) == 3
    assert sum(isinstance(result, KeyLimitReached) for result in results) == 17
    assert await bot.counted() == (0, 3)
    assert await owner.held() == 3
    await hold(database, owner, "500")  # another key of the account is free of it
    await assert_invariants_hold(database)


async def test_a_hold_takes_a_share_of_what_is_left_of_the_cap(owner: Client, database: Database) -> None:
    bot = await limited(owner, "10")
    held = await hold(database, bot, hold_max="30", available_min="2")
    assert (roubles(held.amount), roubles(held.available_before)) == ("3", "10")  # 2 + (10 - 2) / 8
    await hold(database, bot, "7")
    with pytest.raises(KeyLimitReached):
        await hold(database, bot, hold_max="1", available_min="0.000000001")


async def test_a_cap_above_the_balance_lends_nothing(database: Database) -> None:
    bot = await limited(await make_client(database, "5"), "1000")
    held = await hold(database, bot, hold_max="30", available_min="1")
    assert (roubles(held.amount), roubles(held.available_before)) == ("1.5", "5")  # 1 + (5 - 1) / 8
    with pytest.raises(InsufficientFunds):
        await hold(database, bot, "4")


async def test_a_cap_of_nothing_is_a_cap(owner: Client, database: Database) -> None:
    bot = await limited(owner, "0")
    with pytest.raises(KeyLimitReached):
        await hold(database, bot, "0.000000001")


async def test_the_end_of_a_hold_leaves_exactly_what_was_spent(owner: Client, database: Database) -> None:
    bot, ledger = await limited(owner, "100"), ledger_of(database)
    settled, released, handed, given_up, dear = [await hold(database, bot, "5") for _ in range(5)]
    assert await bot.counted() == (0, 25)
    await ledger.settle(settlement(settled, "0.01"))
    assert await bot.counted() == (Decimal("0.9"), 20)
    await ledger.release(release(released))
    assert await bot.counted() == (Decimal("0.9"), 15)
    await ledger.hand_over(HandOver(handed.account_id, handed.hold_id, "gen-1"))
    assert await bot.counted() == (Decimal("0.9"), 15)  # it may have bought something
    await ledger.settle(settlement(handed, "0.02"))
    assert await bot.counted() == (Decimal("2.7"), 10)
    await ledger.release(Release(given_up.account_id, given_up.hold_id, unresolved=True))
    assert await bot.counted() == (Decimal("2.7"), 5)
    assert await ledger.settle(settlement(given_up, "0.03")) == "settled_late"
    assert await bot.counted() == (Decimal("5.4"), 5)
    await ledger.settle(settlement(dear, "2"))  # 180 roubles for a hold of 5: charged in full, and the cap is passed by that
    assert await bot.counted() == (Decimal("185.4"), 0)
    for again in (settled, released, handed, given_up, dear):
        await ledger.settle(settlement(again, "0.01")) if again is not released else await ledger.release(release(again))
    assert await bot.counted() == (Decimal("185.4"), 0)
    with pytest.raises(KeyLimitReached):
        await hold(database, bot, "0.01")
    await assert_invariants_hold(database)


async def test_a_daily_cap_is_whole_again_on_the_next_day(owner: Client, database: Database, raw: asyncpg.Connection) -> None:
    daily, total = await limited(owner, "10", "daily"), await limited(owner, "10")
    ledger = ledger_of(database)
    overnight = await hold(database, daily, "2")
    for bot in (daily, total):
        await ledger.settle(settlement(await hold(database, bot, "8"), "0.08"))  # 7.2 roubles
    with pytest.raises(KeyLimitReached):
        await hold(database, daily, "1")
    await raw.execute("UPDATE api_keys SET spent_on = spent_on - 1 WHERE spent_nano > 0")
    assert await daily.counted() == (0, 2)
    assert await total.counted() == (Decimal("7.2"), 0)
    with pytest.raises(KeyLimitReached):
        await hold(database, total, "8")
    today = await hold(database, daily, "8")  # what was held overnight still counts
    with pytest.raises(KeyLimitReached):
        await hold(database, daily, "0.1")
    await ledger.settle(settlement(overnight, "0.01"))  # charged today, so spent today
    assert await daily.counted() == (Decimal("0.9"), 8)
    await ledger.release(release(today))
    await assert_invariants_hold(database)


async def test_a_cap_lifted_and_set_again_counts_from_then_on(owner: Client, database: Database) -> None:
    bot, ledger = await limited(owner, "10"), ledger_of(database)
    await ledger.settle(settlement(await hold(database, bot, "5"), "0.05"))
    before = [await hold(database, bot, "1") for _ in range(3)]
    await bot.limit("20")  # another amount: the count goes on
    assert await bot.counted() == (Decimal("4.5"), 3)

    await bot.limit(None)
    assert await bot.counted() == (0, 0)
    await assert_invariants_hold(database)
    free = await hold(database, bot, "500")
    await bot.limit("4")
    assert await bot.counted() == (0, 0)
    await ledger.settle(settlement(before[0], "0.01"))
    await ledger.release(release(before[1]))
    await ledger.settle(settlement(before[1], "0.01"))
    await ledger.settle(settlement(free, "0.01"))
    assert await bot.counted() == (0, 0)
    held = await hold(database, bot, "3")
    await bot.limit("4", "daily")  # another period: counted from zero
    assert await bot.counted() == (0, 0)
    await ledger.settle(settlement(held, "0.01"))
    await ledger.settle(settlement(before[2], "0.01"))
    assert await bot.counted() == (0, 0)
    await hold(database, bot, "4")
    await assert_invariants_hold(database)


async def test_a_cap_below_what_is_spent_stops_the_key(owner: Client, database: Database) -> None:
    bot, ledger = await limited(owner, "10"), ledger_of(database)
    await ledger.settle(settlement(await hold(database, bot, "5"), "0.05"))
    running = await hold(database, bot, "5")
    await bot.limit("1")
    with pytest.raises(KeyLimitReached):
        await hold(database, bot, "0.000000001")
    await ledger.settle(settlement(running, "0.05"))
    assert await bot.counted() == (9, 0)
    await assert_invariants_hold(database)


async def test_limits_change_only_on_a_living_key_of_the_account(owner: Client, database: Database) -> None:
    bot, other = await limited(owner, "10"), await make_client(database, "10")
    await hold(database, bot, "5")
    keys = KeyRing(database, VAULT)
    with pytest.raises(NoSuchKey):
        await keys.limit(other.account_id, bot.key_id, KeyLimits())
    with pytest.raises(NoSuchKey):
        await keys.revoke(other.account_id, bot.key_id)
    await keys.revoke(bot.account_id, bot.key_id)
    for change in (keys.limit(bot.account_id, bot.key_id, KeyLimits()), keys.revoke(bot.account_id, bot.key_id)):
        with pytest.raises(NoSuchKey):
            await change
    assert await bot.counted() == (0, 5)
    await assert_invariants_hold(database)


@dataclass
class Model:
    """A key and its account, as a few numbers. `open` are the holds: amount, and whether it counts under the cap."""

    balance: Decimal = Decimal(50)
    limit: Decimal | None = Decimal(20)
    reset: LimitReset | None = None
    spent: Decimal = Decimal(0)
    open: dict[Any, tuple[Decimal, bool]] = field(default_factory=dict)
    released: dict[Any, bool] = field(default_factory=dict)

    @property
    def held(self) -> Decimal:
        return sum((amount for amount, counts in self.open.values() if counts), Decimal(0))

    def change(self, limit: Decimal | None, reset: LimitReset | None) -> None:
        if (limit is None, reset) != (self.limit is None, self.reset):
            self.spent = Decimal(0)
            self.open = {which: (amount, False) for which, (amount, _) in self.open.items()}
            self.released = dict.fromkeys(self.released, False)
        self.limit, self.reset = limit, reset


steps = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 15)),
        st.tuples(st.just("settle"), st.integers(0, 6), st.integers(0, 20)),
        st.tuples(st.just("release"), st.integers(0, 6)),
        st.tuples(st.just("hand over"), st.integers(0, 6)),
        st.tuples(st.just("limit"), st.sampled_from(["lifted", "daily", None]), st.integers(0, 30)),
    ),
    max_size=25,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_any_history_of_a_key_agrees_with_a_model_of_it(database_url: str, history: list[tuple[Any, ...]]) -> None:
    asyncio.run(_play(database_url, history))


async def _play(url: str, history: list[tuple[Any, ...]]) -> None:
    async with pool.open_database(url) as database:
        bot, ledger, model = await limited(await make_client(database, "50"), "20"), ledger_of(database), Model()
        holds: list[Hold] = []
        for kind, *numbers in history:
            if kind == "hold":
                amount = Decimal(numbers[0])
                free = model.balance - sum(amount for amount, _ in model.open.values())
                room = free if model.limit is None else model.limit - model.spent - model.held
                refused: type[Exception] | None = None
                try:
                    holds.append(await hold(database, bot, str(amount), ledger=ledger))
                    model.open[holds[-1].hold_id] = (amount, model.limit is not None)
                except (KeyLimitReached, InsufficientFunds) as error:
                    refused = type(error)
                assert refused is (InsufficientFunds if free < amount else KeyLimitReached if room < amount else None)
            elif kind == "limit":
                limit = None if numbers[0] == "lifted" else Decimal(numbers[1])
                reset: LimitReset | None = "daily" if numbers[0] == "daily" else None
                model.change(limit, reset)
                await bot.limit(None if limit is None else str(limit), reset)
            elif numbers[0] < len(holds):
                which = holds[numbers[0]]
                if kind == "settle":
                    cost = Decimal(numbers[1]) / 100
                    if await ledger.settle(settlement(which, str(cost))) != "already_settled":
                        _, counts = model.open.pop(which.hold_id, (0, False))
                        counts = model.released.pop(which.hold_id, counts)
                        model.balance -= cost * 90
                        model.spent += cost * 90 if counts else 0
                elif kind == "hand over":
                    await ledger.hand_over(HandOver(which.account_id, which.hold_id, None))
                else:
                    await ledger.release(Release(which.account_id, which.hold_id, unresolved=True))
                    if which.hold_id in model.open:
                        model.released[which.hold_id] = model.open.pop(which.hold_id)[1]
            assert await bot.counted() == (model.spent, model.held)
        await assert_invariants_hold(database)


# -- pace, end, revocation


async def test_a_key_has_its_own_pace_however_many_ask(owner: Client, database: Database, other_books: Database) -> None:
    await same_minute()
    bot, ledgers = await limited(owner, requests_per_minute=3), [ledger_of(database), ledger_of(other_books)]
    results = await asyncio.gather(
        *(hold(database, bot, "1", ledger=ledgers[number % 2]) for number in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Hold) for result in results) == 3
    assert sum(isinstance(result, RateLimited) for result in results) == 17
    await hold(database, owner, "1")
    await bot.limit(None, requests_per_minute=None)
    await hold(database, bot, "1")
    await assert_invariants_hold(database)


async def test_a_key_is_slow_again_in_every_minute(owner: Client, database: Database, raw: asyncpg.Connection) -> None:
    await same_minute()
    bot = await limited(owner, "100", requests_per_minute=1)
    await hold(database, bot, "1")
    with pytest.raises(RateLimited):
        await hold(database, bot, "1")
    await raw.execute("UPDATE api_keys SET minute = minute - interval '1 minute' WHERE key_id = $1", bot.key_id)
    await hold(database, bot, "1")
    with pytest.raises(RateLimited):
        await hold(database, bot, "1")
    assert await bot.counted() == (0, 2)


async def test_a_key_ends_at_its_time(owner: Client, database: Database) -> None:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    bot, keys = await limited(owner, expires_at=end), KeyRing(database, VAULT)
    await hold(database, bot, "1")
    assert await keys.is_alive(claim(bot))
    await asyncio.sleep(1.1)
    with pytest.raises(UnknownKey):
        await hold(database, bot, "1")
    assert not await keys.is_alive(claim(bot))
    await bot.limit(None)
    await hold(database, bot, "1")


# -- requests at once


def ledger_for(database: Database, directory: Path, at_once: int) -> Ledger:
    directory.mkdir()
    journal = Journal(directory, 1 << 20, 1 << 30)
    return Ledger(database, journal, rub_per_usd=Decimal(90), hold_ttl_s=60, chat_concurrent_max=at_once)


async def test_no_account_has_more_requests_at_once_than_it_may(
    owner: Client, database: Database, other_books: Database, raw: asyncpg.Connection, tmp_path: Path
) -> None:
    first, second = ledger_for(database, tmp_path / "a", 5), ledger_for(other_books, tmp_path / "b", 5)
    bot = await limited(owner, "100")

    async def place(number: int) -> Hold:
        ceiling = Ceiling(hold_max=parse_roubles("1"), available_min=parse_roubles("1"))
        whose = claim(bot if number % 3 else owner)
        return await (first, second)[number % 2].hold_funds(HoldRequest(whose, new_id(), ceiling, "a/b", "r"))

    async def fill(expected: int) -> list[Hold]:
        results = await asyncio.gather(*(place(number) for number in range(20)), return_exceptions=True)
        assert sum(isinstance(result, ConcurrencyLimitReached) for result in results) == 20 - expected
        assert await open_requests(raw, owner) == 5
        await assert_invariants_hold(database)
        return [result for result in results if isinstance(result, Hold)]

    running = await fill(5)
    await first.settle(settlement(running[0], "0.001"))
    await second.release(release(running[1]))
    await first.hand_over(HandOver(running[2].account_id, running[2].hold_id, "gen-1"))
    assert await open_requests(raw, owner) == 2
    for _ in range(2):  # closed again, or late: counted once
        await first.settle(settlement(running[0], "0.001"))
        await second.settle(settlement(running[1], "0.001"))
        await first.hand_over(HandOver(running[2].account_id, running[2].hold_id, "gen-1"))
        await first.settle(settlement(running[2], "0.001"))
    assert await open_requests(raw, owner) == 2
    await fill(3)


@pytest.mark.parametrize("tuned", [{"rate_limit": {"chat_concurrent_max": 3}}])
async def test_too_many_concurrent_requests_are_told_so_and_places_are_freed(gateway: Gateway, raw: asyncpg.Connection) -> None:
    client = await gateway.client()
    gateway.simulator.first_word_s = 0.5
    replies = await asyncio.gather(*(gateway.chat(client) for _ in range(20)))
    refused = [response for response, _ in replies if response.status != 200]
    assert len(refused) == 17
    for response in refused:
        assert (response.status, response.headers["X-Error-Code"], response.headers["Retry-After"]) == (
            429,
            "too_many_concurrent_requests",
            "1",
        )
    gateway.simulator.first_word_s = 0
    for text in ("fault:status=400", "fault:reset=0", "fault:cut=1", "fault:empty", "Hello"):
        await gateway.chat(client, text)
    assert await open_requests(raw, client) == 0
    await assert_charges_match_bills(gateway, client)


async def test_the_places_of_a_dead_process_are_freed_by_recovery(
    gateway: Gateway, raw: asyncpg.Connection, tmp_path: Path
) -> None:
    client = await gateway.client()
    bot = await limited(client, "50")
    dead = ledger_for(gateway.database, tmp_path / "dead", 3)  # a journal that nobody has open: its process is no more
    running = [await hold(gateway.database, bot, "1", ledger=dead) for _ in range(3)]
    with pytest.raises(ConcurrencyLimitReached):
        await hold(gateway.database, bot, "1", ledger=dead)
    assert await open_requests(raw, client) == 3
    await raw.execute(
        "UPDATE holds SET due_at = now() - interval '1 second', created_at = now() - interval '2 days' WHERE hold_id = ANY($1)",
        [one.hold_id for one in running],
    )
    await gateway.recovered(client)  # a day has passed without evidence
    assert await open_requests(raw, client) == 0
    assert await bot.counted() == (0, 0)
    await assert_invariants_hold(gateway.database)


# -- over HTTP, and over processes


@pytest.fixture
async def other(gateway: Gateway, database_url: str, tmp_path: Path, tuned: dict[str, Any]) -> AsyncIterator[Gateway]:
    """Another gateway on the same database."""
    config = config_for(database_url, gateway.app[CONFIG].openrouter.base_url, tmp_path / "other", tuned)
    async with gateway_on(config, gateway.database, gateway.simulator) as running:
        yield running
        await running.idle()


async def test_two_gateways_together_never_overspend_a_cap(gateway: Gateway, other: Gateway) -> None:
    """Row money-1, for a key: at least a rouble must be left of the cap for each request, so four roubles are for three or four."""
    gateway.simulator.first_word_s = 0.3
    client = await gateway.client("1000")
    bot = await limited(client, "3.5")
    replies = await asyncio.gather(*((gateway, other)[number % 2].chat(bot, **DEAR) for number in range(20)))
    refused = [response for response, _ in replies if response.status != 200]
    assert len(replies) - len(refused) == 3
    for response in refused:
        assert (response.status, response.headers["X-Error-Code"]) == (402, "key_limit_reached")
        assert response.headers["x-should-retry"] == "false"
    await other.idle()
    spent, held = await bot.counted()
    assert (spent, held) == (gateway.billed_usd() * 90, 0)
    await assert_charges_match_bills(gateway, client, "1000")


async def test_what_the_cap_leaves_is_sent_as_max_tokens(gateway: Gateway) -> None:
    """A share of a day's rest is below the whole answer: the balance would cover it all, the cap does not."""
    client = await gateway.client("100000")
    bot = await limited(client, "3", "daily")
    for who in (client, bot):
        response, _ = await gateway.chat(who, model="anthropic/claude-sonnet-4.5")
        assert response.status == 200
    free, narrow = (json.loads(record.body) for record in gateway.simulator.billing.records.values())
    assert "max_tokens" not in free
    assert 160 < narrow["max_tokens"] < 3 / 8 / 90 / 0.0000225 + 50  # its price for a long prompt, and the smallest hold
    await assert_charges_match_bills(gateway, client, "100000")


async def test_limits_and_revocations_are_seen_at_once_by_every_process(gateway: Gateway, other: Gateway) -> None:
    """Contract D6; rows auth-5, auth-8."""
    client = await gateway.client()
    bot = await limited(client)
    assert (await other.chat(bot))[0].status == 200
    url = f"{gateway.url}/v1/keys/{bot.key_id}"
    async with gateway.session.patch(url, json={"limit": 1}, headers=client.headers) as response:
        assert response.status == 200
    assert (await other.chat(bot))[0].status == 200
    await other.idle()
    assert (await other.chat(bot))[0].headers["X-Error-Code"] == "key_limit_reached"
    async with gateway.session.patch(url, json={"limit": None}, headers=client.headers) as response:
        assert response.status == 200
    assert (await other.chat(bot))[0].status == 200
    async with gateway.session.delete(url, headers=client.headers) as response:
        assert (response.status, await response.json()) == (200, {"deleted": True})
    assert (await other.chat(bot))[0].headers["X-Error-Code"] == "invalid_key"
    assert (await other.chat(client))[0].status == 200


async def test_a_key_revoked_in_mid_stream_pays_for_the_whole_answer(gateway: Gateway) -> None:
    """Row auth-14."""
    gateway.simulator.word_s = 0.05
    client = await gateway.client()
    bot = await limited(client, "50")
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with gateway.session.post(gateway.chat_url, json=body, headers=bot.headers) as response:
        first = await response.content.readany()
        await KeyRing(gateway.database, VAULT).revoke(bot.account_id, bot.key_id)
        rest = await response.content.read()
    assert (first + rest).endswith(b"data: [DONE]\n\n")
    await gateway.idle()
    assert (await gateway.chat(bot))[0].status == 401
    assert await bot.counted() == (gateway.billed_usd() * 90, 0)
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


async def test_two_changes_of_one_key_at_once_are_both_made(database: Database) -> None:
    client = await make_client(database, "100")
    keys = KeyRing(database, VAULT)
    _, key = await keys.issue(client.account_id, "bot", KeyLimits(), beside=True)
    for number in range(1, 15):
        await keys.limit(client.account_id, key.key_id, KeyLimits())
        await asyncio.gather(
            keys.change(client.account_id, key.key_id, lambda seen: replace(seen, limit=Nano(5))),
            keys.change(client.account_id, key.key_id, lambda seen, pace=number: replace(seen, requests_per_minute=pace)),  # type: ignore[misc]
        )
        after = (await keys.find(client.account_id, key.key_id)).limits
        assert (after.limit, after.requests_per_minute) == (5, number)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute must be from 1 to "),
        ({"limit_reset": "daily"}, "limit_reset needs a limit"),
        ({"limit": Nano(999_999_999)}, "limit must be from 1, which each request needs, to "),
    ],
)
def test_limits_that_no_key_can_have_are_rejected(changes: KeyLimitChanges, text: str) -> None:
    with pytest.raises(InvalidLimit, match=text):
        changed_limits(KeyLimits(), changes, parse_roubles("1"))
