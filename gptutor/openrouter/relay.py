"""Bytes upstream → downstream, unchanged; a scanner listens for the bill.

Upstream and downstream fail apart: a caller who leaves is not OpenRouter's failure, and OpenRouter's silence is not the caller's.
"""

from collections.abc import Callable
from typing import Protocol

from gptutor.openrouter.bill import Bill, BillScanner
from gptutor.openrouter.reply import Reply
from gptutor.openrouter.rim import UpstreamError

HEARTBEAT = b": GPTUTOR WAITING\n\n"
"""A comment, which every reader of events skips."""


class Downstream(Protocol):
    """The caller's side. `write` never raises: a caller who has gone is remembered, and takes no more bytes.

    It says whether reading on is worth while: for a caller who is there, always; for the bill of one who left, for a bounded
    time.
    """

    async def write(self, chunk: bytes) -> bool: ...


async def relay(
    reply: Reply, downstream: Downstream, scanner: BillScanner, billed: Callable[[Bill], None], *, heartbeat_s: float
) -> UpstreamError | None:
    """Passes every chunk on as soon as it arrives, until upstream ends. Returns how it failed, or None if it ended well.

    `billed` hears of a bill before the caller sees its bytes: whatever happens to him, or to this process, it is known by then.
    Whenever upstream is silent for `heartbeat_s`, the caller hears of us instead, unless that would fall into an event.
    """
    known: Bill | None = None
    try:
        async for chunk in reply.chunks(heartbeat_s):
            if not chunk:
                if scanner.at_event_end and not reply.is_encoded:
                    await downstream.write(HEARTBEAT)
                continue
            scanner.feed(chunk)
            if scanner.bill is not None and scanner.bill is not known:
                known = scanner.bill
                billed(known)
            if known is not None:
                reply.expect_end(scanner.expects_end)  # a price in mid-stream is not the last word
            if not await downstream.write(chunk):
                return None
    except UpstreamError as error:
        return error
    finally:
        scanner.finish()
        if scanner.bill is not None and scanner.bill is not known:
            billed(scanner.bill)
    return None
