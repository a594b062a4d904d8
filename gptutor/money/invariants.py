"""The invariants of the ledger (contract C9): each file of `sql/invariants` is a query that must return no rows."""

import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from gptutor.database.pool import Database
from gptutor.database.statements import SQL
from gptutor.money.amounts import decimal_text
from gptutor.money.records import timestamp

ROWS_MAX = 20


@dataclass(frozen=True, slots=True)
class Invariant:
    name: str
    meaning: str
    query: str

    @property
    def remedy(self) -> str:
        """Where the guide says what to do if it is broken: the page and the anchor."""
        return f"troubleshooting#{self.name}"


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


def rows_json(finding: Finding) -> list[dict[str, Any]]:
    """Amounts in nano-roubles and decimals are plain texts, as many programs read long numbers inexactly."""
    return [{name: _value(name, value) for name, value in row.items()} for row in finding.rows]


def finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.invariant.name,
        "meaning": finding.invariant.meaning,
        "is_broken": bool(finding.rows),
        "rows": rows_json(finding),
        "remedy": finding.invariant.remedy,
    }


def findings_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "broken": sum(bool(finding.rows) for finding in findings),
        "invariants": [finding_json(finding) for finding in findings],
    }


def _value(name: str, value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return timestamp(value)
    if isinstance(value, Decimal):
        return decimal_text(value)
    is_plain = value is None or isinstance(value, bool) or (isinstance(value, int) and not name.endswith("_nano"))
    return value if is_plain else str(value)


async def check(database: Database) -> AsyncIterator[Finding]:
    """Checks every invariant in one snapshot of the database, and yields each result when it is known."""
    async with database.snapshot() as connection:
        for invariant in load_invariants():
            cursor = await connection.cursor(invariant.query)
            yield Finding(invariant, [dict(row) for row in await cursor.fetch(ROWS_MAX)])
