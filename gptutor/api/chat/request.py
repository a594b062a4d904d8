"""The body of `POST /v1/chat/completions`: validated, measured for its price, and prepared for upstream. No I/O.

`ChatRequest` is the one description: validation, the texts of errors and the OpenAPI schema are derived from it. Fields that it
does not name pass without validation, because OpenRouter adds fields every week.

The client's bytes reach OpenRouter unchanged (contract A4): the top level is split into members, each kept as its own bytes, and
only our own members are encoded. No number is ever parsed and encoded again.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Raw

from gptutor.api.chat.surrogates import mask, unmask
from gptutor.errors import ApiError
from gptutor.http.json_body import BOM, ERROR_PATH, MISSING_FIELD, not_json, reject_ambiguous_json
from gptutor.money.pricing import RequestSize
from gptutor.text import ONE_LINE

MODEL_CHARACTERS_MAX = 200
BRACKETS_MAX = 1_000_000
"""Parsing more would block the event loop, and no sensible request has more."""
MEMBERS_MAX = 200
"""At the top level; OpenRouter documents about forty."""
MODELS_MAX = 10
STOP_MAX = 16
"""OpenRouter takes four."""
TOO_LONG = "Expected `array` of length <="
"""In msgspec's error texts."""
ESCAPE = b"\\u00"
ESCAPED_LETTER = re.compile(rb"\\u00(?:5f|6[0-9a-f]|7[0-9a])", re.IGNORECASE)
"""An underscore or a lower-case letter written as an escape, which is done only on purpose: the escaped text is not decoded."""
IMAGES = ("image_url", "input_image")
"""Parts whose bytes are not tokens: an image costs by its size in pixels, within a bound."""
CLIENT_TOOLS = ("function", "custom")
"""Tools that the client runs; all others are run by OpenRouter, at a price."""
RESULTS_MAX = 1000
RESULTS_DEFAULT = 5
"""How many results a search returns, and costs, unless the request sets `max_results`."""
ONLY_TEXT = frozenset({"text"})
STANDARD_TIERS = (None, "auto", "default", "flex")
TOKENS_MAX = 2**31 - 1
CHOICES_MAX = 128
# `5.0` and `1e3` are integers in JSON.
Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)] | Annotated[float, Meta(ge=1, le=TOKENS_MAX, multiple_of=1)]
Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | Annotated[float, Meta(ge=1, le=CHOICES_MAX, multiple_of=1)]


class Message(msgspec.Struct):
    role: Annotated[
        Literal["system", "user", "assistant", "developer", "tool", "function"],
        Meta(description="one of system, user, assistant, developer, tool, function"),
    ]
    content: Annotated[
        Raw,
        Meta(
            description="a string or an array of parts",
            extra_json_schema={
                "type": ["string", "array", "null"],
                "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
            },
        ),
    ] = msgspec.field(default_factory=Raw)


class Tool(msgspec.Struct):
    type: Annotated[Any, Meta(description="`function`, or one of OpenRouter's tools")] = "function"
    parameters: Annotated[Raw, Meta(description="the parameters of one of OpenRouter's tools")] = msgspec.field(
        default_factory=Raw
    )


class ChatRequest(msgspec.Struct):
    """Each description completes the sentence "<field> must be …"."""

    messages: Annotated[list[Message], Meta(min_length=1, description="a non-empty array of messages")]
    model: Annotated[
        Annotated[str, Meta(min_length=1, max_length=MODEL_CHARACTERS_MAX, pattern=ONE_LINE)] | None,
        Meta(description=f"a string of 1 to {MODEL_CHARACTERS_MAX} printable characters"),
    ] = None
    models: Annotated[
        Annotated[list[str], Meta(max_length=MODELS_MAX)] | None, Meta(description=f"an array of at most {MODELS_MAX} strings")
    ] = None
    stream: Annotated[bool | None, Meta(description="a boolean")] = None
    max_tokens: Annotated[Tokens | None, Meta(description=f"an integer from 1 to {TOKENS_MAX}")] = None
    max_completion_tokens: Annotated[Tokens | None, Meta(description=f"an integer from 1 to {TOKENS_MAX}")] = None
    temperature: Annotated[Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="a number from 0 to 2")] = None
    top_p: Annotated[Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="a number from 0 to 1")] = None
    frequency_penalty: Annotated[Annotated[float, Meta(ge=-2, le=2)] | None, Meta(description="a number from -2 to 2")] = None
    presence_penalty: Annotated[Annotated[float, Meta(ge=-2, le=2)] | None, Meta(description="a number from -2 to 2")] = None
    stop: Annotated[
        str | Annotated[list[str], Meta(max_length=STOP_MAX)] | None,
        Meta(description=f"a string or an array of at most {STOP_MAX} strings"),
    ] = None
    n: Annotated[Choices | None, Meta(description=f"an integer from 1 to {CHOICES_MAX}")] = None
    usage: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    stream_options: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    tools: Annotated[list[Tool] | None, Meta(description="an array of objects")] = None
    plugins: Annotated[list[dict[str, Raw]] | None, Meta(description="an array of objects")] = None
    web_search_options: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    modalities: Annotated[list[str] | None, Meta(description="an array of strings")] = None
    service_tier: Annotated[str | None, Meta(description="a string")] = None


class _Part(msgspec.Struct):
    type: str


RULES: Mapping[str, str] = {
    name: str(hint.__metadata__[-1].description)
    for struct in (Message, Tool, ChatRequest)
    for name, hint in get_type_hints(struct, include_extras=True).items()
}
ELEMENTS = {
    "messages": "an object with a role",
    "models": "a string",
    "modalities": "a string",
    "plugins": "an object",
    "stop": "a string",
    "tools": "an object",
}

_decode_request = msgspec.json.Decoder(ChatRequest).decode
_decode_members = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_parts = msgspec.json.Decoder(list[Raw]).decode
_decode_part = msgspec.json.Decoder(_Part).decode


class ParsedRequest(msgspec.Struct, frozen=True):
    """A validated request. `size` is what its price depends on; `members` are its top level, byte for byte."""

    model: str
    fallbacks: tuple[str, ...]
    stream: bool
    message_count: int
    size: RequestSize
    members: dict[str, Raw]
    mask: str | None = None
    """What masks lone surrogates in `members`."""

    def upstream_body(self, *, user: str, output_limit: int | None) -> bytes:
        """The body for OpenRouter: the client's, with our own members.

        `user` is the account's pseudonym; `output_limit` is sent as `max_tokens` where the balance sets a limit.
        """
        own_members: dict[str, bytes] = {
            "user": msgspec.json.encode(user),
            "usage": _with_member(self.members.get("usage"), b'"include"'),
        }
        if _is_null(self.members.get("model")):
            own_members["model"] = msgspec.json.encode(self.model)
        if self.stream:
            own_members["stream_options"] = _with_member(self.members.get("stream_options"), b'"include_usage"')
        if output_limit is not None:
            own_members["max_tokens"] = b"%d" % output_limit
        body = _encode_object({**self.members, **own_members})
        return body if self.mask is None else unmask(body, self.mask)


def parse_request(body: bytes, *, default_model: str) -> ParsedRequest:
    """Validates a request body. Raises ApiError, whose text names the field and what is allowed."""
    body = body.removeprefix(BOM)
    if body.count(b"[") + body.count(b"{") > BRACKETS_MAX:
        raise ApiError("invalid_request", f"Request body must not have more than {BRACKETS_MAX} objects and arrays")
    try:
        request, members, used_mask = _parse(body)
        if len(members) > MEMBERS_MAX:
            raise ApiError("invalid_request", f"Request body must not have more than {MEMBERS_MAX} members")
    except msgspec.ValidationError as error:
        if TOO_LONG not in str(error):  # otherwise the body is not worth the work
            _reject_ambiguous(body)
        raise _validation_error(str(error)) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise not_json(body, error) from error
    _reject_ambiguous(body)

    images, image_bytes, files = 0, 0, 0
    for index, message in enumerate(request.messages):
        for kind, size in _parts(message, index):
            if kind in IMAGES:
                images, image_bytes = images + 1, image_bytes + size
            elif kind != "text":
                files += 1
    limits = (request.max_tokens or 0, request.max_completion_tokens or 0)
    return ParsedRequest(
        model=request.model or default_model,
        fallbacks=tuple(request.models or ()),
        stream=bool(request.stream),
        message_count=len(request.messages),
        size=RequestSize(
            prompt_bytes=sum([len(memoryview(member)) for member in members.values()]) - image_bytes,
            images=images,
            has_files=files > 0,
            choices=int(request.n or 1),
            output_tokens=int(max(limits)) or None,
            paid_tools=_paid_tools(request, files),
            writes_prompt_cache=b'"cache_control"' in body or (ESCAPE in body and ESCAPED_LETTER.search(body) is not None),
            multimodal_output=not ONLY_TEXT.issuperset(request.modalities or ()),
            priority_tier=request.service_tier not in STANDARD_TIERS,
        ),
        members=members,
        mask=used_mask,
    )


def _reject_ambiguous(body: bytes) -> None:
    """The slowest check, so it is made last. Raises ApiError."""
    try:
        reject_ambiguous_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise not_json(body, error) from error


def _parse(body: bytes) -> tuple[ChatRequest, dict[str, Raw], str | None]:
    """The request's known fields, its members, and what masks lone surrogates in them. Raises msgspec's errors."""
    try:
        return _decode_request(body), _decode_members(body), None
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        found = mask(body)
        if found is None:
            raise
        masked, used_mask = found
        return _decode_request(masked), _decode_members(masked), used_mask


def _paid_tools(request: ChatRequest, files: int) -> int:
    """How many uses of OpenRouter's separately priced tools are requested: searching, and reading files."""
    paid = files + (request.web_search_options is not None)
    for tool in request.tools or ():
        if tool.type not in CLIENT_TOOLS:
            paid += 1 + _extra_result_portions(_members(tool.parameters))
    for plugin in request.plugins or ():
        paid += 1 + _extra_result_portions(plugin)
    return paid + (":online" in " ".join((request.model or "", *(request.models or ()))))


def _extra_result_portions(options: Mapping[str, Raw]) -> int:
    """How many portions of RESULTS_DEFAULT results are requested beyond the first."""
    try:
        count = msgspec.json.decode(options.get("max_results", b"0"), type=float)
    except msgspec.DecodeError:
        return 0
    return int(min(max(count, 0), RESULTS_MAX)) // RESULTS_DEFAULT


def _members(raw: Raw) -> Mapping[str, Raw]:
    try:
        return _decode_members(raw)
    except msgspec.DecodeError:
        return {}


def _parts(message: Message, index: int) -> list[tuple[str, int]]:
    """The type and the size in bytes of each part of a message; text has none. Raises ApiError for invalid content."""
    content = message.content
    view = memoryview(content)
    first = view[:1].tobytes()
    if first == b'"':
        return []
    if first in (b"", b"n") and message.role in ("assistant", "function"):
        return []  # null is valid beside tool calls
    place = f"messages[{index}].content"
    if first != b"[":
        raise ApiError("invalid_request", f"{place} must be {RULES['content']}")
    parts = []
    for number, part in enumerate(_decode_parts(content)):
        try:
            kind = _decode_part(part).type
        except msgspec.ValidationError as error:
            raise ApiError("invalid_request", f"{place}[{number}] must be an object with a string `type`") from error
        parts.append((kind, len(memoryview(part))))
    return parts


def _validation_error(message: str) -> ApiError:
    """Our error for a message of msgspec's, which ends in the path: ``Expected `float` <= 2.0 - at `$.temperature` ``."""
    found = ERROR_PATH.search(message)
    place = found[1] if found else ""
    if missing := MISSING_FIELD.search(message):
        place = f"{place}.{missing[1]}".lstrip(".")
    if place == "messages":
        return ApiError("invalid_request", "messages array is required")
    if not place:
        return ApiError("invalid_request", "Request body must be a JSON object")
    field = re.split(r"[.\[]", place.rpartition(".")[2])[0]
    rules = ELEMENTS if place.endswith("]") else RULES
    return ApiError("invalid_request", f"{place} must be {rules.get(field, 'something else')}")


def _is_null(raw: Raw | None) -> bool:
    return raw is None or bytes(memoryview(raw)[:1]) == b"n"


def _with_member(raw: Raw | None, key: bytes) -> bytes:
    """The object in `raw` with `key: true`, its other members unchanged."""
    if raw is None or _is_null(raw):
        return b"{%s:true}" % key
    return _encode_object({**_decode_members(raw), key.decode().strip('"'): b"true"})


def _encode_object(members: Mapping[str, bytes | Raw]) -> bytes:
    """Values may be large: each is copied once."""
    pieces: list[bytes | Raw] = []
    for name, value in members.items():
        pieces += (b",", msgspec.json.encode(name), b":", value)
    pieces[:1] = (b"{",)
    pieces.append(b"}")
    return b"".join(pieces)
