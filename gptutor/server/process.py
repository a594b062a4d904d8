"""Set-up of a serving process: the event loop, garbage collection, and the report of exhausted file descriptors."""

import asyncio
import errno
import gc
import logging
import os
import sys
from typing import Any

from gptutor.http.connection_limits import is_reserved

try:
    import uvloop

    run_loop = uvloop.run  # a turn of the loop costs half of asyncio's
except ImportError:  # there is no wheel of uvloop for this platform
    run_loop = asyncio.run  # type: ignore[assignment]

LOGGER = logging.getLogger("gptutor.process")
SWITCH_S = 0.001
GC_THRESHOLD = 20_000
"""Young objects that trigger a collection."""
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
CHECK_INTERVAL_S = 0.5
REPORT_INTERVAL_S = 5.0


def tune_threads() -> None:
    """The event loop waits at most SWITCH_S for a thread that parses a large body, instead of 5 ms at each turn."""
    sys.setswitchinterval(SWITCH_S)


def tune_garbage_collection() -> None:
    """Exempts what exists after start-up from collections, and makes them rare: requests leave hardly any cycles."""
    tune_threads()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


def report_descriptor_exhaustion(loop: asyncio.AbstractEventLoop) -> None:
    """Logs an error, at most every REPORT_INTERVAL_S, while the process has no free file descriptor but reserved ones.

    asyncio would log a traceback for each connection that it cannot accept; uvloop drops such connections silently.
    """
    silent_until = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not ("socket" in context and isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS):
            loop.default_exception_handler(context)

    def check() -> None:
        nonlocal silent_until
        loop.call_later(CHECK_INTERVAL_S, check)
        try:
            descriptor = os.open(os.devnull, os.O_RDONLY)
            os.close(descriptor)
            if not is_reserved(descriptor):
                return
        except OSError as error:
            if error.errno not in OUT_OF_DESCRIPTORS:
                return
        if loop.time() >= silent_until:
            silent_until = loop.time() + REPORT_INTERVAL_S
            reason = os.strerror(errno.EMFILE)
            LOGGER.error("No connection can be accepted: %s. Raise LimitNOFILE of the service.", reason)

    loop.set_exception_handler(handle)
    check()
