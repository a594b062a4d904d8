"""The ledger of requests: hold → settle | release | hand over. Batched, journalled, idempotent.

A hold is committed before anything is bought, and closed once: by a settlement with the exact charge, or by a release where
nothing was bought. What this process cannot find out itself it hands over to recovery. Closing is idempotent by the hold's
id, so it is repeated until the database has it; the journal remembers it meanwhile.

A settlement goes with the next holds, in one statement and one commit, or after a moment by itself. So an account's next request
finds its last one settled, and does not wait for that.

A hold whose statement failed may have been committed all the same. Nothing was sent for it, so it is released, as soon as the
database answers.
"""

import asyncio
import functools
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Literal, TypeVar

from gptutor.database import Database, DatabaseUnavailable, Row
from gptutor.money.amounts import Nano
from gptutor.money.batch import Batcher
from gptutor.money.holds import (
    HandOver,
    Hold,
    HoldId,
    HoldRequest,
    InsufficientFunds,
    KeyCapReached,
    RateLimited,
    Release,
    RepeatedRequest,
    Settlement,
    TooManyAtOnce,
    UnknownKey,
)
from gptutor.money.journal import Journal

LOGGER = logging.getLogger("gptutor.ledger")
STATEMENTS_AT_ONCE = 3
"""Of each kind: one, as long as none is held up by a lock."""
BATCH_MAX = 200
SETTLE_WITHIN_S = 0.01
PAUSES_S = (0.05, 0.2, 1.0, 5.0)

REFUSED: dict[str, type[Exception]] = {
    "unknown_key": UnknownKey,
    "too_many": TooManyAtOnce,
    "insufficient": InsufficientFunds,
    "capped": KeyCapReached,
}
Outcome = Literal["settled", "settled_late", "already", "no_hold"]
Trade = HoldRequest | Settlement
Item = TypeVar("Item")
Result = TypeVar("Result")


class Ledger:
    """`journal` is this process's own; `active` are the holds that a running exchange still has in its hands."""

    def __init__(
        self,
        database: Database,
        journal: Journal,
        *,
        rub_per_usd: Decimal,
        hold_ttl_s: float,
        chat_per_minute: int = 0,
        chat_at_once: int = 0,
        settle_within_s: float = SETTLE_WITHIN_S,
    ) -> None:
        self.journal = journal
        self.active: set[HoldId] = set()
        self._database = database
        self._rub_per_usd = rub_per_usd
        self._hold_ttl_s = hold_ttl_s
        self._chat_per_minute = chat_per_minute
        self._chat_at_once = chat_at_once
        self._orphans: set[asyncio.Task[None]] = set()
        self._trades: Batcher[Trade, Row] = Batcher(
            self._trade_batch,
            lambda item: item.account_id,
            at_once=STATEMENTS_AT_ONCE,
            batch_max=BATCH_MAX,
            abandoned=lambda item, row: self._forsake(item) if isinstance(item, HoldRequest) else None,
        )
        self._settle_soon = functools.partial(self._trades.submit, within_s=settle_within_s)
        self._late_settlements: Batcher[Settlement, Row] = Batcher(
            self._trade_batch, lambda item: item.account_id, at_once=STATEMENTS_AT_ONCE, batch_max=BATCH_MAX
        )
        """Those that failed once: whoever has their accounts' rows should not keep them from others' holds."""
        self._releases: Batcher[Release, None] = Batcher(
            self._release_batch, lambda item: item.account_id, at_once=STATEMENTS_AT_ONCE, batch_max=BATCH_MAX
        )
        self._hand_overs: Batcher[HandOver, None] = Batcher(
            self._hand_over_batch, lambda item: item.account_id, at_once=1, batch_max=BATCH_MAX
        )

    async def hold_funds(self, request: HoldRequest) -> Hold:
        """Authenticates the key and reserves the ceiling.

        Raises UnknownKey, RateLimited, TooManyAtOnce, InsufficientFunds, KeyCapReached, RepeatedRequest, DatabaseUnavailable.
        """
        self.active.add(request.hold_id)
        try:
            row = await self._trades.submit(request)
        except (Exception, asyncio.CancelledError):
            self._forsake(request)
            raise
        if row["outcome"] == "granted":
            return Hold(
                request.claim.account_id,
                request.hold_id,
                Nano(row["amount_nano"]),
                Nano(row["available_nano"]),
                row["minute_requests"],
            )
        self.active.discard(request.hold_id)
        if row["outcome"] == "rate_limited":
            raise RateLimited(of_key=not self._chat_per_minute or row["minute_requests"] < self._chat_per_minute)
        if refused := REFUSED.get(row["outcome"]):
            raise refused
        raise RepeatedRequest(row["earlier_request_id"], same_body=row["outcome"] == "repeated")

    async def settle(self, settlement: Settlement) -> Outcome:
        """Books the charge and frees the hold; a charge above its hold is booked in full (contract C5)."""
        row = await _until_done(self._settle_soon, settlement, again=self._late_settlements.submit)
        outcome: Outcome = row["outcome"]
        if outcome == "no_hold":
            LOGGER.error("A charge has no hold: %s", settlement)  # a commit was lost: a failover to a stale replica
        return outcome

    async def release(self, item: Release) -> None:
        """Frees a hold; one that is closed already stays as it is."""
        await _until_done(self._releases.submit, item)

    async def hand_over(self, item: HandOver) -> None:
        """Leaves the hold to recovery."""
        await _until_done(self._hand_overs.submit, item)

    def let_go(self, hold_id: HoldId) -> None:
        """The exchange has ended, however: if its hold is not closed, recovery may look at it."""
        self.active.discard(hold_id)

    async def drain(self, within_s: float) -> None:
        """Waits for the releases that were begun on nobody's behalf; what is left then, recovery finds."""
        if self._orphans:
            _, late = await asyncio.wait(self._orphans, timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _forsake(self, request: HoldRequest) -> None:
        """Nobody waits for this hold any more, and it may exist: it is released, having bought nothing."""
        self.active.discard(request.hold_id)
        task = asyncio.create_task(self.release(Release(request.claim.account_id, request.hold_id)))
        self._orphans.add(task)
        task.add_done_callback(self._orphans.discard)

    # -- the statements

    async def _trade_batch(self, items: Sequence[Trade]) -> list[Row]:
        requests = [item for item in items if isinstance(item, HoldRequest)]
        settlements = [item for item in items if isinstance(item, Settlement)]
        rows = await self._database.fetch(
            "settle_and_hold",
            [settlement.account_id for settlement in settlements],
            [settlement.hold_id for settlement in settlements],
            [settlement.charge for settlement in settlements],
            [settlement.cost_usd for settlement in settlements],
            [settlement.generation_id for settlement in settlements],
            [settlement.prompt_tokens for settlement in settlements],
            [settlement.completion_tokens for settlement in settlements],
            self.journal.owner,
            self._hold_ttl_s,
            self._rub_per_usd,
            self._chat_per_minute,
            self._chat_at_once,
            [request.account_id for request in requests],
            [request.claim.key_hash for request in requests],
            [request.hold_id for request in requests],
            [request.ceiling.most for request in requests],
            [request.ceiling.least for request in requests],
            [request.model for request in requests],
            [request.request_id for request in requests],
            [request.idempotency_key for request in requests],
            [request.body_hash for request in requests],
        )
        by_id = {row["hold_id"]: row for row in rows}
        self.journal.closed(settlement.hold_id for settlement in settlements)
        return [by_id[item.hold_id] for item in items]

    async def _release_batch(self, releases: list[Release]) -> Sequence[None]:
        await self._database.fetch(
            "release_holds",
            [release.account_id for release in releases],
            [release.hold_id for release in releases],
            [release.unresolved for release in releases],
        )
        self.journal.closed(release.hold_id for release in releases)
        return [None] * len(releases)

    async def _hand_over_batch(self, items: list[HandOver]) -> Sequence[None]:
        await self._database.fetch(
            "hand_over_holds",
            [item.account_id for item in items],
            [item.hold_id for item in items],
            [item.generation_id for item in items],
        )
        self.journal.closed(item.hold_id for item in items)
        return [None] * len(items)


async def _until_done(
    submit: Callable[[Item], Awaitable[Result]], item: Item, *, again: Callable[[Item], Awaitable[Result]] | None = None
) -> Result:
    """Submits an item that is idempotent, however often it takes while the database is away; `again`, if given, from then on."""
    pauses = itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1]))
    level = logging.WARNING  # once for each hold; then it is known that the database is away
    while True:
        try:
            return await submit(item)
        except DatabaseUnavailable as error:
            LOGGER.log(level, "A hold cannot be closed yet: %s", error)
            level = logging.DEBUG
            submit = again or submit
            await asyncio.sleep(next(pauses) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
