"""Holds, settlements and releases made directly with a ledger."""

import tempfile
from decimal import Decimal
from pathlib import Path

from gptutor.database.pool import Database
from gptutor.money.amounts import Nano, parse_roubles
from gptutor.money.holds import Hold, HoldRequest, Release, Settlement, new_id
from gptutor.money.invariants import check
from gptutor.money.journal import Journal
from gptutor.money.keys import KeyClaim, parse_key
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Ceiling, Charge
from tests.support.gateway import Client

RATE = Decimal(90)


def claim(client: Client) -> KeyClaim:
    parsed = parse_key(client.key)
    assert parsed is not None
    return parsed


def ledger_of(database: Database, journal: Journal | None = None) -> Ledger:
    journal = journal or Journal(Path(tempfile.mkdtemp()), 1 << 20, 1 << 30)
    return Ledger(database, journal, rub_per_usd=RATE, hold_ttl_s=60)


async def hold(
    database: Database, client: Client, hold_max: str, available_min: str | None = None, ledger: Ledger | None = None
) -> Hold:
    """With `available_min`, the hold may be so small."""
    least = parse_roubles(available_min or hold_max)
    ceiling = Ceiling(hold_max=parse_roubles(hold_max), available_min=least, hold_min=least)
    return await (ledger or ledger_of(database)).hold_funds(HoldRequest(claim(client), new_id(), ceiling, "a/b", "r"))


def release(of: Hold) -> Release:
    return Release(of.account_id, of.hold_id)


def settlement(of: Hold, cost: str) -> Settlement:
    charge = Charge(Nano(int(Decimal(cost) * RATE * 10**9)), Decimal(cost))
    return Settlement(of.account_id, of.hold_id, charge, f"gen-{of.hold_id}")


async def assert_invariants_hold(database: Database) -> None:
    assert [finding.invariant.name for finding in [finding async for finding in check(database)] if finding.rows] == []
