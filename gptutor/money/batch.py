"""Natural batching: what arrives while a statement is under way forms the next one.

No timer is involved. With one request at a time a batch is one item and starts at once; under load batches grow by
themselves, and many requests share one round trip and one commit. Items are spread over a few lanes by account, so that two
statements of one process never wait for each other on an account's row; within a lane the order of arrival is kept.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from gptutor.database import DatabaseUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        self._execute = execute
        self._lane_of = lane_of
        self._batch_max = batch_max
        self._abandoned = abandoned
        self._queues: list[deque[tuple[Item, asyncio.Future[Result]]]] = [deque() for _ in range(lanes)]
        self._workers: list[asyncio.Task[None] | None] = [None] * lanes

    async def submit(self, item: Item) -> Result:
        """The item's own result, or the exception of its batch."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        lane = self._lane_of(item) % len(self._queues)
        self._queues[lane].append((item, future))
        if self._workers[lane] is None:
            self._workers[lane] = asyncio.create_task(self._work(lane))
        return await future

    async def _work(self, lane: int) -> None:
        queue = self._queues[lane]
        try:
            while queue:
                batch = [queue.popleft() for _ in range(min(len(queue), self._batch_max))]
                await self._carry_out([entry for entry in batch if not entry[1].done()])
        finally:
            self._workers[lane] = None

    async def _carry_out(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        if not batch:
            return
        try:
            results = await self._execute([item for item, _ in batch])
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:
                for single in batch:  # one of them is to blame; the others must not suffer for it
                    await self._carry_out([single])
        except BaseException as error:
            _fail(batch, DatabaseUnavailable(type(error).__name__))
            raise
        else:
            for (item, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
                elif self._abandoned is not None:
                    self._abandoned(item, result)


def _fail(batch: list[tuple[Item, asyncio.Future[Result]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
