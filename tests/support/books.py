"""Our books beside the simulator's bill."""

from decimal import Decimal

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
