"""The body of an answer, between the socket and whoever takes it. No I/O.

Before there is a taker the bytes are kept, and beyond a bound they are too many; afterwards they pass at once. What is too many,
or more than the taker wants now, is a reason to read no more.
"""

from collections.abc import Callable

KEPT_BYTES_MAX = 256 * 1024

Consumer = Callable[[bytes], None]


def _nobody(piece: bytes) -> None:
    """Takes what still comes after its taker has left."""


class BodyBuffer:
    """`put` what arrives; `open` it to a taker, once."""

    def __init__(self) -> None:
        self.is_held = False
        """Whether the taker wants no more for now."""
        self._taker: Consumer | None = None
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    @property
    def has_any(self) -> bool:
        """Whether anything is kept."""
        return bool(self._kept)

    @property
    def has_enough(self) -> bool:
        """Whether no more should come for now."""
        return self.is_held or self._kept_bytes > KEPT_BYTES_MAX

    def put(self, piece: bytes) -> bool:
        """Whether it is passed on; else it is kept. Raises what the taker raises."""
        if self._taker is not None:
            self._taker(piece)
            return True
        self._kept.append(piece)
        self._kept_bytes += len(piece)
        return False

    def open(self, taker: Consumer) -> None:
        """Gives him what is kept, and from now on what is put. Raises what he raises."""
        self._taker = taker
        if self._kept:
            pieces = b"".join(self._kept)
            self._kept.clear()
            self._kept_bytes = 0
            taker(pieces)

    def close(self) -> None:
        """The taker has left."""
        self._taker = _nobody
