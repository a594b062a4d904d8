"""Natural batching: what arrives while a statement is under way forms the next one.

With one request at a time a batch is one item and starts at once; under load batches grow by themselves, and many requests share
one round trip and one commit. Mostly one statement is under way. One that takes longer than PATIENCE_S may be waiting for
somebody's lock: then those who wait behind it go past it in another statement, except items of the accounts that it has. So two
statements of one batcher never wait for each other on an account's row, and an account's items keep their order of arrival.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptutor.database.errors import DatabaseUnavailable, RowsLocked

PATIENCE_S = 0.05

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class QueuedItem(Generic[Item, Result]):
    item: Item
    account_id: int
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """`execute` carries out a batch and gives its results in order; `account_of` is the same number for what must not meet.

    `at_once` is how many statements there may be; `apart` keeps each of them to one account's items. `abandoned` is called
    with an item and its result where the submitter was cancelled meanwhile: nobody else will see it.
    """

    def __init__(
        self,
        execute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        account_of: Callable[[Item], int],
        *,
        at_once: int,
        batch_max: int,
        patience_s: float = PATIENCE_S,
        apart: bool = False,
        abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._execute = execute
        self._account_of = account_of
        self._at_once = at_once
        self._batch_max = batch_max
        self._patience_s = patience_s
        self._apart = apart
        self._abandoned = abandoned
        self._waiting: deque[QueuedItem[Item, Result]] = deque()
        self._workers: dict[asyncio.Task[None], set[int]] = {}
        """Each with the accounts of its statement."""
        self._impatience: asyncio.TimerHandle | None = None

    async def submit(self, item: Item) -> Result:
        """The item's own result, or the exception of its batch."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append(QueuedItem(item, self._account_of(item), future))
        if not self._workers:
            self._start()
        elif self._impatience is None:
            self._wait_patiently()
        return await future

    def _wait_patiently(self) -> None:
        if self._loop is not None and len(self._workers) < self._at_once:
            self._impatience = self._loop.call_later(self._patience_s, self._start_another)

    def _start_another(self) -> None:
        self._impatience = None
        if self._waiting and len(self._workers) < self._at_once:
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
        elif self._waiting and not self._workers:
            self._start()
        elif self._waiting and self._impatience is None:
            busy = self._busy()
            if any(entry.account_id not in busy for entry in self._waiting):
                self._wait_patiently()  # he found all places taken, while this one was being left

    async def _work(self, accounts: set[int]) -> None:
        """`accounts` are those of the statement that is under way."""
        while batch := self._next_batch(accounts):
            try:
                await self._carry_out(batch)
            except asyncio.CancelledError:
                _fail(batch, DatabaseUnavailable("cancelled"))
                raise

    def _next_batch(self, accounts: set[int]) -> list[QueuedItem[Item, Result]]:
        """Those whose accounts no other statement has, in their order."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        accounts.clear()
        if not self._waiting:
            return []
        busy = self._busy()
        batch: list[QueuedItem[Item, Result]] = []
        held_up: list[QueuedItem[Item, Result]] = []
        while self._waiting and len(batch) < self._batch_max:
            entry = self._waiting.popleft()
            waits = entry.account_id in busy or (self._apart and batch and entry.account_id != batch[0].account_id)
            (held_up if waits else batch).append(entry)
        self._waiting.extendleft(reversed(held_up))
        accounts.update(entry.account_id for entry in batch)
        if self._waiting and batch:
            self._wait_patiently()
        return batch

    def _busy(self) -> set[int]:
        """The accounts of all statements that are under way."""
        return set().union(*self._workers.values())

    async def _carry_out(self, batch: list[QueuedItem[Item, Result]]) -> None:
        batch = [entry for entry in batch if not entry.future.done()]  # whose submitter was cancelled is not served
        if not batch:
            return
        try:
            results = await self._execute([entry.item for entry in batch])
        except RowsLocked as error:
            accounts = {entry.account_id for entry in batch}
            if len(accounts) == 1:
                _fail(batch, error)
                return
            for account in accounts:  # of one of them somebody has a row; the others must not suffer for it
                await self._carry_out([entry for entry in batch if entry.account_id == account])
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


def _fail(batch: Iterable[QueuedItem[Item, Result]], error: Exception) -> None:
    for entry in batch:
        if not entry.future.done():
            entry.future.set_exception(error)
