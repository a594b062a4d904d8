"""`gptutor lost`: after the database was restored from a backup, what it lacks."""

import datetime
from typing import Annotated

import msgspec
import typer

from gptutor.cli.console import Json, fail, out, print_json, with_database
from gptutor.config.load import load
from gptutor.database.pool import Database
from gptutor.money.journal import JOURNALS
from gptutor.money.losses import AuditLine, LostRequest, audit_lines, latest_change, lost_requests
from gptutor.money.records import timestamp, unbooked_json
from gptutor.text import escaped

WHAT_HAPPENS = {
    "settle": "will be charged",
    "hand_over": "its cost will be looked up",
    "release": "bought nothing",
    "none": "CANNOT BE CHARGED: its user is lost",
}


def lost(
    since: Annotated[
        datetime.datetime | None,
        typer.Option(formats=["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"], help="Changes since then (UTC); by default, the latest one."),
    ] = None,
    json: Json = False,
) -> None:
    """After a restore of the database: list what it lacks, by this machine's journals and audit lines. Changes nothing.

    Run it before the service starts again: then the service charges the requests, and the default of --since is no longer right.
    """
    settings = load()

    async def run(database: Database) -> tuple[list[LostRequest], datetime.datetime | None]:
        return await lost_requests(database, settings.paths.data / JOURNALS), await latest_change(database)

    requests, latest = with_database(run)
    begin = since.replace(tzinfo=datetime.UTC) if since is not None else latest
    if begin is None:
        fail("The database is empty: restore it first, or give --since.")
    changes, unreadable = audit_lines(settings.paths.logs, begin)
    if json:
        print_json(
            {
                "since": timestamp(begin),
                "requests": [{"action": each.action, **unbooked_json(each.hold_id, each.record)} for each in requests],
                "changes": [{**msgspec.structs.asdict(line), "timestamp": timestamp(line.timestamp)} for line in changes],
                "unreadable_files": [str(path) for path in unreadable],
            }
        )
        return
    out.print(f"{len(requests)} requests that the journals know, and the database does not:", highlight=False)
    for each in requests:
        facts = unbooked_json(each.hold_id, each.record)
        told = "  ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        out.print(f"  {WHAT_HAPPENS[each.action]}:  {escaped(told)}", highlight=False, markup=False)
    told = f"{len(changes)} changes by administrators since {timestamp(begin)}; repeat those that are missing:"
    out.print(told, highlight=False)
    for line in changes:
        out.print(f"  {escaped(_told(line))}", highlight=False, markup=False)
    for path in unreadable:
        out.print(f"{path} could not be read to its end: there may be more changes.", highlight=False, markup=False)


def _told(line: AuditLine) -> str:
    facts = {
        "user": line.userId, "amount": line.amount, "reference": line.reference, "reason": line.reason, "key": line.keyId,
        "by": line.who,
    }  # fmt: skip
    named = "  ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return f"{timestamp(line.timestamp)}  {line.what}  {named}"
