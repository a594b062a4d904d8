"""The command line (contract F10): the only place that reads arguments and prints for people.

Every command that touches the books finds the database as the service does, so it works beside a running service and alone.
"""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import typer

from gptutor.cli.console import Json, embedded_place, fail, out, print_json, progress, with_administration, with_books
from gptutor.cli.export import export_app
from gptutor.cli.keys import keys_app
from gptutor.cli.users import user_app
from gptutor.config import load
from gptutor.config.schema import Config, ConfigError
from gptutor.database import migrations
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.administration import Administration, ReasonMissing
from gptutor.money.amounts import InvalidAmount, roubles
from gptutor.money.bookings import AlreadyBooked, Uncovered
from gptutor.money.invariants import check, load_invariants
from gptutor.money.journal import JournalError
from gptutor.money.key_limits import InvalidLimit
from gptutor.money.keyring import KEYS_MAX, NoSuchKey, TooManyKeys
from gptutor.money.reconciliation import WaitingHolds, reconcile, waiting_holds
from gptutor.money.users import NoSuchUser
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.totals import totals
from gptutor.server.listener import StartError
from gptutor.server.serve import database_of, run_loop, serve, simulated_openrouter
from gptutor.simulator.server import Simulator

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
user_app.add_typer(keys_app)
app.add_typer(user_app, name="user")
app.add_typer(export_app, name="export")


# Errors whose text is a sentence for the operator.
SENTENCES = (
    *(ConfigError, StartError, JournalError, migrations.MigrationError, DatabaseRefused),
    *(InvalidAmount, InvalidLimit, ReasonMissing),
)


def main() -> None:
    """The entry point: an operator's mistake ends in a sentence and exit code 1, never in a traceback."""
    if any(argument.encode("utf-8", "replace").decode() != argument for argument in sys.argv):
        fail("An argument is not UTF-8 text.")
    try:
        app()
    except SENTENCES as error:
        fail(str(error))
    except NoSuchUser:
        fail("There is no user with this id. `gptutor user list` shows them all.")
    except NoSuchKey:
        fail("The user has no living key of this number. `gptutor user keys ID` shows them.")
    except TooManyKeys:
        fail(f"The user has {KEYS_MAX} living keys already; revoke one first.")
    except Uncovered:
        fail("Less is available than this refund would take. `gptutor user adjust` can take more.")
    except AlreadyBooked as error:
        fail(f"The reference {error} was booked before; nothing was changed.")
    except DatabaseUnavailable as error:
        fail(f"PostgreSQL does not answer: {error.__cause__ or error}")
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename} cannot be used: {error.strerror}.")


# -- the service


@app.command("serve")
def serve_command() -> None:
    """Run the service."""
    settings = load.load()
    if settings.server.workers == 1:
        run_loop(serve(settings))
    else:
        from gptutor.server import workers

        workers.serve(settings)


@app.command()
def migrate() -> None:
    """Bring the database up to date."""
    settings = load.load()
    with database_of(settings) as grounded:
        applied = asyncio.run(migrations.migrate(grounded.database.url))
    embedded = f"embedded PostgreSQL in {embedded_place(settings)}" if settings.embedded else ""
    done = f"Applied to the {embedded}: " if embedded else "Applied: "
    rest = f"The {embedded or 'database'} is up to date."
    out.print(done + ", ".join(applied) if applied else rest, highlight=False, markup=False)


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

    _until_interrupted(run(load.load()))


@app.command()
def docs() -> None:
    """Serve the documentation."""
    from gptutor.web.site import documentation

    async def run(settings: Config) -> None:
        async with documentation(settings) as url:
            out.print(f"The documentation is at {url}")
            await asyncio.Event().wait()

    _until_interrupted(run(load.load()))


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
    settings = load.load()
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
    _print_waiting(WaitingHolds(found.waiting, found.waiting_count, found.at_most))


@app.command("holds")
def holds_command(json: Json = False) -> None:
    """List the holds whose cost is not known: they wait for evidence, or were given up."""
    waiting = with_books(waiting_holds)
    if json:
        print_json(
            {
                "waiting": [hold.as_json() for hold in waiting.oldest],
                "waitingCount": waiting.count,
                "waitingAtMost": roubles(waiting.at_most),
            }
        )
    else:
        _print_waiting(waiting)


@app.command("rekey")
def rekey_command(json: Json = False) -> None:
    """Seal the copies of all keys with GPTUTOR_SECRET_KEY anew, after it was changed. May be broken off, and run again."""

    async def run(administration: Administration) -> tuple[int, int]:
        done = unreadable = 0
        with progress() as bar:
            task = bar.add_task("keys", total=await administration.stale_copies())
            async for done, unreadable in administration.rekey():
                bar.update(task, completed=done + unreadable)
        return done, unreadable

    done, unreadable = with_administration(run)
    if json:
        print_json({"done": done, "unreadable": unreadable})
        return
    if done or unreadable:
        none_left = "" if unreadable else "; none is left under an old one"
        out.print(f"{done} copies were sealed anew with today's secret{none_left}.")
    else:
        out.print("No copy is under an old secret.")
    if unreadable:
        out.print(
            f"{unreadable} copies are opened by no known secret: is one missing in security.old_secret_keys? Their keys go on "
            "working, but cannot be shown any more."
        )


def _print_waiting(waiting: WaitingHolds) -> None:
    out.print(f"{waiting.count} holds wait for evidence, or were given up; together at most {roubles(waiting.at_most)} roubles:")
    for hold in waiting.oldest:
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
