"""`gptutor export ledger`: all ledger entries as CSV or JSON lines, in constant memory."""

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from gptutor.cli.arguments import day, row_id
from gptutor.cli.console import err, fail, progress, with_database
from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId
from gptutor.money.bookings import Bookings
from gptutor.money.records import csv_header, csv_lines, json_lines
from gptutor.money.users import UserRepository

EXPORT_S = 86_400
"""The most that one export may take: a pager that reads the output may pause for hours."""

export_app = typer.Typer(help="Export the ledger.", no_args_is_help=True)


@export_app.callback()
def export() -> None:
    """Export the ledger."""


@export_app.command("ledger")
def export_ledger(
    first: Annotated[
        datetime.date | None, typer.Option("--from", parser=day, metavar="DAY", help="The first day (UTC), such as 2026-01-31.")
    ] = None,
    last: Annotated[
        datetime.date | None, typer.Option("--to", parser=day, metavar="DAY", help="The last day (UTC), included.")
    ] = None,
    user: Annotated[
        int | None, typer.Option(parser=row_id("the user's id"), metavar="ID", help="The entries of one user only.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--out", help="A file instead of standard output; the file appears when it is complete.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON lines, one for each entry.")] = False,
) -> None:
    """Write the ledger as CSV, or as JSON lines, by user and time, from one snapshot of the database."""
    if first and last and first > last:
        fail("--from must not be later than --to.")
    account = None if user is None else AccountId(user)

    async def run(database: Database) -> int:
        count = 0
        if account is not None:
            await UserRepository(database).find(account)
        pages = Bookings(database).export(first, last, account)
        with _output(file) as target, progress() as bar:
            task = bar.add_task("entries", total=None)
            if not json:
                target.write(csv_header())
            async for entries in pages:
                target.write(json_lines(entries).decode() if json else csv_lines(entries))
                count += len(entries)
                bar.update(task, completed=count)
        return count

    count = with_database(run, statement_s=EXPORT_S, idle_s=EXPORT_S)
    err.print(f"{count} entries.", highlight=False)


@contextmanager
def _output(file: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is renamed to its name when it is complete."""
    if file is None:
        sys.stdout.reconfigure(newline="")  # type: ignore[union-attr]
        yield sys.stdout
        sys.stdout.flush()
        return
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8", newline="") as target:
        yield target
    part.replace(file)
