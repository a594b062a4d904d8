"""What all commands share: how they print, how they fail, and how they reach the books."""

import asyncio
import os
import pwd
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from gptutor.config import load
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.database import migrations, pool
from gptutor.database.pool import Database
from gptutor.money.administration import Administration
from gptutor.money.vault import ClosedVault, Vault
from gptutor.server.listener import StartError
from gptutor.server.serve import database_of
from gptutor.telemetry.log_writer import logging_to

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
T = TypeVar("T")

# What is piped into a file or another program is not cut to the width of a screen that is not there.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def with_books(
    work: Callable[[Database], Awaitable[T]], *, begins: bool = False, statement_s: float = 60, idle_s: float = 10
) -> T:
    """Runs `work` on the service's database; the embedded one is started and brought up to date if need be. Where there is none
    yet, only a command that `begins` something makes it. Raises StartError."""
    settings = load.load()
    if not begins:
        _require_database(settings)

    async def run(url: str) -> T:
        if settings.embedded:
            await migrations.migrate(url)
        elif pending := await migrations.pending_migrations(url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
        async with pool.open_database(url, statement_s=statement_s, idle_s=idle_s) as books:
            return await work(books)

    with database_of(settings) as grounded:
        return asyncio.run(run(grounded.database.url))


def with_administration(work: Callable[[Administration], Awaitable[T]], *, changes: bool = True, begins: bool = False) -> T:
    """Runs `work` for the one at the keyboard. Where it `changes` something, its audit lines are in the service's own log when
    this returns. Raises ConfigError, and as `with_books`."""
    settings = load.load()
    if not begins:
        _require_database(settings)  # before a secret or a log is made in the wrong folder
    vault = _vault_of(settings)
    lines = logging_to(settings.paths.logs, level="warning", retention_days=settings.logs.retention_days, stdout=False)
    with lines if changes else nullcontext():
        return with_books(lambda books: work(Administration(books, vault, f"cli:{os_user()}")), begins=begins)


def _require_database(settings: Config) -> None:
    """A command in the wrong folder would find empty books, and believe them. Raises StartError."""
    beginning = embedded_place(settings) / "PG_VERSION"
    if settings.embedded and not beginning.exists():
        raise StartError(
            f"There is no database here: DATABASE_URL is not set, and {beginning} does not exist. Run this in the folder of the "
            "service, where its gptutor.env or its data is; `gptutor serve` and `gptutor user create` begin a new one."
        )


def embedded_place(settings: Config) -> Path:
    """Where the data of the embedded PostgreSQL is, or would be."""
    return (settings.paths.data / "postgres").resolve()


def _vault_of(settings: Config) -> Vault:
    """Most commands neither make nor show a key, and need no secret for what they do."""
    try:
        return Vault(secret_keys(settings))
    except ConfigError as error:
        return ClosedVault(error)


def os_user() -> str:
    """Who runs this process, whatever the environment says."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def progress() -> Progress:
    """A bar on standard error; what is for a file or a program stays clean."""
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err, transient=not err.is_terminal)


def print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def fail(sentence: str) -> NoReturn:
    """An operator's mistake ends in a sentence and exit code 1."""
    err.print(f"[bold red]gptutor:[/] {escape(sentence)}", highlight=False)
    raise SystemExit(1)
