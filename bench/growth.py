"""`make bench-growth`: the cost of a hold and its settlement in an empty database, and in one with years of history.

In the empty database 2,000 accounts are active. In the grown one first as many, spread over all accounts, and then all accounts at
random: there each request touches pages that no other has touched since the checkpoint, and PostgreSQL writes full page images.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from bench.subjects import cpu_s
from bench.usage import fill, log
from gptutor.database import migrations
from gptutor.database.embedded import embedded_postgres
from gptutor.database.statements import STATEMENTS
from gptutor.money.holds import new_id

BATCH = 50
WARM_UP_BATCHES = 300
BATCHES = 400
ACTIVE_ACCOUNTS = 2_000
KEYS = """
INSERT INTO api_keys (account_id, key_hash, prefix, is_main)
SELECT account_id, sha256(account_id::text::bytea), 'sk-user-' || account_id, TRUE FROM accounts
"""
OWNER = uuid.uuid4()


@dataclass(slots=True)
class Load:
    """In each batch, holds funds of BATCH accounts and settles the holds of the previous batch, as the gateway does under load."""

    connection: asyncpg.Connection
    accounts: Sequence[int]
    held: dict[uuid.UUID, int] = field(default_factory=dict)

    async def run_batch(self) -> None:
        chosen = random.sample(self.accounts, BATCH)
        holds = [new_id() for _ in chosen]
        settled = len(self.held)
        generation_ids = [f"gen-{int(time.time())}-{random.getrandbits(64):016x}" for _ in self.held]
        rows = await self.connection.fetch(
            STATEMENTS["settle_and_hold"],
            False,
            *(list(self.held.values()), list(self.held), [1_350_000] * settled, [Decimal("0.000015")] * settled, generation_ids),
            *([12] * settled, [100] * settled),
            *(
                OWNER,
                600.0,
                Decimal(90),
                600,
                200,
                chosen,
                [hashlib.sha256(b"%d" % account).digest() for account in chosen],
                holds,
            ),
            *([160_000_000] * BATCH, [1_000_000] * BATCH, ["vendor-1/model-1"] * BATCH, [str(hold) for hold in holds]),
            *([None] * BATCH, [None] * BATCH),
        )
        assert [row["outcome"] for row in rows] == ["settled"] * settled + ["granted"] * BATCH
        self.held = dict(zip(holds, chosen, strict=True))


async def measure(url: str, accounts: Sequence[int]) -> dict[str, float]:
    """Microseconds per request: CPU time of PostgreSQL, and the median time of a batch divided by its size."""
    connection = await asyncpg.connect(url)
    load = Load(connection, accounts)
    for _ in range(WARM_UP_BATCHES):
        await load.run_batch()
    await connection.execute("CHECKPOINT")
    servers = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres"]
    cpu_before_s, times = cpu_s(servers), []
    clock = asyncio.get_running_loop().time
    for _ in range(BATCHES):
        began = clock()
        await load.run_batch()
        times.append((clock() - began) / BATCH * 1e6)
    cpu_us = (cpu_s(servers) - cpu_before_s) / BATCHES / BATCH * 1e6
    await connection.close()
    return {"cpu_us": round(cpu_us, 1), "median_us": round(statistics.median(times), 1)}


async def grow(url: str, rows: int, accounts: int) -> dict[str, Any]:
    server = await asyncpg.connect(url)
    await server.execute("ALTER SYSTEM SET max_wal_size = '8GB'")
    await server.execute("SELECT pg_reload_conf()")
    results: dict[str, Any] = {"rows": rows, "accounts": accounts}
    for name, size, account_count in (("empty", 0, ACTIVE_ACCOUNTS), ("grown", rows, accounts)):
        await server.execute(f"CREATE DATABASE {name}")
        database_url = url.replace("/postgres?", f"/{name}?")
        await migrations.migrate(database_url)
        connection = await asyncpg.connect(database_url)
        await connection.execute("INSERT INTO accounts (name) VALUES ('largest')")
        await connection.execute("SET synchronous_commit = off")
        await fill(connection, size, account_count)
        await connection.execute(KEYS)
        log("API keys are created")
        await connection.execute("VACUUM ANALYZE")
        await connection.close()
        all_accounts = range(1, account_count + 1)
        results[name] = await measure(database_url, random.sample(all_accounts, ACTIVE_ACCOUNTS))
        log(f"{name}: {results[name]}")
        if rows and name == "grown":
            results["grown_all_accounts"] = await measure(database_url, all_accounts)
            log(f"grown, all accounts: {results['grown_all_accounts']}")
    await server.close()
    for name in ("grown", "grown_all_accounts"):
        results[name]["ratio_cpu"] = round(results[name]["cpu_us"] / results["empty"]["cpu_us"], 2)
        results[name]["ratio_time"] = round(results[name]["median_us"] / results["empty"]["median_us"], 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-growth", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="gptutor-growth-") as directory,
        embedded_postgres(Path(directory) / "postgres") as url,
    ):
        results = asyncio.run(grow(url, arguments.rows, arguments.accounts))
    print(json.dumps(results, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
