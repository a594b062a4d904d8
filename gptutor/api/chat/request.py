"""The body of `POST /v1/chat/completions`: validated, measured for its price, and prepared for upstream. No I/O.

`ChatRequest` is the one description: validation, the texts of errors and the OpenAPI schema are derived from it. Fields that it
does not name pass without validation, because OpenRouter adds fields every week.

The client's bytes reach OpenRouter unchanged (contract A4): the top level is split into members, each kept as its own bytes, and
only our own members are encoded. No number is ever parsed and encoded again.
"""

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Raw

from gptutor.api.chat.surrogates import mask, unmask
from gptutor.errors import ApiError
from gptutor.http.json_body import BOM, ERROR_PATH, MISSING_FIELD, not_json, reject_ambiguous_json
from gptutor.money.pricing import PriceCap, RequestSize
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
OTHER_MEDIA = ("input_audio", "audio_url", "video_url", "input_video")
"""Parts that no OCR reads."""
CLIENT_TOOLS = ("function", "custom", "namespace", "local_shell", "apply_patch", "computer_use_preview")
CLIENT_TOOL_FAMILIES = ("computer_", "bash_", "text_editor_", "memory_")
"""Beginnings of versioned names. The client runs tools of these types; OpenRouter or the provider runs all others, at a price."""
TOOLS_PROMPT_TOKENS = 500
"""The instructions that providers put before the descriptions of tools."""
TOOL_STEPS_MAX = 1000
FREE_PLUGINS = ("file-parser", "response-healing", "context-compression", "moderation", "auto-router")
"""Without a price; `file-parser` may use OCR."""
FREE_ENGINES = ("pdf-text", "cloudflare-ai")
"""They read files without a price."""
CHEAPENING = ("max_price", "allow_fallbacks")
"""Members of `provider` that choose no dearer provider."""
SAME_PROVIDERS = ("free", "online", "floor", "thinking", "extended", "beta")
"""Suffixes of model ids that do not sort providers by anything but their prices."""
RESULTS_MAX = 1000
RESULTS_DEFAULT = 5
"""How many results a search returns, and costs, unless the request sets `max_results`."""
STEP_COUNT = "step_count_is"
"""A condition that ends the calls of server tools."""
NUMBER_MAX = 2**31
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
    provider: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    preset: Annotated[str | None, Meta(description="a string")] = None
    reasoning: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    prediction: Annotated[dict[str, Raw] | None, Meta(description="an object")] = None
    stop_server_tools_when: Annotated[list[dict[str, Raw]] | None, Meta(description="an array of objects")] = None
    max_tool_calls: Annotated[Annotated[int, Meta(ge=1, le=2**31 - 1)] | None, Meta(description="a positive integer")] = None


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
    "stop_server_tools_when": "an object",
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

    def upstream_body(
        self, *, user: str, output_limit: int | None, price_cap: PriceCap | None = None, tool_steps: int | None = None
    ) -> bytes:
        """The body for OpenRouter: the client's, with our own members.

        `user` is the account's pseudonym; `output_limit` is sent as `max_tokens` where the balance sets a limit, `price_cap` as
        `provider.max_price` where the listed prices bound nothing, `tool_steps` as a limit for server tools.
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
        if price_cap is not None:
            own_members["provider"] = _with_price_cap(self.members.get("provider"), price_cap)
        if tool_steps is not None:
            own_members["stop_server_tools_when"] = _with_step_limit(self.members.get("stop_server_tools_when"), tool_steps)
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

    images, image_bytes, files, documents = 0, 0, 0, 0
    for index, message in enumerate(request.messages):
        for kind, size in _parts(message, index):
            if kind in IMAGES:
                images, image_bytes = images + 1, image_bytes + size
            elif kind != "text":
                files += 1
                documents += kind not in OTHER_MEDIA
    limits = (request.max_tokens or 0, request.max_completion_tokens or 0)
    return ParsedRequest(
        model=request.model or default_model,
        fallbacks=tuple(request.models or ()),
        stream=bool(request.stream),
        message_count=len(request.messages),
        size=RequestSize(
            prompt_bytes=sum([len(memoryview(member)) for member in members.values()])
            - image_bytes
            + (TOOLS_PROMPT_TOKENS if request.tools else 0),
            images=images,
            has_files=files > 0,
            choices=int(request.n or 1),
            output_tokens=int(max(limits)) or None,
            paid_tools=_paid_tools(request),
            writes_prompt_cache=b'"cache_control"' in body or (ESCAPE in body and ESCAPED_LETTER.search(body) is not None),
            multimodal_output=not ONLY_TEXT.issuperset(request.modalities or ()),
            priority_tier=request.service_tier not in STANDARD_TIERS,
            reasoning_tokens=_whole_number(request.reasoning, "max_tokens") if request.reasoning else 0,
            prediction_bytes=len(memoryview(members["prediction"])) if request.prediction else 0,
            server_tools=_server_tools(request.tools) if request.tools else 0,
            tool_steps=_tool_steps(request),
            documents=documents,
            has_paid_ocr=_has_paid_ocr(request.plugins) if documents and request.plugins else None,
            has_unlisted_prices=any(_plugin_id(plugin) not in ("web", *FREE_PLUGINS) for plugin in request.plugins or ()),
            chooses_provider=_chooses_provider(request),
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


def _paid_tools(request: ChatRequest) -> int:
    """How many portions of search results are requested before the model is called, and other plugins with a price."""
    paid = int(request.web_search_options is not None)
    for plugin in request.plugins or ():
        if _plugin_id(plugin) not in FREE_PLUGINS:
            paid += 1 + _extra_result_portions(plugin)
    return paid + (":online" in " ".join((request.model or "", *(request.models or ()))))


def _server_tools(tools: Iterable[Tool]) -> int:
    """How many portions of results the tools return that the client does not run, if the model calls each of them once."""
    return sum(1 + _extra_result_portions(_members(tool.parameters)) for tool in tools if not _is_run_by_client(tool.type))


def _is_run_by_client(kind: object) -> bool:
    return kind in CLIENT_TOOLS or (isinstance(kind, str) and kind.startswith(CLIENT_TOOL_FAMILIES))


def _tool_steps(request: ChatRequest) -> int | None:
    """The client's own limit of the steps at which server tools run, if it has one."""
    conditions = request.stop_server_tools_when or ()
    steps = [_whole_number(condition, "step_count") for condition in conditions if _is_string(condition.get("type"), STEP_COUNT)]
    if not request.stop_server_tools_when and request.max_tool_calls is not None:
        steps.append(request.max_tool_calls)
    return min(max(min(steps), 1), TOOL_STEPS_MAX) if steps else None


def _has_paid_ocr(plugins: Iterable[Mapping[str, Raw]]) -> bool | None:
    """Whether a paid engine reads the attached files; None where that depends on the model."""
    found: bool | None = None
    for plugin in plugins:
        engine = _members(plugin.get("pdf", Raw())).get("engine") if _plugin_id(plugin) == "file-parser" else None
        if engine is not None and not _is_null(engine) and not _is_string(engine, "native"):
            if not any(_is_string(engine, free) for free in FREE_ENGINES):
                return True
            found = False
    return found


def _plugin_id(plugin: Mapping[str, Raw]) -> str | None:
    try:
        return msgspec.json.decode(plugin.get("id", b"null"), type=str | None)
    except msgspec.DecodeError:
        return None


def _chooses_provider(request: ChatRequest) -> bool:
    """Whether a dearer provider may answer than the one that OpenRouter would choose."""
    if request.preset is not None:
        return True
    for name, raw in (request.provider or {}).items():
        if name not in CHEAPENING and not _is_null(raw) and not (name == "sort" and _is_string(raw, "price")):
            return True
    models = (request.model or "", *(request.models or ()))
    return any(suffix not in SAME_PROVIDERS for model in models if ":" in model for suffix in model.split(":")[1:])


def _is_string(raw: Raw | None, text: str) -> bool:
    return raw is not None and bytes(raw) == b'"%b"' % text.encode()


def _whole_number(members: Mapping[str, Raw], name: str) -> int:
    """A number, rounded up and not negative; 0 for anything else."""
    try:
        number = msgspec.json.decode(members.get(name, b"0"), type=float)
    except msgspec.DecodeError:
        return 0
    return math.ceil(min(max(number, 0), NUMBER_MAX))


def _extra_result_portions(options: Mapping[str, Raw]) -> int:
    """How many portions of RESULTS_DEFAULT results are requested beyond the first."""
    return min(_whole_number(options, "max_results"), RESULTS_MAX) // RESULTS_DEFAULT


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


def _with_price_cap(raw: Raw | None, cap: PriceCap) -> bytes:
    """The `provider` object with prices that are at most those of the cap, its other members unchanged."""
    provider = {} if raw is None or _is_null(raw) else _decode_members(raw)
    prices: dict[str, bytes | Raw] = {**_members(provider.get("max_price", Raw()))}
    for name, usd in (
        ("prompt", cap.prompt_usd * 10**6),
        ("completion", cap.completion_usd * 10**6),
        ("request", cap.request_usd),
    ):
        lower = prices.get(name)
        if lower is None or not _is_at_most(bytes(lower), usd):
            prices[name] = f"{usd.normalize():f}".encode()
    return _encode_object({**provider, "max_price": _encode_object(prices)})


def _is_at_most(number: bytes, bound: Decimal) -> bool:
    """Whether this JSON number, or string with a number, is from 0 to the bound."""
    try:
        return 0 <= Decimal(number.decode().strip('"')) <= bound
    except ArithmeticError:
        return False


def _with_step_limit(raw: Raw | None, steps: int) -> bytes:
    """The conditions, of which any ends the calls of server tools, and the number of steps as one more unless they have it."""
    condition = b'{"type":"%b","step_count":%d}' % (STEP_COUNT.encode(), steps)
    others = [] if raw is None or _is_null(raw) else [bytes(each) for each in _decode_parts(raw)]
    return b"[%b]" % b",".join([*others, condition])


def _encode_object(members: Mapping[str, bytes | Raw]) -> bytes:
    """Values may be large: each is copied once."""
    pieces: list[bytes | Raw] = []
    for name, value in members.items():
        pieces += (b",", msgspec.json.encode(name), b":", value)
    pieces[:1] = (b"{",)
    pieces.append(b"}")
    return b"".join(pieces)
