"""Natural batching: what arrives while a statement is under way forms the next one.

With one request at a time a batch is one item and starts at once; under load batches grow by themselves, and many requests share
one round trip and one commit. An item that may wait a little goes with the next that may not. Mostly one statement is under way.
One that takes longer than PATIENCE_S may be waiting for somebody's lock: then those who wait behind it go past it in another
statement, except items of the accounts that it has. So two statements of one process never wait for each other on an account's
row, and an account's items keep their order of arrival.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptutor.database import DatabaseUnavailable

PATIENCE_S = 0.05

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class Entry(Generic[Item, Result]):
    item: Item
    account_id: int
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """`execute` carries out a batch and gives its results in order; `account_of` is the same number for what must not meet.

    `at_once` is how many statements there may be. `abandoned` is called with an item and its result where the submitter was
    cancelled meanwhile: nobody else will see it.
    """

    def __init__(
        self,
        execute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        account_of: Callable[[Item], int],
        *,
        at_once: int,
        batch_max: int,
        patience_s: float = PATIENCE_S,
        abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._execute = execute
        self._account_of = account_of
        self._at_once = at_once
        self._batch_max = batch_max
        self._patience_s = patience_s
        self._abandoned = abandoned
        self._waiting: deque[Entry[Item, Result]] = deque()
        self._workers: dict[asyncio.Task[None], set[int]] = {}
        """Each with the accounts of its statement."""
        self._impatience: asyncio.TimerHandle | None = None
        self._is_due = False
        """Whether somebody waits who may not wait; if not, `_patience_ends` when the first of the others may not any more."""
        self._patience_ends: asyncio.TimerHandle | None = None

    async def submit(self, item: Item, *, within_s: float = 0) -> Result:
        """The item's own result, or the exception of its batch. It may wait for company, but begins within so many seconds."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append(Entry(item, self._account_of(item), future))
        if not within_s or self._is_due:
            self._fall_due()
        elif self._patience_ends is None:
            self._patience_ends = self._loop.call_later(within_s, self._fall_due)
        return await future

    def _fall_due(self) -> None:
        self._is_due = True
        if not self._workers:
            self._start()
        elif self._impatience is None:
            self._wait_patiently()

    def _wait_patiently(self) -> None:
        if self._loop is not None and len(self._workers) < self._at_once:
            self._impatience = self._loop.call_later(self._patience_s, self._start_another)

    def _start_another(self) -> None:
        self._impatience = None
        if self._is_due and len(self._workers) < self._at_once:
            self._start()

    def _start(self) -> None:
        accounts: set[int] = set()
        worker = asyncio.create_task(self._work(accounts))
        self._workers[worker] = accounts
        worker.add_done_callback(self._ended)

    def _ended(self, worker: asyncio.Task[None]) -> None:
        """What came in the last moment gets a worker, or, if this one was cancelled, an answer."""
        del self._workers[worker]
        if worker.cancelled():
            _fail(self._waiting, DatabaseUnavailable("cancelled"))
            self._waiting.clear()
            self._is_due = False
        elif self._is_due and not self._workers:
            self._start()

    async def _work(self, accounts: set[int]) -> None:
        """`accounts` are those of the statement that is under way."""
        while batch := self._next_batch(accounts):
            try:
                await self._carry_out(batch)
            except asyncio.CancelledError:
                _fail(batch, DatabaseUnavailable("cancelled"))
                raise

    def _next_batch(self, accounts: set[int]) -> list[Entry[Item, Result]]:
        """Those whose accounts no other statement has, in their order."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        accounts.clear()
        if not self._is_due:
            return []
        if self._patience_ends is not None:
            self._patience_ends.cancel()
            self._patience_ends = None
        busy = set().union(*self._workers.values())
        batch: list[Entry[Item, Result]] = []
        held_up: list[Entry[Item, Result]] = []
        while self._waiting and len(batch) < self._batch_max:
            entry = self._waiting.popleft()
            (held_up if entry.account_id in busy else batch).append(entry)
        self._waiting.extendleft(reversed(held_up))
        self._is_due = bool(self._waiting)
        accounts.update(entry.account_id for entry in batch)
        if self._waiting and batch:
            self._wait_patiently()
        return batch

    async def _carry_out(self, batch: list[Entry[Item, Result]]) -> None:
        batch = [entry for entry in batch if not entry.future.done()]  # whose submitter was cancelled is not served
        if not batch:
            return
        try:
            results = await self._execute([entry.item for entry in batch])
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for entry in batch:  # one of them is to blame; the others must not suffer for it
                await self._carry_out([entry])
        else:
            for entry, result in zip(batch, results, strict=True):
                if not entry.future.done():
                    entry.future.set_result(result)
                elif self._abandoned is not None:
                    self._abandoned(entry.item, result)


def _fail(batch: Iterable[Entry[Item, Result]], error: Exception) -> None:
    for entry in batch:
        if not entry.future.done():
            entry.future.set_exception(error)
