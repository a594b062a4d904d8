"""The caller's side of a stream: raw bytes after an `EventSourceResponse`'s head, and a caller who may leave at any of them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

from gptutor.http.connection import ClientConnection
from gptutor.http.response_head import UnbufferedResponse
from gptutor.openrouter.response import UpstreamResponse
from gptutor.telemetry.metrics import DISCONNECTED_CLIENTS


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long, and for how much, a caller is waited for; the names are those of `config.yaml`, section `relay`."""

    heartbeat_s: float
    buffer_bytes: int
    write_s: float
    leaver_drain_s: float
    leaver_drain_bytes: int


LEFT = (ConnectionError, TimeoutError)
"""A caller who left shows as one of these."""
LAST_CHUNK = b"0\r\n\r\n"


class StreamedResponse(UnbufferedResponse, EventSourceResponse):
    """Only the fields of aiohttp-sse's head. Its pings would fall into the middle of events, and its clocks are kept here."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        return request.writer  # all is written when the server asks for it

    async def write_eof(self, data: bytes = b"") -> None:
        """So is the end."""


class EventStream:
    """Headers go out with the first bytes, so that until then a refusal is still possible.

    Bytes are framed and given to the socket at once. Its buffer is the queue between upstream and the caller: up to
    `buffer_bytes` he may lag without anybody waiting. Beyond that upstream waits for him, for `write_s` seconds in all; a caller
    who wants more patience than that is dropped, so that nobody can keep a bill from being seen, or memory from being freed.
    """

    def __init__(
        self, request: web.Request, answer: asyncio.Future[web.StreamResponse], headers: Mapping[str, str], patience: StreamLimits
    ) -> None:
        self.response = StreamedResponse(headers=headers)
        del self.response.headers["Connection"]  # the server says itself what is true
        self._request = request
        self._answer = answer
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._connection: ClientConnection | None = None
        self._reply: UpstreamResponse | None = None
        self._head = b""
        """Until it is written, with the first bytes."""
        self._is_chunked = request.version >= HttpVersion11
        self._is_ended = False
        self._waits_s = patience.write_s
        self._paused_at = 0.0
        self._impatience: asyncio.TimerHandle | None = None
        self._gone = False
        self._unheard_bytes = 0

    async def begin(self, reply: UpstreamResponse) -> None:
        """Spells the head; it goes out with the first bytes. From here on the caller's slowness pauses the reply."""
        if self._transport is not None or self._gone or self._answer.cancelled():
            return
        connection = self._request.protocol
        if not isinstance(connection, ClientConnection) or connection.transport is None:
            self._leave()
            return
        self._head = await self.response.spell(self._request)
        self._transport, self._connection, self._reply = connection.transport, connection, reply
        self._transport.set_write_buffer_limits(high=self._patience.buffer_bytes)
        connection.follow(self)

    def write(self, chunk: bytes, *, is_last: bool = False) -> bool:
        """Passes bytes on. False: the caller is gone, and more has been read for his bill than is worth while."""
        transport = self._transport
        if transport is None or self._gone or self._answer.cancelled() or transport.is_closing():
            self._unheard_bytes += len(chunk)
            return self._unheard_bytes <= self._patience.leaver_drain_bytes
        if self._is_ended:
            return True  # a heartbeat that was due in that very moment
        self._is_ended = is_last
        if self._is_chunked:
            end = LAST_CHUNK if is_last else b""
            chunk = b"%x\r\n%b\r\n%b" % (len(chunk), chunk, end) if chunk else end
        if self._head:
            chunk, self._head = self._head + chunk, b""
            self.response.is_written = True
            self._request.writer.output_size = len(chunk)
        if chunk:
            transport.write(chunk)
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
        if not self._is_ended:
            self.write(b"", is_last=True)
        if self._gone or self._connection is None or not self._connection.writing_paused:
            return
        try:
            async with asyncio.timeout(self._patience.write_s):
                await self._request.writer.drain()
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
        return self.response.is_written

    def abort(self) -> None:
        """Breaks the connection: a stalled caller keeps nothing of ours, and an answer that went wrong does not look complete."""
        if (transport := self._request.transport) is not None:
            transport.abort()

    def _leave(self) -> None:
        DISCONNECTED_CLIENTS.inc()
        self._gone = True
        self.abort()
        self.resume()
