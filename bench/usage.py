"""How the usage queries scale: `python -m bench.usage [--rows 10000000] [--accounts 100000]`.

On a PostgreSQL of its own, runs all usage queries for the largest account of a small ledger and of a large one. Prints the time of
each, and for the large ledger its plan (generic, as for a prepared statement).
"""

import argparse
import asyncio
import datetime
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import asyncpg

from gptutor.database import migrations
from gptutor.database.embedded import embedded_postgres
from gptutor.database.statements import STATEMENTS

LARGEST = 1
SHARE = 20
"""Every twentieth entry is the largest account's."""
DAYS = 730
CHUNK = 500_000
TIMES = 100
MODELS = "'vendor-' || i % 7 || '/model-' || i % 41"

# Ids as in production: hold ids (UUIDv7) and OpenRouter's generation ids begin with their time, request ids are a process id and a
# counter.
HOLDS = f"""
INSERT INTO holds (account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, generation_id, state,
    cost_usd, charge_nano, created_at, closed_at, key_id)
SELECT CASE i % {SHARE} WHEN 0 THEN {LARGEST} ELSE 2 + i * 7919 % ($3::bigint - 1) END,
    (lpad(to_hex((second * 1000)::bigint), 12, '0') || '7' || substr(md5('hold' || i), 14))::uuid, $4::uuid, 160000000, 90,
    {MODELS}, substr(md5('process' || i / 1000000), 1, 24) || lpad(to_hex(i), 12, '0'), now(),
    'gen-' || second::bigint || '-' || substr(md5('generation' || i), 1, 16), 'settled', 0.0000143 + i % 1000 * 0.00001,
    1287000 + i % 1000 * 900000, to_timestamp(second), $5::timestamptz, 1
FROM generate_series($1::bigint, $2::bigint) AS i,
    LATERAL (SELECT extract(epoch FROM $5::timestamptz) - {DAYS} * 86400 * (1 - i / $6::double precision)) AS at (second)
"""
LEDGER = """
INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd, created_at)
SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd, created_at
FROM holds ORDER BY created_at
"""
TOPUPS = f"""
INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, created_at)
SELECT account_id, gen_random_uuid(), 'topup', 1000000000000, 'payments', now() - interval '{DAYS} days' * random()
FROM accounts, generate_series(1, CASE account_id WHEN {LARGEST} THEN 1000 ELSE 2 END)
"""
BALANCES = """
UPDATE accounts SET balance_nano = entries.amount_nano, charge_count = entries.charges
FROM (
    SELECT account_id, sum(amount_nano)::bigint AS amount_nano, count(*) FILTER (WHERE kind = 'charge') AS charges
    FROM ledger GROUP BY account_id
) AS entries WHERE accounts.account_id = entries.account_id
"""


USAGE_DAYS = """
INSERT INTO usage_days (account_id, day, model, requests, cost_usd, charge_nano)
SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, model, count(*), sum(cost_usd), -sum(amount_nano)::bigint
FROM ledger WHERE kind = 'charge' GROUP BY 1, 2, 3
"""


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def usage_queries(connection: asyncpg.Connection) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Label, statement name and parameters of each query, all for the largest account; some in the middle of its entries."""
    now = await connection.fetchval("SELECT now()")
    today, long_ago = now.date(), datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
    year = today - datetime.timedelta(days=365)
    count = await connection.fetchval("SELECT charge_count FROM accounts WHERE account_id = $1", LARGEST)
    middle = await connection.fetchrow(
        "SELECT created_at, hold_id, model, request_id, generation_id FROM holds WHERE account_id = $1 ORDER BY created_at OFFSET $2 LIMIT 1",
        LARGEST,
        count // 2,
    )
    assert middle is not None
    end, nil = now + datetime.timedelta(days=1), uuid.UUID(int=0)
    position = (middle["created_at"], middle["hold_id"])
    return [
        ("credits", "find_credits", (LARGEST,)),
        ("first page of 100", "list_usage", (LARGEST, end, nil, long_ago, 101)),
        ("a page of 100 from the middle", "list_usage", (LARGEST, *position, long_ago, 101)),
        ("first page of 1000", "list_usage", (LARGEST, end, nil, long_ago, 1001)),
        ("first page of 100 of a model", "list_usage_of_model", (LARGEST, end, nil, long_ago, 101, middle["model"])),
        ("a page of 100 of a model from the middle", "list_usage_of_model", (LARGEST, *position, long_ago, 101, middle["model"])),
        ("a page of a model never used", "list_usage_of_model", (LARGEST, end, nil, long_ago, 101, "no/such")),
        ("totals of 30 days by day", "sum_usage", (LARGEST, today - datetime.timedelta(days=29), today, True, False)),
        ("totals of 366 days by day", "sum_usage", (LARGEST, year, today, True, False)),
        ("totals of 366 days by model", "sum_usage", (LARGEST, year, today, False, True)),
        ("totals of 31 days by day and model", "sum_usage", (LARGEST, today - datetime.timedelta(days=30), today, True, True)),
        ("a request by its request id", "find_request", (LARGEST, middle["request_id"])),
        ("a request by its generation id", "find_request", (LARGEST, middle["generation_id"])),
        ("a request that does not exist", "find_request", (LARGEST, "no-such-request")),
    ]


async def measure_queries(connection: asyncpg.Connection, *, plans: bool) -> dict[str, float]:
    """Median time of each query in milliseconds, as prepared statements of one connection, as in the gateway."""
    medians = {}
    for label, name, parameters in await usage_queries(connection):
        statement = await connection.prepare(STATEMENTS[name])
        times, rows = [], []
        for _ in range(TIMES):
            began = time.perf_counter()
            rows = await statement.fetch(*parameters)
            times.append((time.perf_counter() - began) * 1000)
        medians[label] = statistics.median(times)
        print(f"{label:45} {len(rows):6} rows   median {medians[label]:8.2f} ms   p99 {sorted(times)[TIMES * 99 // 100]:8.2f} ms")
        if plans:
            await connection.execute("SET plan_cache_mode = force_generic_plan")
            for row in await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {STATEMENTS[name]}", *parameters):
                print("   ", row[0])
            await connection.execute("RESET plan_cache_mode")
    return medians


async def fill(connection: asyncpg.Connection, rows: int, accounts: int) -> None:
    """Fills holds, ledger and balances in bulk: without triggers and foreign keys, and builds the indexes afterwards."""
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("SET maintenance_work_mem = '512MB'; SET work_mem = '256MB'")
    indexes = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('holds', 'ledger') AND schemaname = 'public'"
        " AND indexname NOT IN ('holds_pkey', 'ledger_pkey')"
    )
    keys = await connection.fetch(
        "SELECT conname, conrelid::regclass::text AS relname, pg_get_constraintdef(oid) AS definition FROM pg_constraint"
        " WHERE conname IN ('holds_pkey', 'ledger_pkey')"
    )
    for index in indexes:
        await connection.execute(f"DROP INDEX {index['indexname']}")
    for key in keys:
        await connection.execute(f"TRUNCATE {key['relname']}")
        await connection.execute(f"ALTER TABLE {key['relname']} DROP CONSTRAINT {key['conname']}")
    await connection.execute("INSERT INTO accounts (name) SELECT 'growth' FROM generate_series(2, $1::integer)", accounts)
    now, owner = await connection.fetchval("SELECT now()"), uuid.uuid4()
    for first in range(1, rows + 1, CHUNK):
        last = min(first + CHUNK - 1, rows)
        await connection.execute(HOLDS, first, last, accounts, owner, now, float(rows))
        log(f"{last:>12,} of {rows:,} holds")
    await connection.execute(LEDGER)
    await connection.execute(TOPUPS)
    log("the ledger is filled")
    for key in keys:
        await connection.execute(f"ALTER TABLE {key['relname']} ADD CONSTRAINT {key['conname']} {key['definition']}")
        log(f"{key['relname']}: primary key built")
    for index in indexes:
        await connection.execute(index["indexdef"])
        log(f"{index['indexname']} built")
    await connection.execute(BALANCES)
    await connection.execute(USAGE_DAYS)
    await connection.execute("RESET session_replication_role")
    log("balances and daily usage are computed")


async def run(url: str, rows: int, accounts: int) -> None:
    server = await asyncpg.connect(url)
    for setting, value in {
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
        "max_wal_size": "'8GB'",
    }.items():
        await server.execute(f"ALTER SYSTEM SET {setting} = {value}")
    await server.execute("SELECT pg_reload_conf()")
    medians = []
    for name, size in (("small", SHARE), ("large", rows)):
        await server.execute(f"CREATE DATABASE {name}")
        database_url = url.replace("/postgres?", f"/{name}?")
        await migrations.migrate(database_url)
        connection = await asyncpg.connect(database_url)
        await connection.execute("INSERT INTO accounts (name) VALUES ('largest')")
        await fill(connection, size, min(accounts, size))
        await connection.execute("VACUUM ANALYZE")
        count = await connection.fetchrow("SELECT count(*), count(*) FILTER (WHERE account_id = $1) FROM ledger", LARGEST)
        assert count is not None
        size_mb = await connection.fetchval("SELECT pg_database_size(current_database()) / 1000000")
        log(f"{name}: {count[0]:,} ledger entries, {count[1]:,} of them of the largest account; {size_mb:,} MB")
        medians.append(await measure_queries(connection, plans=name == "large"))
        await connection.close()
    print(f"\n{'median, ms':45} {'small':>10} {'large':>10}")
    for label in medians[0]:
        print(f"{label:45} {medians[0][label]:10.2f} {medians[1][label]:10.2f}")
    await server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--accounts", type=int, default=100_000)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="gptutor-growth-") as directory,
        embedded_postgres(Path(directory) / "postgres") as url,
    ):
        asyncio.run(run(url, arguments.rows, arguments.accounts))


if __name__ == "__main__":
    main()
