"""How late the event loop comes: while one callback computes or blocks, no other client is served."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gptutor.telemetry.metrics import EVENT_LOOP_LAG

TICK_S = 0.2
WINDOW_S = 30.0


class LoopLag:
    """Looks at the clock every TICK_S. `longest` may be called by any thread, also while the loop is blocked."""

    def __init__(self) -> None:
        self._due = self._window_ends = 0.0
        self._longest = self._longest_before = 0.0
        """In this window of WINDOW_S, and in the one before it."""
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures the running loop."""
        self._window_ends = time.monotonic() + WINDOW_S
        self._wait()
        EVENT_LOOP_LAG.set_function(self.longest)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            EVENT_LOOP_LAG.set_function(lambda: 0.0)

    def longest(self) -> float:
        """Seconds: the longest of the last WINDOW_S to 2 * WINDOW_S, the current one included."""
        return max(self._longest, self._longest_before, time.monotonic() - self._due)

    def _wait(self) -> None:
        self._due = time.monotonic() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._window_ends:
            self._longest_before, self._longest = self._longest, 0.0
            self._window_ends = now + WINDOW_S
        self._longest = max(self._longest, now - self._due)
        self._wait()
