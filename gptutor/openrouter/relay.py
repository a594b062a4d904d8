"""Bytes upstream → downstream, unchanged; a scanner listens for the bill.

Upstream and downstream fail apart: a caller who leaves is not OpenRouter's failure, and OpenRouter's silence is not the caller's.
"""

from collections.abc import Callable
from typing import Protocol

from gptutor.openrouter.bill import Bill, BillScanner
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.response import UpstreamResponse

HEARTBEAT = b": GPTUTOR WAITING\n\n"
"""A comment, which every reader of events skips."""


class Downstream(Protocol):
    """The caller's side. Nothing here raises: a caller who has gone is remembered, and takes no more bytes."""

    async def begin(self, reply: UpstreamResponse) -> None:
        """The head goes out with the next bytes, or none. From here on the caller's slowness pauses the reply."""
        ...

    def write(self, chunk: bytes, *, is_last: bool = False) -> bool:
        """Whether reading on is worth while: for a caller who is there, always; for the bill of one who left, for so long."""
        ...


async def relay(
    reply: UpstreamResponse, downstream: Downstream, scanner: BillScanner, billed: Callable[[Bill], None], *, heartbeat_s: float
) -> UpstreamError | None:
    """Passes every chunk on in the moment when it arrives, until upstream ends. Returns how it failed, or None if it ended well.

    `billed` hears of a bill before the caller sees its bytes: whatever happens to him, or to this process, it is known by then.
    Whenever upstream is silent for `heartbeat_s`, the caller hears of us instead, unless that would fall into an event.
    """
    known: Bill | None = None

    def pass_on(chunk: bytes) -> None:
        nonlocal known
        scanner.feed(chunk)
        if scanner.bill is not None and scanner.bill is not known:
            known = scanner.bill
            billed(known)
        if known is not None:
            reply.expect_end(scanner.expects_end)  # a price in mid-stream is not the last word
        if not downstream.write(chunk, is_last=scanner.has_ended and reply.is_whole):
            reply.stop()

    def fill_silence() -> None:
        downstream.write(HEARTBEAT if scanner.at_event_end and not reply.is_encoded else b"")

    try:
        while not await reply.heard(heartbeat_s):
            await downstream.begin(reply)
            fill_silence()
        await downstream.begin(reply)
        await reply.pump(pass_on, fill_silence, heartbeat_s)
    except UpstreamError as error:
        return error
    finally:
        scanner.finish()
        if scanner.bill is not None and scanner.bill is not known:
            billed(scanner.bill)
    return None
