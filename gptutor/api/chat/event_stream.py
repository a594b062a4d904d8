"""The client's side of a stream: headers of an `EventSourceResponse`, then raw bytes. The client may disconnect at any time."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

from gptutor.http.connection import ClientConnection
from gptutor.http.unbuffered_response import UnbufferedResponse
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.telemetry.metrics import DISCONNECTED_CLIENTS


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long, and for how many bytes, a client is waited for; named as in `config.yaml`, section `relay`."""

    heartbeat_s: float
    buffer_bytes: int
    write_timeout_s: float
    disconnected_drain_s: float
    disconnected_drain_bytes: int


DISCONNECTED = (ConnectionError, TimeoutError)
"""What a write raises when the client has disconnected."""
LAST_CHUNK = b"0\r\n\r\n"


class StreamedResponse(UnbufferedResponse, EventSourceResponse):
    """Only the headers of aiohttp-sse: its pings would fall into the middle of events, and timeouts are `EventStream`'s."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        return request.writer  # `EventStream` has written everything before the server calls this

    async def write_eof(self, data: bytes = b"") -> None:
        """`EventStream` has written the end."""


class EventStream:
    """Headers go out with the first bytes, so that until then an error response is still possible.

    Bytes are framed and written to the socket at once. The socket's buffer is the queue between upstream and the client: up to
    `buffer_bytes` a client may lag without pausing upstream. Beyond that upstream is paused, for `write_timeout_s` seconds in
    all; then the client is disconnected, so that no client can delay the bill, or the release of memory.
    """

    def __init__(
        self, request: web.Request, response: asyncio.Future[web.StreamResponse], headers: Mapping[str, str], limits: StreamLimits
    ) -> None:
        self.response = StreamedResponse(headers=headers)
        del self.response.headers["Connection"]  # set by `UnbufferedResponse`, if needed
        self._request = request
        self._awaited_response = response
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._connection: ClientConnection | None = None
        self._upstream: UpstreamConnection | None = None
        self._headers = b""
        """Encoded, until they are written."""
        self._is_chunked = request.version >= HttpVersion11
        self._is_finished = False
        self._pause_left_s = limits.write_timeout_s
        self._paused_at = 0.0
        self._pause_timer: asyncio.TimerHandle | None = None
        self.started_at: float | None = None
        """When the first byte was written."""
        self._is_disconnected = False
        self._undelivered_bytes = 0

    async def start(self, upstream: UpstreamConnection) -> None:
        """Encodes the headers; they go out with the first bytes. From here on a slow client pauses `upstream`."""
        if self._transport is not None or self._is_disconnected or self._awaited_response.done():
            return
        connection = self._request.protocol
        if not isinstance(connection, ClientConnection) or connection.transport is None:
            self._disconnect()
            return
        self._headers = await self.response.serialize_headers(self._request)
        self._transport, self._connection, self._upstream = connection.transport, connection, upstream
        self._transport.set_write_buffer_limits(high=self._limits.buffer_bytes)
        connection.set_write_listener(self)

    def write(self, chunk: bytes, *, is_last: bool = False) -> bool:
        """Writes bytes to the client. False: the response has ended or the client has disconnected, and enough more has been read
        to look for the bill.
        """
        transport = self._transport
        if transport is None or self._is_disconnected or self._awaited_response.done() or transport.is_closing():
            self._undelivered_bytes += len(chunk)
            return self._undelivered_bytes <= self._limits.disconnected_drain_bytes
        if self._is_finished:
            return True  # a heartbeat that was due at the same moment
        self._is_finished = is_last
        if self._is_chunked:
            end = LAST_CHUNK if is_last else b""
            chunk = b"%x\r\n%b\r\n%b" % (len(chunk), chunk, end) if chunk else end
        if self._headers:
            chunk, self._headers = self._headers + chunk, b""
            self.started_at = time.monotonic()
            self.response.is_written = True
            self._request.writer.output_size = len(chunk)
        if chunk:
            transport.write(chunk)
        return True

    def pause(self) -> None:
        """The socket's buffer is full."""
        if self._pause_timer is None and self._upstream is not None:
            self._upstream.pause_reading()
            self._paused_at = self._loop.time()
            self._pause_timer = self._loop.call_later(self._pause_left_s, self._disconnect)

    def resume(self) -> None:
        """The socket's buffer is empty again, or the client has disconnected."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
            self._pause_left_s = max(0.0, self._pause_left_s - (self._loop.time() - self._paused_at))
        if self._upstream is not None:
            self._upstream.resume_reading()

    def detach_upstream(self) -> None:
        """The response has been read: the client no longer pauses the connection, which returns to the pool."""
        self._upstream = None

    def end(self, event: bytes) -> None:
        """Ends the response with `event`, before upstream ends. What still comes is only read for the bill."""
        self.write(event, is_last=True)
        self.resume()
        self.detach_upstream()

    async def finish(self) -> None:
        """Writes the end of the body, and waits until the client has taken nearly all of it."""
        if not self._is_finished:
            self.write(b"", is_last=True)
        if self._is_disconnected or self._connection is None or not self._connection.writing_paused:
            return
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._request.writer.drain()
        except DISCONNECTED:
            self._disconnect()

    def close(self) -> None:
        """Separates the client's connection and upstream's: neither calls the other any more."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        if self._connection is not None:
            self._connection.set_write_listener(None)
        self._upstream = None

    @property
    def has_started(self) -> bool:
        """Whether anything has been written: from then on an error response is impossible."""
        return self.response.is_written

    def abort(self) -> None:
        """Breaks the client's connection: its buffer is freed, and a response that failed does not look complete."""
        if (transport := self._request.transport) is not None:
            transport.abort()

    def _disconnect(self) -> None:
        DISCONNECTED_CLIENTS.inc()
        self._is_disconnected = True
        self.abort()
        self.resume()
