"""The caller's side of a stream: raw bytes on an `EventSourceResponse`, and a caller who may leave at any of them."""

import asyncio
from collections.abc import Mapping

from aiohttp import web
from aiohttp_sse import EventSourceResponse

# A caller who left shows as one of these. ClientConnectionResetError is an aiohttp ClientError as well:
# caught here, it can never be taken for a failure of OpenRouter's.
LEFT = (ConnectionError, TimeoutError, RuntimeError)


class EventStream:
    """Headers go out with the first bytes, so that until then a refusal is still possible."""

    def __init__(
        self,
        request: web.Request,
        answer: asyncio.Future[web.StreamResponse],
        headers: Mapping[str, str],
        write_s: float,
    ) -> None:
        # Its pings would fall into the middle of events, so they are put off for ever; `send_timeout` lets the kernel give up
        # on a peer that acknowledges nothing.
        self.response = EventSourceResponse(
            headers=headers, allow_all_methods=True, ping_interval=float("inf"), send_timeout=write_s
        )
        self._request = request
        self._answer = answer
        self._write_s = write_s
        self._gone = False

    async def write(self, chunk: bytes) -> None:
        """Passes bytes on; waits where the caller reads slowly, and gives up on one who reads nothing for `write_s`."""
        if self._gone or self._answer.cancelled():
            return
        try:
            async with asyncio.timeout(self._write_s):
                await self._prepare()
                await self.response.write(chunk)
        except LEFT:
            self._leave()

    async def finish(self) -> None:
        """The end of the body, as HTTP says it."""
        if not self._gone and not self._answer.cancelled():
            try:
                async with asyncio.timeout(self._write_s):
                    await self._prepare()
                    await self.response.write_eof()
            except LEFT:
                self._leave()
        if self.response.prepared:
            self.response.stop_streaming()  # ends the task that waits for the first ping

    async def _prepare(self) -> None:
        if not self.response.prepared:
            if self._request.transport is None:
                raise ConnectionResetError
            await self.response.prepare(self._request)

    def _leave(self) -> None:
        self._gone = True
        if (transport := self._request.transport) is not None:
            transport.abort()  # a stalled caller keeps nothing of ours
