"""What was earned and what it cost, by day, month, model or user: exact sums of charges, and the margin at the operator's rate.

Only charges count. Money that was given (bonuses) or corrected is spent by charges like any other; requests whose cost was never
learnt are in no sum: `gptutor holds` lists them.
"""

import csv
import datetime
import io
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import EXACT, NANO_PER_RUB, AccountId, InvalidAmount, decimal_text, parse_decimal
from gptutor.money.records import csv_cell

By = Literal["day", "month", "model", "user"]
GROUPINGS: tuple[By, ...] = ("day", "month", "model", "user")
ROWS_MAX = 10_000
RATE_MAX = 100_000
CENT = Decimal("0.01")
CSV_COLUMNS = (
    *("requests", "prompt_tokens", "completion_tokens", "earned_rub", "paid_usd"),
    *("paid_rub", "margin_rub", "margin_percent"),
)


def parse_rate(text: str) -> Decimal:
    """What a dollar costs the operator, in roubles. Raises InvalidAmount."""
    rate = parse_decimal(text)
    if not 0 < rate <= RATE_MAX:
        raise InvalidAmount(f"{text[:40]!r} is not a rate")
    return rate


@dataclass(frozen=True, slots=True)
class ReportRow:
    """`earned_rub` was charged, `paid_usd` is what OpenRouter charged us. `paid_rub` and the margin are None without a cost rate.

    `label` is the day, the month (2026-11) or the model; of a user, the name, beside `account_id`. Unknown token counts are left
    out.
    """

    account_id: AccountId | None
    label: str | None
    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None
    earned_rub: Decimal
    paid_usd: Decimal
    paid_rub: Decimal | None

    @property
    def margin_rub(self) -> Decimal | None:
        return None if self.paid_rub is None else EXACT.subtract(self.earned_rub, self.paid_rub)

    @property
    def margin_percent(self) -> Decimal | None:
        """Of what was earned, rounded half up to two places; None if that is nothing."""
        margin = self.margin_rub
        if margin is None or not self.earned_rub:
            return None
        return EXACT.divide(EXACT.multiply(margin, Decimal(100)), self.earned_rub).quantize(CENT, ROUND_HALF_UP, EXACT)


@dataclass(frozen=True, slots=True)
class Report:
    """`total` is of all charges, whether their rows fit into ROWS_MAX (`is_complete`) or not."""

    by: By
    first: datetime.date
    last: datetime.date
    cost_rub_per_usd: Decimal | None
    total: ReportRow
    rows: list[ReportRow]
    is_complete: bool


async def report(
    database: Database, first: datetime.date, last: datetime.date, by: By, cost_rub_per_usd: Decimal | None, limit: int = ROWS_MAX
) -> Report:
    """The charges that were booked on the UTC days from `first` to `last`. `cost_rub_per_usd`: what a dollar costs the operator.

    Raises DatabaseUnavailable.
    """
    total, *rows = [_row_of(row, cost_rub_per_usd) for row in await database.fetch("report_charges", first, last, by, limit + 1)]
    return Report(by, first, last, cost_rub_per_usd, total, rows[:limit], len(rows) <= limit)


def _row_of(row: Row, cost_rub_per_usd: Decimal | None) -> ReportRow:
    paid_usd: Decimal = row["cost_usd"]
    return ReportRow(
        account_id=None if row["account_id"] is None else AccountId(row["account_id"]),
        label=row["account_name"] if row["account_id"] is not None else row["label"],
        requests=row["requests"],
        prompt_tokens=None if row["prompt_tokens"] is None else int(row["prompt_tokens"]),
        completion_tokens=None if row["completion_tokens"] is None else int(row["completion_tokens"]),
        earned_rub=EXACT.divide(row["charge_nano"], Decimal(NANO_PER_RUB)),
        paid_usd=paid_usd,
        paid_rub=None if cost_rub_per_usd is None else EXACT.multiply(paid_usd, cost_rub_per_usd),
    )


# -- as JSON and CSV


def report_json(found: Report) -> dict[str, Any]:
    return {
        "by": found.by,
        "from": found.first.isoformat(),
        "to": found.last.isoformat(),
        "cost_rub_per_usd": _text(found.cost_rub_per_usd),
        "rows": [{**_names(found.by, row), **_values(row)} for row in found.rows],
        "total": _values(found.total),
        "is_complete": found.is_complete,
    }


def report_csv(found: Report) -> str:
    """A line for each row, and the total as the last one."""
    text = io.StringIO()
    writer = csv.writer(text)
    heads = ("user_id", "user_name") if found.by == "user" else (found.by,)
    writer.writerow((*heads, *CSV_COLUMNS))
    for row in found.rows:
        names = (csv_cell(name) if isinstance(name, str) else name for name in _names(found.by, row).values())
        writer.writerow((*names, *_values(row).values()))
    writer.writerow(("total", *[""] * (len(heads) - 1), *_values(found.total).values()))
    return text.getvalue()


def value_texts(row: ReportRow) -> list[str | None]:
    """In the order of CSV_COLUMNS."""
    return [None if value is None else str(value) for value in _values(row).values()]


def _names(by: By, row: ReportRow) -> dict[str, Any]:
    return {"user_id": row.account_id, "user_name": row.label} if by == "user" else {by: row.label}


def _values(row: ReportRow) -> dict[str, Any]:
    """In the order of CSV_COLUMNS."""
    return {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "earned_rub": _text(row.earned_rub),
        "paid_usd": _text(row.paid_usd),
        "paid_rub": _text(row.paid_rub),
        "margin_rub": _text(row.margin_rub),
        "margin_percent": _text(row.margin_percent),
    }


def _text(number: Decimal | None) -> str | None:
    """Without trailing zeros: a product with the rate has many."""
    if number is None:
        return None
    text = decimal_text(number)
    return text.rstrip("0").rstrip(".") if "." in text and "E" not in text else text
