"""The command line (contract F10): parses arguments and prints for people.

Every command finds the database as the service does, so it works beside a running service and alone.
"""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from gptutor import __version__
from gptutor.cli.alerts import alerts_app
from gptutor.cli.audit import audit_app
from gptutor.cli.check import check_command
from gptutor.cli.console import Json, embedded_directory, fail, out, print_json, progress, with_administration
from gptutor.cli.doctor import doctor
from gptutor.cli.export import export_app
from gptutor.cli.install_service import install_service
from gptutor.cli.keys import keys_app
from gptutor.cli.lost import lost
from gptutor.cli.report import report_app
from gptutor.cli.requests import requests_app
from gptutor.cli.users import user_app
from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.database import migrations
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.money.administration import Administration, ReasonMissing
from gptutor.money.amounts import InvalidAmount
from gptutor.money.bookings import AlreadyBooked, Uncovered
from gptutor.money.journal import JournalError
from gptutor.money.key_limits import InvalidLimit
from gptutor.money.keyring import KEYS_MAX, NoSuchKey, TooManyKeys
from gptutor.money.requests import InvalidId
from gptutor.money.users import NoSuchUser, NotErasable, UserErased
from gptutor.server import workers
from gptutor.server.listener import StartError
from gptutor.server.process import run_loop
from gptutor.server.serve import resolved_database, serve, simulated_openrouter
from gptutor.server.supervisor import Handover
from gptutor.simulator.server import Simulator

app = typer.Typer(
    name="gptutor",
    help="GPTutor: a prepaid, exactly billed OpenAI-compatible gateway in front of OpenRouter.\n\n"
    "Start with `gptutor serve`: without any settings it runs with an embedded PostgreSQL and a simulated OpenRouter. "
    "Then `gptutor user create --balance 100` creates a user with an API key.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
user_app.add_typer(keys_app)
app.add_typer(user_app, name="user")
app.add_typer(export_app, name="export")
app.command()(doctor)
app.command()(lost)
app.add_typer(audit_app)
app.add_typer(report_app)
app.add_typer(requests_app)
app.add_typer(alerts_app, name="alerts")
app.command("install-service")(install_service)
app.command("check")(check_command)


# Errors whose text is written for the operator.
OPERATOR_ERRORS = (
    *(ConfigError, StartError, JournalError, migrations.MigrationError, DatabaseRefused),
    *(InvalidAmount, InvalidId, InvalidLimit, ReasonMissing, NotErasable, UserErased),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"gptutor {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """The entry point: an operator's error is a sentence and exit code 1, never a traceback."""
    if any(argument.encode("utf-8", "replace").decode() != argument for argument in sys.argv):
        fail("An argument is not UTF-8 text.")
    try:
        app()
    except OPERATOR_ERRORS as error:
        fail(str(error))
    except NoSuchUser:
        fail("There is no user with this id. `gptutor user list` shows all users.")
    except NoSuchKey:
        fail("The user has no active key with this id. `gptutor user keys ID` shows all keys of the user.")
    except TooManyKeys:
        fail(f"The user already has {KEYS_MAX} active keys; revoke one first with: gptutor user revoke-key.")
    except Uncovered:
        fail("The refund exceeds the available balance. Refund less, or correct the balance with: gptutor user adjust.")
    except AlreadyBooked as error:
        fail(f"A booking with the reference {error} exists already; nothing was changed.")
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
    if (predecessor := Handover.take()) is not None:
        raise typer.Exit(workers.take_over(predecessor))
    settings = load()
    if workers.needs_master(settings):
        raise typer.Exit(workers.serve(settings))
    run_loop(serve(settings))


@app.command()
def migrate() -> None:
    """Apply pending migrations to the database."""
    settings = load()
    with resolved_database(settings) as resolved:
        applied = asyncio.run(migrations.migrate(resolved.database.url))
    database = f"embedded PostgreSQL in {embedded_directory(settings)}" if settings.embedded else "database"
    message = f"Applied to the {database}: {', '.join(applied)}" if applied else f"The {database} is up to date."
    out.print(message, highlight=False, markup=False)


@app.command()
def simulator() -> None:
    """Run the OpenRouter simulator alone."""

    async def run(settings: Config) -> None:
        speed = settings.simulator
        simulator = Simulator(word_s=speed.word_s, first_word_s=speed.first_word_s)
        async with simulated_openrouter(simulator, speed) as base_url:
            out.print(f"The OpenRouter simulator listens at {base_url}; its bills are at {base_url[:-7]}/simulator/bills")
            out.print(f"Use it with: OPENROUTER_BASE_URL={base_url} OPENROUTER_API_KEY=sk-or-simulator gptutor serve")
            await asyncio.Event().wait()

    _until_interrupted(run(load()))


@app.command()
def docs() -> None:
    """Serve the documentation."""
    from gptutor.web.site import documentation

    async def run(settings: Config) -> None:
        async with documentation(settings) as url:
            out.print(f"The documentation is at {url}")
            await asyncio.Event().wait()

    _until_interrupted(run(load()))


@app.command("rekey")
def rekey_command(json: Json = False) -> None:
    """Encrypt the copies of all keys with the current GPTUTOR_SECRET_KEY, after a change. May be interrupted and repeated."""

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
        none_left = "" if unreadable else "; no copy needs an old secret any more"
        out.print(f"{done} copies were encrypted with the current secret{none_left}.")
    else:
        out.print("All copies are encrypted with the current secret.")
    if unreadable:
        out.print(
            f"{unreadable} copies cannot be decrypted with any configured secret: add the missing one to "
            "security.old_secret_keys. Their keys keep working, but cannot be shown again."
        )


def _until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        out.print("Stopped.")
