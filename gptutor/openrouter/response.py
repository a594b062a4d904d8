"""A response of OpenRouter whose headers have arrived. Its body is passed on as it was sent."""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from http import HTTPStatus

from gptutor.openrouter.bill import valid_generation_id
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.headers import RETURNED_HEADERS
from gptutor.openrouter.retry import Failure

CLIENT_HEADERS = {name.lower(): name for name in RETURNED_HEADERS}
ERROR_BODY_BYTES_MAX = 64 * 1024
ERROR_BODY_TIMEOUT_S = 5.0
CHECK_INTERVAL_S = 1.0
"""How often a stream's silence is checked, at least: `expect_end` shortens the timeout while the timer runs."""


class UpstreamResponse:
    """Read the body by `read_body()`, or by `wait_for_body()` and `stream_body()`, then `close()`.

    A stream may be silent for `idle_timeout_s`, and for `end_timeout_s` once its end is expected; then it fails. `release`
    returns the connection to the pool.
    """

    def __init__(
        self,
        connection: UpstreamConnection,
        release: Callable[[UpstreamConnection], None],
        idle_timeout_s: float,
        end_timeout_s: float,
    ) -> None:
        self.connection = connection
        """What the client's side pauses and resumes; not to be used after `close`."""
        self._release: Callable[[UpstreamConnection], None] | None = release
        self._loop = connection.loop
        self._idle_timeout_s = self._timeout_s = idle_timeout_s
        self._end_timeout_s = end_timeout_s
        connection.received_at = self._loop.time()
        self._on_silence: Callable[[], None] | None = None
        self._silence_s = self._silence_reported_at = 0.0
        self.status = connection.status
        self.headers = headers = connection.headers
        """Names are in lower case."""
        self.client_headers = {shown: headers[name] for name, shown in CLIENT_HEADERS.items() if name in headers}
        self.generation_id = valid_generation_id(headers.get("x-generation-id"))
        self.is_event_stream = _is_event_stream(headers.get("content-type", "")) and self.status != HTTPStatus.NO_CONTENT
        self.is_encoded = headers.get("content-encoding", "identity") != "identity"
        """Compressed against our request: nothing can be read in it, or added to it."""

    @property
    def is_closed(self) -> bool:
        """Whether the connection was returned to the pool."""
        return self._release is None

    async def read_body(self, timeout_s: float, count: Callable[[int], None] | None = None) -> bytes:
        """The whole body. `count` may raise to end the response. Raises UpstreamError."""
        return await self.connection.read_body(timeout_s, count)

    async def read_error_body(self) -> bytes:
        """The beginning of an error's body: at most ERROR_BODY_BYTES_MAX, and what arrives within ERROR_BODY_TIMEOUT_S."""
        pieces = bytearray()

        def consume(piece: bytes) -> None:
            pieces.extend(piece)
            if len(pieces) > ERROR_BODY_BYTES_MAX:
                self.connection.finish_early()

        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_TIMEOUT_S):
                await self.connection.stream_body(consume)
        return bytes(pieces)

    async def wait_for_body(self, silence_s: float) -> bool:
        """Waits for the first bytes; False after `silence_s` without any. Raises UpstreamError if the idle timeout has passed."""
        connection, loop = self.connection, self._loop
        if connection.is_paused:
            connection.received_at = loop.time()  # the client is slow, not OpenRouter
        left_s = connection.received_at + self._timeout_s - loop.time()
        if await connection.wait_for_body(max(0.0, min(silence_s, left_s))):
            return True
        if loop.time() - connection.received_at >= self._timeout_s:
            raise UpstreamError(Failure("timeout", generation_id=self.generation_id))
        return False

    async def stream_body(self, consumer: Callable[[bytes], None], on_silence: Callable[[], None], silence_s: float) -> None:
        """Passes the body to `consumer` as it arrives, until its end, and calls `on_silence` after each `silence_s` of silence.

        Raises UpstreamError if the body is cut off, or is silent for longer than the timeout; and what `consumer` raises.
        """
        self._on_silence, self._silence_s = on_silence, silence_s
        self._silence_reported_at = self.connection.received_at = self._loop.time()
        self._timer = self._loop.call_later(min(silence_s, self._timeout_s, CHECK_INTERVAL_S), self._check_silence)
        try:
            await self.connection.stream_body(consumer)
        finally:
            self._timer.cancel()
            self._on_silence = None

    def _check_silence(self) -> None:
        """The one timer of a stream: it looks at what is due when it fires, so that no chunk has to set a timer."""
        connection, now = self.connection, self._loop.time()
        if connection.is_paused:
            connection.received_at = now  # the client is slow, not OpenRouter
        if now - connection.received_at >= self._timeout_s:
            connection.fail("timeout")
            return
        if now - max(self._silence_reported_at, connection.received_at) >= self._silence_s:
            self._silence_reported_at = now
            if self._on_silence is not None:
                self._on_silence()
        silent_at = max(self._silence_reported_at, connection.received_at) + self._silence_s
        due_at = min(silent_at, connection.received_at + self._timeout_s, now + CHECK_INTERVAL_S)
        self._timer = self._loop.call_at(due_at, self._check_silence)

    def finish_early(self) -> None:
        """Ends the body here: enough of it has been read."""
        if not self.is_closed:
            self.connection.finish_early()

    def expect_end(self, expected: bool = True) -> None:
        """Sets the timeout: the shorter one while nothing but the end of the stream is expected."""
        self._timeout_s = min(self._idle_timeout_s, self._end_timeout_s) if expected else self._idle_timeout_s

    def close(self) -> None:
        """Returns the connection to the pool, once. The pool drops it if the body was not read to its end."""
        release, self._release = self._release, None
        if release is not None:
            release(self.connection)


@functools.lru_cache(maxsize=100)
def _is_event_stream(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"
