"""Closes many holds at once, by what a journal knows of them: a bounded number at a time, and each for a bounded time."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from gptutor.money.holds import HandOver, HoldId, Settlement
from gptutor.money.journal_records import HoldRecord
from gptutor.money.ledger import Ledger

LOGGER = logging.getLogger("gptutor.recovery")
CLOSE_TIMEOUT_S = 5
CONCURRENT_MAX = 1000
"""So many holds are being closed at a time, and so many rows read, whatever has died."""

Result = TypeVar("Result")


async def settle_or_hand_over(ledger: Ledger, hold_id: HoldId, record: HoldRecord) -> None:
    """Settles a hold with a known charge, and hands over any other. Raises TimeoutError, JournalError."""
    if record.charge is not None:
        settlement = Settlement(record.account_id, hold_id, record.charge, record.generation_id, record.facts, "journal")
        await with_timeout(ledger.settle(settlement))
    else:
        await with_timeout(ledger.hand_over(HandOver(record.account_id, hold_id, record.generation_id, record.facts)))


async def all_succeed(closings: Iterable[Awaitable[object]]) -> bool:
    """Runs them concurrently, and logs each failure: one hold that cannot be closed must not stop the others.

    Ends early, with False, when all that run at a time fail for want of time: the database is away.
    """
    closings = iter(closings)
    succeeded = True
    while some := list(itertools.islice(closings, CONCURRENT_MAX)):
        outcomes = await asyncio.gather(*some, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        late = sum(isinstance(error, TimeoutError) for error in errors)
        if late:
            LOGGER.warning("%d holds could not be closed within %d s; recovery will retry them", late, CLOSE_TIMEOUT_S)
        for error in errors:
            if not isinstance(error, TimeoutError):
                LOGGER.error("A hold could not be closed: %r", error)
        succeeded = succeeded and not errors
        if late == len(some):
            return False
    return succeeded


async def with_timeout(closing: Awaitable[Result]) -> Result:
    """A closing that waits for a row lock or for the database is abandoned for now: every closing may be repeated."""
    async with asyncio.timeout(CLOSE_TIMEOUT_S):
        return await closing
