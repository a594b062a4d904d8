"""What arrives as an answer: the framing of HTTP/1.1, by llhttp (httptools). No I/O.

Strict: what llhttp refuses, and a head of more than HEAD_BYTES_MAX, is broken; what follows an answer's end is a second answer to
one question, and poisons the connection.
"""

from typing import Any

import httptools

HEAD_BYTES_MAX = 64 * 1024
HEADERS_READ = frozenset(
    b"content-type content-encoding content-length transfer-encoding x-generation-id retry-after date".split()
)
"""Of OpenRouter's twenty or so; the others are nobody's business here."""


class ResponseParser:
    """`feed` it what arrives; it gives the bytes of the body, and tells how far the answer has come."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By their names in small letters."""
        self.has_head = False
        self.is_whole = False
        self.is_kept = False
        """Whole, and by its own word another may follow on its connection."""
        self.is_broken = False
        self.is_poisoned = False
        self.ends_with_connection = False
        self._head_bytes = 0
        self._fields: dict[bytes, bytes] = {}
        self.on_header = self._fields.setdefault
        """llhttp's call for each field, of which there are twenty; of two of one name the first counts."""
        self._pieces: list[bytes] = []
        self._pieces_of_it = 0
        """Of those, when it was whole: the others follow its end."""
        self.on_body = self._pieces.append
        """For each piece, of which a stream that comes at once has hundreds."""
        self._parser: Any = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`, in one piece; also those before what is broken."""
        if not self.has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.is_broken = True
        if not self.has_head and self._head_bytes > HEAD_BYTES_MAX:
            self.is_broken = True
        if self.is_whole or self.is_broken:
            self.close()
        elif self.has_head:
            self._fields.clear()  # trailers
        pieces = self._pieces
        if self.is_whole:
            del pieces[self._pieces_of_it :]
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def close(self) -> None:
        """Nothing more is fed: the parser refers to this, and this to it."""
        self._parser = None

    # -- llhttp's side

    def on_message_begin(self) -> None:
        if self.is_whole:
            self.is_poisoned = True

    def on_headers_complete(self) -> None:
        if self.is_whole:
            return
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self.has_head = True
            for name, value in self._fields.items():
                if (name := name.lower()) in HEADERS_READ:
                    self.headers.setdefault(name.decode(), value.decode("utf-8", "surrogateescape"))
        self._fields.clear()
        if not self.has_head:
            return  # an interim answer; the real one follows
        self.ends_with_connection = "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def on_message_complete(self) -> None:
        if self.status >= 200 and not self.is_whole:
            self.is_whole = True
            self._pieces_of_it = len(self._pieces)
            self.is_kept = self._parser.should_keep_alive() and not self.ends_with_connection
