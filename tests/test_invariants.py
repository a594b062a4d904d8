"""The laws of the books (contract C9; row operator-6): each is silent on healthy books, and fires when a row is corrupted."""

import asyncpg
import pytest

from gptutor.database.pool import Database
from gptutor.money.invariants import check, load_invariants
from tests.support.gateway import make_caller
from tests.support.ledger import hold, ledger_of, release, settlement

# Which law a corruption breaks, besides others that it may break as well. Run with triggers and constraints asleep.
CORRUPTIONS = {
    "01_held_is_the_sum_of_open_holds": "UPDATE accounts SET held_nano = held_nano + 1",
    "02_balance_is_the_sum_of_entries": "UPDATE accounts SET balance_nano = balance_nano + 1",
    "03_settled_hold_has_its_charge": "DELETE FROM ledger WHERE kind = 'charge'",
    "04_charge_has_its_settled_hold": "DELETE FROM holds WHERE state = 'settled'",
    "05_charges_are_counted": "UPDATE accounts SET charges = charges + 1",
    "06_available_is_negative_only_with_a_reason": "UPDATE accounts SET held_nano = balance_nano + 1",
    "07_charge_is_the_rounded_product": "UPDATE holds SET charge_nano = charge_nano + 1 WHERE state = 'settled'",
    "08_generation_is_paid_once": (
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, generation_id, cost_usd, rub_per_usd)"
        " SELECT account_id, gen_random_uuid(), kind, amount_nano, contra, generation_id, cost_usd, rub_per_usd"
        " FROM ledger WHERE kind = 'charge'"
    ),
    "09_open_hold_is_within_its_time": "UPDATE holds SET due_at = now() - interval '3 minutes' WHERE state = 'open'",
    "10_evidence_comes_within_a_day": "UPDATE holds SET created_at = now() - interval '25 hours' WHERE state = 'open'",
    "11_reference_is_booked_once": (
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reference)"
        " SELECT account_id, gen_random_uuid(), 'topup', 1, 'payments', 'pay-1' FROM generate_series(5, 6) AS account_id"
    ),
    "12_holds_make_sense": "UPDATE holds SET closed_at = created_at - interval '1 second' WHERE state = 'settled'",
    "13_books_balance": "UPDATE accounts SET balance_nano = balance_nano + 1",
    "14_open_requests_are_counted": "UPDATE accounts SET open_requests = open_requests + 1",
    "15_key_holds_what_counts": "UPDATE holds SET key_counts = NOT key_counts WHERE state = 'open'",
    "16_usage_days_are_the_ledger": "UPDATE usage_days SET charge_nano = charge_nano + 1",
}


async def broken(books: Database) -> set[str]:
    return {finding.invariant.name async for finding in check(books) if finding.rows}


async def healthy(books: Database) -> None:
    caller = await make_caller(books, "100")
    ledger = ledger_of(books)
    await ledger.settle(settlement(await hold(books, caller, "5"), "0.01"))
    await ledger.release(release(await hold(books, caller, "5")))
    await hold(books, caller, "5")


def test_every_law_has_its_corruption() -> None:
    assert set(CORRUPTIONS) == {invariant.name for invariant in load_invariants()}
    assert len(CORRUPTIONS) == 16


async def test_empty_and_healthy_books_break_no_law(books: Database) -> None:
    assert await broken(books) == set()
    await healthy(books)
    assert await broken(books) == set()


@pytest.mark.parametrize("law", CORRUPTIONS)
async def test_a_corrupted_row_breaks_its_law(books: Database, database_url: str, law: str) -> None:
    await healthy(books)
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    status = await connection.execute(CORRUPTIONS[law])
    assert not status.endswith(" 0")
    await connection.close()
    assert law in await broken(books)


async def test_a_finding_shows_the_offending_row(books: Database, database_url: str) -> None:
    await healthy(books)
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE accounts SET balance_nano = balance_nano + 7")
    await connection.close()
    findings = [finding async for finding in check(books)]
    (row,) = findings[1].rows
    assert row["balance_nano"] - row["entries_nano"] == 7
    assert findings[1].invariant.meaning == "A balance is the sum of its ledger entries, and nothing else."
