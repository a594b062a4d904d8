"""What the commands share: printing, errors, and access to the service's database."""

import asyncio
import os
import pwd
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.database import migrations, pool
from gptutor.database.pool import Database
from gptutor.money.administration import Administration
from gptutor.money.vault import Vault, VaultWithoutSecret
from gptutor.server.listener import StartError
from gptutor.server.serve import resolved_database
from gptutor.telemetry.log_writer import logging_to, require_room
from gptutor.text import escaped, escaped_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
T = TypeVar("T")
caller: str | None = None
"""Who runs this command as the service's user, where that is known (`as_service.py`)."""


class ResultConsole(Console):
    """Standard output. After a change was made, a failure to print its result is no failure of the command."""

    has_changed = False
    """Whether this command has changed something, so that it must not look as if it could be repeated."""

    def print(self, *objects: Any, **options: Any) -> None:
        with self.written():
            super().print(*objects, **options)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around a write to standard output and its flush. Raises OSError, or SystemExit 0 after a change."""
        try:
            yield
        except OSError as error:
            if not self.has_changed:
                raise
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - what is buffered is lost, and must not fail again
            warn(f"The change was made, but its result could not be printed ({error.strerror}). Do not repeat the command.")
            raise SystemExit(0) from error


# Output that is piped into a file or a program has no terminal whose width could limit it.
out = ResultConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def with_database(
    work: Callable[[Database], Awaitable[T]], *, may_create: bool = False, statement_s: float = 60, idle_s: float = 10
) -> T:
    """Runs `work` on the service's database. The embedded one is started and migrated first, if it is not running.

    An embedded database that does not exist yet is created only if `may_create`. Raises StartError.
    """
    settings = load()
    if not may_create:
        _require_database(settings)

    async def run(url: str) -> T:
        if settings.embedded:
            await migrations.migrate(url, accept_newer=True)
        elif pending := await migrations.pending_migrations(url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
        async with pool.open_database(url, statement_s=statement_s, idle_s=idle_s) as database:
            return await work(database)

    with resolved_database(settings) as resolved:
        return asyncio.run(run(resolved.database.url))


def with_administration(
    work: Callable[[Administration], Awaitable[T]], *, read_only: bool = False, may_create: bool = False
) -> T:
    """Runs `work` in the name of the operating-system user. Unless it is `read_only`, its audit lines are in the service's log
    when this returns: nothing is changed if the disk is full, and if it fills up meanwhile, a sentence says what happened.

    Raises ConfigError, OSError, and as `with_database`.
    """
    settings = load()
    if not may_create:
        _require_database(settings)  # before a secret or a log file is created in the wrong folder
    vault = _vault(settings)
    lost: list[Exception] = []
    log = logging_to(
        settings.paths.logs,
        level="warning",
        retention_days=settings.logs.retention_days,
        bytes_max=settings.logs.bytes_max,
        file_bytes_max=settings.logs.file_bytes_max,
        stdout=False,
        on_lost=lost.append,
    )
    with nullcontext() if read_only else log:
        if not read_only:
            require_room(settings.paths.logs)
        result = with_database(lambda database: work(Administration(database, vault, f"cli:{os_user()}")), may_create=may_create)
        out.has_changed = not read_only
    if lost:
        warn(f"The change was made, but its audit line could not be written ({lost[0]}). Do not repeat the command.")
    return result


def _require_database(settings: Config) -> None:
    """A command run in the wrong folder must not create an empty database and report on that. Raises StartError."""
    marker = embedded_directory(settings) / "PG_VERSION"
    if settings.embedded and not marker.exists():
        raise StartError(
            f"There is no database here: DATABASE_URL is not set, and {marker} does not exist. Run this in the folder of the "
            "service, where its gptutor.env or its data is; `gptutor serve` and `gptutor user create` create a new database."
        )


def embedded_directory(settings: Config) -> Path:
    """Where the data of the embedded PostgreSQL is, or would be."""
    return (settings.paths.data / "postgres").resolve()


def _vault(settings: Config) -> Vault:
    """Most commands neither make nor show a key: without a valid secret they work all the same."""
    try:
        return Vault(secret_keys(settings))
    except ConfigError as error:
        return VaultWithoutSecret(error)


def os_user() -> str:
    """The user that this process runs as, by its uid: the environment is not trusted."""
    if caller is not None:
        return caller
    uid = os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def progress() -> Progress:
    """A progress bar on standard error, so that standard output has nothing but the result."""
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err, transient=not err.is_terminal)


def print_json(value: Any) -> None:
    with out.written():
        sys.stdout.buffer.write(escaped_json(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"))
        sys.stdout.buffer.flush()


def shown(text: str) -> str:
    """A text from the database, for `out.print`: it can control neither the terminal nor the markup."""
    return escape(escaped(text))


def warn(sentence: str) -> None:
    """Prints a sentence on standard error, if it can be written to."""
    with suppress(OSError):
        err.print(f"[bold yellow]gptutor:[/] {shown(sentence)}", highlight=False)


def fail(sentence: str) -> NoReturn:
    """Prints an operator's error and exits with code 1."""
    lines = "\n".join(shown(line) for line in sentence.split("\n"))
    err.print(f"[bold red]gptutor:[/] {lines}", highlight=False)
    raise SystemExit(1)
