"""How the questions about usage grow: `python -m bench.usage [--rows 10000000] [--accounts 100000]`.

On a server of its own: runs every question on a small ledger, and on a large one, for the largest account. Prints the plan of each statement (generic, so that nothing is known of its parameters) and
its time.
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

# Ids as they really are: a hold's begins with its time (UUIDv7), OpenRouter's names do, and a process counts its requests.
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


TOTALS = """
INSERT INTO usage_days (account_id, day, model, requests, cost_usd, charge_nano)
SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, model, count(*), sum(cost_usd), -sum(amount_nano)::bigint
FROM ledger WHERE kind = 'charge' GROUP BY 1, 2, 3
"""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def questions(connection: asyncpg.Connection) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Label, statement, parameters; for the largest account, and in the middle of its entries."""
    now = await connection.fetchval("SELECT now()")
    today, long_ago = now.date(), datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
    year = today - datetime.timedelta(days=365)
    count = await connection.fetchval("SELECT charge_count FROM accounts WHERE account_id = $1", LARGEST)
    middle = await connection.fetchrow(
        "SELECT created_at, hold_id, model, request_id, generation_id FROM holds WHERE account_id = $1 ORDER BY created_at OFFSET $2 LIMIT 1",
        LARGEST,
        count // 2,
    )
    end, nil = now + datetime.timedelta(days=1), uuid.UUID(int=0)
    place = (middle["created_at"], middle["hold_id"])
    return [
        ("credits", "find_credits", (LARGEST,)),
        ("first page of 100", "list_usage", (LARGEST, end, nil, long_ago, 101)),
        ("a page of 100 from the middle", "list_usage", (LARGEST, *place, long_ago, 101)),
        ("first page of 1000", "list_usage", (LARGEST, end, nil, long_ago, 1001)),
        ("first page of 100 of a model", "list_usage_of_model", (LARGEST, end, nil, long_ago, 101, middle["model"])),
        ("a page of 100 of a model from the middle", "list_usage_of_model", (LARGEST, *place, long_ago, 101, middle["model"])),
        ("a page of a model never used", "list_usage_of_model", (LARGEST, end, nil, long_ago, 101, "no/such")),
        ("totals of 30 days by day", "sum_usage", (LARGEST, today - datetime.timedelta(days=29), today, True, False)),
        ("totals of 366 days by day", "sum_usage", (LARGEST, year, today, True, False)),
        ("totals of 366 days by model", "sum_usage", (LARGEST, year, today, False, True)),
        ("totals of 31 days by day and model", "sum_usage", (LARGEST, today - datetime.timedelta(days=30), today, True, True)),
        ("a request by its own id", "find_request", (LARGEST, middle["request_id"])),
        ("a request by OpenRouter's id", "find_request", (LARGEST, middle["generation_id"])),
        ("a request that is not there", "find_request", (LARGEST, "no-such-request")),
    ]


async def ask(connection: asyncpg.Connection, *, plans: bool) -> dict[str, float]:
    """Milliseconds, the median of many times, on a connection that keeps its prepared statements as the gateway's do."""
    medians = {}
    for label, name, parameters in await questions(connection):
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
    """In bulk: without triggers and foreign keys, and with the indexes built afterwards."""
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
        say(f"{last:>12,} of {rows:,} holds")
    await connection.execute(LEDGER)
    await connection.execute(TOPUPS)
    say("the ledger has as many charges")
    for key in keys:
        await connection.execute(f"ALTER TABLE {key['relname']} ADD CONSTRAINT {key['conname']} {key['definition']}")
        say(f"{key['relname']} has its key")
    for index in indexes:
        await connection.execute(index["indexdef"])
        say(f"{index['indexname']} is there")
    await connection.execute(BALANCES)
    await connection.execute("RESET session_replication_role")
    say("balances are added up")


async def grow(url: str, rows: int, accounts: int) -> None:
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
        own = url.replace("/postgres?", f"/{name}?")
        await migrations.migrate(own)
        connection = await asyncpg.connect(own)
        await connection.execute("INSERT INTO accounts (name) VALUES ('largest')")
        await fill(connection, size, min(accounts, size))
        began = time.monotonic()
        await connection.execute(TOTALS)
        say(f"the totals took {time.monotonic() - began:.1f} s")
        await connection.execute("VACUUM ANALYZE")
        count = await connection.fetchrow("SELECT count(*), count(*) FILTER (WHERE account_id = $1) FROM ledger", LARGEST)
        size_mb = await connection.fetchval("SELECT pg_database_size(current_database()) / 1000000")
        say(f"{name}: {count[0]:,} entries, of the largest account {count[1]:,}; {size_mb:,} MB")
        medians.append(await ask(connection, plans=name == "large"))
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
        asyncio.run(grow(url, arguments.rows, arguments.accounts))


if __name__ == "__main__":
    main()
