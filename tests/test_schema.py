"""The schema: what is committed is what the migrations and functions make, applied migrations are frozen, and 0.1 converts to it."""

import asyncio
import hashlib
import re
import subprocess
import sys
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gptutor.database import migrations
from gptutor.database.migrations import MigrationError, load_functions, load_migrations, migrate, pending_migrations
from gptutor.database.pool import open_database
from gptutor.database.statements import SQL, STATEMENTS
from gptutor.money.invariants import check
from tests.support.schema import CONVERSION, SCHEMA, create_0_1, database, drop, dump, rows
from tests.support.service import environment

TABLES = ("accounts", "identities", "api_keys", "holds", "ledger", "usage_days")


async def test_the_committed_schema_is_what_the_migrations_and_functions_make(postgres: str) -> None:
    assert SCHEMA.read_text(encoding="utf-8") == dump(postgres), "make schema"


def test_applied_migrations_never_change() -> None:
    """A change to a migration that was released never reaches a database; add another migration. A new one needs its line:
    (cd sql/migrations && sha256sum *.sql > CHECKSUMS)"""
    recorded = [line.split() for line in (SQL / "migrations" / "CHECKSUMS").read_text(encoding="utf-8").splitlines()]
    files = sorted((SQL / "migrations").glob("*.sql"))
    assert recorded == [[hashlib.sha256(path.read_bytes()).hexdigest(), path.name] for path in files]


def test_each_function_is_defined_once_in_the_file_of_its_name() -> None:
    defined = {
        file.name: re.findall(r"FUNCTION (\w+)\s*\([^)]*\)\s+RETURNS", file.text)
        for file in (*load_functions(), *load_migrations())
    }
    assert defined == {
        file.name: [file.name.removeprefix("functions/")] if file in load_functions() else []
        for file in (*load_functions(), *load_migrations())
    }
    assert all("CREATE OR REPLACE FUNCTION" in file.text for file in load_functions())


async def test_the_database_has_no_function_without_a_file(database: Any) -> None:
    async with database.snapshot() as connection:
        found = await connection.fetch("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY proname")
    assert [f"functions/{row['proname']}" for row in found] == [file.name for file in load_functions()]


async def test_every_table_and_every_column_whose_name_is_not_enough_has_a_comment(database: Any) -> None:
    async with database.snapshot() as connection:
        bare = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
            " AND relname NOT LIKE 'schema%' AND obj_description(oid, 'pg_class') IS NULL"
        )
    assert bare == []


# -- functions


async def test_a_changed_function_is_replaced_and_an_unchanged_one_is_not(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await asyncpg.connect(postgres)
    await server.execute("CREATE DATABASE functions")
    url = database(postgres, "functions")
    await migrate(url)
    connection = await asyncpg.connect(url)
    before = await connection.fetch("SELECT name, applied_at FROM schema_functions ORDER BY name")
    changed = migrations.Migration(
        "functions/reject_change",
        "CREATE OR REPLACE FUNCTION reject_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'changed'; END $$",
    )
    functions = [changed if file.name == changed.name else file for file in load_functions()]
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "load_functions", lambda: functions)
        assert await pending_migrations(url) == [changed.name]
        assert await migrate(url) == [changed.name]
        assert await migrate(url) == []
    with pytest.raises(asyncpg.RaiseError, match="changed"):
        await connection.execute("DELETE FROM ledger")
    after = await connection.fetch("SELECT name, applied_at FROM schema_functions ORDER BY name")
    assert [now["name"] for then, now in zip(before, after, strict=True) if then != now] == [changed.name]
    await connection.close()
    await drop(postgres, "functions")
    await server.close()


async def test_functions_that_are_replaced_in_the_midst_of_settlements_lose_none(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row operator-3: processes of the previous release go on settling while the functions change under them."""
    server = await asyncpg.connect(postgres)
    await server.execute("CREATE DATABASE while_settling")
    url = database(postgres, "while_settling")
    await migrate(url)
    connections = [await asyncpg.connect(url) for _ in range(4)]
    await connections[0].execute("INSERT INTO accounts (balance_nano) SELECT 1000000000000000 FROM generate_series(1, 6)")
    await connections[0].execute(
        "INSERT INTO api_keys (account_id, key_hash, prefix) SELECT account_id, sha256('key'), '' FROM accounts"
    )
    settled, stop, accounts = 0, asyncio.Event(), [*range(1, 7)]

    async def settle_on(connection: asyncpg.Connection) -> None:
        nonlocal settled
        holds: list[uuid.UUID] = []
        while not stop.is_set():
            charged, holds = holds, [uuid.uuid4() for _ in accounts]
            count = len(charged)
            rows = await connection.fetch(
                STATEMENTS["settle_and_hold"], True,
                accounts[:count], charged, [9 * 10**8] * count, [Decimal("0.01")] * count, [str(hold) for hold in charged],
                [None] * count, [None] * count, [None] * count, uuid.uuid4(), 60.0, Decimal(90), 0, 0,
                accounts, [hashlib.sha256(b"key").digest()] * 6, holds, *[[10**9] * 6] * 3, ["a/b"] * 6,
                [str(hold) for hold in holds], [None] * 6, [None] * 6,
            )  # fmt: skip
            assert {row["outcome"] for row in rows} <= {"settled", "granted"}
            settled += count

    settling = [asyncio.create_task(settle_on(connection)) for connection in connections]
    for number in range(10):
        before = settled
        changed = [migrations.Migration(file.name, f"{file.text}\n-- {number}") for file in load_functions()]
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "load_functions", lambda changed=changed: changed)
            assert len(await migrate(url)) == len(changed)
        while settled == before and not any(task.done() for task in settling):
            await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*settling)
    totals = await connections[0].fetch("SELECT requests, charge_nano FROM usage_days")
    assert sum(total["requests"] for total in totals) == settled
    assert sum(total["charge_nano"] for total in totals) == settled * 9 * 10**8
    for connection in connections:
        await connection.close()
    await drop(postgres, "while_settling")
    await server.close()


# -- calls


def positional_calls(text: str, functions: set[str]) -> list[str]:
    """Calls of the functions with more than two arguments, one of which is not named."""
    code = re.sub(r"--.*", "", text)
    found = []
    for call in re.finditer(rf"(?<!FUNCTION )\b({'|'.join(sorted(functions))})\s*\(", code):
        depth, arguments = 1, [""]
        for character in code[call.end() :]:
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
            if depth == 0:
                break
            if character == "," and depth == 1:
                arguments.append("")
            else:
                arguments[-1] += character
        if len(arguments) > 2 and not all(re.match(r"\s*\w+\s*=>", argument) for argument in arguments):
            found.append(call[1])
    return found


def test_functions_are_called_by_the_names_of_their_parameters() -> None:
    """Two arrays of one type that change places would be accepted by position, and money would be held for the wrong request."""
    functions = {file.name.removeprefix("functions/") for file in load_functions()}
    texts = {**STATEMENTS, **{file.name: file.text for file in load_functions()}}
    assert {name: calls for name, text in texts.items() if (calls := positional_calls(text, functions))} == {}
    assert "settle_and_hold" in STATEMENTS["settle_and_hold"]
    assert positional_calls("SELECT f($1::bigint[], $2::uuid[], $3::text[])", {"f"}) == ["f"]
    assert positional_calls("SELECT f(a => $1, $2::uuid[], c => g(1, 2))", {"f"}) == ["f"]
    assert positional_calls("SELECT f(a => $1, b => ARRAY[1, 2], c => g(1, 2))", {"f"}) == []


# -- from 0.1


async def fill_0_1(connection: asyncpg.Connection) -> None:
    """Accounts, identities, keys of each kind, holds in each state, entries of each kind, and usage."""
    await connection.execute(
        """
        INSERT INTO accounts (name, is_active) VALUES ('one', TRUE), ('two', FALSE), ('three', TRUE);
        SELECT account_of('vk', '494075', 'four', gen_random_uuid(), 5000000000);
        """
    )
    for account in (1, 2, 3):
        for kind, amount, contra, reference in (
            ("topup", 10**12, "payments", f"pay:{account}"), ("refund", -(10**9), "payments", None),
            ("adjustment", -5, "corrections", None), ("bonus", 7, "goodwill", None),
        ):  # fmt: skip
            row = await connection.fetchrow(
                "SELECT * FROM book_entry($1, gen_random_uuid(), $2, $3, $4, 'why', $5, FALSE)",
                account,
                kind,
                amount,
                contra,
                reference,
            )
            assert row is not None
            assert row["outcome"] == "booked"
        for number, (cap, period, per_minute) in enumerate(
            ((None, None, None), (10**12, "day", None), (10**11, "total", 60), (None, None, 9))
        ):
            await connection.execute(
                "SELECT create_key($1, FALSE, 100, sha256($2::text::bytea), $3, 'name', $4, $5, 'infinity', $6, $7, $8)",
                account, f"{account}-{number}", f"sk-user-{account}-abc{number}", b"sealed", "secret", cap, period, per_minute,
            )  # fmt: skip
    for account in (1, 3):
        hashes = [hashlib.sha256(f"{account}-{number % 4}".encode()).digest() for number in range(12)]
        holds = [uuid.uuid4() for _ in hashes]
        ids = [f"r-{account}-{number}" for number in range(12)]
        keys = [f"again-{account}"] + [None] * 11
        outcomes = await connection.fetch(
            "SELECT outcome FROM hold_funds($1, 60, 90, 0, 0, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            uuid.uuid4(), [account] * 12, hashes, holds, [10**9] * 12, [10**9] * 12, ["a/b", "c/d"] * 6, ids, keys, [b"h" * 32, *[None] * 11],
        )  # fmt: skip
        assert {row["outcome"] for row in outcomes} == {"granted"}
        await connection.execute("SELECT release_holds($1, $2, $3)", [account] * 3, holds[0:3], [False, True, True])
        await connection.execute("SELECT hand_over_holds($1, $2, $3)", [account] * 3, holds[3:6], ["gen-3", None, "gen-5"])
        await connection.execute(
            "SELECT settle_holds($1, $2, $3, $4, $5, $6, $7)",
            [account] * 4, holds[2:5] + holds[6:7], [9 * 10**8] * 4, [Decimal("0.01")] * 4, [f"gen-{account}-{n}" for n in range(4)],
            [1, 2, None, 4], [5, 6, None, 8],
        )  # fmt: skip
    await connection.execute("SELECT renew_key(1, FALSE, FALSE, NULL, sha256('new'), 'sk-user-1-newx', NULL, NULL)")
    await connection.execute(
        # a hold from before keys had ids
        "INSERT INTO holds (account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at)"
        " VALUES (3, gen_random_uuid(), gen_random_uuid(), 0, 90, 'a/b', 'old', now())"
    )


RENAMED = {
    "accounts": {"charges": "charge_count"},
    "api_keys": {
        "shown": "prefix",
        "encrypted": "encrypted_key",
        "cap_nano": "limit_nano",
        "cap_period": "limit_reset",
        "per_minute": "requests_per_minute",
    },
    "holds": {"is_sent": "is_handed_over", "looks": "recovery_attempts", "key_counts": "counts_against_key_limit"},
}


def converted(table: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the row becomes."""
    new = {RENAMED.get(table, {}).get(column, column): value for column, value in row.items()}
    if table == "api_keys":
        new["limit_reset"] = {"day": "daily"}.get(new["limit_reset"])
    if table == "holds":
        new["key_id"] = new["key_id"] or 0
        new["repeats_rejected_until"] = None
    if table == "ledger":
        new["booked_by"] = new["evidence"] = None
    if table == "accounts" and new["account_id"] == 3:
        new["open_requests"] += 1  # the hold without a key's id was not counted
    if table == "accounts":
        new |= {"contact": "", "note": "", "erased_at": None}
    return new


async def test_a_database_of_0_1_is_converted_with_every_row(postgres: str, tmp_path: Path) -> None:
    url, connection = await create_0_1(postgres, "convert_0_1")
    await fill_0_1(connection)
    before = await rows(connection, TABLES)
    assert all(before.values())
    assert {row["state"] for row in before["holds"]} == {"open", "settled", "released"}
    for apply in (pending_migrations, migrate):
        with pytest.raises(MigrationError, match=r"schema of GPTutor 0\.1: convert it first, with make convert-0\.1"):
            await apply(url)

    await connection.close()
    script: list[str | Path] = [sys.executable, CONVERSION.with_suffix(".py")]
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            script, cwd=tmp_path, env=environment(tmp_path, DATABASE_URL=url), check=False, capture_output=True, text=True
        )
    )
    assert (done.returncode, done.stdout) == (0, "The database is converted. `gptutor verify` checks it.\n"), done.stderr
    assert await pending_migrations(url) == []
    connection = await asyncpg.connect(url)
    after = await rows(connection, TABLES)
    assert after == {table: [converted(table, row) for row in found] for table, found in before.items()}
    with pytest.raises(asyncpg.RaiseError, match=r"not a database of GPTutor 0\.1"):
        await connection.execute(CONVERSION.read_text(encoding="utf-8"))
    await connection.close()
    async with open_database(url) as database:
        findings = {finding.invariant.name: finding.rows async for finding in check(database)}
        assert {name for name, found in findings.items() if found} == set()
        for account in (1, 3):
            assert await database.fetch("clear_idempotency_keys", 10) == []
            (held, *_) = [row for row in after["holds"] if row["account_id"] == account and row["state"] == "open"]
            none: list[list[object]] = [[]] * 10
            (row,) = await database.fetch(
                "settle_and_hold", False, [account], [held["hold_id"]], [1], [Decimal(0)], [None], [None], [None], [None],
                uuid.uuid4(), 60.0, Decimal(90), 0, 0, *none,
            )  # fmt: skip
            assert row["outcome"] == "settled"
    # Columns keep their places, so the lines are the same in another order.
    assert sorted(line.rstrip(",") for line in dump(url).splitlines()) == sorted(
        line.rstrip(",") for line in dump(postgres).splitlines()
    )
    await drop(postgres, "convert_0_1")
