"""The caller's side of a stream: raw bytes on an `EventSourceResponse`, and a caller who may leave at any of them."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import HttpVersion11, web
from aiohttp_sse import EventSourceResponse

from gptutor.api.connection import Connection
from gptutor.metrics import CALLERS_DROPPED
from gptutor.openrouter.reply import Reply


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, and for how much, a caller is waited for; the names are those of `config.yaml`, section `relay`."""

    heartbeat_s: float
    buffer_bytes: int
    write_s: float
    leaver_drain_s: float
    leaver_drain_bytes: int


LEFT = (ConnectionError, TimeoutError)
"""A caller who left shows as one of these."""


class EventStream:
    """Headers go out with the first bytes, so that until then a refusal is still possible.

    Bytes are framed and given to the socket at once. Its buffer is the queue between upstream and the caller: up to
    `buffer_bytes` he may lag without anybody waiting. Beyond that upstream waits for him, for `write_s` seconds in all; a caller
    who wants more patience than that is dropped, so that nobody can keep a bill from being seen, or memory from being freed.
    """

    def __init__(
        self, request: web.Request, answer: asyncio.Future[web.StreamResponse], headers: Mapping[str, str], patience: Patience
    ) -> None:
        # Its pings would fall into the middle of events, so they are put off for ever; `send_timeout` lets the kernel give up
        # on a peer that acknowledges nothing.
        self.response = EventSourceResponse(
            headers=headers, allow_all_methods=True, ping_interval=float("inf"), send_timeout=patience.write_s
        )
        if request.version < HttpVersion11:
            self.response.force_close()  # without chunks, only the end of the connection ends the body
        del self.response.headers["Connection"]  # the server says itself what is true
        self._request = request
        self._answer = answer
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._connection: Connection | None = None
        self._reply: Reply | None = None
        self._is_chunked = False
        self._waits_s = patience.write_s
        self._paused_at = 0.0
        self._impatience: asyncio.TimerHandle | None = None
        self._gone = False
        self._unheard_bytes = 0

    async def begin(self, reply: Reply) -> None:
        """Sends the head. From here on the caller's slowness pauses the reply."""
        if self.response.prepared or self._gone or self._answer.cancelled():
            return
        transport, connection = self._request.transport, self._request.protocol
        try:
            if transport is None or not isinstance(connection, Connection):
                raise ConnectionResetError
            transport.set_write_buffer_limits(high=self._patience.buffer_bytes)
            await self.response.prepare(self._request)
        except LEFT:
            self._leave()
            return
        self._transport, self._connection, self._reply = transport, connection, reply
        self._is_chunked = self._request.version >= HttpVersion11
        connection.follow(self)

    def write(self, chunk: bytes) -> bool:
        """Passes bytes on. False: the caller is gone, and more has been read for his bill than is worth while."""
        transport = self._transport
        if transport is None or self._gone or self._answer.cancelled() or transport.is_closing():
            self._unheard_bytes += len(chunk)
            return self._unheard_bytes <= self._patience.leaver_drain_bytes
        if chunk:
            transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._is_chunked else chunk)
        return True

    def pause(self) -> None:
        """The socket's buffer is full."""
        if self._impatience is None and self._reply is not None:
            self._reply.pause()
            self._paused_at = self._loop.time()
            self._impatience = self._loop.call_later(self._waits_s, self._leave)

    def resume(self) -> None:
        """It is empty again, or the caller has gone: then nobody waits for him any more."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
            self._waits_s = max(0.0, self._waits_s - (self._loop.time() - self._paused_at))
        if self._reply is not None:
            self._reply.resume()

    def forget_reply(self) -> None:
        """It has ended: from now on it waits for nobody."""
        self._reply = None

    async def finish(self) -> None:
        """The end of the body, as HTTP says it."""
        if not self._gone and not self._answer.cancelled():
            try:
                async with asyncio.timeout(self._patience.write_s):
                    if not self.response.prepared:
                        if self._request.transport is None:
                            raise ConnectionResetError
                        await self.response.prepare(self._request)
                    await self.response.write_eof()
            except LEFT:
                self._leave()

    def release(self) -> None:
        """Ends the task that waits for the first ping, and would keep request and response for ever."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._connection is not None:
            self._connection.follow(None)
        self._reply = None
        with contextlib.suppress(RuntimeError):  # it was not begun, or broke off while it was
            self.response.stop_streaming()

    @property
    def has_begun(self) -> bool:
        """Whether anything has been sent: from then on there can be no refusal any more."""
        return self.response.prepared

    def abort(self) -> None:
        """Breaks the connection: a stalled caller keeps nothing of ours, and an answer that went wrong does not look complete."""
        if (transport := self._request.transport) is not None:
            transport.abort()

    def _leave(self) -> None:
        CALLERS_DROPPED.inc()
        self._gone = True
        self.abort()
        self.resume()
