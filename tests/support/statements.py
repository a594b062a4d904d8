"""The statements of a database: counted, delayed, lost."""

import asyncio
from typing import Any

import pytest

from gptutor.database.errors import ConstraintViolated, DatabaseUnavailable
from gptutor.database.pool import Database

OF_RECOVERY = frozenset({"claim_due_holds", "clear_idempotency_keys", "clear_marks", "find_hold_states", "find_position"})
"""Statements that recovery sends by itself, at any time."""


class Statements:
    """Counts the statements of a database, and can delay one, or lose its request or its response, as a network may."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.lost_requests: list[str] = []
        self.lost_responses: list[str] = []
        self.rejected: list[str] = []
        self._fetch = database.fetch
        monkeypatch.setattr(database, "fetch", self.fetch)

    async def fetch(self, statement: str, *arguments: Any) -> Any:
        self.seen.append((statement, max((len(each) for each in arguments if isinstance(each, list)), default=0)))
        if statement in self.lost_requests:
            self.lost_requests.remove(statement)
            raise DatabaseUnavailable("the request was lost")
        if statement in self.rejected:
            self.rejected.remove(statement)
            raise ConstraintViolated("a_constraint")
        if statement == "settle_and_hold":
            await self.unblocked.wait()
        rows = await self._fetch(statement, *arguments)
        if statement in self.lost_responses:
            self.lost_responses.remove(statement)
            raise DatabaseUnavailable("the response was lost")
        return rows

    @property
    def of_requests(self) -> list[str]:
        """The names of all statements but recovery's."""
        return [name for name, _ in self.seen if name not in OF_RECOVERY]

    def count(self, statement: str) -> int:
        return sum(name == statement for name, _ in self.seen)
