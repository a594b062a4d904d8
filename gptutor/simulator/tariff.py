"""What OpenRouter bills for a request: tokens of every kind at their own price, and fees beside them. All of it exact."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptutor.simulator.library import SimulatedModel

IMAGE_TOKENS = 1024
SOUND_BYTES_PER_TOKEN = 100
SEARCH_RESULT_USD = Decimal("0.004")
SEARCH_RESULTS = 5
SERVER_TOOL_USD = Decimal("0.01")
OCR_PAGE_USD = Decimal("0.002")
TIERS = {"priority": Decimal(2), "flex": Decimal("0.5")}
CACHE_WRITE = {"5m": Decimal("1.25"), "1h": Decimal(2)}
BYOK_FEE = Decimal("0.05")


@dataclass(frozen=True, slots=True)
class Input:
    """The billed side of a request."""

    prompt_tokens: int
    """All of them; those below are among them."""
    audio_tokens: int = 0
    written_tokens: int = 0
    written_factor: Decimal = Decimal(1)
    images: int = 0
    searches: int = 0
    fees_usd: Decimal = Decimal(0)
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """The tokens of an answer, all choices together."""

    words: int
    reasoning: int = 0
    """So many of the words."""
    images: int = 0
    audio: int = 0


def read_input(request: dict[str, Any]) -> Input:
    """What of a request will be billed. Raises whatever a senseless request makes it raise."""
    messages = request["messages"]
    tools = request.get("tools") or []
    counts = [_tokens(message) for message in messages]
    prompt_tokens = sum(counts) + (len(_json(tools)) // 4 if tools else 0)
    marked = [(index, ttl) for index, message in enumerate(messages) if (ttl := _cache_ttl(message))]
    written = sum(counts[: marked[-1][0] + 1]) if marked else 0
    ttl = marked[-1][1] if marked else "5m"
    if request.get("cache_control"):
        written, ttl = prompt_tokens, request["cache_control"].get("ttl", "5m")
    searches, search_usd = _web_search(request)
    server_tools = sum(tool["type"] not in ("function", "custom") for tool in tools)
    return Input(
        prompt_tokens=prompt_tokens,
        audio_tokens=_sound_tokens(messages),
        written_tokens=written,
        written_factor=CACHE_WRITE[ttl],
        images=sum(1 for _ in _parts(messages, "image_url")),
        searches=searches + server_tools,
        fees_usd=search_usd + server_tools * SERVER_TOOL_USD + _ocr(request),
        tier=request.get("service_tier"),
    )


def usage(model: SimulatedModel, given: Input, made: Output, *, byok: bool = False) -> dict[str, Any]:
    """The `usage` object. Costs are exact decimals; see `generation.dumps`."""
    priced = model.at(given.prompt_tokens)
    factor = TIERS.get(given.tier or "", Decimal(1))
    prompt_usd = factor * _prompt_usd(priced, given) + priced.usd("request") + given.images * priced.usd("image")
    completion_usd = factor * _completion_usd(priced, made)
    cost = prompt_usd + completion_usd + given.fees_usd
    completion = made.words + made.images + made.audio
    return {
        "prompt_tokens": given.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": given.prompt_tokens + completion,
        "cost": cost * BYOK_FEE if byok else cost,
        "is_byok": byok,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            **_some(cache_write_tokens=given.written_tokens, audio_tokens=given.audio_tokens),
        },
        "cost_details": {
            "upstream_inference_cost": cost if byok else None,
            "upstream_inference_prompt_cost": prompt_usd,
            "upstream_inference_completions_cost": completion_usd,
        },
        "completion_tokens_details": {
            "reasoning_tokens": made.reasoning,
            **_some(image_tokens=made.images, audio_tokens=made.audio),
        },
        **({"server_tool_use": {"web_search_requests": given.searches}} if given.searches else {}),
    }


def _prompt_usd(priced: SimulatedModel, given: Input) -> Decimal:
    price = priced.usd("prompt")
    read = given.prompt_tokens - given.audio_tokens
    dearer = given.written_tokens * (given.written_factor - 1)
    return (read + dearer) * price + given.audio_tokens * (priced.usd("audio") or price)


def _completion_usd(priced: SimulatedModel, made: Output) -> Decimal:
    """Thinking, images and sounds cost what is listed for them, and otherwise what words cost."""
    price = priced.usd("completion")
    return (
        (made.words - made.reasoning) * price
        + made.reasoning * (priced.usd("internal_reasoning") or price)
        + made.images * (priced.usd("image_output") or price)
        + made.audio * (priced.usd("audio_output") or price)
    )


def _tokens(message: dict[str, Any]) -> int:
    """A token of a real prompt is about four bytes; one is never shorter than a byte. What is seen or heard counts by itself."""
    content = message.get("content")
    read = message
    if isinstance(content, list):
        read = {**message, "content": [part for part in content if part.get("type") not in ("image_url", "input_audio")]}
    seen = sum(1 for _ in _parts([message], "image_url"))
    return max(1, len(_json(read)) // 4) + seen * IMAGE_TOKENS + _sound_tokens([message])


def _sound_tokens(messages: list[dict[str, Any]]) -> int:
    return sum(-(-len(part["input_audio"]["data"]) // SOUND_BYTES_PER_TOKEN) for part in _parts(messages, "input_audio"))


def _parts(messages: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if part.get("type") == kind)


def _cache_ttl(message: dict[str, Any]) -> str | None:
    """How long a provider is asked to keep everything up to this message."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    marks = [mark for part in (message, *parts) if (mark := part.get("cache_control"))]
    return str(marks[-1].get("ttl", "5m")) if marks else None


def _web_search(request: dict[str, Any]) -> tuple[int, Decimal]:
    """How often the web is searched before the answer, and the price of the results."""
    for plugin in request.get("plugins") or []:
        if plugin.get("id") == "web":
            return 1, SEARCH_RESULT_USD * plugin.get("max_results", SEARCH_RESULTS)
    is_online = str(request.get("model")).endswith(":online") or request.get("web_search_options") is not None
    return (1, SEARCH_RESULT_USD * SEARCH_RESULTS) if is_online else (0, Decimal(0))


def _ocr(request: dict[str, Any]) -> Decimal:
    """Reading files as pictures, a page each."""
    engines = [
        plugin.get("pdf", {}).get("engine") for plugin in request.get("plugins") or [] if plugin.get("id") == "file-parser"
    ]
    files = sum(1 for _ in _parts(request["messages"], "file"))
    return files * OCR_PAGE_USD if "mistral-ocr" in engines else Decimal(0)


def _some(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
