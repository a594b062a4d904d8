"""What a simulated model says to a request, and what that costs."""

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptutor.openrouter.simulator.library import SimulatedModel

RUSSIAN = (
    "Привет! Это симулятор OpenRouter: никакая модель не спрошена, но всё остальное настоящее — запрос прошёл через шлюз, "
    "счёт посчитан по прайс-листу, и рубли списаны до последней цифры. Вы написали: «{prompt}»."
)
ENGLISH = (
    "Hello! This is the OpenRouter simulator: no model was asked, but everything else is real — the request went through the "
    "gateway, the bill follows the price list, and the roubles are exact to the last digit. You wrote: “{prompt}”."
)
ECHO_CHARACTERS = 200
OUTPUT_TOKENS_DEFAULT = 400


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer: its words are its tokens."""

    generation_id: str
    model: SimulatedModel
    created: int
    words: list[str]
    finish_reason: str
    prompt_tokens: int
    choices: int

    def usage(self, words: int | None = None) -> dict[str, Any]:
        """The `usage` object for the first `words` words (all, if None). Costs are exact decimals; see `dumps`."""
        completion = (len(self.words) if words is None else words) * self.choices
        prompt_usd = self.prompt_tokens * self.model.usd("prompt") + self.model.usd("request")
        completion_usd = completion * self.model.usd("completion")
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "cost": prompt_usd + completion_usd,
            "is_byok": False,
            "prompt_tokens_details": {"cached_tokens": 0},
            "cost_details": {
                "upstream_inference_cost": None,
                "upstream_inference_prompt_cost": prompt_usd,
                "upstream_inference_completions_cost": completion_usd,
            },
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def generate(generation_id: str, request: dict[str, Any], model: SimulatedModel, created: int) -> Generation:
    prompt = last_text(request["messages"])
    template = RUSSIAN if any("а" <= letter <= "я" for letter in prompt.lower()) else ENGLISH
    text = template.format(prompt=prompt[:ECHO_CHARACTERS])
    response_format = request.get("response_format")
    if isinstance(response_format, dict) and response_format.get("type") == "json_object":
        text = json.dumps({"answer": text}, ensure_ascii=False)
    pieces = text.split(" ")
    words = [piece if index == 0 else f" {piece}" for index, piece in enumerate(pieces)]
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or OUTPUT_TOKENS_DEFAULT
    finish_reason = "stop" if len(words) <= limit else "length"
    # A token of a real prompt is about four bytes; one is never shorter than a byte.
    prompt_tokens = sum(
        max(1, len(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")) // 4) for message in request["messages"]
    )
    return Generation(generation_id, model, created, words[:limit], finish_reason, prompt_tokens, choices=request.get("n") or 1)


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
