"""What a simulated model replies to a request: a complete response as a sequence of deltas, each of which is one token."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from gptutor.simulator.model_library import SimulatedModel
from gptutor.simulator.response_content import (
    Delta,
    Media,
    make_media,
    make_reasoning,
    make_text,
    make_tool_calls,
    reasoning_detail,
    split_words,
    tool_call_deltas,
)
from gptutor.simulator.tariff import Input, Output, read_input, usage

OUTPUT_TOKENS_DEFAULT = 400


@dataclass(frozen=True, slots=True)
class Generation:
    generation_id: str
    model: SimulatedModel
    created: int
    deltas: Sequence[Delta]
    finish_reason: str
    input: Input
    choices: int = 1
    reasoning_deltas: int = 0
    """How many of `deltas`, from the first, are reasoning."""
    media: Media | None = None
    top_logprobs: int | None = None
    """How many alternatives `logprobs` lists for each token; None: `logprobs` is null."""
    fallbacks: Sequence[SimulatedModel] = ()
    is_byok: bool = False
    bills_worst_case: tuple[SimulatedModel, Input, Output] | None = None
    """What is billed instead of what the reply has: the model at the prices of its provider, and all tokens and fees."""

    def usage(self, delta_count: int | None = None) -> dict[str, Any]:
        """The `usage` object for the first `delta_count` deltas (all, if None)."""
        count = len(self.deltas) if delta_count is None else delta_count
        if self.bills_worst_case is not None and count:
            return usage(*self.bills_worst_case)
        media = self.media if self.media is not None and count >= len(self.deltas) else Media({})
        output = Output(
            text_tokens=count * self.choices,
            reasoning_tokens=min(count, self.reasoning_deltas) * self.choices,
            image_tokens=media.image_tokens * self.choices,
            audio_tokens=media.audio_tokens * self.choices,
        )
        return usage(self.model, self.input, output, is_byok=self.is_byok)

    def message(self) -> dict[str, Any]:
        """The `message` object of a plain response."""
        content = "".join(delta.get("content", "") for delta in self.deltas)
        reasoning = "".join(delta.get("reasoning", "") for delta in self.deltas)
        calls: list[dict[str, Any]] = []
        for call in (call for delta in self.deltas for call in delta.get("tool_calls", ())):
            if "id" in call:
                calls.append({**call, "function": dict(call["function"])})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {
            "role": "assistant",
            "content": content or None,
            "refusal": None,
            **({"reasoning": reasoning, "reasoning_details": [reasoning_detail(reasoning)]} if reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
            **(self.media.delta if self.media else {}),
        }

    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """The `logprobs` object for the text in these deltas, or None if the request did not ask for it."""
        if self.top_logprobs is None:
            return None
        tokens = [delta["content"] for delta in deltas if delta.get("content")]
        return {
            "content": [{**_logprob(token), "top_logprobs": [_logprob(token)] * self.top_logprobs} for token in tokens],
            "refusal": None,
        }


def generate(
    generation_id: str,
    request: dict[str, Any],
    model: SimulatedModel,
    created: int,
    fallbacks: Sequence[SimulatedModel] = (),
) -> Generation:
    """Raises NoEndpoint; KeyError, TypeError, ValueError or the like for an invalid request."""
    prompt = last_text(request["messages"])
    calls = make_tool_calls(request, prompt)
    reasoning, is_shown = make_reasoning(request)
    reasoning_deltas: list[Delta] = [
        {"reasoning": word, "reasoning_details": [reasoning_detail(word)]} if is_shown else {"content": ""} for word in reasoning
    ]
    content_deltas = (
        tool_call_deltas(generation_id, calls)
        if calls
        else [{"content": word} for word in split_words(make_text(request, prompt))]
    )
    deltas = [*reasoning_deltas, *content_deltas]
    requested_limit = request.get("max_tokens") or request.get("max_completion_tokens")
    limit = requested_limit or OUTPUT_TOKENS_DEFAULT
    media = None if calls else make_media(generation_id, request, model)
    is_complete = len(deltas) <= limit
    if media is not None and requested_limit and len(deltas) + media.image_tokens + media.audio_tokens > requested_limit:
        media, is_complete = None, False
    return Generation(
        generation_id,
        model,
        created,
        deltas[:limit],
        ("tool_calls" if calls else "stop") if is_complete else "length",
        read_input(request),
        choices=request.get("n") or 1,
        reasoning_deltas=min(len(reasoning_deltas), limit),
        media=media,
        top_logprobs=(request.get("top_logprobs") or 0) if request.get("logprobs") else None,
        fallbacks=fallbacks,
    )


def with_leading_text(generation: Generation, pieces: Sequence[str]) -> Generation:
    """The same generation with a delta for each of `pieces` before its own text."""
    start = generation.reasoning_deltas
    leading = [{"content": piece} for piece in pieces]
    return replace(generation, deltas=[*generation.deltas[:start], *leading, *generation.deltas[start:]])


def _logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -math.log1p(1 / (1 + len(token))), "bytes": list(token.encode("utf-8", "replace"))}


def last_text(messages: list[Any]) -> str:
    """The text of the last message, which is echoed and may name faults."""
    content = messages[-1].get("content") if isinstance(messages[-1], dict) else None
    if isinstance(content, list):
        content = " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def dumps(value: Any) -> bytes:
    """JSON as OpenRouter's servers write it: compact, with costs as the shortest decimal form of a double."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_double).encode("utf-8", "replace")


def _double(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def as_billed(cost: Decimal) -> Decimal:
    """`cost` rounded as in the JSON of `dumps`: what a client reads there, exactly."""
    return Decimal(repr(float(cost)))
