"""The caller's side of a stream: raw bytes after an `EventSourceResponse`'s head, and a caller who may leave at any of them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
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
LAST_CHUNK = b"0\r\n\r\n"


class Response(EventSourceResponse):
    """Only the head of aiohttp-sse's. Its pings would fall into the middle of events, and its clocks are kept here."""

    is_ended = False
    """Whether the end of the body is written already."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._writer = await web.StreamResponse.prepare(self, request)
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        if not self.is_ended:
            await super().write_eof(data)
        elif self._writer is not None:
            await self._writer.drain()


class EventStream:
    """Headers go out with the first bytes, so that until then a refusal is still possible.

    Bytes are framed and given to the socket at once. Its buffer is the queue between upstream and the caller: up to
    `buffer_bytes` he may lag without anybody waiting. Beyond that upstream waits for him, for `write_s` seconds in all; a caller
    who wants more patience than that is dropped, so that nobody can keep a bill from being seen, or memory from being freed.
    """

    def __init__(
        self, request: web.Request, answer: asyncio.Future[web.StreamResponse], headers: Mapping[str, str], patience: Patience
    ) -> None:
        self.response = Response(headers=headers)
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
            connection.give_up_after(self._patience.write_s)
            await self.response.prepare(self._request)
        except LEFT:
            self._leave()
            return
        self._transport, self._connection, self._reply = transport, connection, reply
        self._is_chunked = self._request.version >= HttpVersion11
        connection.follow(self)

    def write(self, chunk: bytes, *, is_last: bool = False) -> bool:
        """Passes bytes on. False: the caller is gone, and more has been read for his bill than is worth while."""
        transport = self._transport
        if transport is None or self._gone or self._answer.cancelled() or transport.is_closing():
            self._unheard_bytes += len(chunk)
            return self._unheard_bytes <= self._patience.leaver_drain_bytes
        if chunk:
            end = LAST_CHUNK if is_last else b""
            transport.write(b"%x\r\n%b\r\n%b" % (len(chunk), chunk, end) if self._is_chunked else chunk)
            self.response.is_ended = is_last and self._is_chunked
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
        """The end of the body, as HTTP says it, once the caller has taken nearly all."""
        if self._gone or self._answer.cancelled():
            return
        if self.response.is_ended and self._connection is not None and not self._connection.writing_paused:
            return
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
        """Neither connection is told of the other any more."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._connection is not None:
            self._connection.follow(None)
        self._reply = None

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
