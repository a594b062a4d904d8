"""A client's connection: limits of time and bytes for the headers, error responses for malformed bytes, and a close that loses no
request.

Bytes that are not HTTP never reach the application, so they get their error response here, in the same form as all others, and
one log line, which quotes none of them. Pipelined requests need no limit of ours: aiohttp parses at most 32 ahead, then stops
reading.
"""

import asyncio
import logging
import socket
from collections.abc import Coroutine
from typing import Any, Protocol, cast

from aiohttp import StreamReader, web

from gptutor.errors import ApiError
from gptutor.http.connection_limits import ConnectionLimits, is_reserved
from gptutor.http.errors import error_response
from gptutor.http.request_ids import new_request_id
from gptutor.telemetry.metrics import HEADER_TIMEOUTS, MALFORMED_REQUESTS, REJECTED_CONNECTIONS

LOGGER = logging.getLogger("gptutor.http_server")
SHUTDOWN_POLL_S = 0.05
HEADERS_BYTES_MAX = 64 * 1024
"""Of one request in all, while they arrive. aiohttp limits each line and their number, which together are a megabyte."""
LAST_RESORT_S = 0.5
"""How long a connection may take that has one of the last descriptors."""
HEALTHY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 16\r\nConnection: close\r\n\r\n"
    b'{"status": "ok"}'
)
TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 33\r\n"
    b'X-Error-Code: overloaded\r\nRetry-After: 1\r\nConnection: close\r\n\r\n{"error": "Too many connections"}'
)


class WriteListener(Protocol):
    """Writes to the socket directly, past aiohttp, and so needs the transport's flow control itself."""

    def pause(self) -> None:
        """The write buffer is full."""

    def resume(self) -> None:
        """The write buffer has room again, or the connection is lost."""


class ClientConnection(web.RequestHandler):
    """`header_s`: seconds for all headers of a request, from its first byte; of the first request, from the connection's start.

    `silent_s`: seconds after which the kernel drops a peer that acknowledges nothing of what is sent to it. A connection that
    `limits` do not admit is closed at once; one that has a reserved descriptor gets a fixed answer, then it is closed.
    """

    __slots__ = (
        "_close_requested",
        "_counted_host",
        "_discard_timer",
        "_header_bytes",
        "_header_s",
        "_header_timeout",
        "_headers_arriving",
        "_is_admitted",
        "_last_body",
        "_limits",
        "_silent_s",
        "_write_listener",
    )

    def __init__(
        self, manager: web.Server, *, header_s: float, silent_s: float, limits: ConnectionLimits | None = None, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._limits = limits
        self._counted_host: str | None = None
        self._is_admitted = True
        self._header_bytes = 0
        """Of the request whose headers are arriving."""
        self._header_s = header_s
        self._silent_s = silent_s
        self._header_timeout: asyncio.TimerHandle | None = None
        self._write_listener: WriteListener | None = None
        self._headers_arriving = False
        self._last_body: StreamReader | None = None
        """The body of the last request whose headers are complete."""
        self._close_requested = False
        self._discard_timer: asyncio.TimerHandle | None = None

    def set_write_listener(self, listener: WriteListener | None) -> None:
        """Tells `listener` of a full write buffer, now and later; None ends that."""
        self._write_listener = listener
        if listener is not None and self.writing_paused:
            listener.pause()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_listener is not None:
            self._write_listener.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_listener is not None:
            self._write_listener.resume()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sock = transport.get_extra_info("socket")
        if self._limits is not None and not self._admit(self._limits, cast("asyncio.Transport", transport), sock):
            self._is_admitted = False
            return
        super().connection_made(transport)
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._silent_s * 1000))
        self._start_header_timeout()

    def _admit(self, limits: ConnectionLimits, transport: asyncio.Transport, sock: socket.socket | None) -> bool:
        if sock is not None and is_reserved(sock.fileno()):
            REJECTED_CONNECTIONS.labels("descriptors").inc()
            self.transport = transport
            self._header_timeout = asyncio.get_running_loop().call_later(LAST_RESORT_S, transport.abort)
            return False
        peer = transport.get_extra_info("peername")
        host = str(peer[0]) if isinstance(peer, tuple) else ""
        if not limits.add(host):
            REJECTED_CONNECTIONS.labels("limit").inc()
            transport.abort()
            return False
        self._counted_host = host
        return True

    def _respond_as_last_resort(self, data: bytes) -> None:
        """The process may have no descriptor for anything else, so only `/health` is answered."""
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.write(HEALTHY if data.startswith(b"GET /health ") else TOO_MANY_CONNECTIONS)
            transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._is_admitted:
            self._respond_as_last_resort(data)
            return
        in_body, requests_before = self._is_in_body, self._request_count
        super().data_received(data)
        if self._request_count > requests_before:
            self._headers_arriving = False
            if self._header_bytes:
                self._header_bytes = 0
            if self._messages:
                self._last_body = self._messages[-1][1]
            if self._header_timeout is not None:
                self._cancel_header_timeout()
        elif data and not in_body:
            self._headers_arriving = True
            self._header_bytes += len(data)
            if self._header_bytes > HEADERS_BYTES_MAX:
                self._reject_headers()
                return
            if self._header_timeout is None and self._is_waiting_for_request():
                self._start_header_timeout()
        if self._close_requested and not self._is_receiving:
            super().close()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Called when what was read of a body has been taken. If it is discarded only, because its request has been answered,
        reading goes on after a pause.
        """
        if self._limits is not None and self._is_in_body and not self._request_in_progress:
            if self._discard_timer is None:
                self._discard_timer = asyncio.get_running_loop().call_later(self._limits.begin_discard(), self._discard_more)
        else:
            super().resume_reading(resume_parser)

    def _discard_more(self) -> None:
        self._end_discard()
        super().resume_reading()

    def _end_discard(self) -> None:
        if self._discard_timer is not None and self._limits is not None:
            self._discard_timer.cancel()
            self._discard_timer = None
            self._limits.end_discard()

    def _reject_headers(self) -> None:
        MALFORMED_REQUESTS.inc()
        LOGGER.warning(
            "The headers of a request are larger than %d bytes",
            HEADERS_BYTES_MAX,
            extra={"type": "http", "address": self._address},
        )
        self.force_close()

    @property
    def _address(self) -> str | None:
        """Of the client; None where a proxy sends the requests of many clients."""
        if self._limits is None or self._counted_host is None:
            return None
        return self._limits.address(self._counted_host) or None

    def close(self) -> None:
        """Called when the service stops. aiohttp reads nothing more from then on, so a request that is arriving is awaited.

        aiohttp calls it too, when a response was sent and the rest of the request's body does not end: then there is nothing to
        wait for.
        """
        if self._headers_arriving or (self._is_in_body and self._request_in_progress):
            self._close_requested = True
        else:
            super().close()

    @property
    def has_more_requests(self) -> bool:
        """Whether a request has arrived, in whole or in part, after the one that is being answered."""
        return bool(self._messages) or self._headers_arriving

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, and nothing of one has arrived."""
        return self.transport is not None and self._is_waiting_for_request() and not self._is_receiving

    @property
    def _is_receiving(self) -> bool:
        """Whether a request has arrived in part."""
        return self._headers_arriving or self._is_in_body

    @property
    def _is_in_body(self) -> bool:
        """Whether the next bytes belong to the body of a request whose headers are complete and that is not yet answered."""
        return self._last_body is not None and not self._last_body.is_eof() and self._last_body.exception() is None

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """aiohttp reads nothing more from here on, so a request that is arriving is awaited and answered first."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout or 0)
        while self.transport is not None and self._is_receiving and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(SHUTDOWN_POLL_S)
        await super().shutdown(timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel_header_timeout()
        self._end_discard()
        if not self._is_admitted:
            self.transport = None
            return
        if self._counted_host is not None and self._limits is not None:
            self._limits.remove(self._counted_host)
            self._counted_host = None
        super().connection_lost(exc)
        if self._write_listener is not None:
            self._write_listener.resume()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The server's own errors, in our form. `exc` and `message` quote the client's bytes, keys included: not used."""
        cause = type(exc).__name__
        if status == 400:
            MALFORMED_REQUESTS.inc()
            error = ApiError("malformed_request", cause=cause)
        else:
            error = ApiError("internal_error", cause=cause)
        request_id = new_request_id()
        LOGGER.warning(
            "HTTP %d before any handler",
            status,
            extra={"type": "http", "cause": cause, "requestId": request_id, "address": self._address},
        )
        if request.writer.output_size > 0:
            raise ConnectionError("The response has already begun")
        response = error_response(error)
        response.headers["X-Request-ID"] = request_id
        response.force_close()
        return response

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Of every response: aiohttp would name itself and Python with their versions, by which known faults are looked up."""
        resp.headers.setdefault("Server", "")
        return super().finish_response(request, resp, start_time)

    def _is_waiting_for_request(self) -> bool:
        """Whether aiohttp waits for a request whose headers are not complete."""
        return self._waiter is not None and not self._waiter.done()

    def _start_header_timeout(self) -> None:
        self._header_timeout = asyncio.get_running_loop().call_later(self._header_s, self._header_timed_out)

    def _cancel_header_timeout(self) -> None:
        if self._header_timeout is not None:
            self._header_timeout.cancel()
            self._header_timeout = None

    def _header_timed_out(self) -> None:
        self._header_timeout = None
        if self._is_waiting_for_request():
            HEADER_TIMEOUTS.inc()
            self.force_close()
