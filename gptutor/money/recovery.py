"""Recovery: holds that lost their exchange are closed by evidence, never by guess (contract C6).

What may be known of such a hold, and what follows from it, is one table (`decide`):

    its price                        settle                         upstream's bill was seen, the settlement was not committed
    OpenRouter's name for it         ask /generation, patiently     it answers 404 for seconds, sometimes minutes
    that it was sent                 wait for evidence              an answer may have been bought, and nobody has its name
    that it was never sent           release                        the journal of its process is complete, and does not know it
    nothing                          wait for evidence              its process may be alive on another machine

A hold that waits is looked at after 1, 2, 4 … seconds, at most ten minutes. After a day it is given up: released, and marked
for the operator, whose loss it is at most. Evidence that comes even later still charges it, once.

Three sources feed this: the journals of dead processes, whose slots can be locked (at start, and while running); holds that an
exchange handed over; and open holds whose time is up. Any process does it; a claim of due holds belongs to one of them.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypeVar

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database, Row
from gptutor.money import journal
from gptutor.money.amounts import AccountId, roubles
from gptutor.money.holds import HandOver, HoldId, Release, Settlement
from gptutor.money.journal import JournalError, Leftover
from gptutor.money.journal_records import HoldRecord
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import charge

LOGGER = logging.getLogger("gptutor.recovery")
MACHINE_LOST_S = 3600
"""So old a hold of another process, which nobody has left to recovery: no stream is so long, and its machine is gone."""
CLAIM_MAX = 50
CLEAR_KEYS_EVERY_S = 60
CLEARED_KEYS_MAX = 1000
CLOSING_S = 5
LOOKS_MIN = 10
"""So often, at least, is a name asked for: for a quarter of an hour."""

Result = TypeVar("Result")
Decision = Literal["settle", "look_up", "wait", "release", "give_up"]


def decide(knowledge: HoldRecord | None, *, never_sent: bool, too_old: bool) -> Decision:
    """What to do with an open hold that no exchange has in its hands."""
    if knowledge is not None and knowledge.price is not None:
        return "settle"
    if knowledge is None and never_sent:
        return "release"
    if knowledge is not None and knowledge.generation_id is not None:
        return "look_up"  # however old: it may be the first question after a long outage
    return "give_up" if too_old else "wait"


def connection_name(owner: uuid.UUID) -> str:
    """The name under which PostgreSQL shows a process's connections."""
    return f"gptutor {owner}"


class Recovery:
    """`cost_of` asks OpenRouter what a generation cost: dollars, or None while it does not say."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        journals: Path,
        cost_of: Callable[[str], Awaitable[Decimal | None]],
        *,
        poll_s: float,
        look_max_s: float,
        give_up_s: float,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._journals = journals
        self._cost_of = cost_of
        self._poll_s = poll_s
        self._look_max_s = look_max_s
        self._give_up_s = give_up_s
        self._keys_cleared_until = 0.0

    async def run(self, left: Sequence[Leftover] = ()) -> None:
        """For ever: adopt the dead, then look at what is due. `left` is what this process found at its start, and still has."""
        while True:
            try:
                left = [leftover for leftover in left if not await self.replay(leftover)]
                with journal.adopted(self._journals) as leftovers:
                    for leftover in leftovers:
                        await self.replay(leftover)
                await self.look()
                await self.clear_idempotency_keys()
            except (DatabaseUnavailable, JournalError) as error:
                LOGGER.warning("Recovery waits: %s", error)
            except Exception:
                LOGGER.exception("Recovery failed, and goes on")
            await asyncio.sleep(self._poll_s)

    async def replay(self, leftover: Leftover) -> bool:
        """Brings what a dead process knew into the database, and forgets it here if that went well: otherwise it comes again.

        Raises DatabaseUnavailable.
        """
        # A statement of the dead may still be under way, and commit a hold after this look. Without a connection it cannot.
        await self._database.fetch("end_connections", connection_name(leftover.owner))
        rows = await self._database.fetch("list_open_holds_of", leftover.owner)
        unknown = [row for row in rows if row["hold_id"] not in leftover.known]
        never_sent = decide(None, never_sent=leftover.complete, too_old=False) == "release"
        freed = await _all_went_well(
            _in_time(
                self._ledger.release(Release(row["account_id"], row["hold_id"]))
                if never_sent
                else self._ledger.hand_over(HandOver(row["account_id"], row["hold_id"], None))
            )
            for row in unknown
        )
        if not await self._bring(leftover.known) or not freed:
            return False
        leftover.discard()
        if leftover.known or unknown:
            LOGGER.info("A process that has ended left %d holds known and %d unknown", len(leftover.known), len(unknown))
        return True

    async def look(self) -> int:
        """Looks once at every hold that was broken off here or is due; gives the number of these. Raises DatabaseUnavailable."""
        own = self._ledger.journal.known
        await self._bring({hold_id: own[hold_id] for hold_id in own.keys() - self._ledger.active})
        rows = await self._database.fetch("claim_due_holds", CLAIM_MAX, self._look_max_s)
        await _all_went_well(map(self._look_at, rows))
        return len(rows)

    async def clear_idempotency_keys(self) -> None:
        """Clears keys that are older than 24 hours, at most once a minute. Raises DatabaseUnavailable."""
        if time.monotonic() < self._keys_cleared_until:
            return
        rows = await self._database.fetch("clear_idempotency_keys", CLEARED_KEYS_MAX)
        if len(rows) < CLEARED_KEYS_MAX:  # otherwise there are more, and the next look clears them
            self._keys_cleared_until = time.monotonic() + CLEAR_KEYS_EVERY_S

    async def _bring(self, known: Mapping[HoldId, HoldRecord]) -> bool:
        """Into the database what only a journal knew: prices are settled, the rest is handed over. Whether all of it is there."""
        return await _all_went_well(
            _in_time(
                self._ledger.settle(knowledge.price.settlement(knowledge.account_id, hold_id, knowledge.generation_id))
                if knowledge.price is not None
                else self._ledger.hand_over(HandOver(knowledge.account_id, hold_id, knowledge.generation_id))
            )
            for hold_id, knowledge in known.items()
        )

    async def _look_at(self, row: Row) -> None:
        account_id, hold_id = AccountId(row["account_id"]), HoldId(row["hold_id"])
        own = self._ledger.journal
        if hold_id in self._ledger.active or hold_id in own.known:
            return  # a long answer, still running here; or one that was broken off just now
        knowledge = HoldRecord(account_id, row["generation_id"]) if row["is_handed_over"] else None
        # Who has a name is asked for a while, however old: nobody could be asked while OpenRouter, or this service, was away.
        too_old = row["age_s"] > self._give_up_s and (row["generation_id"] is None or row["recovery_attempts"] > LOOKS_MIN)
        decision = decide(knowledge, never_sent=row["owner"] == own.owner, too_old=too_old)
        if decision == "look_up" and await self._look_up(row):
            return
        if knowledge is None and row["owner"] != own.owner and row["age_s"] > MACHINE_LOST_S and not too_old:
            # Its journal will not come: it waits for evidence like others, and its account's request does not run any more.
            await _in_time(self._ledger.hand_over(HandOver(account_id, hold_id, row["generation_id"])))
        if decision == "release":
            await _in_time(self._ledger.release(Release(account_id, hold_id)))
        elif too_old:
            await _in_time(self._ledger.release(Release(account_id, hold_id, unresolved=True)))
            LOGGER.error(
                "A hold is given up: nobody learnt what it bought",
                extra={"type": "recovery", "userId": str(account_id), "requestId": row["request_id"]},
            )

    async def _look_up(self, row: Row) -> bool:
        """Whether OpenRouter said what it cost; then it is settled."""
        generation_id = row["generation_id"]
        cost_usd = await self._cost_of(generation_id)
        if cost_usd is None:
            return False
        due = charge(cost_usd, row["rub_per_usd"])
        settlement = Settlement(AccountId(row["account_id"]), HoldId(row["hold_id"]), due, cost_usd, generation_id)
        outcome = await _in_time(self._ledger.settle(settlement))
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
                "costRub": roubles(due),
                "outcome": outcome,
            },
        )
        return True


async def _all_went_well(closings: Iterable[Awaitable[object]]) -> bool:
    """Side by side; says of each that did not: one hold's trouble is not another's."""
    outcomes = await asyncio.gather(*closings, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    late = sum(isinstance(error, TimeoutError) for error in errors)
    if late:
        LOGGER.warning("%d holds could not be closed within %d s; they are tried again", late, CLOSING_S)
    for error in errors:
        if not isinstance(error, TimeoutError):
            LOGGER.error("A hold could not be closed: %r", error)
    return not errors


async def _in_time(closing: Awaitable[Result]) -> Result:
    """What is held up, by somebody's lock or by the database, is given up for now: all closings can be asked for again."""
    async with asyncio.timeout(CLOSING_S):
        return await closing
