"""`gptutor export ledger`: all entries as CSV, however many there are."""

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from gptutor.cli.console import err, fail, progress, with_books
from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId
from gptutor.money.bookings import Bookings
from gptutor.money.records import csv_head, csv_lines
from gptutor.money.users import UserRepository

DAY = ["%Y-%m-%d"]
READER_S = 86_400
"""For so long may a reader, such as a pager, leave the snapshot waiting."""

export_app = typer.Typer(help="Export the books.", no_args_is_help=True)


@export_app.callback()
def export() -> None:
    """Export the books."""


@export_app.command("ledger")
def export_ledger(
    first: Annotated[datetime.datetime | None, typer.Option("--from", formats=DAY, help="The first day (UTC).")] = None,
    last: Annotated[datetime.datetime | None, typer.Option("--to", formats=DAY, help="The last day (UTC), included.")] = None,
    user: Annotated[int | None, typer.Option(min=1, max=2**63 - 1, help="One user only.")] = None,
    file: Annotated[
        Path | None, typer.Option("--out", help="A file instead of standard output; it is complete if it exists.")
    ] = None,
) -> None:
    """Write the ledger as CSV, by user and time, from one snapshot of the database."""
    if first and last and first > last:
        fail("--from must not be later than --to.")
    account = None if user is None else AccountId(user)

    async def run(books: Database) -> int:
        count = 0
        if account is not None:
            await UserRepository(books).find(account)
        pages = Bookings(books).export(first.date() if first else None, last.date() if last else None, account)
        with _opened(file) as target, progress() as bar:
            task = bar.add_task("entries", total=None)
            target.write(csv_head())
            async for entries in pages:
                target.write(csv_lines(entries))
                count += len(entries)
                bar.update(task, completed=count)
        return count

    count = with_books(run, statement_s=READER_S, idle_s=READER_S)
    err.print(f"{count} entries.", highlight=False)


@contextmanager
def _opened(file: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name when it is whole."""
    if file is None:
        sys.stdout.reconfigure(newline="")  # type: ignore[union-attr]
        yield sys.stdout
        sys.stdout.flush()
        return
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8", newline="") as target:
        yield target
    part.replace(file)
