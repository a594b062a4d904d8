"""Charges compared with the bills of the simulator."""

from decimal import Decimal

from gptutor.money.bookings import Bookings
from gptutor.money.invariants import check
from tests.support.gateway import Client, Gateway


async def charged_usd(gateway: Gateway, client: Client) -> Decimal:
    entries = await Bookings(gateway.database).entries(client.account_id, 1000)
    return sum((entry.cost_usd for entry in entries if entry.cost_usd is not None), Decimal(0))


async def assert_charges_match_bills(gateway: Gateway, client: Client, balance: str = "100") -> None:
    """Charges equal the bills of the simulator, all invariants hold, and no hold is open."""
    await gateway.recovered(client)
    assert await charged_usd(gateway, client) == gateway.billed_usd()
    assert await client.balance() == Decimal(balance) - gateway.billed_usd() * 90
    assert await client.held() == 0
    assert [finding.invariant.name async for finding in check(gateway.database) if finding.rows] == []
