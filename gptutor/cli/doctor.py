"""`gptutor doctor`: what is wrong with this installation, one sentence for each finding."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

import typer

from gptutor.cli.console import Json, embedded_directory, fail, out, print_json, shown
from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.diagnosis.checks import CHECKS
from gptutor.diagnosis.findings import Examined, Installation, error, examine
from gptutor.server.listener import StartError
from gptutor.server.serve import resolved_database

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    url: Annotated[str, typer.Option("--url", help="The public address, such as https://api.example.com: TLS is checked.")] = "",
    json: Json = False,
) -> None:
    """Check the whole installation, whether or not the service runs, and say what to do. Exits with 1 if there is an error."""
    if url and (urlsplit(url).scheme != "https" or not urlsplit(url).hostname):
        fail("--url must be an address such as https://api.example.com.")
    examined = _examined(url)
    errors = sum(finding.level == "error" for each in examined for finding in each.findings)
    warnings = sum(finding.level == "warning" for each in examined for finding in each.findings)
    if json:
        print_json(
            [
                {"check": each.name, "level": finding.level, "sentence": finding.sentence}
                for each in examined
                for finding in each.findings
            ]
        )
    else:
        for each in examined:
            for finding in each.findings:
                level = f"[{COLOURS[finding.level]}]{finding.level:<7}[/]"
                out.print(f"{level} {each.name + ':':<12} {shown(finding.sentence)}", highlight=False)
        out.print(f"Errors: {errors}, warnings: {warnings}.", highlight=False)
    if errors:
        raise typer.Exit(1)


def _examined(address: str) -> list[Examined]:
    try:
        settings = load()
    except ConfigError as failure:
        return [Examined("settings", [error(f"{failure} Nothing else was checked.")])]
    with _database_url(settings) as (database_url, obstacle):
        examined = asyncio.run(examine(CHECKS, Installation(settings, database_url, address)))
    return examined if obstacle is None else [*examined, Examined("database", [error(obstacle)])]


@contextmanager
def _database_url(settings: Config) -> Iterator[tuple[str, str | None]]:
    """The URL, and why there is none. An embedded database is started if it exists, and never created or migrated."""
    if settings.embedded and not (embedded_directory(settings) / "PG_VERSION").exists():
        yield "", None
        return
    resolved = resolved_database(settings)
    try:
        url = resolved.__enter__().database.url
    except StartError as failure:
        yield "", str(failure)
        return
    try:
        yield url, None
    finally:
        resolved.__exit__(None, None, None)
