"""An answer of OpenRouter's whose headers have come: `Reply`. Its bytes come through as they were sent."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp

from gptutor.openrouter.rim import generation_id_of, translated

LOOK_S = 1.0
"""How often a silent connection is looked at."""
# The list is complete: what is not in it does not pass, hop-by-hop headers and cookies least of all.
# The headers of an answer that reach the caller; all others are OpenRouter's and its edge's own affair. It is asked not to
# compress, but if it does, the bytes are passed as they are, and the caller must know.
PASSED_ON = ("Content-Type", "Content-Encoding", "X-Generation-Id")


class Reply:
    """An answer whose headers have come: read its bytes by `read()` or by iterating `chunks()`, then `close()` it.

    A stream may be silent for `idle_s`, and for `end_s` once its end is expected.
    """

    def __init__(self, response: aiohttp.ClientResponse, idle_s: float, end_s: float) -> None:
        self._response = response
        self._idle_s = self._silence_s = idle_s
        self._end_s = end_s
        self.status = response.status
        self.headers = {name: response.headers[name] for name in PASSED_ON if name in response.headers}
        self.generation_id = generation_id_of(response)
        self.is_event_stream = response.content_type == "text/event-stream"
        self.is_encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        """Compressed against our wish: nothing can be read in it, or added to it."""

    async def chunks(self, quiet_s: float) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, and `b""` after each `quiet_s` of silence.

        Raises UpstreamError if it ends before its end, or is silent for too long.
        """
        content = self._response.content
        clock = asyncio.get_running_loop().time
        heard = told = clock()
        with translated(self.generation_id):
            while True:
                wait_s = min(LOOK_S, told + quiet_s - clock(), heard + self._silence_s - clock())
                try:
                    async with asyncio.timeout(wait_s):
                        chunk = await content.readany()
                except TimeoutError:
                    if content.is_eof() or content.exception() is not None:
                        continue  # it came in the very moment
                    if self._is_lost():
                        raise aiohttp.ClientPayloadError("bad framing") from None
                    if clock() - heard >= self._silence_s:
                        raise
                    if clock() - told >= quiet_s:
                        told = clock()
                        yield b""
                    continue
                except (aiohttp.ClientError, OSError):
                    if rest := _buffered(content):
                        yield rest
                    raise
                if not chunk:
                    return
                yield chunk
                heard = told = clock()

    async def read(self, within_s: float) -> bytes:
        """The whole body. Raises UpstreamError."""
        with translated(self.generation_id):
            async with asyncio.timeout(within_s):
                return await self._response.read()

    def _is_lost(self) -> bool:
        """Whether nothing can come any more: aiohttp drops a connection whose framing is broken, and does not tell the reader."""
        connection = self._response.connection
        return connection is None or connection.transport is None or connection.transport.is_closing()

    def expect_end(self, expected: bool = True) -> None:
        """All that matters has been said, or (False) not yet: how long silence is worth waiting for."""
        self._silence_s = min(self._idle_s, self._end_s) if expected else self._idle_s

    def close(self) -> None:
        """Gives the connection back if the body was read to its end, and drops it otherwise."""
        self._response.release() if self._response.content.at_eof() else self._response.close()


def _buffered(content: aiohttp.StreamReader) -> bytes:
    """What arrived before a connection broke: aiohttp's reader raises first, and has no public way to what it still holds."""
    return content._read_nowait(-1) if content._buffer else b""
