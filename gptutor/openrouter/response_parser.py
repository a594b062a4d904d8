"""The framing of an HTTP/1.1 response, parsed by llhttp (httptools). No I/O.

Strict: what llhttp rejects, and headers of more than HEADERS_BYTES_MAX, are malformed. Data after the end of a response would be
a second response to one request, so the connection must not be used again.
"""

from typing import Any

import httptools

from gptutor.openrouter.headers import RETURNED_HEADERS

HEADERS_BYTES_MAX = 64 * 1024
HEADERS_READ = frozenset(b"content-length transfer-encoding retry-after date".split()).union(
    name.lower().encode() for name in RETURNED_HEADERS
)
"""Of the twenty or so that OpenRouter sends; the others are not decoded."""


class ResponseParser:
    """Takes the received bytes by `feed`, which returns those of the body; the attributes say how far the response has come."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names are in lower case."""
        self.has_headers = False
        self.is_complete = False
        self.allows_reuse = False
        """The response is complete, and the connection may carry another one."""
        self.is_malformed = False
        self.has_extra_data = False
        """Data followed the end of the response."""
        self.ends_at_eof = False
        """Only the end of the connection ends the body."""
        self._header_bytes = 0
        self._fields: dict[bytes, bytes] = {}
        self.on_header = self._fields.setdefault
        """llhttp's callback for each header field, of which there are twenty; of two with one name the first counts."""
        self._pieces: list[bytes] = []
        self._pieces_when_complete = 0
        """How many pieces belong to this response: later ones follow its end."""
        self.on_body = self._pieces.append
        """llhttp's callback for each piece of the body; a stream that arrives at once has hundreds."""
        self._parser: Any = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`, in one piece, including those before a malformed part."""
        if not self.has_headers:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.is_malformed = True
        if not self.has_headers and self._header_bytes > HEADERS_BYTES_MAX:
            self.is_malformed = True
        if self.is_complete or self.is_malformed:
            self.close()
        elif self.has_headers:
            self._fields.clear()  # trailers
        pieces = self._pieces
        if self.is_complete:
            del pieces[self._pieces_when_complete :]
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def close(self) -> None:
        """Ends the parsing, and breaks the reference cycle between this object and llhttp's parser."""
        self._parser = None

    # -- llhttp's callbacks

    def on_message_begin(self) -> None:
        if self.is_complete:
            self.has_extra_data = True

    def on_headers_complete(self) -> None:
        if self.is_complete:
            return
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self.has_headers = True
            for name, value in self._fields.items():
                if (name := name.lower()) in HEADERS_READ:
                    self.headers.setdefault(name.decode(), value.decode("utf-8", "surrogateescape"))
        self._fields.clear()
        if not self.has_headers:
            return  # an interim response; the final one follows
        self.ends_at_eof = "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def on_message_complete(self) -> None:
        if self.status >= 200 and not self.is_complete:
            self.is_complete = True
            self._pieces_when_complete = len(self._pieces)
            self.allows_reuse = self._parser.should_keep_alive() and not self.ends_at_eof
