"""The head of an answer that is relayed, spelled here, so that it leaves in one write with the first bytes of its body.

aiohttp writes a stream's head in a packet of its own, and any head by way of several coroutines. All other answers are aiohttp's.
"""

import functools
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE

JOINED_BYTES_MAX = 64 * 1024
"""A larger body is not copied to stand behind its head."""


class UnbufferedResponse(web.StreamResponse):
    """A response that gives its head, and leaves the writing to whoever has its body."""

    is_written = False
    """Whether any bytes of it are."""
    _is_kept: bool | None = None

    @property
    def keep_alive(self) -> bool | None:
        """Whether another request may come on its connection; the server asks."""
        return super().keep_alive if self._is_kept is None else self._is_kept

    async def spell(self, request: web.Request, length: int | None = None) -> bytes:
        """The head, with what the application adds to every answer. Without a `length` the body is chunked, if HTTP allows."""
        await request.app.on_response_prepare.send(request, self)
        headers, version = self.headers, request.version
        if self.status == HTTPStatus.NO_CONTENT:
            pass  # a length would be wrong, and a chunk the beginning of the next answer
        elif length is not None:
            headers["Content-Length"] = str(length)
        elif version >= HttpVersion11:
            headers["Transfer-Encoding"] = "chunked"
        else:
            self.force_close()  # only the end of the connection ends the body
        self._is_kept = request.keep_alive and super().keep_alive is not False
        if self._is_kept != (version >= HttpVersion11):  # what the version does not say by itself
            headers["Connection"] = "keep-alive" if self._is_kept else "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
            raise ValueError("A field of the head has a line break in it")
        first = f"HTTP/{version.major}.{version.minor} {self.status} {self.reason}\r\n"
        return f"{first}{lines}{_stamp(int(time.time()))}".encode("utf-8", "surrogateescape")


class CompleteResponse(UnbufferedResponse):
    """An answer whose body is known."""

    def __init__(self, body: bytes, *, status: int, headers: dict[str, str]) -> None:
        super().__init__(status=status, headers=headers)
        self._whole = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Writes all of it. Raises ConnectionError."""
        transport, writer = request.transport, request.writer
        if self.is_written:
            return writer
        head = await self.spell(cast("web.Request", request), len(self._whole))
        if transport is None or transport.is_closing():
            raise ConnectionResetError
        self.is_written = True
        writer.output_size = len(head) + len(self._whole)
        if len(self._whole) <= JOINED_BYTES_MAX:
            transport.write(head + self._whole)
        else:
            transport.write(head)
            transport.write(self._whole)
        await writer.drain()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """It is written already."""


@functools.lru_cache(maxsize=1)
def _stamp(second: int) -> str:
    """The last lines of every head in that second."""
    return f"Date: {formatdate(second, usegmt=True)}\r\nServer: {SERVER_SOFTWARE}\r\n\r\n"
