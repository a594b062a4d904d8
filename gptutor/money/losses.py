"""What a database lacks after a restore: requests by this machine's journals, changes by the audit lines of its logs.

The service books again what the journals know when it starts (`rollback.py`); nothing is changed here.
"""

import asyncio
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from gptutor.database.pool import Database
from gptutor.money import journal
from gptutor.money.closings import CONCURRENT_MAX
from gptutor.money.holds import HoldId
from gptutor.money.journal_records import HoldRecord
from gptutor.money.rollback import lost_action, read_closed
from gptutor.telemetry.log_search import UNREADABLE, log_files, opened

AUDIT = b'"audit"'


@dataclass(frozen=True, slots=True)
class LostRequest:
    """A hold that the database lacks, or has open.

    `action` is what the service will do with it when it starts: `settle`, `hand_over` or `release`; `none`: the account is lost
    too, so nothing can be booked.
    """

    hold_id: HoldId
    record: HoldRecord
    action: str


async def lost_requests(database: Database, journals: Path) -> list[LostRequest]:
    """By the journals of all processes of this machine, the living ones included. Raises DatabaseUnavailable."""
    found: dict[HoldId, LostRequest] = {}
    for slot in journal.slots(journals) if journals.is_dir() else []:  # noqa: ASYNC240 - a command of its own
        for files in list(journal.kept_files(slot)):
            for path, is_replayed in files:
                records = iter((await asyncio.to_thread(read_closed, path, is_replayed=is_replayed)).items())
                while some := dict(islice(records, CONCURRENT_MAX)):
                    found |= {lost.hold_id: lost for lost in await _lost(database, some)}
    return sorted(found.values(), key=lambda lost: lost.hold_id)


async def _lost(database: Database, records: Mapping[HoldId, HoldRecord]) -> list[LostRequest]:
    accounts = [record.account_id for record in records.values()]
    rows = {row["hold_id"]: row for row in await database.fetch("find_hold_states", accounts, list(records))}
    present = {row["account_id"] for row in await database.fetch("find_present_accounts", accounts)}
    actions = {hold_id: lost_action(record, rows.get(hold_id)) for hold_id, record in records.items()}
    return [
        LostRequest(hold_id, records[hold_id], action if records[hold_id].account_id in present else "none")
        for hold_id, action in actions.items()
        if action is not None
    ]


async def latest_change(database: Database) -> datetime.datetime | None:
    """Until when the database knows what happened. None: nothing has. Raises DatabaseUnavailable."""
    (row,) = await database.fetch("find_latest_change")
    latest: datetime.datetime | None = row["latest"]
    return latest


class AuditLine(msgspec.Struct):
    """The audit line of a change by an administrator (`telemetry.logs.audit`)."""

    timestamp: datetime.datetime
    type: str
    who: str = ""
    what: str = ""
    userId: str | None = None  # noqa: N815 - the log's own name
    amount: str | None = None
    reference: str | None = None
    reason: str | None = None
    keyId: int | None = None  # noqa: N815


def audit_lines(logs: Path, since: datetime.datetime) -> tuple[list[AuditLine], list[Path]]:
    """Of all log files that are kept, compressed ones included, oldest first; and the files that could not be read to their ends.

    The times of the lines are whole seconds.
    """
    since = since.replace(microsecond=0)
    decoder = msgspec.json.Decoder(AuditLine)
    lines: list[AuditLine] = []
    unreadable: list[Path] = []
    for path in reversed(log_files(logs)):
        try:
            with opened(path) as file:
                for line in file:
                    if AUDIT in line:
                        try:
                            found = decoder.decode(line)
                        except (msgspec.DecodeError, UnicodeDecodeError):
                            continue  # a line that a full disk has cut
                        found.timestamp = found.timestamp.replace(
                            tzinfo=datetime.UTC
                        )  # the log's times do not say that they are UTC
                        if found.type == "audit" and found.timestamp >= since:
                            lines.append(found)
        except UNREADABLE:
            unreadable.append(path)
    return lines, unreadable
