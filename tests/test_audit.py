"""verify and reconcile, on the command line and over HTTP: what is broken, what to do about it, and which difference is too large."""

import asyncio
import datetime
import json
import re
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gptutor.admin import audit
from gptutor.config.schema import Config
from gptutor.database.alert_book import AlertBook
from gptutor.database.pool import Database
from gptutor.http.app_keys import CONFIG
from gptutor.money.invariants import Finding, check, load_invariants, rows_json
from gptutor.money.reconciliation import Tolerance
from gptutor.telemetry.alerts import PROVEN_ENDS
from gptutor.web import page
from tests.support.admin_client import administrator_of
from tests.support.corruptions import CORRUPTIONS
from tests.support.gateway import Gateway, config_for, make_client
from tests.support.ledger import assert_invariants_hold, hold, ledger_of, settlement
from tests.support.service import environment, run


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> Config:
    return config_for(database_url, "http://127.0.0.1:9", tmp_path)


def remedies(language: str) -> dict[str, str]:
    """The text of each invariant's remedy, by the invariant's name."""
    text = (page.HERE / "pages" / f"troubleshooting.{language}.md").read_text(encoding="utf-8")
    parts = [part.partition("\n") for part in text.split("\n### ") if part.startswith("`")]
    return {head.strip("`"): remedy.strip() for head, _, remedy in parts}


def statements(remedy: str) -> str:
    return "".join(re.findall(r"^```sql\n(.*?)^```$", remedy, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_the_guide_has_a_remedy_for_each_invariant(language: str) -> None:
    found = remedies(language)
    assert list(found) == [invariant.name for invariant in load_invariants()]
    assert [name for name, remedy in found.items() if len(remedy) < 100] == []
    body = page.load_pages()[language, "troubleshooting"].body
    for invariant in load_invariants():
        name, _, anchor = invariant.remedy.partition("#")
        assert name == "troubleshooting"
        assert f'id="{anchor}"' in body
    assert [statements(remedy) for remedy in found.values()] == [statements(remedy) for remedy in remedies("en").values()]


@pytest.mark.parametrize("broken", [name for name, remedy in remedies("en").items() if statements(remedy)])
async def test_the_statements_of_a_remedy_repair_what_is_broken(database: Database, database_url: str, broken: str) -> None:
    client = await make_client(database, "100")
    ledger = ledger_of(database)
    charged = settlement(await hold(database, client, "5"), "0.01")
    await ledger.settle(charged)
    await hold(database, client, "5")
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(CORRUPTIONS[broken])
    await connection.execute("RESET session_replication_role")
    assert broken in {finding.invariant.name async for finding in check(database) if finding.rows}
    texts = remedies("en")
    followed_by = {"03": ("02", "05", "16"), "04": ("01", "14", "15")}.get(broken[:2], ())
    for name in (broken, *(name for name in texts if name[:2] in followed_by)):
        text = statements(texts[name]).replace(":account", str(client.account_id)).replace(":'hold'", f"'{charged.hold_id}'")
        await connection.execute(text)
    await connection.close()
    await assert_invariants_hold(database)
    assert await client.balance() == Decimal("99.1")


async def test_what_is_broken_is_told_with_its_remedy(
    database: Database, database_url: str, config: Config, tmp_path: Path
) -> None:
    environ = environment(tmp_path, DATABASE_URL=database_url, GPTUTOR_DOCS__PORT="8081")
    client = await make_client(database, "5")
    sound = json.loads(run(environ, "verify", "--json").stdout)
    assert (sound["broken"], [one["rows"] for one in sound["invariants"]]) == (0, [[] for _ in load_invariants()])
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE accounts SET balance_nano = balance_nano + 1")
    await connection.close()

    verified = run(environ, "verify", "--json", check=False)
    document = json.loads(verified.stdout)
    assert (verified.returncode, document["broken"]) == (1, 2)
    assert document["invariants"][1] == {
        "name": "02_balance_is_the_sum_of_entries",
        "meaning": "A balance is the sum of its ledger entries, and nothing else.",
        "is_broken": True,
        "rows": [{"account_id": client.account_id, "balance_nano": "5000000001", "entries_nano": "5000000000"}],
        "remedy": "troubleshooting#02_balance_is_the_sum_of_entries",
    }
    async with administrator_of(config) as anna:
        assert await anna.data("/admin/verify") == document
    verified = run(environ, "verify", check=False)
    assert verified.returncode == 1
    assert "entries_nano=5000000000\n" in verified.stdout
    assert "What to do: http://127.0.0.1:8081/en/troubleshooting#02_balance_is_the_sum_of_entries\n" in verified.stdout
    assert "`gptutor docs` serves the pages" in verified.stdout


async def test_verify_ends_the_alert_of_a_process_that_has_gone(
    database: Database, database_url: str, config: Config, tmp_path: Path
) -> None:
    """The process that replaced it has never seen the account broken."""
    client = await make_client(database, "100")
    book = AlertBook(database)
    connection = await asyncpg.connect(database_url)

    async def is_over() -> bool:
        await connection.execute("UPDATE alerts SET seen_at = now() - interval '1 hour'")
        return bool(await book.ended(60))

    async def change(amount: int) -> None:
        await connection.execute(
            "UPDATE accounts SET balance_nano = balance_nano + $2 WHERE account_id = $1", client.account_id, amount
        )

    environ = environment(tmp_path, DATABASE_URL=database_url)
    async with administrator_of(config) as anna:
        for verify in (lambda: asyncio.to_thread(run, environ, "verify", check=False), lambda: anna.data("/admin/verify")):
            await book.write({"books_broken": "1 accounts"}, proven_ends=PROVEN_ENDS)
            await change(1)
            await verify()
            assert not await is_over()
            await change(-1)
            assert not await is_over()
            await verify()
            assert await is_over()
    await connection.close()


async def test_verify_runs_once_at_a_time_and_not_for_ever(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slow(database: Database) -> AsyncIterator[Finding]:
        begun.set()
        await ended.wait()
        for invariant in load_invariants():
            yield Finding(invariant, [])

    monkeypatch.setattr(audit, "check", slow)
    async with administrator_of(config) as anna:
        try:
            async with asyncio.timeout(10):
                first = asyncio.create_task(anna.data("/admin/verify"))
                await begun.wait()
                for path in ("/admin/verify", "/admin/reconcile"):
                    busy = await anna.request("GET", path)
                    assert busy == (503, "verify or reconcile is running already; try again when it has ended")
                ended.set()
                assert (await first)["broken"] == 0
                ended.clear()
                monkeypatch.setattr(audit, "VERIFY_S", 0.01)
                status, text = await anna.request("GET", "/admin/verify")
                assert (status, text.partition(";")[2]) == (503, " gptutor verify takes as long as it needs")
        finally:
            ended.set()


@pytest.mark.parametrize(
    ("difference", "total", "usd", "percent", "is_exceeded"),
    [
        ("0.5", "1", "0.5", "2", False),
        ("0.5000001", "1", "0.5", "2", True),
        ("-0.5000001", "1", "0.5", "2", True),  # we charged more
        ("20", "1000", "0.5", "2", False),  # … of which 2 % are 20
        ("20.01", "1000", "0.5", "2", True),
        ("0", "0", "0", "0", False),
        ("0.0000000000000000001", "1", "0", "0", True),
        ("9", "9", "0", "100", False),
    ],
)
def test_a_difference_is_too_large_above_both_tolerances(
    difference: str, total: str, usd: str, percent: str, is_exceeded: bool
) -> None:
    tolerance = Tolerance(Decimal(usd), Decimal(percent))
    assert tolerance.is_exceeded_by(Decimal(difference), Decimal(total)) is is_exceeded


async def test_reconcile_fails_for_a_difference_above_the_settings(
    gateway: Gateway, database_url: str, config: Config, tmp_path: Path
) -> None:
    await gateway.chat(await gateway.client())
    upstream = gateway.app[CONFIG].openrouter
    strict = {"GPTUTOR_RECONCILE__DIFFERENCE_USD_MAX": "0", "GPTUTOR_RECONCILE__DIFFERENCE_PERCENT_MAX": "0"}

    async def reconciled(**settings: str) -> tuple[int, Any]:
        environ = environment(
            tmp_path,
            DATABASE_URL=database_url,
            OPENROUTER_BASE_URL=upstream.base_url,
            OPENROUTER_API_KEY="sk-or-test",
            **settings,
        )
        ran = await asyncio.to_thread(run, environ, "reconcile", "--json", check=False)
        text = (await asyncio.to_thread(run, environ, "reconcile", check=False)).stdout
        document = json.loads(ran.stdout)
        assert ("TOO LARGE" in text) is document["is_too_different"]
        return ran.returncode, document

    code, document = await reconciled(**strict)
    assert (code, document["is_too_different"], Decimal(document["days"][0]["difference_usd"])) == (0, False, 0)
    body = {"model": "google/gemini-2.5-flash-lite", "messages": [{"role": "user", "content": "past the gateway"}]}
    headers = {"Authorization": "Bearer sk-or-test"}
    async with gateway.session.post(f"{upstream.base_url}/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200
    code, document = await reconciled(**strict)
    assert (code, document["is_too_different"], document["days"][0]["is_too_different"]) == (1, True, True)
    code, document = await reconciled()
    assert (code, document["is_too_different"]) == (0, False)
    async with administrator_of(gateway.app[CONFIG]) as anna:
        assert await anna.data("/admin/reconcile") == document
    async with administrator_of(config) as anna:
        status, text = await anna.request("GET", "/admin/reconcile")
        assert (status, text) == (500, "OpenRouter's totals cannot be read: unreachable")


def test_the_values_of_an_offending_row_are_exact_and_plain() -> None:
    """Amounts in nano-roubles are texts, because many programs read long numbers inexactly."""
    row = {"at": datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC), "usd": Decimal("1E+2"), "held_nano": 2**60, "keys": 3}
    (shown,) = rows_json(Finding(load_invariants()[0], [row]))
    assert shown == {"at": "2026-11-29T12:00:00.000Z", "usd": "100", "held_nano": str(2**60), "keys": 3}
