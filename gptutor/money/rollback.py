"""Notices that the database has gone back, and books again what it has lost.

A database that was restored from a backup, or replaced by a server that lagged behind, has lost commits that this process was
told of: a settled hold is open again, or gone. The journals keep closed holds for a while. Every process compares the server's
position with the one that it remembers, in a file in its slot: after a restart, a promotion or a restore the server's history is
another one, and a copy of an earlier state has a lower position in the write-ahead log. Where a server tells neither, one hold is
a witness: the latest that was settled before. That only gives cause to look. What is lost is found by comparing each kept hold
with its row (`lost_action`), so that a plain restart, or a failover without loss, changes nothing and alarms nobody.

    the row is             and the journal says that the hold was    what is done
    missing, or not settled    settled                               settle; a missing hold is placed again, and booked late
    missing, or open           handed over to recovery               hand over (again); a missing hold is placed again
    open                       released                              release

What the journals do not keep any more cannot be booked again; `gptutor reconcile` shows the sum, by day.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from gptutor.database.pool import Database, Row
from gptutor.money import journal
from gptutor.money.amounts import AccountId
from gptutor.money.closings import CONCURRENT_MAX, all_succeed, settle_or_hand_over, with_timeout
from gptutor.money.holds import HoldId, Release
from gptutor.money.journal_records import HoldRecord, parse_line, position_line
from gptutor.money.ledger import Ledger
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import LOST_COMMITS

LOGGER = logging.getLogger("gptutor.recovery")
IDLE_SLOTS_EVERY_S = 60
"""How often slots without a process are checked. They are locked meanwhile, and a new process would take another one."""
POSITION = "position"
"""The file in each slot."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a server stood, and a hold that it had settled then."""

    history: str
    wal_bytes: int | None
    witness: tuple[AccountId, HoldId] | None


def may_have_gone_back(remembered: Position | None, history: str, wal_bytes: int | None, *, witness_is_settled: bool) -> bool:
    """Whether the server may have lost commits since a position was remembered."""
    if remembered is None or remembered.history != history:
        return True
    if remembered.wal_bytes is not None and wal_bytes is not None and wal_bytes < remembered.wal_bytes:
        return True
    return remembered.witness is not None and not witness_is_settled


def lost_action(record: HoldRecord, row: Row | None) -> Literal["settle", "hand_over", "release"] | None:
    """What to do with a hold that the journal has as closed; `row` is what the database has of it."""
    if record.charge is not None:
        return "settle" if row is None or row["state"] != "settled" else None
    is_running = row is not None and row["state"] == "open" and not row["is_handed_over"]
    if record.is_handed_over:
        return "hand_over" if row is None or is_running else None
    return "release" if is_running else None


class RollbackCheck:
    """`kept_s`, `kept_bytes_max`: how much evidence a slot keeps."""

    def __init__(self, database: Database, ledger: Ledger, journals: Path, *, kept_s: float, kept_bytes_max: int) -> None:
        self._database = database
        self._ledger = ledger
        self._journals = journals
        self._kept_s = kept_s
        self._kept_bytes_max = kept_bytes_max
        self._remembered: Position | None = None
        self._verified_at = 0.0
        self._idle_slots_checked_until = 0.0
        self._booked_again = 0

    async def check(self) -> None:
        """Compares the server's position with the one that each slot remembers, and the kept holds if it may have gone back.

        Raises DatabaseUnavailable, JournalError.
        """
        own = self._ledger.journal
        latest_settled = own.latest_settled  # before the position is asked for
        remembered, now = self._remembered or read_position(own.slot), time.time()
        was_suspect, self._remembered = await self._check_slot(
            own.slot, remembered, latest_settled, verified_at=self._verified_at
        )
        self._verified_at = now if self._remembered is not None else 0
        if self._remembered is not None:
            own.expire(self._kept_s)
            if own.latest_settled == latest_settled:
                own.latest_settled = None  # as a witness it is remembered, or of no use: its account may be lost
        if not was_suspect and time.monotonic() < self._idle_slots_checked_until:
            return
        for slot in journal.slots(self._journals):
            if slot != own.slot and any(slot.glob(journal.KEPT_PATTERN)):
                with journal.locked(slot) as is_idle:
                    if is_idle and (await self._check_slot(slot, read_position(slot)))[1] is not None:
                        journal.expire_kept(slot, self._kept_s, self._kept_bytes_max)
        self._idle_slots_checked_until = time.monotonic() + IDLE_SLOTS_EVERY_S

    async def _check_slot(
        self,
        slot: Path,
        remembered: Position | None,
        latest_settled: tuple[AccountId, HoldId] | None = None,
        *,
        verified_at: float = 0,
    ) -> tuple[bool, Position | None]:
        """Whether the server may have gone back, and its position now; None if it still lacks something that the slot knows."""
        account_id, hold_id = remembered.witness if remembered is not None and remembered.witness else (None, None)
        (row,) = await self._database.fetch("find_position", account_id, hold_id)
        history, wal_bytes = row["history"], row["wal_bytes"]
        is_suspect = may_have_gone_back(remembered, history, wal_bytes, witness_is_settled=bool(row["is_settled"]))
        if is_suspect and not await self._book_again(slot, verified_at=verified_at):
            return True, None  # the old position stays, and so does the evidence
        witness = latest_settled or (remembered.witness if remembered is not None and row["is_settled"] else None)
        position = Position(history, wal_bytes, witness)
        if position != remembered:
            write_position(slot, position)
        return is_suspect, position

    async def _book_again(self, slot: Path, *, verified_at: float) -> bool:
        """Compares all kept holds with their rows, file by file. Returns whether the database has all of them now.

        `verified_at`: when this process has seen that the database had all of them (0: never). What is lost since is what was
        closed last: of a file that was complete then, and of which nothing is lost, no earlier one has to be read.
        """
        succeeded = True
        self._verified_at = 0  # if this is interrupted, all is read the next time: the latest is booked first
        self._booked_again = 0
        unbooked = journal.read_unbooked(self._journals)
        for files in list(journal.kept_files(slot)):
            for path, is_replayed in files:
                records = await asyncio.to_thread(read_closed, path, is_replayed=is_replayed)
                lost = 0
                remaining = iter(records.items())
                while some := dict(islice(remaining, CONCURRENT_MAX)):
                    actions = await self._lost(some, unbooked)
                    lost += len(actions)
                    closings = (self._do(action, hold_id, some[hold_id]) for hold_id, action in actions.items())
                    succeeded = await all_succeed(closings) and succeeded
                if records and not lost and path.stat().st_mtime < verified_at:
                    break
        if self._booked_again:
            LOST_COMMITS.inc(self._booked_again)
            ALERTS.count("commits_lost", "The database has gone back, and lost what it had committed", self._booked_again)
            LOGGER.error(
                "The database has gone back: %d holds that it had closed were lost, and are closed again by the journal. "
                "What was paid or changed meanwhile is lost too. Run: gptutor verify, gptutor reconcile",
                self._booked_again,
                extra={"type": "recovery"},
            )
        return succeeded

    async def _lost(self, records: Mapping[HoldId, HoldRecord], unbooked: Collection[HoldId]) -> dict[HoldId, str]:
        """What to do, for each hold that the database has not as the journal says."""
        rows = await self._database.fetch("find_hold_states", [record.account_id for record in records.values()], list(records))
        by_id = {row["hold_id"]: row for row in rows}
        actions: dict[HoldId, str] = {}
        for hold_id, record in records.items():
            if hold_id in self._ledger.active or hold_id in self._ledger.journal.open_holds:
                continue  # another attempt of a request that is still running
            if hold_id in unbooked and hold_id not in by_id:
                continue  # the operator was told
            if (action := lost_action(record, by_id.get(hold_id))) is not None:
                actions[hold_id] = action
        return actions

    async def _do(self, action: str, hold_id: HoldId, record: HoldRecord) -> None:
        if action == "release":
            await with_timeout(self._ledger.release(Release(record.account_id, hold_id)))
        else:
            await settle_or_hand_over(self._ledger, hold_id, record)
        self._booked_again += 1


def read_closed(path: Path, *, is_replayed: bool) -> dict[HoldId, HoldRecord]:
    """The closed holds of a file. A replay settles or hands over what is open."""
    segment = journal.read_segment(path)
    if is_replayed:
        for record in segment.open_holds.values():
            record.is_handed_over = record.charge is None
        segment.closed_holds |= segment.open_holds
    return segment.closed_holds


def read_position(slot: Path) -> Position | None:
    """What the slot remembers; None if nothing, or if the file is damaged."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = parse_line((slot / POSITION).read_bytes().rstrip(b"\n"))
        if fields is not None:
            _, history, wal_bytes, account_id, hold_id = (field.decode() for field in fields)
            return Position(
                history,
                None if wal_bytes == "-" else int(wal_bytes),
                None if hold_id == "-" else (AccountId(int(account_id)), HoldId(uuid.UUID(hold_id))),
            )
    return None


def write_position(slot: Path, position: Position) -> None:
    """Raises JournalError."""
    path = slot / POSITION
    temporary = path.with_suffix(".new")
    try:
        temporary.write_bytes(position_line(position.history, position.wal_bytes, position.witness))
        temporary.rename(path)
    except OSError as error:
        raise journal.JournalError(f"{path} cannot be written: {error.strerror}.") from error
