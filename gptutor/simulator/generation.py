"""What a simulated model says to a request: a finished answer as a row of pieces, of which each is a token."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from gptutor.simulator.library import SimulatedModel
from gptutor.simulator.speech import Delta, Media, calls_of, media_of, text_of, thought, thoughts_of, tool_deltas, words_of
from gptutor.simulator.tariff import Input, Output, read_input, usage

OUTPUT_TOKENS_DEFAULT = 400


@dataclass(frozen=True, slots=True)
class Generation:
    generation_id: str
    model: SimulatedModel
    created: int
    pieces: Sequence[Delta]
    finish_reason: str
    given: Input
    choices: int = 1
    reasoning: int = 0
    """So many of the pieces, the first ones, are thought and not said."""
    media: Media | None = None
    top_logprobs: int | None = None
    """How many alternatives are told for each word; None: nothing is told."""
    fallbacks: Sequence[SimulatedModel] = ()
    byok: bool = False

    def usage(self, words: int | None = None) -> dict[str, Any]:
        """The `usage` object for the first `words` pieces (all, if None)."""
        count = len(self.pieces) if words is None else words
        media = self.media if self.media is not None and count >= len(self.pieces) else Media({})
        made = Output(
            words=count * self.choices,
            reasoning=min(count, self.reasoning) * self.choices,
            images=media.images * self.choices,
            audio=media.audio * self.choices,
        )
        return usage(self.model, self.given, made, byok=self.byok)

    def message(self) -> dict[str, Any]:
        """The plain answer's message."""
        said = "".join(piece.get("content", "") for piece in self.pieces)
        thoughts = "".join(piece.get("reasoning", "") for piece in self.pieces)
        calls: list[dict[str, Any]] = []
        for call in (call for piece in self.pieces for call in piece.get("tool_calls", ())):
            if "id" in call:
                calls.append({**call, "function": dict(call["function"])})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {
            "role": "assistant",
            "content": said or None,
            "refusal": None,
            **({"reasoning": thoughts, "reasoning_details": [thought(thoughts)]} if thoughts else {}),
            **({"tool_calls": calls} if calls else {}),
            **(self.media.delta if self.media else {}),
        }

    def logprobs(self, pieces: Sequence[Delta]) -> dict[str, Any] | None:
        """How sure the model was of what it says in these pieces."""
        if self.top_logprobs is None:
            return None
        words = [piece["content"] for piece in pieces if piece.get("content")]
        return {
            "content": [{**_sure(word), "top_logprobs": [_sure(word)] * self.top_logprobs} for word in words],
            "refusal": None,
        }


def generate(
    generation_id: str,
    request: dict[str, Any],
    model: SimulatedModel,
    created: int,
    fallbacks: Sequence[SimulatedModel] = (),
) -> Generation:
    """Raises NoEndpoint, and whatever a senseless request makes it raise."""
    prompt = last_text(request["messages"])
    calls = calls_of(request, prompt)
    thoughts, is_told = thoughts_of(request)
    thinking: list[Delta] = [
        {"reasoning": word, "reasoning_details": [thought(word)]} if is_told else {"content": ""} for word in thoughts
    ]
    saying = tool_deltas(generation_id, calls) if calls else [{"content": word} for word in words_of(text_of(request, prompt))]
    pieces = [*thinking, *saying]
    asked_limit = request.get("max_tokens") or request.get("max_completion_tokens")
    limit = asked_limit or OUTPUT_TOKENS_DEFAULT
    media = None if calls else media_of(generation_id, request, model)
    is_whole = len(pieces) <= limit
    if media is not None and asked_limit and len(pieces) + media.images + media.audio > asked_limit:
        media, is_whole = None, False
    return Generation(
        generation_id,
        model,
        created,
        pieces[:limit],
        ("tool_calls" if calls else "stop") if is_whole else "length",
        read_input(request),
        choices=request.get("n") or 1,
        reasoning=min(len(thinking), limit),
        media=media,
        top_logprobs=(request.get("top_logprobs") or 0) if request.get("logprobs") else None,
        fallbacks=fallbacks,
    )


def with_words(generation: Generation, words: Sequence[str]) -> Generation:
    """The same answer, which begins with these words."""
    thought_of = generation.reasoning
    said = [{"content": word} for word in words]
    return replace(generation, pieces=[*generation.pieces[:thought_of], *said, *generation.pieces[thought_of:]])


def _sure(word: str) -> dict[str, Any]:
    return {"token": word, "logprob": -math.log1p(1 / (1 + len(word))), "bytes": list(word.encode("utf-8", "replace"))}


def last_text(messages: list[Any]) -> str:
    """The text of the last message, for the echo and for faults that are asked for in words."""
    content = messages[-1].get("content") if isinstance(messages[-1], dict) else None
    if isinstance(content, list):
        content = " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def dumps(value: Any) -> bytes:
    """JSON as OpenRouter's servers print it: compact, costs as the shortest spelling of a double."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_double).encode("utf-8", "replace")


def _double(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def as_billed(cost: Decimal) -> Decimal:
    """The cost that a reader of our JSON sees, exactly."""
    return Decimal(repr(float(cost)))
