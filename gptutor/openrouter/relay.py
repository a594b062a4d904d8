"""Bytes upstream → downstream, unchanged; a scanner looks for the bill.

Upstream and downstream fail separately: a disconnected client is not a failure of OpenRouter's, and a silent OpenRouter is not
one of the client's.
"""

from collections.abc import Callable
from typing import Protocol

from gptutor.openrouter.bill import Bill, BillScanner
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.response import UpstreamResponse

HEARTBEAT = b": GPTUTOR WAITING\n\n"
"""A comment, which every reader of server-sent events skips."""


class Downstream(Protocol):
    """The client's side. Its methods raise nothing: a disconnected client is remembered, and gets no more bytes."""

    async def start(self, upstream: UpstreamConnection) -> None:
        """Prepares the headers, which go out with the first bytes. From here on a slow client pauses `upstream`."""
        ...

    def write(self, chunk: bytes, *, is_last: bool = False) -> bool:
        """Whether to read on: always for a connected client; for a disconnected one within a bound, to see the bill."""
        ...


async def relay(
    response: UpstreamResponse,
    downstream: Downstream,
    scanner: BillScanner,
    record_bill: Callable[[Bill], None],
    *,
    heartbeat_s: float,
) -> UpstreamError | None:
    """Passes every chunk on as it arrives, until upstream ends. Returns how upstream failed, or None if it did not.

    `record_bill` is called before the bytes of the bill are written: whatever happens to the client or to this process
    afterwards, the bill is known. After each `heartbeat_s` of upstream's silence a heartbeat is written, unless it would fall
    into an event.
    """
    connection = response.connection
    recorded: Bill | None = None

    def pass_on(chunk: bytes) -> None:
        nonlocal recorded
        scanner.feed(chunk)
        if scanner.bill is not None and scanner.bill is not recorded:
            recorded = scanner.bill
            record_bill(recorded)
        if recorded is not None:
            response.expect_end(scanner.expects_end)  # a price in mid-stream is not the last event
        if not downstream.write(chunk, is_last=scanner.has_seen_end and connection.is_finished):
            response.finish_early()

    def write_heartbeat() -> None:
        downstream.write(HEARTBEAT if scanner.at_event_boundary and not response.is_encoded else b"")

    try:
        while not await response.wait_for_body(heartbeat_s):
            await downstream.start(connection)
            write_heartbeat()
        await downstream.start(connection)
        await response.stream_body(pass_on, write_heartbeat, heartbeat_s)
    except UpstreamError as error:
        return error
    finally:
        scanner.finish()
        if scanner.bill is not None and scanner.bill is not recorded:
            record_bill(scanner.bill)
    return None
