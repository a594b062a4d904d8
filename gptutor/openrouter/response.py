"""An answer of OpenRouter's whose head has come: `UpstreamResponse`. Its bytes come through as they were sent."""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from http import HTTPStatus

from gptutor.openrouter.bill import sane_generation_id
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.retry import Failure

# The list is complete: what is not in it does not pass, hop-by-hop headers and cookies least of all.
# The headers of an answer that reach the caller; all others are OpenRouter's and its edge's own affair. It is asked not to
# compress, but if it does, the bytes are passed as they are, and the caller must know.
PASSED_ON = {"content-type": "Content-Type", "content-encoding": "Content-Encoding", "x-generation-id": "X-Generation-Id"}
REFUSAL_BYTES_MAX = 64 * 1024
REFUSAL_S = 5.0


class UpstreamResponse:
    """Read its bytes by `read()`, or by `heard()` and `pump()`, then `close()` it.

    A stream may be silent for `idle_s`, and for `end_s` once its end is expected. `done` gets the connection back.
    """

    def __init__(
        self, connection: UpstreamConnection, done: Callable[[UpstreamConnection], None], idle_s: float, end_s: float
    ) -> None:
        self._connection = connection
        self._done: Callable[[UpstreamConnection], None] | None = done
        self._loop = connection.loop
        self._idle_s = self._silence_s = idle_s
        self._end_s = end_s
        connection.heard_at = self._loop.time()
        self._is_paused = False
        self._told: Callable[[], None] | None = None
        self._told_at = self._quiet_s = 0.0
        headers = connection.headers
        self.status = connection.status
        self.all_headers = headers
        """By their names in small letters."""
        self.headers = {shown: headers[name] for name, shown in PASSED_ON.items() if name in headers}
        self.generation_id = sane_generation_id(headers.get("x-generation-id"))
        self.is_event_stream = _is_of_events(headers.get("content-type", "")) and self.status != HTTPStatus.NO_CONTENT
        self.is_encoded = headers.get("content-encoding", "identity") != "identity"
        """Compressed against our wish: nothing can be read in it, or added to it."""

    @property
    def is_closed(self) -> bool:
        """Whether its connection is another's affair by now."""
        return self._done is None

    @property
    def is_whole(self) -> bool:
        """Whether all of it has come already."""
        return self._connection.has_ended

    async def read(self, within_s: float) -> bytes:
        """The whole body. Raises UpstreamError."""
        try:
            return await self._connection.read(within_s)
        except UpstreamError as error:
            raise self._named(error) from None

    async def read_refusal(self) -> bytes:
        """The beginning of the body, as far as it is of use, and as much of it as comes soon."""
        pieces = bytearray()

        def take(piece: bytes) -> None:
            pieces.extend(piece)
            if len(pieces) > REFUSAL_BYTES_MAX:
                self._connection.stop()

        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(REFUSAL_S):
                await self._connection.take(take)
        return bytes(pieces)

    async def heard(self, quiet_s: float) -> bool:
        """Waits for the first bytes; False after `quiet_s` of silence. Raises UpstreamError if none come in time, or ever."""
        if self._is_paused:
            self._connection.heard_at = self._loop.time()  # it is the caller who is slow
        left_s = self._connection.heard_at + self._silence_s - self._loop.time()
        try:
            if await self._connection.heard(max(0.0, min(quiet_s, left_s))):
                return True
        except UpstreamError as error:
            raise self._named(error) from None
        if self._loop.time() - self._connection.heard_at >= self._silence_s:
            raise UpstreamError(Failure("timeout", generation_id=self.generation_id))
        return False

    async def pump(self, taker: Callable[[bytes], None], told: Callable[[], None], quiet_s: float) -> None:
        """Passes the body to `taker` as it arrives, until its end, and calls `told` after each `quiet_s` of silence.

        Raises UpstreamError if it ends before its end, or is silent for too long; and what `taker` raises.
        """
        self._told, self._quiet_s = told, quiet_s
        self._told_at = self._connection.heard_at = self._loop.time()
        self._timer = self._loop.call_later(min(quiet_s, self._silence_s, LOOK_S), self._look)
        try:
            await self._connection.take(taker)
        except UpstreamError as error:
            raise self._named(error) from None
        finally:
            self._timer.cancel()
            self._told = None

    def _look(self) -> None:
        """The one timer of a stream: it sees what is due when it wakes, so that a chunk costs no timer."""
        connection, now = self._connection, self._loop.time()
        if self._is_paused:
            connection.heard_at = now  # it is the caller who is slow
        if now - connection.heard_at >= self._silence_s:
            connection.end("timeout")
            return
        if now - max(self._told_at, connection.heard_at) >= self._quiet_s:
            self._told_at = now
            if self._told is not None:
                self._told()
        quiet_at = max(self._told_at, connection.heard_at) + self._quiet_s
        self._timer = self._loop.call_at(min(quiet_at, connection.heard_at + self._silence_s, now + LOOK_S), self._look)

    def pause(self) -> None:
        """The caller does not take more."""
        self._is_paused = True
        self._connection.pause()

    def resume(self) -> None:
        self._is_paused = False
        self._connection.heard_at = self._loop.time()
        self._connection.resume()

    def stop(self) -> None:
        """Enough has been read."""
        if not self.is_closed:
            self._connection.stop()

    def expect_end(self, expected: bool = True) -> None:
        """All that matters has been said, or (False) not yet: how long silence is worth waiting for."""
        self._silence_s = min(self._idle_s, self._end_s) if expected else self._idle_s

    def close(self) -> None:
        """Gives the connection back, once; it is dropped if the body was not read to its end."""
        done, self._done = self._done, None
        if done is not None:
            done(self._connection)

    def _named(self, error: UpstreamError) -> UpstreamError:
        """The same failure, with the answer's name: something may have been bought."""
        return UpstreamError(Failure(error.failure.kind, generation_id=self.generation_id))


@functools.lru_cache(maxsize=100)
def _is_of_events(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"


LOOK_S = 1.0
"""How often a stream's timer looks, at least: what was expected changes while it sleeps."""
