"""Compares our charges with OpenRouter's own totals, day by day: a difference is a lost or a doubled charge (contract C9).

Small differences at midnight are not losses: OpenRouter counts a request on the day it finishes, and we on the day we book it.
"""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano, roubles


@dataclass(frozen=True, slots=True)
class DailyCost:
    """The costs of one UTC day in dollars: by our ledger, and by OpenRouter."""

    day: datetime.date
    ours_usd: Decimal
    openrouter_usd: Decimal

    @property
    def difference_usd(self) -> Decimal:
        return self.openrouter_usd - self.ours_usd


@dataclass(frozen=True, slots=True)
class WaitingHold:
    """A hold without evidence of its cost, open or given up. `amount` is the most that the request may have cost."""

    account_id: AccountId
    state: str
    amount: Nano
    model: str
    request_id: str
    generation_id: str | None
    created_at: datetime.datetime

    def as_json(self) -> dict[str, Any]:
        return {
            "userId": self.account_id,
            "state": self.state,
            "atMost": roubles(self.amount),
            "model": self.model,
            "requestId": self.request_id,
            "generationId": self.generation_id,
            "createdAt": self.created_at,
        }


@dataclass(frozen=True, slots=True)
class Reconciliation:
    days: list[DailyCost]
    waiting: list[WaitingHold]

    @property
    def waiting_cost_max(self) -> Nano:
        return cost_max(self.waiting)

    def as_json(self) -> dict[str, Any]:
        return {
            "days": [
                {
                    "day": day.day.isoformat(),
                    "oursUsd": f"{day.ours_usd:f}",
                    "openrouterUsd": f"{day.openrouter_usd:f}",
                    "differenceUsd": f"{day.difference_usd:f}",
                }
                for day in self.days
            ],
            "waiting": [hold.as_json() for hold in self.waiting],
            "waitingAtMost": roubles(self.waiting_cost_max),
        }


async def reconcile(database: Database, openrouter_usd: Mapping[datetime.date, Decimal]) -> Reconciliation:
    """Compares the UTC days for which OpenRouter gives a total, newest first. Raises DatabaseUnavailable."""
    days = []
    for day in sorted(openrouter_usd, reverse=True):
        row = await database.fetchrow("cost_of_day", day)
        days.append(DailyCost(day, row["cost_usd"] if row else Decimal(0), openrouter_usd[day]))
    return Reconciliation(days, await waiting_holds(database))


async def waiting_holds(database: Database) -> list[WaitingHold]:
    """Holds that wait for evidence of their cost, or that recovery gave up; oldest first. Raises DatabaseUnavailable."""
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


def cost_max(holds: Iterable[WaitingHold]) -> Nano:
    """The most that these holds may cost together."""
    return Nano(sum(hold.amount for hold in holds))
