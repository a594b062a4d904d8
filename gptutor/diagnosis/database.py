"""PostgreSQL: its login, version, limits and durability, its migrations, and the copies of keys that the secret must decrypt."""

import datetime
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from gptutor import __version__
from gptutor.config.schema import ADMIN_CONNECTIONS_MAX, Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.database import migrations
from gptutor.database.errors import DatabaseRefused, DatabaseUnavailable
from gptutor.database.pool import Database, Row, open_database
from gptutor.database.statements import SQL
from gptutor.diagnosis.findings import Finding, Installation, error, ok, warning
from gptutor.money.amounts import AccountId
from gptutor.money.vault import DecryptionFailed, EncryptedKey, Vault

VERSION_LEAST = 150_000
SLOW_S = 0.02
"""A request waits for the database twice: more than this is felt."""
SKEW_S = 5
GRANT = re.compile(r"^GRANT ([A-Z, ]+) ON ([a-z_, ]+) TO gptutor_app;", re.MULTILINE)
NONE_YET = "There is no database yet: `gptutor serve` or `gptutor migrate` creates the embedded one."


@asynccontextmanager
async def _opened(installation: Installation) -> AsyncIterator[Database]:
    async with open_database(
        installation.database_url, name="gptutor doctor", connections_max=1, acquire_s=5, statement_s=10
    ) as it:
        yield it


def unreachable(failure: DatabaseUnavailable) -> Finding:
    if isinstance(failure, DatabaseRefused):
        return error(str(failure))
    cause = type(failure.__cause__ or failure).__name__
    return error(f"PostgreSQL does not answer at DATABASE_URL ({cause}): is it running, and are host and port right?")


async def server(installation: Installation) -> Sequence[Finding]:
    """Whether the service can log in, and what kind of server it meets."""
    if not installation.database_url:
        return [ok(NONE_YET)]
    try:
        async with _opened(installation) as database:
            (row,) = await database.fetch("describe_server")
            began, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
            (again,) = await database.fetch("describe_server")
            took_s = time.perf_counter() - began
            lacking = await database.fetch("list_missing_privileges", *_needed_privileges())
    except DatabaseUnavailable as failure:
        return [unreachable(failure)]
    findings = server_findings(row, installation.config, is_embedded=installation.config.embedded)
    if lacking:
        names = ", ".join(f"{each['privilege']} on {each['table_name']}" for each in lacking)
        findings.append(error(f"The role of DATABASE_URL lacks {names}: run sql/roles.sql again, as after every migration."))
    if took_s > SLOW_S:
        findings.append(
            warning(
                f"A statement takes {took_s * 1000:.0f} ms, and a request waits for two: put PostgreSQL nearer to the service."
            )
        )
    skew_s = (again["now"] - now).total_seconds()
    if abs(skew_s) > SKEW_S:
        findings.append(warning(f"The clock of PostgreSQL differs from this machine's by {skew_s:.0f} s: run NTP on both."))
    return findings


def server_findings(row: Row, config: Config, *, is_embedded: bool) -> list[Finding]:
    """What follows from `describe_server`."""
    findings = [ok(f"PostgreSQL {row['version']} accepts the login; the database has {row['bytes'] / (1 << 20):.0f} MB.")]
    if row["version_number"] < VERSION_LEAST:
        findings.append(error(f"PostgreSQL {row['version']} is too old: 15 or newer is needed."))
    if row["encoding"] != "UTF8":
        findings.append(error(f"The database is encoded in {row['encoding']}: create it again with the encoding UTF8."))
    if row["is_read_only"]:
        findings.append(error("PostgreSQL is read-only, a replica perhaps: DATABASE_URL must name the primary."))
    for name, is_on in (("fsync", row["has_fsync"]), ("full_page_writes", row["has_full_page_writes"])):
        if not is_on:
            findings.append(error(f"{name} is off: a power cut destroys the books. Set it to on in postgresql.conf."))
    if row["synchronous_commit"] == "off":
        findings.append(warning("synchronous_commit is off: a power cut loses charges that were made. Set it to on."))
    if row["is_archiving_failing"]:
        findings.append(
            error("The latest archiving of the write-ahead log failed: see PostgreSQL's log, and mend archive_command.")
        )
    if row["is_superuser"] and not is_embedded:
        findings.append(warning("The role of DATABASE_URL is a superuser: make one with few privileges (sql/roles.sql)."))
    findings += _connections(row, config)
    return findings


def _connections(row: Row, config: Config) -> list[Finding]:
    """Old and new processes overlap while they are replaced, so twice the pools are needed for a moment."""
    administrators = ADMIN_CONNECTIONS_MAX if config.admin.is_enabled else 0
    pools = 2 * config.server.workers * (config.database.connections_max + administrators)
    most = min(number for number in (row["connections_max"], row["connections_max_of_role"]) if number is not None)
    told = f"The pools take up to {pools} connections while processes are replaced, and PostgreSQL gives {most}"
    if pools > most:
        return [
            error(f"{told}: lower database.connections_max or GPTUTOR_WORKERS, or raise max_connections or the role's limit.")
        ]
    return [ok(f"{told}; {row['connections']} are open now.")]


async def schema(installation: Installation) -> Sequence[Finding]:
    """Pending migrations, and those of a newer release."""
    if not installation.database_url:
        return [ok(NONE_YET)]
    try:
        pending = await migrations.find_pending(installation.database_url)
    except migrations.MigrationError as failure:
        return [error(str(failure))]
    except DatabaseUnavailable as failure:
        return [unreachable(failure)]
    if pending.names:
        return [error(f"The database lacks {', '.join(pending.names)}: run gptutor migrate.")]
    if pending.newer is not None:
        return [ok(f"{pending.newer} has migrated the database, and {__version__} works with it.")]
    return [ok("All migrations are applied.")]


async def secret(installation: Installation) -> Sequence[Finding]:
    """Whether the secrets of the settings decrypt the copies of keys that are stored."""
    config = installation.config
    if config.embedded and not installation.database_url:
        return [ok(NONE_YET)]
    try:
        vault = Vault(secret_keys(config))
    except ConfigError as failure:
        return [error(str(failure))]
    try:
        async with _opened(installation) as database:
            rows = await database.fetch("sample_key_copies")
    except DatabaseUnavailable as failure:
        return [unreachable(failure)]
    unreadable = [row for row in rows if not _opens(vault, row)]
    if unreadable:
        return [
            error(
                "The secrets of the settings do not decrypt all stored copies of keys: add the missing one to "
                "security.old_secret_keys, and run gptutor rekey. Until then those keys work, but cannot be shown again."
            )
        ]
    if any(row["secret_id"] != vault.secret_id for row in rows):
        return [warning("Some copies of keys are encrypted with an old secret: run gptutor rekey, then remove the old secret.")]
    return [ok("GPTUTOR_SECRET_KEY decrypts the stored copies of keys." if rows else "No copies of keys are stored yet.")]


def _opens(vault: Vault, row: Row) -> bool:
    try:
        vault.decrypt(AccountId(row["account_id"]), row["key_hash"], EncryptedKey(row["encrypted_key"], row["secret_id"]))
    except DecryptionFailed:
        return False
    return True


def _needed_privileges() -> tuple[list[str], list[str]]:
    """Tables, and a privilege on each, as `sql/roles.sql` grants them."""
    text = (SQL / "roles.sql").read_text(encoding="utf-8")
    pairs = [
        (table.strip(), privilege.strip())
        for privileges, tables in GRANT.findall(text)
        for table in tables.split(",")
        for privilege in privileges.split(",")
    ]
    return [table for table, _ in pairs], [privilege for _, privilege in pairs]
