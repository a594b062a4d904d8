"""Finds members of a JSON object that arrives in pieces and may be of any length, in bounded memory. No I/O.

For the events that are too long to be kept: the last one of an image, or of a long output that it repeats, has the bill behind a
megabyte of text. Only the wanted values are kept, each up to VALUE_BYTES_MAX.

The structure is followed exactly, so nothing inside a string or in another object is taken for a wanted member. Numbers, `true`
and the like are not validated: the decoder of a value does that.
"""

import re
from collections.abc import Iterable

import msgspec

VALUE_BYTES_MAX = 64 * 1024
KEY_BYTES_MAX = 256

Path = tuple[str, ...]

REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
STRUCTURE = re.compile(rb'["{}\[\]:,]')
BRACKET = re.compile(rb'["{}\[\]]')
"""All that matters inside a value that is neither wanted nor on the way to a wanted one."""
SPACE = b" \t\r\n"

_decode_key = msgspec.json.Decoder(str).decode


class MemberReader:
    """`feed` it the document in pieces; then `values` has the raw bytes of the wanted members that were found, by their paths.

    No path may be the beginning of another one. As in every decoder here, the last of several members with one name counts.
    `is_whole` tells whether the document was one JSON object from its first byte to its last; if not, `values` is not to be
    trusted.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.values: dict[Path, bytes] = {}
        self._wanted = frozenset(paths)
        self._on_the_way = frozenset(path[:length] for path in self._wanted for length in range(len(path)))
        self._depth = 0
        """How many objects and arrays are open."""
        self._keys: list[str] = []
        """The current member's key in each open object on the way to a wanted member, outermost first."""
        self._expects_key = False
        self._in_string = False
        self._is_escaped = False
        """The piece before ended in a backslash, inside a string."""
        self._kept: bytearray | None = None
        """What has arrived of a key or a wanted value."""
        self._kept_max = 0
        self._has_started = False
        self._has_failed = False

    @property
    def is_whole(self) -> bool:
        return self._has_started and not self._depth and not self._has_failed

    def feed(self, piece: bytes) -> None:
        at = 0
        while at < len(piece) and not self._has_failed:
            at = self._read_string(piece, at) if self._in_string else self._read_structure(piece, at)

    def _read_string(self, piece: bytes, at: int) -> int:
        """Reads the rest of a string, as far as it is in the piece. Returns where it stopped, as `_read_structure` does."""
        quote = piece.find(b'"', at)
        end = len(piece) if quote < 0 else quote
        if self._is_escaped or piece.find(b"\\", at, end) >= 0:  # never in base64, of which most long strings are
            found = REST_OF_STRING.match(piece, at + self._is_escaped)
            end = found.end() if found else len(piece)
        self._is_escaped = piece[end : end + 1] == b"\\"  # the last byte: any other escape is within the match
        is_closed = end < len(piece) and not self._is_escaped
        self._keep(piece[at : end + 1])
        if is_closed:
            self._in_string = False
            if self._expects_key and self._is_on_the_way:
                self._end_key()
        return end + 1

    def _read_structure(self, piece: bytes, at: int) -> int:
        is_on_the_way = self._is_on_the_way
        found = (STRUCTURE if is_on_the_way else BRACKET).search(piece, at)
        if not self._depth and piece[at : found.start() if found else None].strip(SPACE):
            self._has_failed = True
        if found is None:
            self._keep(piece[at:])
            return len(piece)
        token, end = found[0], found.end()
        if is_on_the_way and token in b"}],":
            self._keep(piece[at : found.start()])
            self._end_value()
        elif is_on_the_way and token == b'"' and self._expects_key:
            self._kept, self._kept_max = bytearray(token), KEY_BYTES_MAX
        else:
            self._keep(piece[at:end])
        self._step(token)
        return end

    def _step(self, token: bytes) -> None:
        """Follows the structure."""
        is_on_the_way = self._is_on_the_way
        if token == b'"':
            self._in_string = True
            self._has_failed |= not self._depth
        elif token in b"{[":
            self._has_failed |= not self._depth and (self._has_started or token == b"[")
            self._has_started = True
            if token == b"{" and is_on_the_way and tuple(self._keys) in self._on_the_way:
                self._keys.append("")
                self._expects_key = True
            self._depth += 1
        elif token in b"}]":
            if is_on_the_way:
                self._has_failed |= token == b"]" or not self._depth
                del self._keys[-1:]
                self._expects_key = False
            self._depth -= 1
        elif token == b",":
            self._expects_key = True
        else:
            self._expects_key = False
            if tuple(self._keys) in self._wanted:
                self.values.pop(tuple(self._keys), None)
                self._kept, self._kept_max = bytearray(), VALUE_BYTES_MAX

    @property
    def _is_on_the_way(self) -> bool:
        """Whether the innermost open object or array is an object on the way to a wanted member; also before the first one."""
        return self._depth == len(self._keys)

    def _keep(self, part: bytes) -> None:
        if self._kept is not None:
            if len(self._kept) + len(part) <= self._kept_max:
                self._kept += part
            else:
                self._kept = None

    def _end_key(self) -> None:
        """A name that is too long, or is no valid text, is none of those that are wanted."""
        try:
            self._keys[-1] = "" if self._kept is None else _decode_key(self._kept)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._keys[-1] = ""
        self._kept = None

    def _end_value(self) -> None:
        if self._kept is not None:
            self.values[tuple(self._keys)] = bytes(self._kept).strip(SPACE)
        self._kept = None
