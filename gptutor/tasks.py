"""Tasks that outlive the request that started them, and are waited for when the service stops."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundTasks:
    """Keeps a strong reference to each task until the task ends: the event loop keeps only weak ones."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    async def wait(self, within_s: float | None) -> set[asyncio.Task[Any]]:
        """Waits for all tasks, for `within_s` seconds at most (None: without limit). Returns those that have not ended."""
        if not self._tasks:
            return set()
        _, late = await asyncio.wait(self._tasks, timeout=within_s)
        return late

    async def drain(self, within_s: float | None) -> int:
        """Waits for all tasks, for `within_s` seconds at most (None: without limit), then cancels the rest.

        Returns how many were cancelled.
        """
        late = await self.wait(within_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)
