"""The report: what was earned and what it cost, to the last digit, as a table, CSV and JSON, on the command line and over HTTP."""

import csv
import datetime
import io
import json
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from gptutor.database.pool import Database
from gptutor.money.report import Report, report, report_csv, report_json, value_texts
from tests.support.admin_client import administrator_of
from tests.support.gateway import config_for, make_client
from tests.support.service import environment, refused, run

FIRST, LAST = datetime.date(2026, 10, 30), datetime.date(2026, 11, 2)
RATE = Decimal("82.5")


@pytest.fixture
async def users(database: Database, database_url: str) -> list[int]:
    """Three users with charges from 29 October to 3 November, one of whom is called as a formula is."""
    ids = [(await make_client(database, "0")).account_id for _ in range(3)]
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE accounts SET name = '=1+1' WHERE account_id = $1", ids[1])
    charges = [
        (ids[0], "2026-10-29", "a/b", 1, 7, 7, "100", 10**13), (ids[0], "2026-10-30", "a/b", 2, 10, 20, "0.0000000000000000000000000000001", 9),
        (ids[0], "2026-11-01", "a/b", 1, None, None, "1", 90 * 10**9), (ids[1], "2026-11-01", "c/d", 1, 5, None, "2", 100 * 10**9),
        (ids[1], "2026-11-02", "a/b", 1, 1, 1, "0", 0), (ids[2], "2026-11-03", "a/b", 1, 7, 7, "100", 10**13),
    ]  # fmt: skip
    await connection.executemany(
        "INSERT INTO usage_days (account_id, day, model, requests, prompt_tokens, completion_tokens, cost_usd, charge_nano)"
        " VALUES ($1, $2::text::date, $3, $4, $5, $6, $7::text::numeric, $8)",
        charges,
    )
    await connection.close()
    return [int(one) for one in ids]


def lines(found: Report) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(report_csv(found))))


async def test_sums_and_margins_are_exact(database: Database, users: list[int]) -> None:
    found = await report(database, FIRST, LAST, "day", RATE)
    assert [list(row.values()) for row in lines(found)] == [
        ["2026-10-30", "2", "10", "20", "0.000000009", "0.0000000000000000000000000000001", "0.00000000000000000000000000000825", "0.00000000899999999999999999999175", "100"],
        ["2026-11-01", "2", "5", "", "190", "3", "247.5", "-57.5", "-30.26"],
        ["2026-11-02", "1", "1", "1", "0", "0", "0", "0", ""],
        ["total", "5", "16", "21", "190.000000009", "3.0000000000000000000000000000001", "247.50000000000000000000000000000825", "-57.49999999100000000000000000000825", "-30.26"],
    ]  # fmt: skip
    assert value_texts(found.total) == [str(value) for value in report_json(found)["total"].values()]
    months = await report(database, FIRST, LAST, "month", None)
    assert None in value_texts(months.total), "without a rate there is no margin"
    assert [(row.label, row.requests, row.paid_rub, row.margin_percent) for row in months.rows] == [
        ("2026-10", 2, None, None), ("2026-11", 3, None, None),
    ]  # fmt: skip
    assert months.total.earned_rub == found.total.earned_rub


async def test_models_and_users_come_by_what_they_paid_and_a_cut_list_has_the_whole_total(
    database: Database, users: list[int]
) -> None:
    models = await report(database, FIRST, LAST, "model", RATE)
    assert [(row.label, row.earned_rub) for row in models.rows] == [("c/d", 100), ("a/b", Decimal("90.000000009"))]
    by_user = await report(database, FIRST, LAST, "user", RATE)
    assert [(row["user_id"], row["user_name"], row["earned_rub"]) for row in lines(by_user)] == [
        (str(users[1]), "'=1+1", "100"), (str(users[0]), "", "90.000000009"), ("total", "", "190.000000009"),
    ]  # fmt: skip
    cut = await report(database, FIRST, LAST, "user", RATE, limit=1)
    assert (len(cut.rows), cut.is_complete, cut.total) == (1, False, by_user.total)
    empty = await report(database, datetime.date(2020, 1, 1), datetime.date(2020, 1, 1), "user", RATE)
    assert (empty.rows, empty.total.requests, empty.total.margin_rub, empty.total.margin_percent) == ([], 0, 0, None)


async def test_the_command_and_the_endpoint_say_the_same(
    database: Database, database_url: str, users: list[int], tmp_path: Path
) -> None:
    environ = environment(tmp_path, DATABASE_URL=database_url, GPTUTOR_BILLING__COST_RUB_PER_USD="70")
    days = ("report", "--from", str(FIRST), "--to", str(LAST))
    document = json.loads(run(environ, *days, "--by", "user", "--cost-rub-per-usd", "82,5", "--json").stdout)
    async with administrator_of(config_for(database_url, "http://127.0.0.1:9", tmp_path)) as anna:
        query = f"from={FIRST}&to={LAST}&by=user"
        assert await anna.data(f"/admin/report?{query}&cost_rub_per_usd=82.5") == document
        assert await anna.data(f"/admin/report?{query}&cost_rub_per_usd=82,5") == document
        assert (await anna.data(f"/admin/report?{query}"))["total"]["margin_rub"] is None
        for wrong in (
            "by=hour",
            "cost_rub_per_usd=x",
            "cost_rub_per_usd=-1",
            "cost_rub_per_usd=1,000",
            "from=2000-01-01",
            "group=day",
        ):
            assert (await anna.request("GET", f"/admin/report?{wrong}"))[0] == 400
    assert json.loads(run(environ, *days, "--json").stdout)["total"]["paid_rub"] == "210.000000000000000000000000000007"
    text = run(environ, *days, "--csv").stdout
    assert text.splitlines()[0].startswith("day,requests,")
    table = run(environ, *days, "--by", "model").stdout
    for words in ("c/d", "190.000000009", "total"):
        assert words in table
    environ.pop("GPTUTOR_BILLING__COST_RUB_PER_USD")
    assert "There is no margin without the cost of a dollar" in run(environ, *days).stdout
    assert "must be a number such as 82.5" in refused(environ, "report", "--cost-rub-per-usd", "1e3")
    assert "--from must not be later than --to." in refused(environ, "report", "--from", "2026-02-01", "--to", "2026-01-31")
