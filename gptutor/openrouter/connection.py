"""One connection to OpenRouter: sends a request, receives the bytes of its response. `response_parser.py` parses them.

Why not aiohttp's ClientSession: most of a relay's cost was its work for each request, and a task woken for each chunk. Here the
bytes of a body go from the socket's callback to their consumer (`stream_body`) in the same turn of the event loop: no task, no
queue, no copy but the one that the parser makes. The connection guarantees:

- Data that arrives without a request, or after the end of a response, closes the connection.
- A slow consumer pauses the reading (`pause_reading`), so that OpenRouter waits by TCP and memory is bounded. Until there is a
  consumer, the body is buffered, up to BUFFER_BYTES_MAX.
- A connection is reused only after a response that was complete, and whose headers allow it.
- Whatever ends a response early becomes one UpstreamError, by what it proves about the purchase.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Literal

from gptutor.openrouter.bill import valid_generation_id
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.response_parser import ResponseParser
from gptutor.openrouter.retry import Failure

ERROR_STATUS_MIN = 300
"""Statuses from here on are not completions."""
WRITE_BYTES_MAX = 256 * 1024
"""Requests are written in pieces of this size: one write of ten megabytes would block the event loop."""
BUFFER_BYTES_MAX = 256 * 1024
"""More of a body than this is not read before there is a consumer."""

Consumer = Callable[[bytes], None]
FailureKind = Literal["timeout", "broken"]
Event = Literal["headers", "body", "end"]


def _discard(piece: bytes) -> None:
    """The consumer of what arrives after the real consumer has gone."""


class UpstreamConnection(asyncio.Protocol):
    """`send_request`, then `stream_body` or `read_body`. One response at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.received_at = 0.0
        """When the last bytes of a body arrived, by the loop's clock."""
        self.is_new = True
        """Whether the connection has not been in the pool yet."""
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._awaited: Event = "headers"
        self._drained: asyncio.Future[None] | None = None
        self._reset()
        self.is_finished = True

    def _reset(self) -> None:
        self._parser = ResponseParser()
        self.is_finished = False
        """Nothing more of the response will come: it is complete, it failed, or it was cut off by `finish_early`."""
        self._is_sent = True
        self._failure: Failure | None = None
        self._consumer: Consumer | None = None
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0
        self.is_paused = False
        """The consumer takes no more for now."""
        self._is_reading_paused = False

    # -- the request

    async def send_request(self, headers: bytes, body: bytes, timeout_s: float) -> None:
        """Sends a request and waits for the headers of its response. Raises UpstreamError."""
        self._reset()
        try:
            if len(body) <= WRITE_BYTES_MAX:
                self._write(headers + body)
                await self._wait_for("headers", timeout_s)
            else:
                async with asyncio.timeout(timeout_s):
                    await self._write_in_pieces(headers, body)
                    if not self._parser.has_headers:
                        await self._wait_for("headers", None)
        except TimeoutError:
            if self._parser.has_headers:
                return  # OpenRouter responded without reading the rest of the request
            self.fail("timeout")
            self._raise_failure("headers")
        except BaseException:
            self.abort()
            raise

    async def _write_in_pieces(self, headers: bytes, body: bytes) -> None:
        """Stops at an error response. The rest of the request is not sent then, so the connection cannot be reused."""
        self._is_sent = False
        self._write(headers)
        for start in range(0, len(body), WRITE_BYTES_MAX):
            if self._failure is not None or self._parser.status >= ERROR_STATUS_MIN:
                return
            self._write(body[start : start + WRITE_BYTES_MAX])
            await (self._drained or asyncio.sleep(0))
        self._is_sent = True

    def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            self.fail("broken")
        else:
            self._transport.write(data)

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent on this connection."""
        return self.is_open and self.is_finished and self._parser.allows_reuse and self._is_sent

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def tls_session(self) -> ssl.SSLSession | None:
        """The session that the next handshake can resume."""
        tls = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        return tls.session if tls is not None else None

    # -- the response

    @property
    def status(self) -> int:
        return self._parser.status

    @property
    def headers(self) -> dict[str, str]:
        """Names are in lower case."""
        return self._parser.headers

    async def wait_for_body(self, timeout_s: float) -> bool:
        """Waits for the first bytes of the body, or its end. False after `timeout_s` without either. Raises UpstreamError."""
        if not self._buffer:
            await self._wait_for("body", timeout_s, on_timeout=self._wake)
        return bool(self._buffer) or self.is_finished

    async def stream_body(self, consumer: Consumer, timeout_s: float | None = None) -> None:
        """Passes the body to `consumer` as it arrives, until its end. Raises UpstreamError, and what `consumer` raises."""
        try:
            self._consumer = consumer
            if self._buffer:
                buffered = b"".join(self._buffer)
                self._buffer.clear()
                self._buffer_bytes = 0
                consumer(buffered)
            self._update_reading()
            await self._wait_for("end", timeout_s)
        finally:
            self._consumer = _discard

    async def read_body(self, timeout_s: float, count: Callable[[int], None] | None = None) -> bytes:
        """The whole body. `count` gets the size of each piece, and may raise to end the response. Raises UpstreamError."""
        pieces: list[bytes] = []

        def consume(piece: bytes) -> None:
            if count is not None:
                count(len(piece))
            pieces.append(piece)

        await self.stream_body(consume, timeout_s)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pause_reading(self) -> None:
        """The consumer takes no more until `resume_reading`."""
        self.is_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        self.is_paused = False
        self.received_at = self.loop.time()  # the pause was not OpenRouter's silence
        self._update_reading()

    def _update_reading(self) -> None:
        pauses = (self.is_paused or self._buffer_bytes > BUFFER_BYTES_MAX) and not self.is_finished
        if pauses != self._is_reading_paused and self._transport is not None and not self._transport.is_closing():
            self._is_reading_paused = pauses
            if pauses:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def finish_early(self) -> None:
        """Ends the response here, as if it were complete, and closes the connection."""
        if not self.is_finished:
            self.is_finished = True
            self.abort()
            self._wake()

    def fail(self, kind: FailureKind) -> None:
        """Ends the response with an UpstreamError for the waiting task, and closes the connection."""
        if self.is_finished:
            return
        generation_id = self._parser.headers.get("x-generation-id")
        self._failure = Failure(kind, generation_id=valid_generation_id(generation_id))
        self.is_finished = True
        self.abort()
        self._wake()
        self.resume_writing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """The connection goes on over TLS, inside a proxy's tunnel."""
        self._transport = transport
        self.is_finished = True

    def data_received(self, data: bytes) -> None:
        if self.is_finished:
            self.abort()  # no response is expected
            return
        parser = self._parser
        body = parser.feed(data)
        self.is_finished = parser.is_complete
        if body:
            self.received_at = self.loop.time()
            if self._consumer is None:
                self._buffer.append(body)
                self._buffer_bytes += len(body)
                if self._buffer_bytes > BUFFER_BYTES_MAX:
                    self._update_reading()
            else:
                try:
                    self._consumer(body)
                except Exception as error:
                    self.is_finished = True
                    self.abort()
                    if self._waiter is not None and not self._waiter.done():
                        self._waiter.set_exception(error)
        if self.is_finished or (self._awaited != "end" and self._has_arrived(self._awaited)):
            self._wake()
        if self._drained is not None and (self.is_finished or parser.status >= ERROR_STATUS_MIN):
            self.resume_writing()
        if parser.is_malformed:
            self.fail("broken")
        if parser.has_extra_data:
            self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self._parser.close()
        self.resume_writing()
        if self.is_finished:
            return
        if self._parser.has_headers and self._parser.ends_at_eof and exc is None:
            self.is_finished = True
            self._wake()
        else:
            self.fail("broken")

    def pause_writing(self) -> None:
        self._drained = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    # -- waiting

    async def _wait_for(self, event: Event, timeout_s: float | None, on_timeout: Callable[[], None] | None = None) -> None:
        """Waits for `event`; on timeout calls `on_timeout` (default: fails the response). Raises UpstreamError."""
        if self.is_finished:
            self._raise_failure(event)
            return
        self._awaited = event
        waiter = self._waiter = self.loop.create_future()
        timer = None if timeout_s is None else self.loop.call_later(timeout_s, on_timeout or self._time_out)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        self._raise_failure(event)

    def _time_out(self) -> None:
        self.fail("timeout")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _has_arrived(self, event: Event) -> bool:
        """Whether the headers, or the first bytes of the body, have arrived."""
        return (event == "headers" and self._parser.has_headers) or (event == "body" and bool(self._buffer))

    def _raise_failure(self, awaited: Event) -> None:
        """Raises UpstreamError if the response failed before `awaited` arrived: what preceded the failure is delivered first."""
        if self._failure is not None and not self._has_arrived(awaited):
            raise UpstreamError(self._failure)
