"""Responses that we write to the transport ourselves, so that the headers leave in one write with the first bytes of the body.

aiohttp writes a stream's headers in a packet of their own, and all headers through several coroutines. Only relayed responses
are written in this way; all others are aiohttp's.
"""

import asyncio
import functools
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from gptutor.http.byte_budget import ResponseBytes

RATE_MIN = 32 * 1024
"""Bytes per second."""
JOINED_BYTES_MAX = 64 * 1024
"""A larger body is written after the headers: joining them would copy it."""


class UnbufferedResponse(web.StreamResponse):
    """A response that serializes its headers, and leaves writing to the owner of its body."""

    is_written = False
    """Whether any bytes of the response are written."""
    _keep_alive_decision: bool | None = None

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection can be used for another request; read by aiohttp's server."""
        return super().keep_alive if self._keep_alive_decision is None else self._keep_alive_decision

    async def serialize_headers(self, request: web.Request, length: int | None = None) -> bytes:
        """The status line and all headers. Without `length` the body is chunked if the version allows. Raises ValueError."""
        await request.app.on_response_prepare.send(request, self)
        headers, version = self.headers, request.version
        if self.status == HTTPStatus.NO_CONTENT:
            pass  # without a body: a length would be wrong, and a chunk would begin the next response
        elif length is not None:
            headers["Content-Length"] = str(length)
        elif version >= HttpVersion11:
            headers["Transfer-Encoding"] = "chunked"
        else:
            self.force_close()  # only the end of the connection ends the body
        self._keep_alive_decision = request.keep_alive and super().keep_alive is not False
        if self._keep_alive_decision != (version >= HttpVersion11):  # differs from the version's default
            headers["Connection"] = "keep-alive" if self._keep_alive_decision else "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
            raise ValueError("A header contains a line break")
        status_line = f"HTTP/{version.major}.{version.minor} {self.status} {self.reason}\r\n"
        return f"{status_line}{lines}{_date(int(time.time()))}".encode("utf-8", "surrogateescape")


class CompleteResponse(UnbufferedResponse):
    """A response whose whole body is known. `kept` is released when the client has taken it, or was given up.

    A client must take it within `write_timeout_s`, and a further second for each RATE_MIN bytes.
    """

    def __init__(
        self, body: bytes, *, status: int, headers: dict[str, str], kept: ResponseBytes | None = None, write_timeout_s: float = 60
    ) -> None:
        super().__init__(status=status, headers=headers)
        self._complete_body = body
        self._kept = kept
        self._write_timeout_s = write_timeout_s + len(body) / RATE_MIN

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Writes the whole response, and waits until the client has taken nearly all of it. Raises ConnectionError."""
        transport, writer = request.transport, request.writer
        if self.is_written:
            return writer
        body, self._complete_body = self._complete_body, b""
        headers = await self.serialize_headers(cast("web.Request", request), len(body))
        if transport is None or transport.is_closing():
            raise ConnectionResetError
        self.is_written = True
        writer.output_size = len(headers) + len(body)
        if len(body) <= JOINED_BYTES_MAX:
            transport.write(headers + body)
        else:
            transport.write(headers)
            transport.write(body)
        del body  # from here on only the transport has it
        if request.protocol.writing_paused:
            try:
                async with asyncio.timeout(self._write_timeout_s):
                    await writer.drain()
            except TimeoutError:
                transport.abort()
                raise ConnectionResetError from None
        if self._kept is not None:
            self._kept.release()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


@functools.lru_cache(maxsize=1)
def _date(unix_s: int) -> str:
    """The last header of every response in that second, and the empty line after it."""
    return f"Date: {formatdate(unix_s, usegmt=True)}\r\n\r\n"
