"""The ids that requests get, X-Request-ID: random UUIDs (version 4, RFC 9562), so that they tell nothing about other requests."""

import os

BYTES = 16
BATCH = 256
"""Ids for which random bytes are read at a time: one system call for each would cost most of the time."""
VARIANT = {digit: "89ab"[number % 4] for number, digit in enumerate("0123456789abcdef")}
"""Of a random digit the one that an id has in its place."""


class _RequestIds:
    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # parent and child must not give out the same ids

    def _forget(self) -> None:
        self._random = b""
        self._position = 0

    def __call__(self) -> str:
        position = self._position
        if position >= len(self._random):
            self._random = os.urandom(BYTES * BATCH)
            position = 0
        self._position = position + BYTES
        text = self._random[position : position + BYTES].hex()
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{VARIANT[text[16]]}{text[17:20]}-{text[20:]}"


new_request_id = _RequestIds()
