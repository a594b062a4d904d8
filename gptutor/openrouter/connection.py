"""One connection to OpenRouter: a request goes out, the bytes of its answer come in. What they mean, `answer.py` says; who gets
those of the body, `intake.py`.

Why not aiohttp's ClientSession: most of a relay's cost was its ceremony for each request, and a task woken for each chunk. Here
the bytes of an answer go from the socket's callback to whoever takes them (`take`), in the same turn of the loop: no task, no
queue, no copy but the one that the parser makes. What must be true all the same:

- What comes when nothing was asked, or after an answer's end, breaks the connection.
- Whoever takes too slowly stops the reading (`pause`), so OpenRouter waits by TCP, and memory is bounded. So it is while nobody
  takes yet.
- A connection is used again only after an answer that ended as it said, and whose head allows it.
- Whatever ends an answer before its end, ends in one UpstreamError, by what it proves about the purchase.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Literal

from gptutor.openrouter.bill import sane_generation_id
from gptutor.openrouter.body_buffer import BodyBuffer, Consumer
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.response_parser import ResponseParser
from gptutor.openrouter.retry import Failure

REFUSED = 300
"""The least status of an answer that is none."""
PIECE_BYTES = 256 * 1024
"""Requests are written in pieces of this size: one write of ten megabytes would hold up everybody else."""

Ending = Literal["timeout", "broken"]
Event = Literal["head", "body", "end"]


class UpstreamConnection(asyncio.Protocol):
    """Ask, read the head, then `take` or `read` the body. One answer at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.heard_at = 0.0
        """When the last bytes of a body came, by the loop's clock."""
        self.is_fresh = True
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._awaited: Event = "head"
        self._drained: asyncio.Future[None] | None = None
        self._reset()
        self._is_over = True

    def _reset(self) -> None:
        self._answer = ResponseParser()
        self._is_over = False  # whole, given up, or enough of it
        self._is_sent = True
        self._failure: Failure | None = None
        self._intake = BodyBuffer()
        self._is_paused = False

    # -- asking

    async def ask(self, head: bytes, body: bytes, within_s: float) -> None:
        """Sends a request; returns when the head of its answer is there. Raises UpstreamError."""
        self._reset()
        try:
            if len(body) <= PIECE_BYTES:
                self._send(head + body)
                await self._wait("head", within_s)
            else:
                async with asyncio.timeout(within_s):
                    await self._send_in_pieces(head, body)
                    if not self._answer.has_head:
                        await self._wait("head", None)
        except TimeoutError:
            if self._answer.has_head:
                return  # it came, and nobody read what was still to be sent
            self.end("timeout")
            self._raise_failure("head")
        except BaseException:
            self.abort()
            raise

    async def _send_in_pieces(self, head: bytes, body: bytes) -> None:
        """What is refused before its end is not sent to its end: then the connection cannot be used again."""
        self._is_sent = False
        self._send(head)
        for start in range(0, len(body), PIECE_BYTES):
            if self._failure is not None or self._answer.status >= REFUSED:
                return
            self._send(body[start : start + PIECE_BYTES])
            await (self._drained or asyncio.sleep(0))
        self._is_sent = True

    @property
    def is_usable(self) -> bool:
        """Whether another request may be sent on it."""
        return self.is_open and self._is_over and self._answer.is_kept and self._is_sent

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def tls_session(self) -> ssl.SSLSession | None:
        """What the next handshake can begin with."""
        secured = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        return secured.session if secured is not None else None

    def _send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            self.end("broken")
        else:
            self._transport.write(data)

    # -- the answer

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def headers(self) -> dict[str, str]:
        return self._answer.headers

    @property
    def has_ended(self) -> bool:
        """Whether all of the answer has come. (Some of it may not be taken yet.)"""
        return self._is_over

    async def heard(self, within_s: float) -> bool:
        """Waits for the first bytes of the body, or its end. False: nothing came for so long. Raises UpstreamError."""
        if not self._intake.has_any:
            await self._wait("body", within_s, late=self._wake)
        return self._intake.has_any or self._is_over

    async def take(self, taker: Consumer, within_s: float | None = None) -> None:
        """Passes the body to `taker` as it comes, until its end. What `taker` raises is raised here. Raises UpstreamError."""
        try:
            self._intake.open(taker)
            self._set_reading()
            await self._wait("end", within_s)
        finally:
            self._intake.close()

    async def read(self, within_s: float) -> bytes:
        """The whole body. Raises UpstreamError."""
        pieces: list[bytes] = []
        await self.take(pieces.append, within_s)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pause(self) -> None:
        """No more is read until `resume`."""
        self._intake.is_held = True
        self._set_reading()

    def resume(self) -> None:
        self._intake.is_held = False
        self._set_reading()

    def _set_reading(self) -> None:
        pauses = self._intake.has_enough and not self._is_over
        if pauses != self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = pauses
            if pauses:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def stop(self) -> None:
        """Enough of it: whoever waits for its end has it now."""
        if not self._is_over:
            self._is_over = True
            self.abort()
            self._wake()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """After TLS was begun inside a tunnel."""
        self._transport = transport
        self._is_over = True

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            self.abort()  # nothing was asked
            return
        answer = self._answer
        body = answer.feed(data)
        self._is_over = answer.is_whole
        self._pass_on(body)
        if answer.is_broken:
            self.end("broken")
        if answer.is_poisoned:
            self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self._answer.close()
        self.resume_writing()
        if self._is_over:
            return
        if self._answer.has_head and self._answer.ends_with_connection and exc is None:
            self._is_over = True
            self._wake()
        else:
            self.end("broken")

    def pause_writing(self) -> None:
        self._drained = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    # -- between them

    def _pass_on(self, data: bytes) -> None:
        """What came in this turn goes to the taker; then whoever waits is woken."""
        if data:
            self.heard_at = self.loop.time()
            try:
                if not self._intake.put(data) and self._intake.has_enough:
                    self._set_reading()
            except Exception as error:
                self._is_over = True
                self.abort()
                if self._waiter is not None and not self._waiter.done():
                    self._waiter.set_exception(error)
        awaited = self._awaited
        if self._is_over or (awaited == "head" and self._answer.has_head) or (awaited == "body" and self._intake.has_any):
            self._wake()
        if self._drained is not None and (self._is_over or self._answer.status >= REFUSED):
            self.resume_writing()

    async def _wait(self, event: Event, within_s: float | None, late: Callable[[], None] | None = None) -> None:
        """Until it comes, or is `late`, which ends the answer unless something else is to be done. Raises UpstreamError."""
        if self._is_over:
            self._raise_failure(event)
            return
        self._awaited = event
        waiter = self._waiter = self.loop.create_future()
        timer = None if within_s is None else self.loop.call_later(within_s, late or self._time_out)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        self._raise_failure(event)

    def _time_out(self) -> None:
        self.end("timeout")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, ending: Ending) -> None:
        """Gives the answer up: whoever waits for it gets an UpstreamError."""
        if self._is_over:
            return
        name = self._answer.headers.get("x-generation-id") if self._answer.has_head else None
        self._failure = Failure(ending, generation_id=sane_generation_id(name))
        self._is_over = True
        self.abort()
        self._wake()
        self.resume_writing()

    def _raise_failure(self, awaited: Event) -> None:
        """Not while what is waited for has come: what was sent before a failure passes before it is told."""
        has_come = (awaited == "head" and self._answer.has_head) or (awaited == "body" and self._intake.has_any)
        if self._failure is not None and not has_come:
            raise UpstreamError(self._failure)
