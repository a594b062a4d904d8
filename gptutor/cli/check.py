"""`gptutor check`: whether the service could start now with the settings that are on disk. It changes nothing.

systemd runs it before a start and before a reload, and the service itself at SIGHUP.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from gptutor import __version__
from gptutor.cli.console import err, out, shown
from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.database import migrations
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.money.journal import JOURNALS
from gptutor.server.listener import StartError
from gptutor.server.runners import require_c_parser


def check_command() -> None:
    """Check the settings, the secret, the database and the folders, and change nothing. Exit with 1 if a start would fail."""
    settings = load()
    mistakes = [*_mistakes(settings)]
    warnings: list[str] = []
    if not settings.embedded:
        try:
            if pending := asyncio.run(migrations.pending_migrations(settings.database.url)):
                mistakes.append(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
        except (DatabaseRefused, migrations.MigrationError) as error:
            mistakes.append(str(error))
        except DatabaseUnavailable as error:
            warnings.append(
                f"PostgreSQL does not answer at DATABASE_URL ({error.__cause__ or error}): the service would wait for it."
            )
    for sentence in warnings:
        err.print(f"[bold yellow]warning:[/] {shown(sentence)}", highlight=False)
    for sentence in mistakes:
        err.print(f"[bold red]gptutor:[/] {shown(sentence)}", highlight=False)
    if mistakes:
        raise SystemExit(1)
    out.print(f"GPTutor {__version__}: the service can start with these settings.", highlight=False)


def _mistakes(settings: Config) -> Iterator[str]:
    try:
        require_c_parser()
    except StartError as error:
        yield str(error)
    if not settings.embedded or settings.security.secret_key:  # the embedded database's own secret is made at the first start
        try:
            secret_keys(settings)
        except ConfigError as error:
            yield str(error)
    journals = settings.paths.data / JOURNALS
    data = journals if journals.exists() else settings.paths.data
    for setting, folder in (("paths.logs", settings.paths.logs), ("paths.data", data)):
        if (obstacle := _obstacle(folder)) is not None:
            yield f"{setting}: {folder} {obstacle}. Make the user that runs the service its owner."
    if settings.admin.socket and not (folder := Path(settings.admin.socket).absolute().parent).is_dir():
        yield f"admin.socket: {folder} does not exist. Make it, or let systemd make it (RuntimeDirectory=)."


def _obstacle(folder: Path) -> str | None:
    """Why no files can be written there; a folder that does not exist yet is made by the service."""
    if not folder.exists():
        parent = next(one for one in folder.absolute().parents if one.exists())
        return None if _is_writable(parent) else f"does not exist, and cannot be made in {parent}"
    if not folder.is_dir():
        return "is not a folder"
    return None if _is_writable(folder) else "cannot be written"


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
