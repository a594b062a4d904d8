"""Places for large request bodies: a thread parses them, one at a time, and the accounts take turns.

A large body needs a verified key and a place, which it has until it is parsed. An account with many large bodies waits for itself
only: the next body of another account is parsed after the one that is being parsed now.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptutor.errors import ApiError
from gptutor.money.amounts import AccountId

LARGE_BODY_BYTES_MIN = 100 * 1024
"""Parsing a larger body would block the event loop for too long, and nobody without a verified key may send one."""
COMMAS_MAX = 5_000
"""A smaller body with more values is parsed like a large one: each number costs a call. 100 KB of prose has three thousand."""
LARGE_BODY_WEIGHT = 5
"""As how many refused requests one with a large body is counted."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Job(Generic[Result]):
    work: Callable[[], Result]
    result: "asyncio.Future[Result]"


class LargeBodies:
    """`places_max`: how many large bodies of one account may be read, or wait for the thread, at a time."""

    def __init__(self, thread: ThreadPoolExecutor, places_max: int) -> None:
        self._thread = thread
        self._places_max = places_max
        self._places: Counter[AccountId] = Counter()
        self._jobs: dict[AccountId, deque[_Job[object]]] = {}
        """By account; the account whose turn is next is first."""
        self._is_busy = False

    @contextmanager
    def place(self, account_id: AccountId) -> Iterator[None]:
        """Raises ApiError if the account has all its places."""
        if self._places[account_id] >= self._places_max:
            raise ApiError(
                "too_many_concurrent_requests", f"At most {self._places_max} large requests may be sent at the same time"
            )
        self._places[account_id] += 1
        try:
            yield
        finally:
            self._places[account_id] -= 1
            if not self._places[account_id]:
                del self._places[account_id]

    async def run(self, account_id: AccountId, work: Callable[[], Result]) -> Result:
        """Runs `work` in the thread when it is the account's turn. Raises what `work` raises."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.setdefault(account_id, deque()).append(_Job(work, result))  # type: ignore[arg-type]
        self._start_next()
        try:
            return await result
        finally:
            del result  # an error's traceback would refer to it, and it to the error

    def _start_next(self) -> None:
        while self._jobs and not self._is_busy:
            account_id, jobs = next(iter(self._jobs.items()))
            del self._jobs[account_id]
            job = jobs.popleft()
            if jobs:
                self._jobs[account_id] = jobs  # last: the others have their turns first
            if not job.result.done():  # the client may have disconnected
                self._is_busy = True
                running = job.result.get_loop().run_in_executor(self._thread, job.work)
                running.add_done_callback(lambda done, job=job: self._finish(job, done))  # type: ignore[misc]

    def _finish(self, job: _Job[object], done: "asyncio.Future[object]") -> None:
        self._is_busy = False
        error = done.exception()
        if not job.result.done():
            if error is None:
                job.result.set_result(done.result())
            else:
                job.result.set_exception(error)
        self._start_next()
