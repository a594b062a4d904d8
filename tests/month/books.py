"""The ledger compared with the simulator's bills, generation by generation."""

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal

import aiohttp
import asyncpg

from gptutor.money.journal import JOURNALS, read_journals
from tests.month.service import Service
from tests.month.waiting import WAIT_S

CHARGES = "SELECT generation_id, cost_usd FROM ledger WHERE kind = 'charge'"


@dataclass(frozen=True, slots=True)
class Books:
    bills: dict[str, Decimal]
    """Generation id → dollars, of all that cost something."""
    charges: list[tuple[str, Decimal]]

    @property
    def uncharged(self) -> set[str]:
        return self.bills.keys() - {generation_id for generation_id, _ in self.charges}

    @property
    def billed_usd(self) -> Decimal:
        return sum(self.bills.values(), Decimal(0))

    def differences(self, lost: Collection[str]) -> list[str]:
        """Sentences. `lost` are the generations that nobody can be charged for."""
        found = [
            f"{generation_id} was charged {count} times."
            for generation_id, count in Counter(generation_id for generation_id, _ in self.charges).items()
            if count > 1
        ]
        for generation_id, cost_usd in self.charges:
            if cost_usd and (bill_usd := self.bills.get(generation_id)) != cost_usd:
                found.append(f"{generation_id} was charged with {cost_usd} dollars, and its bill is {bill_usd}.")
        found += [
            f"{generation_id} was billed and neither charged nor lost." for generation_id in sorted(self.uncharged - {*lost})
        ]
        found += [f"{generation_id} is listed as lost, and was charged." for generation_id in sorted({*lost} - self.uncharged)]
        return found


async def read_books(database_url: str, simulator_url: str) -> Books:
    async with aiohttp.ClientSession() as session, session.get(f"{simulator_url}/simulator/bills") as response:
        bills = {bill["id"]: Decimal(bill["cost_usd"]) for bill in await response.json()}
    connection = await asyncpg.connect(database_url)
    try:
        charges = [(row["generation_id"], row["cost_usd"]) for row in await connection.fetch(CHARGES)]
    finally:
        await connection.close()
    return Books({generation_id: usd for generation_id, usd in bills.items() if usd}, charges)


async def settled_books(database_url: str, simulator_url: str, lost: Collection[str] = ()) -> Books:
    """Waits until all is charged, or no longer. To be called when no requests run."""
    ends_at = time.monotonic() + WAIT_S
    while (books := await read_books(database_url, simulator_url)).uncharged - {*lost} and time.monotonic() < ends_at:
        await asyncio.sleep(0.2)
    return books


def leftovers(service: Service) -> list[str]:
    """Requests that an orderly stop has left in the journals."""
    return [
        f"The journal of {journal.owner} still has {len(journal.open_holds)} requests after the stop."
        for slot in sorted((service.data / JOURNALS).iterdir())
        if slot.is_dir()
        for journal in read_journals(slot)
        if journal.open_holds
    ]
