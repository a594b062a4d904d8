"""Natural batching: items that arrive while a statement is running form the next batch.

With one request at a time a batch is one item and starts at once; under load batches grow by themselves, and many requests share
one round trip and one commit. Usually a single statement is running. If it takes longer than OVERTAKE_AFTER_S, it may be waiting
for a row lock. Then another statement overtakes it with the queued items, except items of accounts in a running statement. So
two statements of one batcher never wait for each other on an account's row, and an account's items keep their order of arrival.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptutor.database.errors import DatabaseUnavailable, RowsLocked
from gptutor.telemetry.metrics import BATCH_ITEMS

OVERTAKE_AFTER_S = 0.05

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class QueuedItem(Generic[Item, Result]):
    item: Item
    account_id: int
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects items into batches.

    `execute` runs a batch and returns one result per item, in order. `account_of` names the account of an item: items of one
    account are never in two running statements. At most `concurrent_max` statements run at a time, each with at most `batch_max`
    items, and with `one_account_per_batch` each with items of a single account. `on_abandoned` gets an item and its result when
    the submitter was cancelled while the item's statement was running: no one else will see that result.
    """

    def __init__(
        self,
        execute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        account_of: Callable[[Item], int],
        *,
        concurrent_max: int,
        batch_max: int,
        overtake_after_s: float = OVERTAKE_AFTER_S,
        one_account_per_batch: bool = False,
        on_abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._execute = execute
        self._account_of = account_of
        self._concurrent_max = concurrent_max
        self._batch_max = batch_max
        self._overtake_after_s = overtake_after_s
        self._one_account_per_batch = one_account_per_batch
        self._on_abandoned = on_abandoned
        self._queue: deque[QueuedItem[Item, Result]] = deque()
        self._workers: dict[asyncio.Task[None], set[int]] = {}
        """Each worker with the accounts in its running statement."""
        self._overtake_timer: asyncio.TimerHandle | None = None

    async def submit(self, item: Item) -> Result:
        """Returns the item's own result. Raises the exception of its batch."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._queue.append(QueuedItem(item, self._account_of(item), future))
        if not self._workers:
            self._start_worker()
        elif self._overtake_timer is None:
            self._schedule_overtaking()
        return await future

    def _schedule_overtaking(self) -> None:
        if self._loop is not None and len(self._workers) < self._concurrent_max:
            self._overtake_timer = self._loop.call_later(self._overtake_after_s, self._overtake)

    def _overtake(self) -> None:
        self._overtake_timer = None
        if self._queue and len(self._workers) < self._concurrent_max:
            self._start_worker()

    def _start_worker(self) -> None:
        accounts: set[int] = set()
        worker = asyncio.create_task(self._work(accounts))
        self._workers[worker] = accounts
        worker.add_done_callback(self._worker_done)

    def _worker_done(self, worker: asyncio.Task[None]) -> None:
        """Items queued since the worker's last look at the queue get a new worker or, if this one was cancelled, an exception."""
        del self._workers[worker]
        if worker.cancelled():
            _fail(self._queue, DatabaseUnavailable("cancelled"))
            self._queue.clear()
        elif self._queue and not self._workers:
            self._start_worker()
        elif self._queue and self._overtake_timer is None:
            busy = self._busy_accounts()
            if any(entry.account_id not in busy for entry in self._queue):
                self._schedule_overtaking()  # submit set no timer: all `concurrent_max` workers still counted as running

    async def _work(self, accounts: set[int]) -> None:
        """Runs batches until none can start. `accounts` is kept equal to the accounts in the running statement."""
        while batch := self._next_batch(accounts):
            try:
                await self._run_batch(batch)
            except asyncio.CancelledError:
                _fail(batch, DatabaseUnavailable("cancelled"))
                raise

    def _next_batch(self, accounts: set[int]) -> list[QueuedItem[Item, Result]]:
        """Takes from the queue, in order, the items whose accounts are in no other running statement."""
        if self._overtake_timer is not None:
            self._overtake_timer.cancel()
            self._overtake_timer = None
        accounts.clear()
        if not self._queue:
            return []
        busy = self._busy_accounts()
        batch: list[QueuedItem[Item, Result]] = []
        postponed: list[QueuedItem[Item, Result]] = []
        while self._queue and len(batch) < self._batch_max:
            entry = self._queue.popleft()
            other_account = self._one_account_per_batch and batch and entry.account_id != batch[0].account_id
            (postponed if entry.account_id in busy or other_account else batch).append(entry)
        self._queue.extendleft(reversed(postponed))
        accounts.update(entry.account_id for entry in batch)
        if self._queue and batch:
            self._schedule_overtaking()
        return batch

    def _busy_accounts(self) -> set[int]:
        """The accounts in all running statements."""
        return set().union(*self._workers.values())

    async def _run_batch(self, batch: list[QueuedItem[Item, Result]]) -> None:
        batch = [entry for entry in batch if not entry.future.done()]  # items whose submitter was cancelled are dropped
        if not batch:
            return
        BATCH_ITEMS.observe(len(batch))
        try:
            results = await self._execute([entry.item for entry in batch])
        except RowsLocked as error:
            accounts = {entry.account_id for entry in batch}
            if len(accounts) == 1:
                _fail(batch, error)
                return
            for account in accounts:  # the lock is on one account's row: each account is run by itself
                await self._run_batch([entry for entry in batch if entry.account_id == account])
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for entry in batch:  # one item is to blame: each is run by itself, so that the others succeed
                await self._run_batch([entry])
        else:
            for entry, result in zip(batch, results, strict=True):
                if not entry.future.done():
                    entry.future.set_result(result)
                elif self._on_abandoned is not None:
                    self._on_abandoned(entry.item, result)


def _fail(batch: Iterable[QueuedItem[Item, Result]], error: Exception) -> None:
    for entry in batch:
        if not entry.future.done():
            entry.future.set_exception(error)
