"""The invariants of the ledger (contract C9): each file of `sql/invariants` is a query that must return no rows."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptutor.database.pool import SQL, Database

ROWS_MAX = 20


@dataclass(frozen=True, slots=True)
class Invariant:
    name: str
    meaning: str
    query: str


@dataclass(frozen=True, slots=True)
class Finding:
    invariant: Invariant
    rows: list[dict[str, Any]]
    """The first rows that violate the invariant; empty if it holds."""


def load_invariants(directory: Path = SQL / "invariants") -> list[Invariant]:
    invariants = []
    for path in sorted(directory.glob("*.sql")):
        text = path.read_text(encoding="utf-8")
        comment, _, query = text.partition("\n")
        invariants.append(Invariant(path.stem, comment.removeprefix("-- "), query.strip().rstrip(";")))
    return invariants


async def check(database: Database) -> AsyncIterator[Finding]:
    """Checks every invariant in one snapshot of the database, and yields each result when it is known."""
    async with database.snapshot() as connection:
        for invariant in load_invariants():
            cursor = await connection.cursor(invariant.query)
            yield Finding(invariant, [dict(row) for row in await cursor.fetch(ROWS_MAX)])
