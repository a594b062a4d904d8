"""Natural batching: what arrives while a statement is under way forms the next one.

No timer is involved. With one request at a time a batch is one item and starts at once; under load batches grow by
themselves, and many requests share one round trip and one commit. Items are spread over a few lanes by account, so that two
statements of one process never wait for each other on an account's row; within a lane the order of arrival is kept.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptutor.database import DatabaseUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class Entry(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """`execute` carries out a batch and gives its results in order; `lane_of` is the same number for what must not meet.

    `abandoned` is called with an item and its result where the submitter was cancelled meanwhile: nobody else will see it.
    """

    def __init__(
        self,
        execute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        lane_of: Callable[[Item], int],
        *,
        lanes: int,
        batch_max: int,
        abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._execute = execute
        self._lane_of = lane_of
        self._batch_max = batch_max
        self._abandoned = abandoned
        self._queues: list[deque[Entry[Item, Result]]] = [deque() for _ in range(lanes)]
        self._workers: list[asyncio.Task[None] | None] = [None] * lanes

    async def submit(self, item: Item) -> Result:
        """The item's own result, or the exception of its batch."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = self._loop.create_future()
        lane = self._lane_of(item) % len(self._queues)
        self._queues[lane].append(Entry(item, future))
        if self._workers[lane] is None:
            self._start(lane)
        return await future

    def _start(self, lane: int) -> None:
        worker = self._workers[lane] = asyncio.create_task(self._work(lane))
        worker.add_done_callback(lambda ended: self._ended(lane, ended))

    def _ended(self, lane: int, worker: asyncio.Task[None]) -> None:
        """The lane is free again; what came in the last moment gets a worker, or, if this one was cancelled, an answer."""
        self._workers[lane] = None
        queue = self._queues[lane]
        if worker.cancelled():
            _fail(queue, DatabaseUnavailable("cancelled"))
            queue.clear()
        elif queue:
            self._start(lane)

    async def _work(self, lane: int) -> None:
        queue = self._queues[lane]
        while queue:
            batch = [queue.popleft() for _ in range(min(len(queue), self._batch_max))]
            try:
                await self._carry_out(batch)
            except asyncio.CancelledError:
                _fail(batch, DatabaseUnavailable("cancelled"))
                raise

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
