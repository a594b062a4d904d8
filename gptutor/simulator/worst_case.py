"""The most that OpenRouter can bill for a request, as `Simulator.bills_worst_case` does: what a gateway must be prepared for.

Every byte of the prompt is a token, and the output is as long as its limit and the model allow. Nothing limits what recordings of
the live service show without a limit: the reasoning beside `max_tokens`, images, audio, the results of searches, the steps of
server tools, the pages of a file, a price that is not listed. Where the client chooses the provider, or the model is a router,
the dearest provider answers that `provider.max_price` admits.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from gptutor.simulator.model_library import SimulatedModel
from gptutor.simulator.tariff import SEARCH_RESULT_USD, SEARCH_RESULTS, Input, Output, read_input

PROVIDER_FACTOR = 20
"""The dearest provider's price, as a multiple of the listed price."""
ROUTER_USD = {"prompt": Decimal("0.000075"), "completion": Decimal("0.0003")}
"""Per token of the dearest model that a router may choose."""
CHEAP_SUFFIXES = ("free", "online", "floor", "thinking")
CLIENT_TOOLS = ("function", "custom", "namespace")
IMAGE_TOKENS = 8192
MEDIA_TOKENS = 6 * 1290
"""Six images, or six minutes of speech."""
RESULT_TOKENS = 4000
TOOL_USD = Decimal("0.05")
TOOL_STEPS = 30
"""At which OpenRouter ends the calls of server tools if the request has no limit."""
OCR_USD = 1000 * Decimal("0.002")
RESEARCH_SEARCHES = 50


def dearest_provider(model: SimulatedModel, request: dict[str, Any]) -> SimulatedModel:
    """The model at the prices of the dearest provider that may answer."""
    options = request.get("provider") or {}
    caps = {name: Decimal(str(usd)) for name, usd in (options.get("max_price") or {}).items()}
    if Decimal(model.prompt) < 0:
        limits = {name: caps.get(name, Decimal(1000)) / 10**6 for name in ROUTER_USD}
        prices = {name: f"{min(ROUTER_USD[name], limits[name]):f}" for name in ROUTER_USD}
        return replace(model, **prices, request=f"{min(Decimal('0.02'), caps.get('request', Decimal(1))):f}")  # type: ignore[arg-type]
    suffixes = str(request.get("model")).split(":")[1:]
    is_chosen = {*options} - {"max_price", "allow_fallbacks"} or any(suffix not in CHEAP_SUFFIXES for suffix in suffixes)
    if not is_chosen:
        return model

    def factor(name: str) -> Decimal:
        listed = Decimal(getattr(model, name)) * (1 if name == "request" else 10**6)
        return min(Decimal(PROVIDER_FACTOR), caps[name] / listed) if listed and name in caps else Decimal(PROVIDER_FACTOR)

    prompt, completion = factor("prompt"), factor("completion")

    def dearer(prices: Mapping[str, Any]) -> dict[str, Any]:
        factors = {"prompt": prompt, "audio": prompt, "input_cache_write": prompt, "min_prompt_tokens": None}
        return {
            name: value if (by := factors.get(name, completion)) is None else f"{Decimal(value) * by:f}"
            for name, value in prices.items()
        }

    return replace(
        model,
        **dearer({"prompt": model.prompt, "completion": model.completion}),
        request=f"{Decimal(model.request) * factor('request'):f}",
        prices=dearer(model.prices),
        overrides=[dearer(override) for override in model.overrides],
    )


def worst_input(model: SimulatedModel, request: dict[str, Any]) -> Input:
    read = read_input(request)
    plugins, tools = request.get("plugins") or [], request.get("tools") or []
    parts = [part for message in request["messages"] if isinstance(message["content"], list) for part in message["content"]]
    files = [part for part in parts if part["type"] == "file"]
    engines = [plugin.get("pdf", {}).get("engine", "default") for plugin in plugins if plugin["id"] == "file-parser"]
    has_ocr = "mistral-ocr" in engines or (not model.reads_files and not {"pdf-text", "cloudflare-ai"} & {*engines})

    text = [part for part in parts if part["type"] not in ("image_url", "file")]
    plain = [message["content"] for message in request["messages"] if isinstance(message["content"], str)]
    tokens = len(json.dumps([*plain, *text, *tools], ensure_ascii=False).encode()) + read.images * IMAGE_TOKENS
    results = sum(plugin.get("max_results", SEARCH_RESULTS) for plugin in plugins if plugin["id"] == "web")
    if ":online" in str(request.get("model")) or request.get("web_search_options") is not None:
        results += SEARCH_RESULTS
    tokens = model.context if files else min(tokens + results * RESULT_TOKENS, model.context)

    steps = _steps(request)
    uses = sum(tool["type"] not in CLIENT_TOOLS for tool in tools)
    read_again = [min(tokens + uses * step * RESULT_TOKENS * SEARCH_RESULTS, model.context) for step in range(steps + 1)]
    fees = results * SEARCH_RESULT_USD + uses * steps * TOOL_USD + (len(files) * OCR_USD if has_ocr else 0)
    fees += Decimal(model.unlisted_usd) * (request.get("n") or 1)
    if "deep-research" in model.id:
        read_again.append(model.context)
        fees += RESEARCH_SEARCHES * model.price_usd("web_search")
    elif model.id.startswith("perplexity/"):
        fees += model.price_usd("web_search")
    total = sum(read_again)
    return replace(
        read,
        prompt_tokens=total,
        cache_write_tokens=total if read.cache_write_tokens else 0,
        audio_tokens=min(read.audio_tokens, total),
        fees_usd=fees,
    )


def worst_output(model: SimulatedModel, request: dict[str, Any]) -> Output:
    longest = model.output_max or model.context
    limit = max(request.get("max_tokens") or 0, request.get("max_completion_tokens") or 0) or longest
    reasoning = (request.get("reasoning") or {}).get("max_tokens") or 0
    text = min(limit + reasoning, longest) + len(str((request.get("prediction") or {}).get("content") or ""))
    text += model.context if "deep-research" in model.id else 0
    count = (request.get("n") or 1) * (_steps(request) + 1)
    return Output(
        text_tokens=text * count,
        reasoning_tokens=min(reasoning, text) * count,
        image_tokens=min(MEDIA_TOKENS, longest) * count if "image" in model.outputs else 0,
        audio_tokens=min(MEDIA_TOKENS, longest) * count if "audio" in model.outputs else 0,
    )


def _steps(request: dict[str, Any]) -> int:
    """How many times server tools run."""
    if all(tool["type"] in CLIENT_TOOLS for tool in request.get("tools") or []):
        return 0
    conditions = request.get("stop_server_tools_when") or []
    return min(TOOL_STEPS, *(int(each["step_count"]) for each in conditions if each["type"] == "step_count_is"), TOOL_STEPS)
