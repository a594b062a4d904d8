"""What OpenRouter bills for a request: tokens of each kind at their own price, and additional fees. All amounts are exact."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptutor.simulator.model_library import SimulatedModel

IMAGE_TOKENS = 1024
AUDIO_BYTES_PER_TOKEN = 100
SEARCH_RESULT_USD = Decimal("0.004")
SEARCH_RESULTS = 5
SERVER_TOOL_USD = Decimal("0.01")
OCR_PAGE_USD = Decimal("0.002")
TIER_FACTORS = {"priority": Decimal(2), "flex": Decimal("0.5")}
CACHE_WRITE_FACTORS = {"5m": Decimal("1.25"), "1h": Decimal(2)}
BYOK_FEE = Decimal("0.05")


@dataclass(frozen=True, slots=True)
class Input:
    """What is billed for the request itself."""

    prompt_tokens: int
    """All prompt tokens, including the audio and cache write tokens."""
    audio_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_factor: Decimal = Decimal(1)
    images: int = 0
    web_searches: int = 0
    fees_usd: Decimal = Decimal(0)
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """The tokens of a response, all choices together."""

    text_tokens: int
    """Including the reasoning tokens."""
    reasoning_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0


def read_input(request: dict[str, Any]) -> Input:
    """Reads the billed parts of a request. Raises KeyError, TypeError, ValueError or the like for an invalid request."""
    messages = request["messages"]
    tools = request.get("tools") or []
    counts = [_tokens(message) for message in messages]
    prompt_tokens = sum(counts) + (len(_json(tools)) // 4 if tools else 0)
    breakpoints = [(index, ttl) for index, message in enumerate(messages) if (ttl := _cache_ttl(message))]
    cached = sum(counts[: breakpoints[-1][0] + 1]) if breakpoints else 0
    ttl = breakpoints[-1][1] if breakpoints else "5m"
    if request.get("cache_control"):
        cached, ttl = prompt_tokens, request["cache_control"].get("ttl", "5m")
    web_searches, search_usd = _web_search(request)
    server_tools = sum(tool["type"] not in ("function", "custom") for tool in tools)
    return Input(
        prompt_tokens=prompt_tokens,
        audio_tokens=_audio_tokens(messages),
        cache_write_tokens=cached,
        cache_write_factor=CACHE_WRITE_FACTORS[ttl],
        images=sum(1 for _ in _parts(messages, "image_url")),
        web_searches=web_searches + server_tools,
        fees_usd=search_usd + server_tools * SERVER_TOOL_USD + _ocr_usd(request),
        tier=request.get("service_tier"),
    )


def usage(model: SimulatedModel, request: Input, response: Output, *, is_byok: bool = False) -> dict[str, Any]:
    """The `usage` object. Costs are exact decimals; see `generation.dumps`."""
    priced = model.with_prices_for(request.prompt_tokens)
    factor = TIER_FACTORS.get(request.tier or "", Decimal(1))
    prompt_usd = factor * _prompt_usd(priced, request) + priced.price_usd("request") + request.images * priced.price_usd("image")
    completion_usd = factor * _completion_usd(priced, response)
    cost = prompt_usd + completion_usd + request.fees_usd
    completion = response.text_tokens + response.image_tokens + response.audio_tokens
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": request.prompt_tokens + completion,
        "cost": cost * BYOK_FEE if is_byok else cost,
        "is_byok": is_byok,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": request.cache_write_tokens,
            "audio_tokens": request.audio_tokens,
            "video_tokens": 0,
        },
        "cost_details": {
            "upstream_inference_cost": cost,
            "upstream_inference_prompt_cost": prompt_usd,
            "upstream_inference_completions_cost": completion_usd,
        },
        "completion_tokens_details": {
            "reasoning_tokens": response.reasoning_tokens,
            "image_tokens": response.image_tokens,
            "audio_tokens": response.audio_tokens,
        },
        **({"server_tool_use": {"web_search_requests": request.web_searches}} if request.web_searches else {}),
    }


def _prompt_usd(priced: SimulatedModel, request: Input) -> Decimal:
    price = priced.price_usd("prompt")
    text_tokens = request.prompt_tokens - request.audio_tokens
    cache_write_surcharge = request.cache_write_tokens * (request.cache_write_factor - 1)
    return (text_tokens + cache_write_surcharge) * price + request.audio_tokens * (priced.price_usd("audio") or price)


def _completion_usd(priced: SimulatedModel, response: Output) -> Decimal:
    """Reasoning, image and audio tokens have the price listed for them, or else the price of text tokens."""
    price = priced.price_usd("completion")
    return (
        (response.text_tokens - response.reasoning_tokens) * price
        + response.reasoning_tokens * (priced.price_usd("internal_reasoning") or price)
        + response.image_tokens * (priced.price_usd("image_output") or price)
        + response.audio_tokens * (priced.price_usd("audio_output") or price)
    )


def _tokens(message: dict[str, Any]) -> int:
    """About four bytes of JSON are one token, as in real prompts. Images and audio are counted separately."""
    content = message.get("content")
    text_only = message
    if isinstance(content, list):
        text_only = {**message, "content": [part for part in content if part.get("type") not in ("image_url", "input_audio")]}
    images = sum(1 for _ in _parts([message], "image_url"))
    return max(1, len(_json(text_only)) // 4) + images * IMAGE_TOKENS + _audio_tokens([message])


def _audio_tokens(messages: list[dict[str, Any]]) -> int:
    return sum(-(-len(part["input_audio"]["data"]) // AUDIO_BYTES_PER_TOKEN) for part in _parts(messages, "input_audio"))


def _parts(messages: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if part.get("type") == kind)


def _cache_ttl(message: dict[str, Any]) -> str | None:
    """How long the provider is to cache everything up to this message, or None."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    controls = [control for part in (message, *parts) if (control := part.get("cache_control"))]
    return str(controls[-1].get("ttl", "5m")) if controls else None


def _web_search(request: dict[str, Any]) -> tuple[int, Decimal]:
    """How many web searches precede the response, and the price of their results."""
    for plugin in request.get("plugins") or []:
        if plugin.get("id") == "web":
            return 1, SEARCH_RESULT_USD * plugin.get("max_results", SEARCH_RESULTS)
    is_online = str(request.get("model")).endswith(":online") or request.get("web_search_options") is not None
    return (1, SEARCH_RESULT_USD * SEARCH_RESULTS) if is_online else (0, Decimal(0))


def _ocr_usd(request: dict[str, Any]) -> Decimal:
    """The fee for OCR of the attached files, each counted as one page."""
    engines = [
        plugin.get("pdf", {}).get("engine") for plugin in request.get("plugins") or [] if plugin.get("id") == "file-parser"
    ]
    files = sum(1 for _ in _parts(request["messages"], "file"))
    return files * OCR_PAGE_USD if "mistral-ocr" in engines else Decimal(0)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
