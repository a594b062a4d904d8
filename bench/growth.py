"""`make bench-growth`: what a hold and its settlement cost in an empty database, and in one with years of them behind it.

In the empty one 2,000 accounts are busy; in the grown one as many, spread over all, and then all of them at random: there each
request finds pages that nobody has touched before, and PostgreSQL writes each whole into its log.
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
from bench.usage import TOTALS, fill, say
from gptutor.database import migrations
from gptutor.database.embedded import embedded_postgres
from gptutor.database.statements import STATEMENTS
from gptutor.money.holds import new_id

BATCH = 50
WARM_UP = 300
ROUNDS = 400
SMALL = 2_000
KEYS = """
INSERT INTO api_keys (account_id, key_hash, prefix, is_main)
SELECT account_id, sha256(account_id::text::bytea), 'sk-user-' || account_id, TRUE FROM accounts
"""
OWNER = uuid.uuid4()


@dataclass(slots=True)
class Trader:
    """Asks for holds of BATCH accounts, and settles those of the batch before: what the gateway does under load."""

    connection: asyncpg.Connection
    accounts: Sequence[int]
    held: dict[uuid.UUID, int] = field(default_factory=dict)

    async def one_batch(self) -> None:
        chosen = random.sample(self.accounts, BATCH)
        holds = [new_id() for _ in chosen]
        charged = len(self.held)
        names = [f"gen-{int(time.time())}-{random.getrandbits(64):016x}" for _ in self.held]
        rows = await self.connection.fetch(
            STATEMENTS["settle_and_hold"],
            False,
            *(list(self.held.values()), list(self.held), [1_350_000] * charged, [Decimal("0.000015")] * charged, names),
            *([12] * charged, [100] * charged),
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
        assert [row["outcome"] for row in rows] == ["settled"] * charged + ["granted"] * BATCH
        self.held = dict(zip(holds, chosen, strict=True))


async def cost(url: str, accounts: Sequence[int]) -> dict[str, float]:
    """Microseconds per request: PostgreSQL's CPU, and the median time of a batch."""
    connection = await asyncpg.connect(url)
    trader = Trader(connection, accounts)
    for _ in range(WARM_UP):
        await trader.one_batch()
    await connection.execute("CHECKPOINT")
    servers = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres"]
    before, times = cpu_s(servers), []
    clock = asyncio.get_running_loop().time
    for _ in range(ROUNDS):
        began = clock()
        await trader.one_batch()
        times.append((clock() - began) / BATCH * 1e6)
    spent = (cpu_s(servers) - before) / ROUNDS / BATCH * 1e6
    await connection.close()
    return {"cpu_us": round(spent, 1), "median_us": round(statistics.median(times), 1)}


async def grow(url: str, rows: int, accounts: int) -> dict[str, Any]:
    server = await asyncpg.connect(url)
    await server.execute("ALTER SYSTEM SET max_wal_size = '8GB'")
    await server.execute("SELECT pg_reload_conf()")
    found: dict[str, Any] = {"rows": rows, "accounts": accounts}
    for name, size, people in (("empty", 0, SMALL), ("grown", rows, accounts)):
        await server.execute(f"CREATE DATABASE {name}")
        own = url.replace("/postgres?", f"/{name}?")
        await migrations.migrate(own)
        connection = await asyncpg.connect(own)
        await connection.execute("INSERT INTO accounts (name) VALUES ('largest')")
        await connection.execute("SET synchronous_commit = off")
        await fill(connection, size, people)
        await connection.execute(KEYS)
        await connection.execute(TOTALS)
        say("everybody has a key, and totals")
        await connection.execute("VACUUM ANALYZE")
        await connection.close()
        everybody = range(1, people + 1)
        found[name] = await cost(own, random.sample(everybody, SMALL))
        say(f"{name}: {found[name]}")
        if rows and name == "grown":
            found["grown_everybody"] = await cost(own, everybody)
            say(f"grown, everybody: {found['grown_everybody']}")
    await server.close()
    for name in ("grown", "grown_everybody"):
        found[name]["ratio_cpu"] = round(found[name]["cpu_us"] / found["empty"]["cpu_us"], 2)
        found[name]["ratio_time"] = round(found[name]["median_us"] / found["empty"]["median_us"], 2)
    return found


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
        found = asyncio.run(grow(url, arguments.rows, arguments.accounts))
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
