"""Small JSON bodies with a declared form: those of the account's payments, and of the administrator."""

from typing import Annotated, TypeVar

import msgspec
from aiohttp import web

from gptutor.api.body import BodyLimits, read_body
from gptutor.errors import Refusal

T = TypeVar("T")

LIMITS = BodyLimits(64 * 1024, idle_s=10, total_s=30)

# What PostgreSQL cannot keep, and what would make a log line or a table look like another, is not text for us.
Line = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]*$")]


async def read_form(request: web.Request, form: type[T], limits: BodyLimits = LIMITS) -> T:
    """The body as `form`. Raises Refusal."""
    if request.content_length is not None and request.content_length > limits.bytes_max:
        raise Refusal("body_too_large", f"Request body is larger than {limits.bytes_max} bytes")
    body = await read_body(request, limits)
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise Refusal("invalid_request", _sentence(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal("invalid_json") from error


def _sentence(fault: str) -> str:
    """`amount: expected …` from msgspec's fault, which ends in the place: ``… - at `$.amount` ``."""
    what, _, place = fault.partition(" - at ")
    field = place.strip("`").removeprefix("$").lstrip(".")
    if "matching regex" in what:
        what = "expected a text without control characters, in the form that is documented"
    return f"{field}: {what[:1].lower()}{what[1:]}" if field else what
