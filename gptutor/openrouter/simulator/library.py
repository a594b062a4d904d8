"""The simulator's model list: 326 models in OpenRouter's form, the same at every start.

The recommended models of our documentation come first, with prices of their own; then models made from the names of real
families; free ones; and router models, whose price is known only afterwards and stands as "-1".
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

MODELS_TOTAL = 326
CREATED = 1_735_689_600  # 2025-01-01


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    id: str
    name: str
    prompt: str
    completion: str
    context: int
    output_max: int | None
    image: str = "0"
    request: str = "0"
    cancellable: bool = True
    """Whether its provider stops, and stops billing, when the caller closes a stream."""

    def listing(self) -> dict[str, Any]:
        """The model as an element of `GET /models`."""
        modalities = ["text", "image"] if self.image != "0" else ["text"]
        return {
            "id": self.id,
            "canonical_slug": self.id.partition(":")[0],
            "name": self.name,
            "created": CREATED,
            "description": f"{self.name}, simulated.",
            "context_length": self.context,
            "architecture": {
                "modality": "+".join(modalities) + "->text",
                "input_modalities": modalities,
                "output_modalities": ["text"],
                "tokenizer": "Other",
                "instruct_type": None,
            },
            "pricing": {
                "prompt": self.prompt,
                "completion": self.completion,
                "request": self.request,
                "image": self.image,
                "web_search": "0",
                "internal_reasoning": "0",
            },
            "top_provider": {
                "context_length": self.context,
                "max_completion_tokens": self.output_max,
                "is_moderated": self.id.startswith("openai/"),
            },
            "per_request_limits": None,
            "supported_parameters": ["max_tokens", "temperature", "top_p", "stop", "seed", "tools", "response_format"],
        }

    def usd(self, name: str) -> Decimal:
        """A price as it is billed: a router's "-1" is billed at a middling price."""
        price = Decimal(getattr(self, name))
        return price if price >= 0 else Decimal("0.000001")


RECOMMENDED = [
    SimulatedModel("google/gemini-2.5-flash-lite", "Google: Gemini 2.5 Flash Lite", "0.0000001", "0.0000004",
                   1_048_576, 65_535, image="0.0001", cancellable=False),
    SimulatedModel("anthropic/claude-3-haiku", "Anthropic: Claude 3 Haiku", "0.00000025", "0.00000125",
                   200_000, 4096, image="0.0004"),
    SimulatedModel("openai/gpt-4o-mini", "OpenAI: GPT-4o-mini", "0.00000015", "0.0000006", 128_000, 16_384, image="0.000217"),
    SimulatedModel("meta-llama/llama-3.1-8b-instruct", "Meta: Llama 3.1 8B Instruct", "0.00000002", "0.00000003",
                   131_072, 16_384),
]  # fmt: skip
ROUTERS = [
    SimulatedModel("openrouter/auto", "Auto Router", "-1", "-1", 2_000_000, None),
    SimulatedModel("openrouter/auto-beta", "Auto Router (beta)", "-1", "-1", 2_000_000, None),
]
FAMILIES = [
    ("openai", "gpt", 0.00000125, True), ("anthropic", "claude", 0.000003, True), ("google", "gemini", 0.0000003, False),
    ("meta-llama", "llama", 0.00000004, True), ("mistralai", "mistral", 0.0000004, False), ("qwen", "qwen3", 0.0000001, True),
    ("deepseek", "deepseek-v3", 0.00000025, True), ("x-ai", "grok", 0.000003, True), ("cohere", "command", 0.0000025, True),
    ("amazon", "nova", 0.0000008, False), ("microsoft", "phi", 0.00000006, True), ("nvidia", "nemotron", 0.0000001, True),
    ("moonshotai", "kimi", 0.0000006, True), ("z-ai", "glm", 0.0000005, True), ("minimax", "minimax-m", 0.0000003, False),
    ("nousresearch", "hermes", 0.0000001, True),
]  # fmt: skip
SIZES = [("nano", 0.2), ("mini", 0.5), ("base", 1.0), ("pro", 3.0), ("ultra", 10.0)]


def make_library() -> dict[str, SimulatedModel]:
    """All models by id."""
    models = [*RECOMMENDED, *ROUTERS]
    generation = 1
    while len(models) < MODELS_TOTAL:
        for author, family, price, cancellable in FAMILIES:
            for size, factor in SIZES:
                prompt = Decimal(repr(round(price * factor, 12)))
                identity = f"{author}/{family}-{generation}-{size}"
                models.append(
                    SimulatedModel(
                        identity, f"{author}: {family} {generation} {size}", f"{prompt:f}", f"{prompt * 4:f}",
                        131_072, 16_384 if size != "ultra" else None, cancellable=cancellable,
                    )
                )  # fmt: skip
                if size == "nano":
                    models.append(SimulatedModel(identity + ":free", f"{family} {generation} (free)", "0", "0", 32_768, 8192))
        generation += 1
    return {model.id: model for model in models[:MODELS_TOTAL]}
