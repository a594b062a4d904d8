"""What an account spent, to the last digit (contract D5, C9): credits, entries, totals, one request; on a real PostgreSQL."""

import asyncio
import datetime
import itertools
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import asyncpg
import pytest
from aiohttp import web

from gptutor.database.pool import Database
from gptutor.http.query import encode_cursor
from gptutor.integrations.vk import signature
from gptutor.money.amounts import AccountId, Nano, roubles
from gptutor.money.holds import Hold, HoldRequest, Release, Settlement, new_id
from gptutor.money.pricing import Ceiling, Charge, charge_amount
from gptutor.money.usage import Usage
from gptutor.money.users import NoSuchUser
from tests.support.gateway import Client, Gateway, make_client
from tests.support.ledger import RATE, assert_invariants_hold, claim, hold, ledger_of, release, settlement
from tests.support.recovery import journals_in, mortal, process

MODELS = ("google/gemini-2.5-flash-lite", "openai/gpt-4o-mini", "anthropic/claude-3-haiku")
PATHS = ("/v1/credits", "/v1/usage", "/v1/usage/totals", "/v1/generation?id=x")
NOON = datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)
MIDNIGHT = datetime.datetime(2026, 3, 11, tzinfo=datetime.UTC)
TICK = datetime.timedelta(microseconds=1)

BOOK = """
WITH held AS (
    INSERT INTO holds (account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, state, charge_nano, cost_usd,
        created_at, closed_at, key_id)
    VALUES ($1, $2, $2, $3, 90, $4, 'r', now(), 'settled', $3, $5, $6, $6, 0)
), entry AS (
    INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, model, cost_usd, rub_per_usd, created_at)
    VALUES ($1, $2, 'charge', -$3::bigint, 'revenue', $4, $5, 90, $6)
)
UPDATE accounts SET balance_nano = balance_nano - $3, charge_count = charge_count + 1 WHERE account_id = $1
"""


async def get(gateway: Gateway, client: Client | None, path: str, **parameters: Any) -> tuple[int, Any]:
    """Status, and the answer decoded."""
    query = {name.rstrip("_"): str(value) for name, value in parameters.items()}
    headers = client.headers if client else {}
    async with gateway.session.get(gateway.url + path, params=query, headers=headers) as response:
        return response.status, await response.json()


async def data(gateway: Gateway, client: Client, path: str, **parameters: Any) -> Any:
    status, answer = await get(gateway, client, path, **parameters)
    assert status == 200, answer
    return answer["data"]


@pytest.fixture
async def past(database_url: str) -> AsyncIterator[Any]:
    """Books a charge of the past: account, cost in dollars, when, model."""
    connection = await asyncpg.connect(database_url, server_settings={"timezone": "Pacific/Auckland"})  # UTC's day is meant

    async def book(client: Client, cost: str, at: datetime.datetime, model: str = "a/b", entry: uuid.UUID | None = None) -> None:
        cost_usd = Decimal(cost)
        await connection.execute(BOOK, client.account_id, entry or new_id(), charge_amount(cost_usd, RATE), model, cost_usd, at)

    yield book
    await connection.close()


# -- exact


async def test_everything_agrees_with_openrouters_bills_to_the_last_digit(gateway: Gateway) -> None:
    client = await gateway.client("100")
    for number, model in enumerate([*MODELS, *MODELS[:2], MODELS[0]]):
        await gateway.chat(client, f"Tell me {number} stories", model=model, stream=number % 2 == 0)
    bills = gateway.simulator.billing.records
    spent = sum((charge_amount(bill.cost_usd, RATE) for bill in bills.values()), 0)
    assert len(bills) == 6
    assert spent > 0

    money = await data(gateway, client, "/v1/credits")
    assert money == {
        "balance": roubles(100 * 10**9 - spent),
        "held": "0",
        "available": roubles(100 * 10**9 - spent),
        "total_spent": roubles(spent),
        "currency": "RUB",
    }
    assert Decimal(money["balance"]) == await client.balance()

    *entries, topup = await data(gateway, client, "/v1/usage")
    assert (topup["kind"], topup["amount"], topup["cost_usd"], topup["request_id"]) == ("topup", "100", None, None)
    assert [entry["generation_id"] for entry in reversed(entries)] == list(bills)
    for entry in entries:
        bill = bills[entry["generation_id"]]
        assert Decimal(entry["cost_usd"]) == bill.cost_usd
        assert entry["amount"] == roubles(-charge_amount(bill.cost_usd, RATE))
        assert (entry["kind"], entry["model"], entry["rate"]) == ("charge", bill.model, "90")
        assert (entry["prompt_tokens"], entry["completion_tokens"]) == (bill.prompt_tokens, bill.completion_tokens)
        assert client.key.startswith(entry["key"])
        assert len(entry["key"]) < len(client.key) / 2
        one = await data(gateway, client, "/v1/generation", id=entry["generation_id"])
        assert one["id"] == entry["id"]
        assert one == await data(gateway, client, "/v1/generation", id=entry["request_id"])
        assert {**one, "charged": f"-{one['charged']}"}.items() >= {
            "state": "settled",
            "charged": entry["amount"],
            "held": "0",
        }.items()
        shared = one.keys() & entry.keys() - {"created_at"}
        assert {name: one[name] for name in shared} == {name: entry[name] for name in shared}

    (day,) = await data(gateway, client, "/v1/usage/totals")
    assert (day["requests"], day["amount"], Decimal(day["cost_usd"])) == (6, roubles(spent), gateway.billed_usd())
    assert day["prompt_tokens"] == sum(bill.prompt_tokens for bill in bills.values())
    assert day["completion_tokens"] == sum(bill.completion_tokens for bill in bills.values())
    models = await data(gateway, client, "/v1/usage/totals", by="model")
    assert {total["model"]: total["requests"] for total in models} == Counter(bill.model for bill in bills.values())
    assert sum(Decimal(total["amount"]) for total in models) == Decimal(roubles(spent))
    both = await data(gateway, client, "/v1/usage/totals", by="day,model")
    assert [{**total, "day": day["day"]} for total in models] == both
    await assert_invariants_hold(gateway.database)


async def test_no_digit_is_lost_where_a_double_would_lose_it(gateway: Gateway) -> None:
    client = await gateway.client("123456789.123456789")
    assert (await data(gateway, client, "/v1/credits"))["balance"] == "123456789.123456789"


async def test_a_running_request_is_held_and_not_spent(gateway: Gateway) -> None:
    client = await gateway.client("100")
    await hold(gateway.database, client, "30.5")
    money = await data(gateway, client, "/v1/credits")
    assert (money["balance"], money["held"], money["available"], money["total_spent"]) == ("100", "30.5", "69.5", "0")
    assert [entry["kind"] for entry in await data(gateway, client, "/v1/usage")] == ["topup"]


async def test_an_account_that_is_not_there_has_no_credits(database: Database) -> None:
    with pytest.raises(NoSuchUser):
        await Usage(database).credits(AccountId(10**9))


async def test_responses_are_not_cached(gateway: Gateway) -> None:
    client = await gateway.client()
    for path in PATHS[:3]:
        async with gateway.session.get(gateway.url + path, headers=client.headers) as response:
            assert (response.status, response.content_type) == (200, "application/json")
            assert response.headers["Cache-Control"] == "no-store"


# -- whose


@pytest.mark.parametrize("path", PATHS)
async def test_without_a_key_every_endpoint_is_401(gateway: Gateway, path: str) -> None:
    assert await get(gateway, None, path) == (401, {"error": "Invalid API key or inactive user"})


async def test_another_accounts_money_and_requests_are_not_shown(gateway: Gateway) -> None:
    client, other = await gateway.client("100"), await gateway.client("7")
    await gateway.chat(client)
    *_, cursor = [answer["next_cursor"] for _, answer in [await get(gateway, client, "/v1/usage", limit=1)]]
    (entry,) = await data(gateway, client, "/v1/usage", model=MODELS[0])

    unknown = await get(gateway, other, "/v1/generation", id="gen-nobody")
    assert unknown[0] == 404
    for name in (entry["request_id"], entry["generation_id"]):
        assert await get(gateway, other, "/v1/generation", id=name) == unknown
    assert (await get(gateway, other, "/v1/generation", id=entry["id"]))[0] == 404
    assert [own["amount"] for own in await data(gateway, other, "/v1/usage")] == ["7"]
    assert await data(gateway, other, "/v1/usage", model=entry["model"]) == []
    assert {own["kind"] for own in await data(gateway, other, "/v1/usage", cursor=cursor)} <= {"topup"}
    assert await data(gateway, other, "/v1/usage/totals") == []
    assert (await data(gateway, other, "/v1/credits"))["total_spent"] == "0"
    status, answer = await get(gateway, other, "/v1/credits", account_id=client.account_id)
    assert (status, answer["error"]) == (400, "'account_id' is not a parameter here; there are none")


# -- entries


async def test_pages_are_complete_and_repeat_nothing_while_new_entries_arrive(gateway: Gateway, past: Any) -> None:
    client = await gateway.client("100")
    for number in range(40):  # four of each moment: only their ids tell them apart
        await past(client, "0.001", NOON + number // 4 * datetime.timedelta(milliseconds=1))
    before = {entry["id"] for entry in await data(gateway, client, "/v1/usage")}
    assert len(before) == 41

    seen: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {"limit": 3}
    while True:
        _, answer = await get(gateway, client, "/v1/usage", **parameters)
        assert len(answer["data"]) == 3 or answer["next_cursor"] is None
        seen += answer["data"]
        if answer["next_cursor"] is None:
            break
        parameters["cursor"] = answer["next_cursor"]
        await past(client, "0.002", datetime.datetime.now(datetime.UTC))
    ids = [entry["id"] for entry in seen]
    assert len(ids) == len(set(ids))
    assert set(ids) == before
    assert [(entry["created_at"], entry["id"]) for entry in seen] == sorted(
        ((entry["created_at"], entry["id"]) for entry in seen), reverse=True
    )


async def test_a_full_last_page_has_no_next_cursor(gateway: Gateway, past: Any) -> None:
    client = await gateway.client("0")
    for number in range(4):
        await past(client, "0.001", NOON + number * TICK)
    _, first = await get(gateway, client, "/v1/usage", limit=2)
    _, last = await get(gateway, client, "/v1/usage", limit=2, cursor=first["next_cursor"])
    assert (len(first["data"]), len(last["data"]), last["next_cursor"]) == (2, 2, None)
    assert (await get(gateway, client, "/v1/usage", limit=4))[1]["next_cursor"] is None


async def test_entries_are_filtered_by_model_and_by_whole_utc_days(gateway: Gateway, past: Any) -> None:
    client = await gateway.client("0")
    await past(client, "0.001", MIDNIGHT - TICK, "a/early")
    await past(client, "0.002", MIDNIGHT, "a/late")
    await past(client, "0.003", MIDNIGHT + datetime.timedelta(days=1) - TICK, "a/late")

    async def costs(**parameters: str) -> list[str]:
        return [entry["cost_usd"] for entry in await data(gateway, client, "/v1/usage", **parameters)]

    assert await costs() == ["0.003", "0.002", "0.001"]
    assert await costs(from_="2026-03-11") == ["0.003", "0.002"]
    assert await costs(to="2026-03-10") == ["0.001"]
    assert await costs(from_="2026-03-11", to="2026-03-11") == ["0.003", "0.002"]
    assert await costs(from_="2026-03-12") == []
    assert await costs(model="a/late") == ["0.003", "0.002"]
    assert await costs(model="a/late", to="2026-03-10") == []
    assert await costs(model="a/l") == []
    _, page = await get(gateway, client, "/v1/usage", model="a/late", limit=1)
    assert await costs(model="a/late", cursor=page["next_cursor"]) == ["0.002"]
    assert await costs(cursor=page["next_cursor"], to="2026-03-10") == ["0.001"]
    (entry,) = await data(gateway, client, "/v1/usage", to="2026-03-10")
    assert entry["created_at"] == "2026-03-10T23:59:59.999Z"


# -- totals


async def test_a_day_is_a_utc_day(gateway: Gateway, past: Any) -> None:
    client = await gateway.client("100")
    await past(client, "0.001", MIDNIGHT - TICK)
    await past(client, "0.002", MIDNIGHT)
    await past(client, "0.003", MIDNIGHT + datetime.timedelta(days=1) - TICK)
    totals = await data(gateway, client, "/v1/usage/totals", from_="2026-03-01", to="2026-03-31")
    assert [(total["day"], total["requests"], total["cost_usd"], total["amount"]) for total in totals] == [
        ("2026-03-11", 2, "0.005", "0.45"),
        ("2026-03-10", 1, "0.001", "0.09"),
    ]
    assert await data(gateway, client, "/v1/usage/totals", from_="2026-03-10", to="2026-03-10") == totals[1:]
    await assert_invariants_hold(gateway.database)


async def test_totals_name_their_period(gateway: Gateway) -> None:
    client = await gateway.client("0")
    today = datetime.datetime.now(datetime.UTC).date()
    _, answer = await get(gateway, client, "/v1/usage/totals")
    assert answer == {"data": [], "from": str(today - datetime.timedelta(days=29)), "to": str(today), "by": "day"}
    _, answer = await get(gateway, client, "/v1/usage/totals", to="2026-01-30", by="model")
    assert answer == {"data": [], "from": "2026-01-01", "to": "2026-01-30", "by": "model"}


async def test_tokens_are_added_up_as_far_as_they_are_known(gateway: Gateway) -> None:
    client, ledger = await gateway.client("100"), ledger_of(gateway.database)

    async def settle(prompt: int | None, completion: int | None) -> None:
        held = await hold(gateway.database, client, "1", ledger=ledger)
        await ledger.settle(
            Settlement(client.account_id, held.hold_id, Charge(Nano(9), Decimal("0.0000000001"), prompt, completion), None)
        )

    async def tokens() -> list[tuple[int | None, int | None]]:
        totals = await data(gateway, client, "/v1/usage/totals")
        return [(total["prompt_tokens"], total["completion_tokens"]) for total in totals]

    for prompt, completion, known in [
        (None, None, (None, None)),
        (2**53 - 1, None, (2**53 - 1, None)),
        (None, 7, (2**53 - 1, 7)),
        (2**53 - 1, 0, (2**54 - 2, 7)),
    ]:
        await settle(prompt, completion)
        assert await tokens() == [known]
    assert [total["cost_usd"] for total in await data(gateway, client, "/v1/usage/totals")] == ["0.0000000004"]


async def test_what_recovery_and_late_evidence_settle_is_in_the_totals(gateway: Gateway, tmp_path: Path) -> None:
    client, database, directory = await gateway.client("100"), gateway.database, tmp_path / "dead"
    dead = mortal(database, directory)
    held = await hold(database, client, "5", ledger=dead)
    dead.journal.record_sent(held.account_id, held.hold_id)
    dead.journal.record_charge(held.hold_id, Charge(Nano(9 * 10**8), Decimal("0.01"), 15, 32), "gen-1")
    with process(database, directory) as heir:
        for abandoned in journals_in(directory):
            await heir.recovery.replay(abandoned)
    given_up = await hold(database, client, "5")
    await ledger_of(database).release(Release(client.account_id, given_up.hold_id, unresolved=True))
    assert await ledger_of(database).settle(settlement(given_up, "0.02")) == "settled_late"

    (total,) = await data(gateway, client, "/v1/usage/totals")
    assert (total["requests"], total["cost_usd"], total["amount"]) == (2, "0.03", "2.7")
    assert (total["prompt_tokens"], total["completion_tokens"]) == (15, 32)
    assert (await data(gateway, client, "/v1/credits"))["total_spent"] == "2.7"
    await assert_invariants_hold(database)


async def test_a_settlement_that_is_repeated_is_counted_once(gateway: Gateway) -> None:
    client, ledger = await gateway.client("100"), ledger_of(gateway.database)
    held = await hold(gateway.database, client, "5", ledger=ledger)
    batch = [settlement(held, "0.01")] * 2
    await ledger._settle_and_hold_batch(batch)
    await ledger._settle_and_hold_batch(batch)
    (total,) = await data(gateway, client, "/v1/usage/totals")
    assert (total["requests"], total["amount"]) == (1, "0.9")


async def test_many_settlements_at_once_lose_no_total_and_never_deadlock(database: Database) -> None:
    """Ten accounts, in every order, by several processes."""
    clients = [await make_client(database, "1000") for _ in range(10)]
    ledgers = [ledger_of(database) for _ in range(4)]
    batches = []
    for turn, ledger in itertools.product(range(5), ledgers):
        holds = [await hold(database, client, "1", ledger=ledger) for client in clients]
        batch = [settlement(held, "0.01") for held in holds]
        batches.append(ledger._settle_and_hold_batch(batch if turn % 2 else batch[::-1], wait_for_locks=True))
    for outcomes in await asyncio.gather(*batches):
        assert {row["outcome"] for row in outcomes} == {"settled"}
    async with database.snapshot() as connection:
        rows = await connection.fetch("SELECT requests, charge_nano FROM usage_days")
    assert [tuple(row) for row in rows] == [(20, 20 * 9 * 10**8)] * 10
    await assert_invariants_hold(database)


# -- one request


async def test_a_request_is_shown_in_every_state(gateway: Gateway, database_url: str) -> None:
    client, ledger = await gateway.client("100"), ledger_of(gateway.database)

    async def begin(name: str) -> Hold:
        ceiling = Ceiling(hold_max=Nano(5 * 10**9), available_min=Nano(5 * 10**9))
        return await ledger.hold_funds(HoldRequest(claim(client), new_id(), ceiling, "a/b", name))

    async def state(name: str) -> tuple[Any, ...]:
        generation = await data(gateway, client, "/v1/generation", id=name)
        return (
            generation["state"],
            generation["charged"],
            generation["held"],
            generation["cost_usd"],
            generation["closed_at"] is not None,
        )

    await begin("running")
    assert await state("running") == ("open", None, "5", None, False)
    await ledger.release(release(await begin("failed")))
    assert await state("failed") == ("released", None, "0", None, True)
    await ledger.settle(settlement(await begin("done"), "0.010"))
    assert await state("done") == ("settled", "0.9", "0", "0.010", True)
    lost = await begin("lost")
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE holds SET is_handed_over = TRUE, due_at = 'infinity' WHERE hold_id = $1", lost.hold_id)
    await connection.close()
    assert await state("lost") == ("awaiting_evidence", None, "5", None, False)
    await ledger.release(Release(client.account_id, lost.hold_id, unresolved=True))
    assert await state("lost") == ("unresolved", None, "0", None, True)
    await ledger.settle(settlement(lost, "0.01"))
    assert await state("lost") == ("settled", "0.9", "0", "0.01", True)


async def test_of_requests_with_the_same_id_the_newest_is_shown(gateway: Gateway) -> None:
    client = await gateway.client()
    names = []
    for _ in range(3):
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        headers = {**client.headers, "X-Request-ID": "again"}
        async with gateway.session.post(gateway.chat_url, json=body, headers=headers) as response:
            names.append((await response.json(content_type=None))["id"])
        await gateway.idle()
    assert (await data(gateway, client, "/v1/generation", id="again"))["generation_id"] == names[-1]
    assert (await data(gateway, client, "/v1/generation", id=names[0]))["generation_id"] == names[0]


# -- invalid parameters


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/v1/usage?limit=0", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=1001", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=-1", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=1e2", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=%D9%A3", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=", "limit must be a whole number from 1 to 1000"),
        ("/v1/usage?limit=1&limit=2", "limit is given more than once"),
        ("/v1/usage?form=2026-01-01", "'form' is not a parameter here; known parameters: limit, cursor, from, to, model"),
        ("/v1/usage?from=yesterday", "from must be a day, such as 2026-01-31, from 2000-01-01 to 2999-12-31"),
        ("/v1/usage?from=2026-02-30", "from must be a day, such as 2026-01-31, from 2000-01-01 to 2999-12-31"),
        ("/v1/usage?from=20260201", "from must be a day, such as 2026-01-31, from 2000-01-01 to 2999-12-31"),
        ("/v1/usage?to=9999-12-31", "to must be a day, such as 2026-01-31, from 2000-01-01 to 2999-12-31"),
        ("/v1/usage?to=0001-01-01", "to must be a day, such as 2026-01-31, from 2000-01-01 to 2999-12-31"),
        ("/v1/usage?from=2026-01-02&to=2026-01-01", "from must not be later than to: 2026-01-02 is later than 2026-01-01"),
        ("/v1/usage?model=", "model must be a text of 1 to 200 printable characters"),
        ("/v1/usage?model=a%00b", "model must be a text of 1 to 200 printable characters"),
        ("/v1/usage?model=" + "a" * 201, "model must be a text of 1 to 200 printable characters"),
        ("/v1/usage?cursor=abc", "cursor must be the next_cursor of an earlier response, unchanged"),
        ("/v1/usage?cursor=" + "_" * 36, "cursor must be the next_cursor of an earlier response, unchanged"),
        ("/v1/usage?cursor=f" + "_" * 31, "cursor must be the next_cursor of an earlier response, unchanged"),
        ("/v1/usage?cursor=%D1%8F", "cursor must be the next_cursor of an earlier response, unchanged"),
        ("/v1/usage/totals?by=week", "by must be one of: day; model; day,model"),
        (
            "/v1/usage/totals?from=2025-01-01&to=2026-01-02",
            "from and to must span at most 366 days: 2025-01-01 to 2026-01-02 is more",
        ),
        ("/v1/usage/totals?limit=1", "'limit' is not a parameter here; known parameters: from, to, by"),
        ("/v1/generation", "id is required: a request id, or OpenRouter's generation id"),
        ("/v1/generation?id=", "id must be a text of 1 to 200 printable characters"),
    ],
)
async def test_a_wrong_parameter_is_named_with_its_fault_and_range(gateway: Gateway, path: str, fault: str) -> None:
    client = await gateway.client("0")
    async with gateway.session.get(gateway.url + path, headers=client.headers) as response:
        assert (response.status, await response.json()) == (400, {"error": fault})
        assert response.headers["X-Error-Code"] == "invalid_request"


@pytest.mark.parametrize(
    ("by", "first", "status"),
    [
        ("day", "2025-01-01", 200),
        ("model", "2024-12-31", 400),
        ("day,model", "2025-12-02", 200),
        ("day,model", "2025-12-01", 400),
    ],
)
async def test_totals_span_a_leap_year_at_most_and_a_month_by_both(gateway: Gateway, by: str, first: str, status: int) -> None:
    client = await gateway.client("0")
    assert (await get(gateway, client, "/v1/usage/totals", from_=first, to="2026-01-01", by=by))[0] == status


async def test_every_cursor_that_can_be_encoded_is_accepted(gateway: Gateway) -> None:
    client = await gateway.client("5")
    first, last = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (1, 9999))
    for moment, count in [(first, 0), (NOON, 0), (last, 1)]:
        cursor = encode_cursor(moment, uuid.UUID(int=2**128 - 1))
        assert len(await data(gateway, client, "/v1/usage", cursor=cursor)) == count


@pytest.mark.parametrize("tuned", [{"vk": {"app_id": 5, "secret_key": "s"}}])
@pytest.mark.parametrize("path", ["/v1/credits", "/v1/usage", "/v1/usage/totals"])
async def test_a_sign_in_may_read_usage_without_a_key(gateway: Gateway, path: str) -> None:
    signed = {"vk_user_id": "494075", "vk_app_id": "5", "vk_ts": str(int(time.time()))}
    launch = urlencode({**signed, "sign": signature(signed, "s")})
    for token, status in ((launch, 200), (launch + "x", 401)):
        async with gateway.session.get(gateway.url + path, headers={"Authorization": f"Bearer {token}"}) as response:
            assert response.status == status
            assert ("data" in await response.json()) is (status == 200)


async def test_a_cost_with_an_extreme_exponent_is_charged_and_shown_in_a_sane_form(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(_: web.Request) -> web.Response:
        return web.Response(body=plays_costs.pop(), content_type="application/json")

    plays_costs = [b'{"usage":{"cost":0.01}}', b'{"usage":{"cost":1e-999}}']
    plays.append(play)
    client = await gateway.client()
    for _ in range(2):
        await gateway.chat(client)
    await gateway.idle()
    entries = await data(gateway, client, "/v1/usage")
    assert [(entry["cost_usd"], entry["amount"]) for entry in entries][:2] == [("0.01", "-0.9"), ("1E-999", "0")]
    (total,) = await data(gateway, client, "/v1/usage/totals")
    assert (total["cost_usd"], total["amount"]) == ("0.01", "0.9")
