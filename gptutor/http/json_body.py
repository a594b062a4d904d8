"""JSON in request bodies: ambiguous JSON is rejected, and a small body is decoded as a Struct. No I/O.

The Struct's description of a field completes the sentence "<field> must be …" in error texts; without a description the text
lists the choices of a Literal. A test finds the fields that have neither: msgspec's own texts name Python's types.
"""

import functools
import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from gptutor.errors import ApiError
from gptutor.money.amounts import AmbiguousAmount, parse_decimal
from gptutor.text import ONE_LINE

NAME_CHARACTERS_SHOWN = 100
BOM = b"\xef\xbb\xbf"
"""Some editors on Windows put it before a text in UTF-8. It is skipped."""
NUMBER_CHARACTERS_MAX = 400
"""No meaningful number is longer; the largest double has 309 digits."""

# Where msgspec's error texts name the field.
ERROR_PATH = re.compile(r"`\$\.?(.*)`")
MISSING_FIELD = re.compile(r"missing required field `(\w+)`")
UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`", re.DOTALL)

Body = TypeVar("Body", bound=msgspec.Struct)
# Control characters would forge log lines and tables, and PostgreSQL cannot store NUL.
PrintableText = Annotated[str, msgspec.Meta(pattern=ONE_LINE)]


AN_AMOUNT = "an amount in roubles, such as 99.50"
"""The description of a field."""


class Amount(Decimal):
    """Roubles: a JSON number, or a plain decimal in a string, `"99.50"` or `"99,50"`. Decimal alone would read `"1_0"` as ten."""


def _reject_duplicate_fields(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len(dict(pairs)) != len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ApiError("duplicate_field", f"The field {duplicate[:NAME_CHARACTERS_SHOWN]!r} is duplicated in one object")


def _check_number(text: str) -> None:
    if len(text) > NUMBER_CHARACTERS_MAX or math.isinf(float(text)):
        raise ApiError("invalid_request", f"Numbers must be finite, and at most {NUMBER_CHARACTERS_MAX} characters long")


def _reject_constant(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity, which Python's parser would accept


reject_ambiguous_json = json.JSONDecoder(
    object_pairs_hook=_reject_duplicate_fields,
    parse_float=_check_number,
    parse_int=_check_number,
    parse_constant=_reject_constant,
).decode
"""Parses a text. Raises ApiError for JSON that two parsers may read differently, ValueError for what is not JSON.

The gateway would price a request by one value of a duplicated field, and the model provider could obey the other. A number
outside the range of a double is infinite for one parser and an error for another.
"""


def parse_json_body(body: bytes, struct: type[Body]) -> Body:
    """Raises ApiError, whose text names the field, its fault and what is allowed. Unknown fields are rejected by `struct`."""
    body = body.removeprefix(BOM)
    try:
        reject_ambiguous_json(body.decode())
        decoded: Body = _decoder(struct).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", _error_text(error, struct)) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise not_json(body, error) from error


def not_json(body: bytes, error: Exception) -> ApiError:
    """For a body that cannot be parsed because of `error`: the text tells a wrong encoding, such as a Windows console's."""
    cause = type(error).__name__
    try:
        body.decode()
    except UnicodeDecodeError:
        return ApiError("invalid_json", "Request body must be in UTF-8", cause=cause)
    return ApiError("invalid_json", cause=cause)


@functools.cache
def _decoder(struct: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(struct, dec_hook=_decode_amount, float_hook=_decode_decimal)


def _decode_decimal(text: str) -> Decimal:
    """msgspec's hook for a number with a point or an exponent. Raises ValueError."""
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of more than 18 digits
        raise ValueError("Expected a number such as 100 or 99.50") from None


def _decode_amount(_: type, value: Any) -> Amount:
    """msgspec's hook for an Amount: `value` is a string, an integer, a Decimal, or any other JSON value. Raises ValueError."""
    if isinstance(value, str):
        return Amount(parse_decimal(value))
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("Expected a number or a string such as 99.50")
    return Amount(value)


def whole(number: float | None) -> int | None:
    """A field that may be `5.0`, for which its type requires a whole number."""
    return None if number is None else int(number)


def must_be(struct: type[msgspec.Struct], field: str) -> str:
    """`limit must be …`"""
    return f"{field} must be {_description(struct, field)}"


def _description(struct: type[msgspec.Struct], field: str) -> str | None:
    """The description of a field, by its name in JSON, or the choices of a Literal."""
    hint = next((known.type for known in msgspec.structs.fields(struct) if known.encode_name == field), None)
    text = next((meta.description for meta in reversed(getattr(hint, "__metadata__", ())) if meta.description), None)
    choices = [choice for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for choice in get_args(kind)]
    return text or (f"one of {', '.join(choices)}" if choices else None)


def _error_text(error: msgspec.ValidationError, struct: type[msgspec.Struct]) -> str:
    """Our text for msgspec's error."""
    message = str(error)
    if unknown := UNKNOWN_FIELD.search(message):
        known = ", ".join(struct.__struct_encode_fields__)
        return f"{unknown[1][:NAME_CHARACTERS_SHOWN]!r} is not a field of this request; known fields: {known}"
    found = [match[1] for match in (MISSING_FIELD.search(message), ERROR_PATH.search(message)) if match]
    for field in (re.split(r"[.\[]", path)[0] for path in found):
        if isinstance(error.__cause__, AmbiguousAmount):
            return f"{field}: {error.__cause__}"
        if _description(struct, field):
            return must_be(struct, field)
    return "Request body must be a JSON object"
