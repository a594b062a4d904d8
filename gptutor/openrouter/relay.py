"""Bytes upstream → downstream, unchanged; a scanner listens for the bill.

Upstream and downstream fail apart: a caller who leaves is not OpenRouter's failure, and OpenRouter's silence is not the caller's.
"""

from typing import Protocol

from gptutor.openrouter.bill import BillScanner
from gptutor.openrouter.service import Reply, UpstreamError


class Downstream(Protocol):
    """The caller's side. `write` never raises: a caller who has gone is remembered, and takes no more bytes."""

    async def write(self, chunk: bytes) -> None: ...


async def relay(reply: Reply, downstream: Downstream, scanner: BillScanner) -> UpstreamError | None:
    """Passes every chunk on as soon as it arrives, until upstream ends. Returns how it failed, or None if it ended well."""
    try:
        async for chunk in reply.chunks():
            scanner.feed(chunk)
            await downstream.write(chunk)
    except UpstreamError as error:
        return error
    finally:
        scanner.finish()
    return None
