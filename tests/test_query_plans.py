"""The plans of the statements whose tables grow: none reads a whole table, and none reads more pages than its answer needs."""

import asyncio
import datetime
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from gptutor.database.migrations import migrate
from gptutor.database.statements import STATEMENTS
from tests.support.schema import database, drop

ACCOUNTS = 200
UNUSED_ACCOUNTS = 10_000
HOLDS = 40_000
DAYS = 400
GROWING = {"holds", "ledger", "usage_days", "api_keys", "accounts", "pending_payments"}
NIL = uuid.UUID(int=0)
LAST = uuid.UUID(int=2**128 - 1)

FILL = f"""
SET session_replication_role = replica;
INSERT INTO accounts (name) SELECT '' FROM generate_series(1, {ACCOUNTS});
INSERT INTO accounts (name, contact)
SELECT 'vk ' || i, CASE i % 1000 WHEN 7 THEN 'Иван' || i ELSE 'user' || i END || '@example.org' FROM generate_series(1, {UNUSED_ACCOUNTS}) AS i;
INSERT INTO api_keys (account_id, key_hash, prefix, revoked_at)
SELECT 1 + i % {ACCOUNTS}, sha256(i::text::bytea), 'sk-user-' || i, CASE WHEN i > {ACCOUNTS} THEN now() END
FROM generate_series(1, {ACCOUNTS * 30}) AS i;
INSERT INTO holds (account_id, hold_id, owner, key_id, amount_nano, rub_per_usd, model, request_id, due_at, created_at, closed_at,
    state, charge_nano, cost_usd, generation_id, is_unresolved, idempotency_key, body_hash, repeats_rejected_until)
SELECT 1 + i * 7919 % {ACCOUNTS}, (lpad(to_hex(i), 12, '0') || '7' || substr(md5(i::text), 14))::uuid, gen_random_uuid(), 1, 5, 90,
    'vendor/model-' || i % 5, CASE WHEN i % 4 = 1 THEN 'many' ELSE 'r-' || i END, at, at, CASE kind WHEN 1 THEN NULL ELSE at END,
    (CASE kind WHEN 0 THEN 'settled' WHEN 1 THEN 'open' ELSE 'released' END)::hold_state,
    CASE kind WHEN 0 THEN 9 END, CASE kind WHEN 0 THEN 0.0000001 END, 'gen-' || i, kind = 2,
    CASE i % 100 WHEN 3 THEN 'key-' || i END, CASE WHEN i % 100 = 3 OR i % 1000 = 5 THEN sha256('') END,
    CASE i % 1000 WHEN 5 THEN at END
FROM generate_series(1, {HOLDS}) AS i,
    LATERAL (SELECT now() - interval '{DAYS} days' * (1 - i / {HOLDS}.0), CASE i % 1000 WHEN 1 THEN 1 WHEN 2 THEN 2 ELSE 0 END)
        AS of (at, kind);
INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd, created_at)
SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd, created_at
FROM holds WHERE state = 'settled';
INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reference)
SELECT account_id, gen_random_uuid(), 'topup', 1000, 'payments', 'pay-' || account_id FROM accounts;
INSERT INTO usage_days (account_id, day, model, requests, cost_usd, charge_nano)
SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, model, count(*), sum(cost_usd), -sum(amount_nano)
FROM ledger WHERE kind = 'charge' GROUP BY 1, 2, 3;
INSERT INTO pending_payments (payment_id, account_id, next_lookup_at)
SELECT 'payment-' || i, 1 + i % {ACCOUNTS}, now() + i * interval '1 second' FROM generate_series(1, {HOLDS}) AS i;
RESET session_replication_role;
VACUUM ANALYZE;
"""


@pytest.fixture(scope="module")
def filled(postgres: str) -> Iterator[str]:
    """The URL of a database with rows."""

    async def fill() -> str:
        server = await asyncpg.connect(postgres)
        await server.execute("CREATE DATABASE plans")
        await server.close()
        url = database(postgres, "plans")
        await migrate(url)
        connection = await asyncpg.connect(url)
        for statement in FILL.split(";\n"):
            if statement.strip():
                await connection.execute(statement)
        await connection.close()
        return url

    yield asyncio.run(fill())
    asyncio.run(drop(postgres, "plans"))


@pytest.fixture
async def connection(filled: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(filled)
    await connection.execute("SET plan_cache_mode = force_generic_plan")  # the plan that a prepared statement keeps
    yield connection
    await connection.close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


NOW = datetime.datetime.now(datetime.UTC)
TODAY = NOW.date()
LONG_AGO = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
MIDDLE = NOW - datetime.timedelta(days=DAYS // 2)
END = datetime.datetime.max.replace(tzinfo=datetime.UTC)
MONTH = datetime.timedelta(days=30)

# label → statement, arguments, rows, pages at most (with room for the dead rows that the updates of these tests leave)
STATEMENTS_OF_GROWTH: dict[str, tuple[str, tuple[Any, ...], int, int]] = {
    "a page of waiting holds": ("list_waiting_holds", (20,), 20, 500),
    "all waiting holds": ("list_waiting_holds", (1000,), 80, 800),
    "the sum of waiting holds": ("sum_waiting_holds", (), 1, 200),
    "the cost of a month by day": ("cost_by_day", (TODAY - MONTH, TODAY), 31, 500),
    "the newest entries": ("list_entries", (1, END, LAST, 20), 20, 200),
    "entries in the middle": ("list_entries", (1, MIDDLE, NIL, 20), 20, 200),
    "a key of an account with many": ("find_key", (1, 200), 1, 5),
    "a page of old idempotency keys": ("clear_idempotency_keys", (20,), 20, 900),
    "ended marks": ("clear_marks", (20,), 20, 900),
    "a mark": ("mark_outcomes_unknown", ([1], [NIL], [b"x" * 32], 180.0), 0, 20),
    "due holds": ("claim_due_holds", (20, 600.0), 20, 900),
    "open holds of a dead process": ("list_open_holds_of", (NIL, NIL, 1000), 0, 200),
    "the states of holds": ("find_hold_states", (list(range(1, 101)), [NIL] * 100), 0, 400),
    "the newest usage": ("list_usage", (1, END, LAST, LONG_AGO, 20), 20, 200),
    "usage of a model": ("list_usage_of_model", (1, MIDDLE, NIL, LONG_AGO, 10, "vendor/model-0"), 10, 120),
    "a request by its id": ("find_request", (HOLDS * 7919 % ACCOUNTS + 1, f"r-{HOLDS}"), 1, 30),
    "requests by any id, of all accounts": ("find_requests", ("many", None, 20), 20, 900),
    "requests by a hold's id": ("find_requests", ("none", uuid.UUID(int=0), 20), 0, 60),
    "a report of a month by day": ("report_charges", (TODAY - MONTH, TODAY, "day", 100), 32, 500),
    "a report of a month by user": ("report_charges", (TODAY - MONTH, TODAY, "user", 50), 51, 700),
    "a payment by its reference": ("find_reference", ("pay-7",), 1, 10),
    "credits": ("find_credits", (7,), 1, 20),
    "a month of totals": ("sum_usage", (1, TODAY - MONTH, TODAY, True, False), 15, 100),
    "a payment that is due": ("claim_due_payment", (30.0, 3600.0, 60.0), 1, 60),
    "a pending payment": ("find_pending_payment", ("payment-7",), 1, 10),
    "pending payments of an account": ("count_pending_payments", (1,), 1, 250),
    "users by a rare word": ("find_accounts_by_words", (["ИВАН", "@example.org"], 101), 10, 60),
    "users by a word that all have": ("find_accounts_by_words", (["vk"], 101), 101, 60),
    "open holds, for the metrics": ("sum_open_holds", (), 1, 200),
    "a part of all balances": ("sum_balances", (0, 20), 1, 10),
    "a live key": ("find_live_key", (1, b"x" * 32), 0, 10),
}


@pytest.mark.parametrize("label", STATEMENTS_OF_GROWTH)
async def test_a_statement_reads_no_whole_table(connection: asyncpg.Connection, label: str) -> None:
    statement, arguments, rows, pages = STATEMENTS_OF_GROWTH[label]
    transaction = connection.transaction()
    await transaction.start()
    found = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {STATEMENTS[statement]}", *arguments)
    await transaction.rollback()
    (document,) = json.loads(found)
    plan = document["Plan"]
    assert plan["Actual Rows"] == pytest.approx(rows, abs=15 if "month" in label else 0)
    scans = [(node["Node Type"], node["Relation Name"]) for node in nodes(plan) if node.get("Relation Name") in GROWING]
    assert scans
    assert [scan for scan in scans if scan[0] == "Seq Scan"] == [], json.dumps(plan, indent=1)
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= pages, json.dumps(plan, indent=1)


async def test_a_sequential_scan_is_noticed(connection: asyncpg.Connection) -> None:
    (document,) = json.loads(await connection.fetchval("EXPLAIN (FORMAT JSON) SELECT * FROM holds WHERE amount_nano > 7"))
    assert [node["Node Type"] for node in nodes(document["Plan"])] == ["Seq Scan"]
