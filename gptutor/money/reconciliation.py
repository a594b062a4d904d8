"""Our charges compared with OpenRouter's own totals, day by day: a difference is a lost or doubled charge (contract C9).

Small differences are not losses: today's total moves while requests run, and around midnight OpenRouter counts a request on the
day on which it ends, we on the day on which its charge is booked. `Tolerance` says what is small.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from gptutor.database.pool import Database
from gptutor.money.amounts import EXACT, AccountId, Nano

WAITING_MAX = 1000


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A day's difference is too large if it is above both: so many dollars, and this percentage of OpenRouter's total."""

    usd: Decimal
    percent: Decimal

    def is_exceeded_by(self, difference_usd: Decimal, theirs_usd: Decimal) -> bool:
        relative = EXACT.multiply(EXACT.multiply(theirs_usd, self.percent), Decimal("0.01"))
        return abs(difference_usd) > max(self.usd, relative)


NO_TOLERANCE = Tolerance(Decimal(0), Decimal(0))


@dataclass(frozen=True, slots=True)
class DailyCost:
    """One UTC day's costs in dollars."""

    day: datetime.date
    ours_usd: Decimal
    theirs_usd: Decimal
    tolerance: Tolerance

    @property
    def difference_usd(self) -> Decimal:
        return EXACT.subtract(self.theirs_usd, self.ours_usd)

    @property
    def is_too_different(self) -> bool:
        return self.tolerance.is_exceeded_by(self.difference_usd, self.theirs_usd)


@dataclass(frozen=True, slots=True)
class WaitingHold:
    """A request whose cost is not known; `amount` is the most that it can have cost."""

    account_id: AccountId
    state: Literal["open", "awaiting_evidence", "unresolved"]
    amount: Nano
    model: str
    request_id: str
    generation_id: str | None
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class WaitingHolds:
    """The oldest waiting holds; `count` and `at_most` are the number and the sum of all of them."""

    oldest: list[WaitingHold]
    count: int
    at_most: Nano


@dataclass(frozen=True, slots=True)
class Reconciliation:
    days: list[DailyCost]
    waiting: WaitingHolds

    @property
    def is_too_different(self) -> bool:
        return any(day.is_too_different for day in self.days)


async def reconcile(
    database: Database, theirs_usd: Mapping[datetime.date, Decimal], tolerance: Tolerance = NO_TOLERANCE
) -> Reconciliation:
    """Compares the days of OpenRouter's totals with ours, newest first. Raises DatabaseUnavailable."""
    ours_usd: dict[datetime.date, Decimal] = {}
    if theirs_usd:
        rows = await database.fetch("cost_by_day", min(theirs_usd), max(theirs_usd))
        ours_usd = {row["day"]: row["cost_usd"] for row in rows}
    days = [DailyCost(day, ours_usd.get(day, Decimal(0)), theirs_usd[day], tolerance) for day in sorted(theirs_usd, reverse=True)]
    return Reconciliation(days, await waiting_holds(database))


async def waiting_holds(database: Database, limit: int = WAITING_MAX) -> WaitingHolds:
    """Holds that wait for evidence of their cost, and unresolved ones; the oldest first. Raises DatabaseUnavailable."""
    (total,) = await database.fetch("sum_waiting_holds")
    oldest = [
        WaitingHold(
            AccountId(row["account_id"]),
            row["state"],
            Nano(row["amount_nano"]),
            row["model"],
            row["request_id"],
            row["generation_id"],
            row["created_at"],
        )
        for row in await database.fetch("list_waiting_holds", limit)
    ]
    return WaitingHolds(oldest, total["holds"], Nano(total["amount_nano"]))
