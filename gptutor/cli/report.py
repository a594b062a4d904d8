"""`gptutor report`: what was earned, what it cost, and the margin."""

import datetime
import sys
from decimal import Decimal
from typing import Annotated

import typer
from rich.table import Table

from gptutor.cli.arguments import day
from gptutor.cli.console import Json, fail, out, print_json, shown, with_database
from gptutor.config.load import load
from gptutor.money.amounts import InvalidAmount
from gptutor.money.report import RATE_MAX, By, Report, ReportRow, parse_rate, report, report_csv, report_json, value_texts

report_app = typer.Typer()

REPORT_S = 600


@report_app.command("report")
def report_command(
    first: Annotated[
        datetime.date | None,
        typer.Option("--from", parser=day, metavar="DAY", help="The first day (UTC); by default this month's."),
    ] = None,
    last: Annotated[
        datetime.date | None,
        typer.Option("--to", parser=day, metavar="DAY", help="The last day (UTC), included; by default today."),
    ] = None,
    by: Annotated[By, typer.Option(help="What the rows are.")] = "day",
    cost_rub_per_usd: Annotated[
        str | None,
        typer.Option(metavar="ROUBLES", help="What a dollar costs you, for the margin; by default billing.cost_rub_per_usd."),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json: Json = False,
) -> None:
    """Show the roubles that were charged, the dollars that OpenRouter charged for them, and the margin."""
    today = datetime.datetime.now(datetime.UTC).date()
    to_day = last or today
    from_day = first or min(today, to_day).replace(day=1)
    if from_day > to_day:
        fail("--from must not be later than --to.")
    rate = load().billing.cost_rub_per_usd if cost_rub_per_usd is None else _rate(cost_rub_per_usd)
    found = with_database(lambda database: report(database, from_day, to_day, by, rate or None), statement_s=REPORT_S)
    if json:
        print_json(report_json(found))
    elif csv:
        with out.written():
            sys.stdout.reconfigure(newline="")  # type: ignore[union-attr]
            sys.stdout.write(report_csv(found))
            sys.stdout.flush()
    else:
        _print(found)


def _rate(text: str) -> Decimal:
    try:
        return parse_rate(text)
    except InvalidAmount:
        fail(f"--cost-rub-per-usd must be a number such as 82.5, up to {RATE_MAX}.")


def _print(found: Report) -> None:
    heads = ("user", "name") if found.by == "user" else (found.by,)
    columns = ("requests", "prompt tokens", "output tokens", "earned ₽", "paid $", "paid ₽", "margin ₽", "margin %")
    table = Table(*heads, *columns, show_footer=True)
    for column in table.columns[len(heads) :]:
        column.justify = "right"
        column.no_wrap = True
    for row in found.rows:
        names = (str(row.account_id), shown(row.label or "")) if found.by == "user" else (shown(row.label or ""),)
        table.add_row(*names, *_cells(row))
    for column, total in zip(table.columns[len(heads) :], _cells(found.total), strict=True):
        column.footer = total
    table.columns[0].footer = "total"
    out.print(table)
    if not found.is_complete:
        out.print(f"Only the first {len(found.rows)} rows are shown; the total is of all.", highlight=False)
    if found.cost_rub_per_usd is None:
        out.print("There is no margin without the cost of a dollar: set billing.cost_rub_per_usd, or give --cost-rub-per-usd.")


def _cells(row: ReportRow) -> list[str]:
    return [text or "" for text in value_texts(row)]
