"""The statements that a database carries out: counted, held up, lost."""

import asyncio
from typing import Any

import pytest

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database


class Statements:
    """Counts a database's statements, and can hold one up, or lose its reply, as a network does."""

    def __init__(self, books: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        self.let_in = asyncio.Event()
        self.let_in.set()
        self.lost_requests: list[str] = []
        self.lost_replies: list[str] = []
        self._fetch = books.fetch
        monkeypatch.setattr(books, "fetch", self.fetch)

    async def fetch(self, statement: str, *arguments: Any) -> Any:
        self.seen.append((statement, max((len(each) for each in arguments if isinstance(each, list)), default=0)))
        if statement in self.lost_requests:
            self.lost_requests.remove(statement)
            raise DatabaseUnavailable("the request was lost")
        if statement == "settle_and_hold":
            await self.let_in.wait()
        rows = await self._fetch(statement, *arguments)
        if statement in self.lost_replies:
            self.lost_replies.remove(statement)
            raise DatabaseUnavailable("the reply was lost")
        return rows

    def count(self, statement: str) -> int:
        return sum(name == statement for name, _ in self.seen)
