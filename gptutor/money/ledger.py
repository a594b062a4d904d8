"""The ledger of requests: hold → settle | release | hand over. Batched, journalled, idempotent.

A hold is committed before anything is bought, and closed once: by a settlement with the exact charge, or by a release if nothing
was bought. If this process cannot find out which, it hands the hold over to recovery. Closing is idempotent by the hold's id, so
closing is retried until the database has committed it; until then the journal has the hold.

The settlements of finished requests and the holds of new ones share statements and commits. Such a statement does not wait for
account rows that are locked by another process or by hand: it skips their items, which are then submitted again, in a statement
for that account alone, which does wait. Releases use a short lock timeout, and are retried.

A hold that the database has lost, as by a failover to a server that lagged behind, is placed again when it is closed: its charge
is booked late, or recovery looks for it.

A hold whose statement failed may have been committed all the same. No request was sent for such a hold, so it is released as soon
as the database responds.
"""

import asyncio
import datetime
import functools
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any, Literal, TypeVar

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database, Row
from gptutor.money.amounts import NANO_PER_RUB, Nano
from gptutor.money.batch import Batcher
from gptutor.money.holds import (
    ConcurrencyLimitReached,
    HandOver,
    Hold,
    HoldFacts,
    HoldId,
    HoldRequest,
    InsufficientFunds,
    KeyLimitReached,
    Mark,
    OutcomeUnknown,
    RateLimited,
    Release,
    RepeatedRequest,
    Settlement,
    UnknownKey,
    placed_at_ms,
)
from gptutor.money.journal import Journal
from gptutor.money.journal_records import HoldRecord
from gptutor.money.overruns import report_overrun
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.metrics import UNBOOKED_CHARGES
from gptutor.telemetry.model_labels import count_charge

LOGGER = logging.getLogger("gptutor.ledger")
CONCURRENT_STATEMENTS_MAX = 3
"""For each kind of batch. Usually one is running."""
LOCKED_ACCOUNTS_MAX = 4
"""For how many locked account rows statements may wait at a time; items of further locked accounts are queued."""
BATCH_MAX = 200
REPEATS_REJECTED_S = 180.0
"""How long a client's repeat is recognised. Clients that repeat do so within seconds."""
MARK_S = 1.0
"""How long a client waits for its error, which it gets only after the mark."""
RETRY_PAUSES_S = (0.05, 0.2, 1.0, 5.0)
RELEASES_S = 6.0
"""How long a request waits for releases that may free its idempotency key: longer than the longest of these pauses."""

NO_OVERDRAFT = Nano(0)
NOT_SETTLED = ("locked", "no_hold")
NEWLY_SETTLED = ("settled", "settled_late")
REJECTIONS: dict[str, type[Exception]] = {
    "unknown_key": UnknownKey,
    "concurrency_limited": ConcurrencyLimitReached,
    "insufficient": InsufficientFunds,
    "key_limit_reached": KeyLimitReached,
}
Outcome = Literal["settled", "settled_late", "already_settled", "no_hold"]
HoldOrSettlement = HoldRequest | Settlement
Closing = Settlement | HandOver
Item = TypeVar("Item")
Result = TypeVar("Result")


class Ledger:
    """`journal` is this process's own. `active` are the holds of running exchanges: recovery leaves them alone.

    A charge that exceeds its hold by more than `overdraft_max` is an error in the log.
    """

    def __init__(
        self,
        database: Database,
        journal: Journal,
        *,
        rub_per_usd: Decimal,
        hold_ttl_s: float,
        chat_per_minute: int = 0,
        chat_concurrent_max: int = 0,
        overdraft_max: Nano = NO_OVERDRAFT,
    ) -> None:
        self.journal = journal
        self.active: set[HoldId] = set()
        self._database = database
        self._rub_per_usd = rub_per_usd
        self._hold_ttl_s = hold_ttl_s
        self._chat_per_minute = chat_per_minute
        self._chat_concurrent_max = chat_concurrent_max
        self._overdraft_max = overdraft_max
        self._background_releases = BackgroundTasks()
        self._holds_and_settlements: Batcher[HoldOrSettlement, Row] = Batcher(
            self._settle_and_hold_batch,
            lambda item: item.account_id,
            concurrent_max=CONCURRENT_STATEMENTS_MAX,
            batch_max=BATCH_MAX,
            on_abandoned=self._release_abandoned,
        )
        self._of_locked_accounts: Batcher[HoldOrSettlement, Row] = Batcher(
            functools.partial(self._settle_and_hold_batch, wait_for_locks=True),
            lambda item: item.account_id,
            concurrent_max=LOCKED_ACCOUNTS_MAX,
            batch_max=BATCH_MAX,
            overtake_after_s=0,
            one_account_per_batch=True,
            on_abandoned=self._release_abandoned,
        )
        """Items whose account row was locked: the items of each account wait for it in a statement of their own."""
        self._releases: Batcher[Release, None] = Batcher(
            self._release_batch, lambda item: item.account_id, concurrent_max=CONCURRENT_STATEMENTS_MAX, batch_max=BATCH_MAX
        )
        self._hand_overs: Batcher[HandOver, bool] = Batcher(
            self._hand_over_batch, lambda item: item.account_id, concurrent_max=1, batch_max=BATCH_MAX
        )
        self._restorations: Batcher[Closing, str] = Batcher(
            self._restore_batch, lambda item: item.account_id, concurrent_max=1, batch_max=BATCH_MAX
        )

        self._marks: Batcher[Mark, None] = Batcher(
            self._mark_batch, lambda item: item.account_id, concurrent_max=CONCURRENT_STATEMENTS_MAX, batch_max=BATCH_MAX
        )

    async def hold_funds(self, request: HoldRequest) -> Hold:
        """Authenticates the key and holds the ceiling.

        Raises UnknownKey, RateLimited, ConcurrencyLimitReached, InsufficientFunds, KeyLimitReached, RepeatedRequest,
        OutcomeUnknown and DatabaseUnavailable.
        """
        self.active.add(request.hold_id)
        try:
            row = await self._submit(request)
            if row["outcome"] in ("repeated", "mismatched") and len(self._background_releases):
                await self._background_releases.wait(RELEASES_S)  # one of them may free the idempotency key
                row = await self._submit(request)
        except (Exception, asyncio.CancelledError):
            self._release_in_background(request)
            raise
        if row["outcome"] == "granted":
            return Hold(
                request.claim.account_id,
                request.hold_id,
                Nano(row["amount_nano"]),
                Nano(row["available_nano"]),
                row["minute_requests"],
                HoldFacts(
                    Nano(row["amount_nano"]), self._rub_per_usd, request.claim.key_hash[:8], request.request_id, request.model
                ),
            )
        self.active.discard(request.hold_id)
        if row["outcome"] == "rate_limited":
            raise RateLimited(of_key=not self._chat_per_minute or row["minute_requests"] < self._chat_per_minute)
        if rejection := REJECTIONS.get(row["outcome"]):
            raise rejection
        if row["outcome"] == "outcome_unknown":
            raise OutcomeUnknown(row["earlier_request_id"])
        raise RepeatedRequest(row["earlier_request_id"], same_body=row["outcome"] == "repeated")

    async def settle(self, settlement: Settlement) -> Outcome:
        """Books the charge and closes the hold; a charge above the held amount is booked in full (contract C5).

        A hold that the database has lost is placed again. The outcome no_hold: that cannot be done, and the charge was written
        down for the operator. Raises JournalError if not even that.
        """
        row = await _retry_until_done(self._submit, settlement)
        if row["outcome"] == "no_hold" and await self._restore(settlement):
            row = await _retry_until_done(self._submit, settlement)
        outcome: Outcome = row["outcome"]
        if outcome in NEWLY_SETTLED:
            self._report_charge(settlement)
        return outcome

    def _report_charge(self, settlement: Settlement) -> None:
        hold, charge = settlement.facts, settlement.charge
        count_charge(
            "" if hold is None else hold.model,
            prompt_tokens=charge.prompt_tokens,
            completion_tokens=charge.completion_tokens,
            cost_usd=float(charge.cost_usd),
            charge_rub=charge.amount / NANO_PER_RUB,
        )
        if hold is not None and charge.amount > hold.amount:
            report_overrun(settlement.account_id, hold, charge.amount, overdraft_max=self._overdraft_max)

    async def release(self, item: Release) -> None:
        """Closes a hold without a charge. A hold that is already closed stays as it is."""
        await _retry_until_done(self._releases.submit, item)

    async def hand_over(self, item: HandOver) -> None:
        """Leaves the hold to recovery. A hold that the database has lost is placed again, as by `settle`. Raises JournalError."""
        if not await _retry_until_done(self._hand_overs.submit, item):
            await self._restore(item)

    async def mark_outcome_unknown(self, mark: Mark) -> None:
        """To be awaited before the client learns that its request has failed: then its repeat finds the mark. Never raises."""
        try:
            async with asyncio.timeout(MARK_S):
                await self._marks.submit(mark)
        except Exception as error:
            LOGGER.warning("A repeat of a request whose outcome is unknown would not be recognised: %r", error)

    def deactivate(self, hold_id: HoldId) -> None:
        """To be called when the exchange has ended: if its hold is still open, recovery may close it."""
        self.active.discard(hold_id)

    async def drain(self, within_s: float) -> int:
        """Waits for background releases, then cancels the rest, which recovery will find. Returns how many were cancelled."""
        return await self._background_releases.drain(within_s)

    def _release_in_background(self, request: HoldRequest) -> None:
        """Releases a hold that may exist and that no exchange waits for: nothing was bought under it."""
        self.active.discard(request.hold_id)
        self._background_releases.start(self._release_or_log(Release(request.claim.account_id, request.hold_id)))

    async def _release_or_log(self, item: Release) -> None:
        """A release that nobody waits for: its failure is logged, and recovery finds the hold."""
        try:
            await self.release(item)
        except Exception as error:
            LOGGER.error("A hold could not be released: %r", error)

    def _release_abandoned(self, item: HoldOrSettlement, row: Row) -> None:
        """Called when a hold was granted after the exchange that wanted it was cancelled."""
        if isinstance(item, HoldRequest) and row["outcome"] == "granted":
            self._release_in_background(item)

    async def _restore(self, item: Closing) -> bool:
        """Places a hold again if the database has lost it. Returns whether the database has it; otherwise it is written down."""
        outcome = await _retry_until_done(self._restorations.submit, item)
        if outcome == "impossible":
            charge = item.charge if isinstance(item, Settlement) else None
            self.journal.record_unbooked(item.hold_id, HoldRecord(item.account_id, item.generation_id, charge, item.facts))
            UNBOOKED_CHARGES.inc()
            LOGGER.error(
                "A request cannot be charged: the database has lost its hold and its account. gptutor reconcile lists it",
                extra={
                    "type": "recovery",
                    "userId": str(item.account_id),
                    "holdId": str(item.hold_id),
                    "requestId": item.facts.request_id if item.facts is not None else None,
                    "generationId": item.generation_id,
                },
            )
            self.journal.record_closed([item.hold_id])
        elif isinstance(item, HandOver):
            self.journal.record_handed_over([item.hold_id])
        return outcome != "impossible"

    async def _submit(self, item: HoldOrSettlement) -> Row:
        row = await self._holds_and_settlements.submit(item)
        return await self._of_locked_accounts.submit(item) if row["outcome"] == "locked" else row

    # -- the statements

    async def _settle_and_hold_batch(self, items: Sequence[HoldOrSettlement], *, wait_for_locks: bool = False) -> list[Row]:
        requests = [item for item in items if isinstance(item, HoldRequest)]
        settlements = [item for item in items if isinstance(item, Settlement)]
        rows = await self._database.fetch(
            "settle_and_hold",
            wait_for_locks,
            *_columns_of_charges(settlements),
            self.journal.owner,
            self._hold_ttl_s,
            self._rub_per_usd,
            self._chat_per_minute,
            self._chat_concurrent_max,
            *_columns_of_holds(requests),
        )
        by_id = {row["hold_id"]: row for row in rows}
        self.journal.record_closed(item.hold_id for item in settlements if by_id[item.hold_id]["outcome"] not in NOT_SETTLED)
        return [by_id[item.hold_id] for item in items]

    async def _release_batch(self, releases: list[Release]) -> Sequence[None]:
        await self._database.fetch(
            "release_holds",
            [release.account_id for release in releases],
            [release.hold_id for release in releases],
            [release.unresolved for release in releases],
        )
        self.journal.record_closed(release.hold_id for release in releases)
        return [None] * len(releases)

    async def _hand_over_batch(self, items: list[HandOver]) -> Sequence[bool]:
        """Whether each was open; the others are closed, or lost."""
        rows = await self._database.fetch(
            "hand_over_holds",
            [item.account_id for item in items],
            [item.hold_id for item in items],
            [item.generation_id for item in items],
        )
        open_holds = {row["hold_id"] for row in rows}
        self.journal.record_handed_over(open_holds)
        return [item.hold_id in open_holds for item in items]

    async def _restore_batch(self, items: list[Closing]) -> Sequence[str]:
        facts = [item.facts for item in items]
        rows = await self._database.fetch(
            "restore_holds",
            self.journal.owner,
            [item.account_id for item in items],
            [item.hold_id for item in items],
            [datetime.datetime.fromtimestamp(placed_at_ms(item.hold_id) / 1000, datetime.UTC) for item in items],
            [each and each.amount for each in facts],
            [each and each.rub_per_usd for each in facts],
            [each and each.key_hash_beginning for each in facts],
            [each and each.model for each in facts],
            [each and each.request_id for each in facts],
            [item.generation_id for item in items],
            [isinstance(item, HandOver) for item in items],
        )
        by_id = {row["hold_id"]: row["outcome"] for row in rows}
        return [by_id[item.hold_id] for item in items]

    async def _mark_batch(self, marks: list[Mark]) -> Sequence[None]:
        await self._database.fetch(
            "mark_outcomes_unknown",
            [mark.account_id for mark in marks],
            [mark.hold_id for mark in marks],
            [mark.body_hash for mark in marks],
            REPEATS_REJECTED_S,
        )
        return [None] * len(marks)


def _columns_of_charges(settlements: Sequence[Settlement]) -> Sequence[list[Any]]:
    """In the order of the parameters of `settle_and_hold`."""
    if not settlements:
        return [[]] * 8
    return [
        [settlement.account_id for settlement in settlements],
        [settlement.hold_id for settlement in settlements],
        [settlement.charge.amount for settlement in settlements],
        [settlement.charge.cost_usd for settlement in settlements],
        [settlement.generation_id for settlement in settlements],
        [settlement.charge.prompt_tokens for settlement in settlements],
        [settlement.charge.completion_tokens for settlement in settlements],
        [settlement.evidence for settlement in settlements],
    ]


def _columns_of_holds(requests: Sequence[HoldRequest]) -> Sequence[list[Any]]:
    """In the order of the parameters of `settle_and_hold`."""
    if not requests:
        return [[]] * 10
    return [
        [request.claim.account_id for request in requests],
        [request.claim.key_hash for request in requests],
        [request.hold_id for request in requests],
        [request.ceiling.hold_max for request in requests],
        [ceiling.hold_max if (ceiling := request.ceiling).hold_min is None else ceiling.hold_min for request in requests],
        [request.ceiling.available_min for request in requests],
        [request.model for request in requests],
        [request.request_id for request in requests],
        [request.idempotency_key for request in requests],
        [request.body_hash for request in requests],
    ]


async def _retry_until_done(submit: Callable[[Item], Awaitable[Result]], item: Item) -> Result:
    """Submits an idempotent item again and again until the database is available."""
    pauses = itertools.chain(RETRY_PAUSES_S, itertools.repeat(RETRY_PAUSES_S[-1]))
    level = logging.WARNING  # once for each hold: the following failures tell nothing new
    while True:
        try:
            return await submit(item)
        except DatabaseUnavailable as error:
            LOGGER.log(level, "A hold cannot be closed yet: %s", error)
            level = logging.DEBUG
            await asyncio.sleep(next(pauses) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
