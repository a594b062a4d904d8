"""Waiting for tasks at an end."""

import asyncio
from collections.abc import Collection


async def finish(tasks: Collection[asyncio.Task[None]], within_s: float) -> int:
    """Waits for all of them, at most so long; then cancels the rest. Returns how many were cut off."""
    if not tasks:
        return 0
    _, late = await asyncio.wait(tasks, timeout=within_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return len(late)
