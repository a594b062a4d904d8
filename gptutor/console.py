"""What all commands share: how they print, how they fail, and how they reach the books."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from gptutor import config, database
from gptutor.database import Database
from gptutor.listener import StartError
from gptutor.money.vault import Vault
from gptutor.serve import database_of

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
T = TypeVar("T")

# What is piped into a file or another program is not cut to the width of a screen that is not there.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def with_books(work: Callable[[Database], Awaitable[T]], *, statement_s: float = 60) -> T:
    """Runs `work` on the service's database; the embedded one is started and brought up to date if need be."""
    settings = config.load()

    async def run(url: str) -> T:
        if settings.embedded:
            await database.migrate(url)
        elif pending := await database.pending_migrations(url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
        async with database.connected(url, statement_s=statement_s) as books:
            return await work(books)

    with database_of(settings) as grounded:
        return asyncio.run(run(grounded.database.url))


def vault() -> Vault:
    """For the keys that this command makes or shows. Raises ConfigError."""
    return Vault(config.load().secret_keys())


def print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def fail(sentence: str) -> NoReturn:
    """An operator's mistake ends in a sentence and exit code 1."""
    err.print(f"[bold red]gptutor:[/] {escape(sentence)}", highlight=False)
    raise SystemExit(1)
