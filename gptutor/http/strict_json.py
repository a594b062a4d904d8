"""What two readers of JSON may read differently is refused before anything is priced by it. No I/O."""

import json
import math
from typing import Any

from gptutor.errors import ApiError

NAME_CHARACTERS_SHOWN = 100
NUMBER_CHARACTERS_MAX = 400
"""No number that means anything is written longer; the largest double has 309 digits."""


def _object_once(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len(dict(pairs)) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ApiError("duplicate_key", f"{twice[:NAME_CHARACTERS_SHOWN]!r} stands twice in one object")


def _number(text: str) -> None:
    if len(text) > NUMBER_CHARACTERS_MAX or math.isinf(float(text)):
        raise ApiError("invalid_request", f"Numbers must be finite, and at most {NUMBER_CHARACTERS_MAX} characters long")


def _no_number(text: str) -> None:
    raise ValueError(text)  # NaN, Infinity: Python's own reader would take them


reject_ambiguous_json = json.JSONDecoder(
    object_pairs_hook=_object_once, parse_float=_number, parse_int=_number, parse_constant=_no_number
).decode
"""Reads a text, and raises ApiError for what two readers of JSON may read differently, and ValueError for what is none.

A key that stands twice is priced by one value here, and may be obeyed by the other upstream. A number out of the range of a
double is infinite for one and an error for the other.
"""
