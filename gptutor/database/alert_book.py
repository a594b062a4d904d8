"""What is wrong, as all processes have written it down: the typed functions of `sql/queries/alerts.sql`."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from gptutor.database.pool import Database


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that is on."""

    name: str
    text: str
    since: datetime.datetime


@dataclass(frozen=True, slots=True)
class Event:
    """The latest of the events of one name. `count` of them are not told yet; `told_at` is when earlier ones were."""

    name: str
    text: str
    count: int
    told_at: datetime.datetime | None


class AlertBook:
    """An AlertStore (`telemetry/alerts.py`). Its methods raise DatabaseUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, conditions: Mapping[str, str], *, proven_ends: frozenset[str]) -> list[str]:
        names = sorted(conditions)
        rows = await self._database.fetch(
            "write_alerts", names, [conditions[name] for name in names], [name not in proven_ends for name in names]
        )
        return [row["name"] for row in rows if row["is_new"]]

    async def end(self, name: str) -> None:
        await self._database.fetch("end_alert", name)

    async def ended(self, lease_s: float) -> list[tuple[str, datetime.datetime]]:
        return [(row["name"], row["since"]) for row in await self._database.fetch("delete_ended_alerts", lease_s)]

    async def count(self, name: str, text: str, count: int, *, apart_s: float) -> None:
        await self._database.fetch("count_alert_events", name, text, count, apart_s)

    async def due_events(self, least: Mapping[str, int], *, apart_s: float) -> list[tuple[str, str, int]]:
        rows = await self._database.fetch("claim_alert_events", [*least], [*least.values()], apart_s)
        return [(row["name"], row["text"], row["events"]) for row in rows]

    async def conditions(self) -> list[Condition]:
        """Those that are on, the oldest first."""
        rows = await self._database.fetch("list_alerts")
        return [Condition(row["name"], row["text"], row["since"]) for row in rows]

    async def events(self) -> list[Event]:
        """The latest of each name, the latest first."""
        rows = await self._database.fetch("list_alert_events")
        return [Event(row["name"], row["text"], row["events"], row["told_at"]) for row in rows]
