"""A small JSON body that is described by a Struct: all of it is checked, and what the Struct does not name is refused. No I/O.

The descriptions of the Struct's fields complete the sentence "<field> must be …", as those of the ask do, or the words that may
be chosen from; where there is neither, the checker's own words must do.
"""

import functools
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from gptutor.api.chat.request import MISSING, PLACE
from gptutor.errors import ApiError
from gptutor.http.strict_json import NAME_CHARACTERS_SHOWN, reject_ambiguous_json
from gptutor.money.amounts import PLAIN_DECIMAL

Form = TypeVar("Form", bound=msgspec.Struct)

# What PostgreSQL cannot keep, and what would make a log line or a table look like another, is not text for us.
Line = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z")]


class Amount(Decimal):
    """Of money: a JSON number, or a plain decimal as text, `"99.50"`. Decimal alone would take `"1_0"` for ten."""


UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)


def parse_json_body(body: bytes, form: type[Form]) -> Form:
    """Raises ApiError, whose text names the field, its fault and what is allowed."""
    try:
        reject_ambiguous_json(body.decode())
        read: Form = _decoder(form).decode(body)
        return read
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", _told(str(error), form)) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ApiError("invalid_json", cause=type(error).__name__) from error


@functools.cache
def _decoder(form: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(form, dec_hook=_amount, float_hook=Decimal)


def _amount(_: type, value: Any) -> Amount:
    """What the decoder asks for where an Amount should stand: `value` is a text, an integer, a Decimal, or anything else."""
    if isinstance(value, str) and not PLAIN_DECIMAL.fullmatch(value):
        raise ValueError("Expected a number such as 100 or 99.50")
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError("Expected a number or a text such as 99.50")
    return Amount(value)


def must_be(form: type[msgspec.Struct], field: str) -> str:
    """`limit must be …`"""
    return f"{field} must be {_description(form, field)}"


def _description(form: type[msgspec.Struct], field: str) -> str | None:
    """Of a field by its name in JSON: what its declaration says; of a choice, what there is to choose from."""
    hint = next((known.type for known in msgspec.structs.fields(form) if known.encode_name == field), None)
    said = next((meta.description for meta in reversed(getattr(hint, "__metadata__", ())) if meta.description), None)
    choices = [choice for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for choice in get_args(kind)]
    return said or (f"one of {', '.join(choices)}" if choices else None)


def _told(fault: str, form: type[msgspec.Struct]) -> str:
    if unknown := UNKNOWN.search(fault):
        known = ", ".join(form.__struct_encode_fields__)
        return f"{unknown[1][:NAME_CHARACTERS_SHOWN]!r} is not a field of this request; it has {known}"
    found = MISSING.search(fault) or PLACE.search(fault)
    if found is None:
        return "Request body must be a JSON object"
    if _description(form, found[1]):
        return must_be(form, found[1])
    what = fault.partition(" - at ")[0]
    if "matching regex" in what:
        what = "expected a text without control characters, in the form that is documented"
    return f"{found[1]}: {what[:1].lower()}{what[1:]}"
