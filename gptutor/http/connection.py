"""A caller's connection, where the HTTP server leaves something open: how long a head may take, what malformed bytes are told.

Bytes that are not HTTP never reach the application, so they get their refusal here, in the same form as all others, and one line
in the log, without a byte of what was sent. Pipelined requests need no bound of ours: the server parses at most 32 ahead, then
stops reading.
"""

import asyncio
import logging
import socket
import uuid
from typing import Any, Protocol

from aiohttp import StreamReader, web

from gptutor.errors import ApiError
from gptutor.http.error_response import error_response
from gptutor.telemetry.metrics import HEADER_TIMEOUTS, MALFORMED_REQUESTS

LOGGER = logging.getLogger("gptutor.http_server")
LOOK_S = 0.05


class WriteListener(Protocol):
    """Whoever writes past the server, straight to the socket."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class ClientConnection(web.RequestHandler):
    """`header_s` seconds are given for the whole head of a request, from its first byte, or from the connection's beginning.

    A peer who acknowledges nothing for `silent_s` seconds, whatever is being sent to him, is given up by the kernel.
    """

    __slots__ = ("_closes", "_follower", "_head_begun", "_header_s", "_impatience", "_newest", "_silent_s")

    def __init__(self, manager: web.Server, *, header_s: float, silent_s: float, **limits: Any) -> None:
        super().__init__(manager, **limits)
        self._header_s = header_s
        self._silent_s = silent_s
        self._impatience: asyncio.TimerHandle | None = None
        self._follower: WriteListener | None = None
        self._head_begun = False
        self._newest: StreamReader | None = None
        """The body of the last request whose head has come."""
        self._closes = False

    def follow(self, follower: "WriteListener | None") -> None:
        """Tells `follower`, until another call, when the socket takes no more, and when it does again."""
        self._follower = follower
        if follower is not None and self.writing_paused:
            follower.pause()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._follower is not None:
            self._follower.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._follower is not None:
            self._follower.resume()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._silent_s * 1000))
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        in_body, before = self._is_in_body, self._request_count
        super().data_received(data)
        if self._request_count > before:
            self._head_begun = False
            if self._messages:
                self._newest = self._messages[-1][1]
            if self._impatience is not None:
                self._impatience.cancel()
                self._impatience = None
        elif data and not in_body:
            self._head_begun = True
            if self._impatience is None and self._waits():
                self._wait_for_head()
        if self._closes and not self._is_arriving:
            super().close()

    def close(self) -> None:
        """At the end of the service. From then on aiohttp hears nothing more: a request that is arriving comes in first."""
        if self._is_arriving:
            self._closes = True
        else:
            super().close()

    @property
    def _is_arriving(self) -> bool:
        """Whether a request has begun to come, and has not come wholly."""
        return self._head_begun or self._is_in_body

    @property
    def _is_in_body(self) -> bool:
        """Whether what comes next belongs to a request whose head has come, and which nobody has answered without it."""
        return self._newest is not None and not self._newest.is_eof() and self._newest.exception() is None

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """From here on aiohttp hears nothing more, so a request that is arriving is waited for, and answered."""
        loop = asyncio.get_running_loop()
        until = loop.time() + (timeout or 0)
        while self.transport is not None and self._is_arriving and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        await super().shutdown(timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        super().connection_lost(exc)
        if self._follower is not None:
            self._follower.resume()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What the server itself has to say, in our form. `exc` and `message` quote the caller's bytes, keys included."""
        cause = type(exc).__name__
        if status == 400:
            MALFORMED_REQUESTS.inc()
            refusal = ApiError("malformed_request", cause=cause)
        else:
            refusal = ApiError("internal_error", cause=cause)
        request_id = str(uuid.uuid4())
        LOGGER.warning("HTTP %d before any handler", status, extra={"type": "http", "cause": cause, "requestId": request_id})
        if request.writer.output_size > 0:
            raise ConnectionError("An answer has begun")
        response = error_response(refusal)
        response.headers["X-Request-ID"] = request_id
        response.force_close()
        return response

    def _waits(self) -> bool:
        """Whether the server waits for a request whose head is not complete."""
        return self._waiter is not None and not self._waiter.done()

    def _wait_for_head(self) -> None:
        self._impatience = asyncio.get_running_loop().call_later(self._header_s, self._give_up)

    def _give_up(self) -> None:
        self._impatience = None
        if self._waits():
            HEADER_TIMEOUTS.inc()
            self.force_close()
