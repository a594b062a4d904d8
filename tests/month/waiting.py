"""Waiting for what must happen."""

import asyncio
import time
from collections.abc import Callable

WAIT_S = 60.0


class Failed(Exception):
    """The service did not do what it must; the text is a sentence."""


async def until(condition: Callable[[], bool], sentence: str, *, wait_s: float = WAIT_S) -> None:
    """Raises Failed, with the sentence, if the condition does not come true in time."""
    ends_at = time.monotonic() + wait_s
    while not condition():
        require(time.monotonic() < ends_at, f"{sentence} (within {wait_s:.0f} s)")
        await asyncio.sleep(0.05)


def require(condition: bool, sentence: str) -> None:
    """Raises Failed, with the sentence, unless the condition is true."""
    if not condition:
        raise Failed(sentence)
