"""Recovery: open holds that no exchange will close any more are closed by evidence, never by guess (contract C6).

The evidence of a hold decides what is done with it (`next_action`):

    its charge is known             settle                   upstream's bill was read, the settlement was not committed
    its generation id is known      look up /generation      /generation may return 404 for seconds, sometimes minutes
    its request was sent            wait for evidence        a completion may have been bought, and its generation id is unknown
    its request was never sent      release                  the journal of its process is complete, goes back far enough, and
                                                             has no such hold
    nothing is known                wait for evidence        its process may be alive on another machine

A hold that waits is processed after 1, 2, 4 … seconds, at most ten minutes. After a day recovery gives up: the hold is released
and marked as unresolved for the operator, whose loss is at most the amount of the hold. Evidence that arrives even later still
charges the account, once.

The holds come from three sources: the journals of dead processes, whose slots can be locked (at start, and while running); holds
that an exchange handed over; and open holds whose time has expired. Every process runs recovery; a hold that is due is claimed by
one of them.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database, Row
from gptutor.money import journal
from gptutor.money.amounts import AccountId, Nano, roubles
from gptutor.money.closings import CONCURRENT_MAX, all_succeed, settle_or_hand_over, with_timeout
from gptutor.money.holds import HandOver, HoldFacts, HoldId, Release, Settlement, placed_at_ms
from gptutor.money.journal import AbandonedJournal, ClosedHolds, JournalError
from gptutor.money.journal_records import HoldRecord
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Charge, charge_amount
from gptutor.money.rollback import RollbackCheck
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import HOLDS_GIVEN_UP

LOGGER = logging.getLogger("gptutor.recovery")
MACHINE_LOST_S = 3600
"""A hold of another process that is older than this, and was not handed over: no stream takes so long, so its machine is lost."""
CLAIM_MAX = 50
CLEAR_KEYS_EVERY_S = 60
CLEARED_KEYS_MAX = 1000
LOOKUPS_MIN = 10
"""How often at least a generation id is looked up before recovery gives up: the look-ups take about a quarter of an hour."""

NO_HOLD = uuid.UUID(int=0)
Action = Literal["settle", "look_up", "wait", "release", "give_up"]


def next_action(record: HoldRecord | None, *, never_sent: bool, too_old: bool) -> Action:
    """What to do with an open hold that no running exchange owns. `record` is None if no journal knows the hold."""
    if record is not None and record.charge is not None:
        return "settle"
    if record is None and never_sent:
        return "release"
    if record is not None and record.generation_id is not None:
        return "look_up"  # at any age: after a long outage this may be the first look-up
    return "give_up" if too_old else "wait"


def connection_name(owner: uuid.UUID) -> str:
    """The `application_name` of a process's connections to PostgreSQL."""
    return f"gptutor {owner}"


class Recovery:
    """`cost_of` asks OpenRouter for the cost of a generation id: dollars, or None while OpenRouter does not know it."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        journals: Path,
        cost_of: Callable[[str], Awaitable[Decimal | None]],
        *,
        poll_s: float,
        lookup_interval_max_s: float,
        give_up_s: float,
        kept_s: float = 86_400,
        kept_bytes_max: int = 32 << 20,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._journals = journals
        self._cost_of = cost_of
        self._poll_s = poll_s
        self._lookup_interval_max_s = lookup_interval_max_s
        self._give_up_s = give_up_s
        self._keys_cleared_until = 0.0
        self._rollback_check = RollbackCheck(database, ledger, journals, kept_s=kept_s, kept_bytes_max=kept_bytes_max)

    async def run(self, not_replayed: Sequence[AbandonedJournal] = ()) -> None:
        """Runs until cancelled: replays the journals of dead processes, then processes due holds.

        `not_replayed` are the journals that this process found in its own slot at its start and could not replay then.
        """
        while True:
            try:
                not_replayed = [each for each in not_replayed if not await self.replay(each)]
                with journal.abandoned(self._journals) as abandoned_journals:
                    for each in abandoned_journals:
                        await self.replay(each)
                await self.process_due_holds()
                await self.clear_idempotency_keys()
                await self.check_for_rollback()
            except (DatabaseUnavailable, JournalError) as error:
                LOGGER.warning("Recovery waits: %s", error)
            except Exception:
                LOGGER.exception("Recovery failed, and continues")
            await asyncio.sleep(self._poll_s)

    async def replay(self, abandoned: AbandonedJournal) -> bool:
        """Writes what a dead process knew to the database, then retires its journal. Returns False if a part failed: try again.

        Raises DatabaseUnavailable.
        """
        # A statement of the dead process may still be running, and commit a hold later; ending its connections prevents that.
        await self._database.fetch("end_connections", connection_name(abandoned.owner))
        all_closed, unrecorded, last = True, 0, NO_HOLD
        while rows := await self._database.fetch("list_open_holds_of", abandoned.owner, last, CONCURRENT_MAX):
            last = rows[-1]["hold_id"]
            of_unrecorded = {row["hold_id"]: row["account_id"] for row in rows if row["hold_id"] not in abandoned.open_holds}
            if not of_unrecorded:
                continue
            closed = await asyncio.to_thread(journal.find_closed, abandoned.files, of_unrecorded)
            if not abandoned.is_complete:
                closed.sent_are_known_after_ms = math.inf
            succeeded = await all_succeed(
                self._close_unrecorded(account_id, hold_id, closed) for hold_id, account_id in of_unrecorded.items()
            )
            all_closed = all_closed and succeeded
            unrecorded += len(of_unrecorded)
        if not await self._settle_or_hand_over(abandoned.open_holds) or not all_closed:
            return False
        abandoned.retire()
        ALERTS.count(
            "process_died", "A process ended without closing its requests: it was killed, or crashed, and recovery does it"
        )
        if abandoned.open_holds or unrecorded:
            LOGGER.info(
                "Replayed the journal of a dead process: %d holds recorded, %d not", len(abandoned.open_holds), unrecorded
            )
        return True

    async def check_for_rollback(self) -> None:
        """Books again what the database has lost, if it has gone back. Raises DatabaseUnavailable, JournalError."""
        await self._rollback_check.check()

    async def process_due_holds(self) -> int:
        """Processes once the holds of exchanges that ended abnormally in this process, and all due holds.

        Returns the number of due holds. Raises DatabaseUnavailable.
        """
        own = self._ledger.journal.open_holds
        await self._settle_or_hand_over({hold_id: own[hold_id] for hold_id in own.keys() - self._ledger.active})
        rows = await self._database.fetch("claim_due_holds", CLAIM_MAX, self._lookup_interval_max_s)
        unrecorded = [
            row["hold_id"]
            for row in rows
            if row["owner"] == self._ledger.journal.owner
            and not row["is_handed_over"]
            and not self._is_in_process(row["hold_id"])
        ]
        closed = await asyncio.to_thread(self._ledger.journal.closed, unrecorded) if unrecorded else None
        await all_succeed(self._process_due_hold(row, closed if row["hold_id"] in unrecorded else None) for row in rows)
        return len(rows)

    async def clear_idempotency_keys(self) -> None:
        """Clears keys that are older than 24 hours, and ended marks, at most once a minute. Raises DatabaseUnavailable."""
        if time.monotonic() < self._keys_cleared_until:
            return
        keys = await self._database.fetch("clear_idempotency_keys", CLEARED_KEYS_MAX)
        marks = await self._database.fetch("clear_marks", CLEARED_KEYS_MAX)
        if max(len(keys), len(marks)) < CLEARED_KEYS_MAX:  # otherwise there are more, and the next poll clears them
            self._keys_cleared_until = time.monotonic() + CLEAR_KEYS_EVERY_S

    async def _settle_or_hand_over(self, records: Mapping[HoldId, HoldRecord]) -> bool:
        """Settles the holds with a known charge, and hands over the others. Returns whether the database has all of it."""
        return await all_succeed(settle_or_hand_over(self._ledger, hold_id, record) for hold_id, record in records.items())

    def _is_in_process(self, hold_id: HoldId) -> bool:
        """Whether it is a long completion that is still running here, or one that ended abnormally just now."""
        return hold_id in self._ledger.active or hold_id in self._ledger.journal.open_holds

    async def _close_unrecorded(self, account_id: AccountId, hold_id: HoldId, closed: ClosedHolds) -> None:
        """Closes a hold that is open in the database, and not in the journal of its process; `closed` is what that says of it.

        If its request was never sent, it is released. But the database may have gone back since it was closed.
        """
        record = closed.records.get(hold_id)
        was_released = record is not None and record.charge is None and not record.is_handed_over
        never_sent = was_released or placed_at_ms(hold_id) > closed.sent_are_known_after_ms
        if next_action(None if was_released else record, never_sent=never_sent, too_old=False) == "release":
            await with_timeout(self._ledger.release(Release(account_id, hold_id)))
        else:
            await settle_or_hand_over(self._ledger, hold_id, record or HoldRecord(account_id))

    async def _process_due_hold(self, row: Row, closed: ClosedHolds | None) -> None:
        """`closed`: of a hold of this process that its journal does not have as open, what the journal says of it."""
        account_id, hold_id = AccountId(row["account_id"]), HoldId(row["hold_id"])
        own = self._ledger.journal
        if self._is_in_process(hold_id):
            return
        if closed is not None:
            await self._close_unrecorded(account_id, hold_id, closed)
            return
        record = HoldRecord(account_id, row["generation_id"]) if row["is_handed_over"] else None
        # A generation id is looked up several times at any age: OpenRouter, or this service, may have been down until now.
        too_old = row["age_s"] > self._give_up_s and (row["generation_id"] is None or row["recovery_attempts"] > LOOKUPS_MIN)
        action = next_action(record, never_sent=False, too_old=too_old)
        if action == "look_up" and await self._look_up(row):
            return
        if record is None and row["owner"] != own.owner and row["age_s"] > MACHINE_LOST_S and not too_old:
            # The journal of that process is lost. The hold waits for evidence, and no longer counts as a running request.
            await with_timeout(self._ledger.hand_over(HandOver(account_id, hold_id, row["generation_id"])))
        if too_old:
            await with_timeout(self._ledger.release(Release(account_id, hold_id, unresolved=True)))
            HOLDS_GIVEN_UP.inc()
            LOGGER.error(
                "Recovery gives up a hold: no evidence of what it bought",
                extra={"type": "recovery", "userId": str(account_id), "requestId": row["request_id"]},
            )
            ALERTS.count("hold_given_up", f"The cost of the request {row['request_id']} was not found out: its hold is released")

    async def _look_up(self, row: Row) -> bool:
        """Asks OpenRouter for the cost of a generation id, and settles the hold. Returns False if OpenRouter does not know it."""
        generation_id = row["generation_id"]
        cost_usd = await self._cost_of(generation_id)
        if cost_usd is None:
            return False
        charge = Charge(charge_amount(cost_usd, row["rub_per_usd"]), cost_usd)
        facts = HoldFacts(
            Nano(row["amount_nano"]), row["rub_per_usd"], row["key_hash_beginning"], row["request_id"], row["model"]
        )
        settlement = Settlement(AccountId(row["account_id"]), HoldId(row["hold_id"]), charge, generation_id, facts, "generation")
        outcome = await with_timeout(self._ledger.settle(settlement))
        LOGGER.info(
            "LLM Recovered: %s",
            row["model"],
            extra={
                "type": "recovery",
                "model": row["model"],
                "userId": str(row["account_id"]),
                "requestId": row["request_id"],
                "generationId": generation_id,
                "costUsd": str(cost_usd),
                "costRub": roubles(charge.amount),
                "outcome": outcome,
            },
        )
        return True
