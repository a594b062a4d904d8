"""Our books beside the simulator's bill."""

from decimal import Decimal
from typing import Any

import asyncpg

from gptutor.money.bookings import Bookings
from gptutor.money.invariants import check
from tests.support.gateway import Caller, Gateway


async def charged_usd(gateway: Gateway, caller: Caller) -> Decimal:
    entries = await Bookings(gateway.books).entries(caller.account_id, 1000)
    return sum((entry.cost_usd for entry in entries if entry.cost_usd is not None), Decimal(0))


async def assert_books_agree(gateway: Gateway, caller: Caller, balance: str = "100") -> None:
    """Our books, the simulator's bill and all laws agree, and nothing is held."""
    await gateway.recovered(caller)
    assert await charged_usd(gateway, caller) == gateway.billed_usd()
    assert await caller.balance() == Decimal(balance) - gateway.billed_usd() * 90
    assert await caller.held() == 0
    assert [finding.invariant.name async for finding in check(gateway.books) if finding.rows] == []


async def overruns(database_url: str) -> list[tuple[Any, ...]]:
    """The simulator's bills that were above what was held for them: there are none, in any test (contract C4)."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch(
            "SELECT model, amount_nano, charge_nano FROM holds WHERE charge_nano > amount_nano AND generation_id LIKE 'gen-%-%'"
        )
    finally:
        await connection.close()
    return [tuple(row) for row in rows]
