"""Our charges against OpenRouter's own totals, day by day: the difference is what was lost, or doubled (contract C9).

Small differences at midnight are no loss: OpenRouter counts a request on the day on which it finishes, we on the day on which we
book it.
"""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano


@dataclass(frozen=True, slots=True)
class DailyCost:
    """One UTC day's costs in dollars."""

    day: datetime.date
    ours_usd: Decimal
    theirs_usd: Decimal

    @property
    def difference_usd(self) -> Decimal:
        return self.theirs_usd - self.ours_usd


@dataclass(frozen=True, slots=True)
class WaitingHold:
    """A hold whose cost is not known, `open` or given up; `amount` is the most that it may have cost."""

    account_id: AccountId
    state: str
    amount: Nano
    model: str
    request_id: str
    generation_id: str | None
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class Reconciliation:
    days: list[DailyCost]
    waiting: list[WaitingHold]

    @property
    def at_most(self) -> Nano:
        return sum_of(self.waiting)


async def reconcile(database: Database, theirs_usd: Mapping[datetime.date, Decimal]) -> Reconciliation:
    """Compares the days that OpenRouter tells of with ours, newest first. Raises DatabaseUnavailable."""
    days = []
    for day in sorted(theirs_usd, reverse=True):
        row = await database.fetchrow("cost_of_day", day)
        days.append(DailyCost(day, row["cost_usd"] if row else Decimal(0), theirs_usd[day]))
    return Reconciliation(days, await waiting_holds(database))


async def waiting_holds(database: Database) -> list[WaitingHold]:
    """Holds that wait for evidence of what they bought, or were given up; the oldest first. Raises DatabaseUnavailable."""
    return [
        WaitingHold(
            AccountId(row["account_id"]),
            row["state"],
            Nano(row["amount_nano"]),
            row["model"],
            row["request_id"],
            row["generation_id"],
            row["created_at"],
        )
        for row in await database.fetch("list_waiting_holds")
    ]


def sum_of(holds: Iterable[WaitingHold]) -> Nano:
    """The most that they may have cost together."""
    return Nano(sum(hold.amount for hold in holds))
