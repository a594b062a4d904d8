"""The ledger of requests: hold → settle | release | hand over. Batched, journalled, idempotent.

A hold is committed before anything is bought, and closed once: by a settlement with the exact charge, or by a release where
nothing was bought. What this process cannot find out itself it hands over to recovery. Closing is idempotent by the hold's
id, so it is repeated until the database has it; the journal remembers it meanwhile.

What one request ends with and another begins with share statements and commits. These do not wait for an account's row that
another process has, or somebody's hand: what belongs to that account is asked for again, by itself, and waits alone. Releases
give up soon, and come again.

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
from typing import Any, Literal, TypeVar

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database, Row
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
from gptutor.tasks import BackgroundTasks

LOGGER = logging.getLogger("gptutor.ledger")
STATEMENTS_AT_ONCE = 3
"""Of each kind: mostly one."""
LOCKED_AT_ONCE = 4
"""So many accounts may be held by somebody; another would wait behind them."""
BATCH_MAX = 200
PAUSES_S = (0.05, 0.2, 1.0, 5.0)

REFUSED: dict[str, type[Exception]] = {
    "unknown_key": UnknownKey,
    "concurrency_limited": TooManyAtOnce,
    "insufficient": InsufficientFunds,
    "key_limit_reached": KeyCapReached,
}
Outcome = Literal["settled", "settled_late", "already_settled", "no_hold"]
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
    ) -> None:
        self.journal = journal
        self.active: set[HoldId] = set()
        self._database = database
        self._rub_per_usd = rub_per_usd
        self._hold_ttl_s = hold_ttl_s
        self._chat_per_minute = chat_per_minute
        self._chat_at_once = chat_at_once
        self._orphans = BackgroundTasks()
        self._trades: Batcher[Trade, Row] = Batcher(
            self._trade_batch,
            lambda item: item.account_id,
            at_once=STATEMENTS_AT_ONCE,
            batch_max=BATCH_MAX,
            abandoned=self._abandon,
        )
        self._locked: Batcher[Trade, Row] = Batcher(
            functools.partial(self._trade_batch, waits=True),
            lambda item: item.account_id,
            at_once=LOCKED_AT_ONCE,
            batch_max=BATCH_MAX,
            patience_s=0,
            apart=True,
            abandoned=self._abandon,
        )
        """Those whose account's row somebody had: each account's wait for it in a statement of their own."""
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
            row = await self._trade(request)
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
        row = await _until_done(self._trade, settlement)
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

    async def drain(self, within_s: float) -> int:
        """Waits for the releases that were begun on nobody's behalf; what is left then, recovery finds. How many are left."""
        return await self._orphans.drain(within_s)

    def _forsake(self, request: HoldRequest) -> None:
        """Nobody waits for this hold any more, and it may exist: it is released, having bought nothing."""
        self.active.discard(request.hold_id)
        self._orphans.start(self.release(Release(request.claim.account_id, request.hold_id)))

    def _abandon(self, item: Trade, row: Row) -> None:
        if isinstance(item, HoldRequest) and row["outcome"] == "granted":
            self._forsake(item)

    async def _trade(self, item: Trade) -> Row:
        row = await self._trades.submit(item)
        return await self._locked.submit(item) if row["outcome"] == "locked" else row

    # -- the statements

    async def _trade_batch(self, items: Sequence[Trade], *, waits: bool = False) -> list[Row]:
        requests = [item for item in items if isinstance(item, HoldRequest)]
        settlements = [item for item in items if isinstance(item, Settlement)]
        rows = await self._database.fetch(
            "settle_and_hold",
            waits,
            *_columns_of_charges(settlements),
            self.journal.owner,
            self._hold_ttl_s,
            self._rub_per_usd,
            self._chat_per_minute,
            self._chat_at_once,
            *_columns_of_holds(requests),
        )
        by_id = {row["hold_id"]: row for row in rows}
        self.journal.closed(item.hold_id for item in settlements if by_id[item.hold_id]["outcome"] != "locked")
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


def _columns_of_charges(settlements: Sequence[Settlement]) -> Sequence[list[Any]]:
    """In the order of `settle_and_hold`."""
    if not settlements:
        return [[]] * 7
    return [
        [settlement.account_id for settlement in settlements],
        [settlement.hold_id for settlement in settlements],
        [settlement.charge for settlement in settlements],
        [settlement.cost_usd for settlement in settlements],
        [settlement.generation_id for settlement in settlements],
        [settlement.prompt_tokens for settlement in settlements],
        [settlement.completion_tokens for settlement in settlements],
    ]


def _columns_of_holds(requests: Sequence[HoldRequest]) -> Sequence[list[Any]]:
    """In the order of `settle_and_hold`."""
    if not requests:
        return [[]] * 9
    return [
        [request.claim.account_id for request in requests],
        [request.claim.key_hash for request in requests],
        [request.hold_id for request in requests],
        [request.ceiling.most for request in requests],
        [request.ceiling.least for request in requests],
        [request.model for request in requests],
        [request.request_id for request in requests],
        [request.idempotency_key for request in requests],
        [request.body_hash for request in requests],
    ]


async def _until_done(submit: Callable[[Item], Awaitable[Result]], item: Item) -> Result:
    """Submits an item that is idempotent, however often it takes while the database is away."""
    pauses = itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1]))
    level = logging.WARNING  # once for each hold; then it is known that the database is away
    while True:
        try:
            return await submit(item)
        except DatabaseUnavailable as error:
            LOGGER.log(level, "A hold cannot be closed yet: %s", error)
            level = logging.DEBUG
            await asyncio.sleep(next(pauses) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
