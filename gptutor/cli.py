"""The command line (contract F10): the only place that reads arguments and prints for people.

Every command that touches the books finds the database as the service does, so it works beside a running service and alone.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import typer

from gptutor import config, database
from gptutor.cli_users import user_app
from gptutor.console import Json, fail, out, print_json, with_books
from gptutor.database import Database
from gptutor.listener import StartError
from gptutor.money.amounts import InvalidAmount, roubles
from gptutor.money.bookings import AlreadyBooked
from gptutor.money.invariants import check, load_invariants
from gptutor.money.journal import JournalError
from gptutor.money.reconciliation import reconcile
from gptutor.money.users import NoSuchUser
from gptutor.openrouter.rim import UpstreamError
from gptutor.openrouter.simulator.server import Simulator
from gptutor.openrouter.totals import totals
from gptutor.serve import database_of, serve, simulated_openrouter
from gptutor.settings import Config, ConfigError

app = typer.Typer(
    name="gptutor",
    help="GPTutor: a prepaid, exactly billed OpenAI-compatible gateway in front of OpenRouter.\n\n"
    "Start with `gptutor serve`: without any settings it runs whole, with an embedded PostgreSQL and a simulated OpenRouter. "
    "Then `gptutor user create --balance 100` makes a user with an API key.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(user_app, name="user")


def main() -> None:
    """The entry point: an operator's mistake ends in a sentence and exit code 1, never in a traceback."""
    try:
        app()
    except (ConfigError, StartError, InvalidAmount, JournalError, database.MigrationError, database.DatabaseRefused) as error:
        fail(str(error))
    except PermissionError as error:
        fail(f"{error.filename} cannot be used: {error.strerror}.")
    except NoSuchUser:
        fail("There is no user with this id. `gptutor user list` shows them all.")
    except AlreadyBooked as error:
        fail(f"The reference {error} was booked before; nothing was changed.")
    except database.DatabaseUnavailable as error:
        fail(f"PostgreSQL does not answer: {error.__cause__ or error}")


# -- the service


@app.command("serve")
def serve_command() -> None:
    """Run the service."""
    asyncio.run(serve(config.load()))


@app.command()
def migrate() -> None:
    """Bring the database up to date."""
    with database_of(config.load()) as settings:
        applied = asyncio.run(database.migrate(settings.database.url))
    out.print(f"Applied: {', '.join(applied)}" if applied else "The database is up to date.")


@app.command()
def simulator() -> None:
    """Run the OpenRouter simulator alone."""

    async def run(settings: Config) -> None:
        pace = settings.simulator
        simulator = Simulator(word_s=pace.word_s, first_word_s=pace.first_word_s)
        async with simulated_openrouter(simulator, pace) as base_url:
            out.print(f"A simulated OpenRouter answers at {base_url}; its own bills are at {base_url[:-7]}/simulator/bills")
            out.print(f"Use it with: OPENROUTER_BASE_URL={base_url} OPENROUTER_API_KEY=sk-or-simulator gptutor serve")
            await asyncio.Event().wait()

    _until_interrupted(run(config.load()))


@app.command()
def docs() -> None:
    """Serve the documentation."""
    from gptutor.web.site import documentation

    async def run(settings: Config) -> None:
        async with documentation(settings) as url:
            out.print(f"The documentation is at {url}")
            await asyncio.Event().wait()

    _until_interrupted(run(config.load()))


@app.command()
def verify() -> None:
    """Prove the books: every invariant, over one snapshot. Exits with 1 and the offending rows if one is broken."""

    async def run(books: Database) -> int:
        broken = number = 0
        total = len(load_invariants())
        async for finding in check(books):
            number += 1
            mark = "[red]BROKEN[/]" if finding.rows else "[green]ok[/]"
            out.print(f"{number:>3}/{total} {mark:<6} {finding.invariant.meaning}", highlight=False)
            for row in finding.rows:
                out.print("        " + ", ".join(f"{name}={value}" for name, value in row.items()), highlight=False, markup=False)
            broken += bool(finding.rows)
        out.print(f"{broken} of {total} invariants are broken." if broken else f"All {total} invariants hold.")
        return 1 if broken else 0

    if code := with_books(run, statement_s=86_400):
        raise typer.Exit(code)


@app.command("reconcile")
def reconcile_command(json: Json = False) -> None:
    """Compare our charges with OpenRouter's own totals, by day, and list the holds whose cost is not known."""
    settings = config.load()
    if settings.simulated:
        fail("There is nothing to compare: OPENROUTER_API_KEY is not set.")
    try:
        upstream = settings.openrouter
        theirs = asyncio.run(totals(upstream.base_url, upstream.api_key, upstream.management_key, proxy=upstream.proxy))
    except UpstreamError as error:
        fail(f"OpenRouter does not tell its totals: {error}.")
    found = with_books(lambda books: reconcile(books, theirs))
    if json:
        print_json(found.as_json())
        return
    for day in found.days:
        out.print(f"{day.day}  ours {day.ours_usd:f}  OpenRouter {day.theirs_usd:f}  difference {day.difference_usd:f} dollars")
    out.print(
        f"{len(found.waiting)} holds wait for evidence, or were given up; together at most {roubles(found.at_most)} roubles:"
    )
    for hold in found.waiting:
        out.print(
            f"  user {hold.account_id}  {hold.created_at:%Y-%m-%d %H:%M}  {hold.state}  at most {roubles(hold.amount)} roubles  "
            f"{hold.model}  {hold.generation_id or 'no name'}  request {hold.request_id}",
            highlight=False,
            markup=False,
        )


def _until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        out.print("Stopped.")
