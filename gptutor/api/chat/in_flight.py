"""Requests whose money is not closed yet: each has a task here, which outlives its caller and is waited for at the end."""

import asyncio
from collections.abc import Coroutine

from gptutor.tasks import finish
from gptutor.telemetry.metrics import IN_FLIGHT_REQUESTS


class InFlight:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        IN_FLIGHT_REQUESTS.set_function(self.__len__)

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work` in a task of its own, kept by a strong reference until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def __len__(self) -> int:
        return len(self._tasks)

    async def drain(self, within_s: float) -> int:
        """Waits for all of it, at most so long; then cancels the rest. Returns how many were cut off."""
        return await finish(self._tasks, within_s)
