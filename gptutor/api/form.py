"""A small JSON body that is described by a Struct: all of it is checked, and what the Struct does not name is refused. No I/O.

The descriptions of the Struct's fields complete the sentence "<field> must be …", as those of the ask do.
"""

import re
from typing import TypeVar, get_type_hints

import msgspec

from gptutor.api.ask import MISSING, NAME_CHARACTERS_SHOWN, PLACE, refuse_ambiguity
from gptutor.errors import Refusal

Form = TypeVar("Form", bound=msgspec.Struct)

UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)


def read_form(body: bytes, form: type[Form]) -> Form:
    """Raises Refusal, whose text names the field, its fault and what is allowed."""
    try:
        refuse_ambiguity(body.decode())
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise Refusal("invalid_request", _told(str(error), form)) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Refusal("invalid_json", cause=type(error).__name__) from error


def must_be(form: type[msgspec.Struct], field: str) -> str:
    """`limit must be …`"""
    return f"{field} must be {get_type_hints(form, include_extras=True)[field].__metadata__[-1].description}"


def _told(fault: str, form: type[msgspec.Struct]) -> str:
    if unknown := UNKNOWN.search(fault):
        return (
            f"{unknown[1][:NAME_CHARACTERS_SHOWN]!r} is not a field of this request; it has {', '.join(form.__struct_fields__)}"
        )
    if found := MISSING.search(fault) or PLACE.search(fault):
        return must_be(form, found[1])
    return "Request body must be a JSON object"
