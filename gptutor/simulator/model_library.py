"""The simulator's model list: 326 models in OpenRouter's format, the same at every start.

First come the models that the documentation recommends, with individual prices; then router models, whose price is known only
after a request and is listed as "-1"; then models whose price lists cover all other price fields of OpenRouter; then generated
models of real families, paid and free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

MODELS_TOTAL = 326
CREATED = 1_735_689_600  # 2025-01-01
VARIANTS = ("nitro", "floor", "online", "thinking")
"""Suffixes (`MODEL:nitro`) that OpenRouter accepts after every listed model id. The variants themselves are not listed."""


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
    """Whether the provider stops, and stops billing, when the client closes a stream."""
    prices: Mapping[str, str] = field(default_factory=dict)
    """Further prices, by OpenRouter's names."""
    overrides: Sequence[Mapping[str, Any]] = ()
    """Other prices from `min_prompt_tokens` on; the last one that applies counts."""
    outputs: Sequence[str] = ("text",)
    reads_files: bool = False
    """Whether the model reads attached files itself."""
    unlisted_usd: str = "0"
    """What is billed for each choice beside the listed prices."""

    def listing(self) -> dict[str, Any]:
        """The model as an element of `GET /models`."""
        conditions = {"image": self.image != "0", "audio": "audio" in self.prices, "file": self.reads_files}
        modalities = ["text", *(name for name, is_read in conditions.items() if is_read)]
        return {
            "id": self.id,
            "canonical_slug": self.id.partition(":")[0],
            "name": self.name,
            "created": CREATED,
            "description": f"{self.name}, simulated.",
            "context_length": self.context,
            "architecture": {
                "modality": f"{'+'.join(modalities)}->{'+'.join(self.outputs)}",
                "input_modalities": modalities,
                "output_modalities": list(self.outputs),
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
                **self.prices,
                **({"overrides": list(self.overrides)} if self.overrides else {}),
            },
            "top_provider": {
                "context_length": self.context,
                "max_completion_tokens": self.output_max,
                "is_moderated": self.id.startswith("openai/"),
            },
            "per_request_limits": None,
            "supported_parameters": SUPPORTED,
            "default_parameters": {"temperature": None, "top_p": None, "frequency_penalty": None},
            "supported_voices": ["alloy"] if "audio" in self.outputs else None,
            "links": {"details": f"/api/v1/models/{self.id}/endpoints"},
        }

    def price_usd(self, name: str) -> Decimal:
        """The billed price of one unit: 0 if none is listed, an average price for a router's "-1"."""
        price = Decimal(str(self.prices.get(name) or getattr(self, name, "0")))
        return price if price >= 0 else Decimal("0.000001")

    def with_prices_for(self, prompt_tokens: int) -> "SimulatedModel":
        """The model with the prices that apply to a prompt of this length."""
        for override in reversed(self.overrides):
            if prompt_tokens >= override["min_prompt_tokens"]:
                return replace(self, prompt=override["prompt"], completion=override["completion"])
        return self


SUPPORTED = [
    "max_tokens", "temperature", "top_p", "stop", "seed", "tools", "tool_choice", "response_format", "structured_outputs",
    "reasoning", "logprobs", "top_logprobs",
]  # fmt: skip


RECOMMENDED = [
    SimulatedModel("google/gemini-2.5-flash-lite", "Google: Gemini 2.5 Flash Lite", "0.0000001", "0.0000004",
                   1_048_576, 65_535, image="0.0001", cancellable=False, reads_files=True),
    SimulatedModel("anthropic/claude-3-haiku", "Anthropic: Claude 3 Haiku", "0.00000025", "0.00000125",
                   200_000, 4096, image="0.0004", reads_files=True),
    SimulatedModel("openai/gpt-4o-mini", "OpenAI: GPT-4o-mini", "0.00000015", "0.0000006", 128_000, 16_384, image="0.000217",
                   reads_files=True),
    SimulatedModel("meta-llama/llama-3.1-8b-instruct", "Meta: Llama 3.1 8B Instruct", "0.00000002", "0.00000003",
                   131_072, 16_384),
]  # fmt: skip
ROUTERS = [
    SimulatedModel("openrouter/auto", "Auto Router", "-1", "-1", 2_000_000, None),
    SimulatedModel("openrouter/auto-beta", "Auto Router (beta)", "-1", "-1", 2_000_000, None),
]
SPECIAL = [
    SimulatedModel(
        "anthropic/claude-sonnet-4.5", "Anthropic: Claude Sonnet 4.5", "0.000003", "0.000015", 1_000_000, 64_000, image="0.0048",
        prices={"input_cache_read": "0.0000003", "input_cache_write": "0.00000375", "web_search": "0.01"},
        overrides=({"min_prompt_tokens": 200_000, "prompt": "0.000006", "completion": "0.0000225"},), reads_files=True,
    ),
    SimulatedModel(
        "google/gemini-2.5-pro", "Google: Gemini 2.5 Pro", "0.00000125", "0.00001", 1_048_576, 65_536, image="0.00516",
        cancellable=False,
        prices={"audio": "0.0000025", "input_cache_read": "0.00000031", "input_cache_write": "0.000001625",
                "internal_reasoning": "0.000012"},
        overrides=({"min_prompt_tokens": 200_000, "prompt": "0.0000025", "completion": "0.000015"},), reads_files=True,
    ),
    SimulatedModel(
        "google/gemini-2.5-flash-image", "Google: Gemini 2.5 Flash Image", "0.0000003", "0.0000025", 32_768, 32_768,
        image="0.001238", cancellable=False, prices={"image_output": "0.00003"}, outputs=("text", "image"),
    ),
    SimulatedModel(
        "openai/gpt-4o-audio-preview", "OpenAI: GPT-4o Audio", "0.0000025", "0.00001", 128_000, 16_384,
        prices={"audio": "0.00004", "audio_output": "0.00008"}, outputs=("text", "audio"),
    ),
    SimulatedModel(
        "perplexity/sonar", "Perplexity: Sonar", "0.000001", "0.000001", 127_072, None, request="0.005", cancellable=False,
        prices={"web_search": "0.005"},
    ),
    SimulatedModel(
        "perplexity/sonar-deep-research", "Perplexity: Sonar Deep Research", "0.000002", "0.000008", 128_000, None,
        cancellable=False, prices={"web_search": "0.005", "internal_reasoning": "0.000003"},
    ),
    SimulatedModel(
        "black-forest-labs/flux.2-pro", "Black Forest Labs: FLUX.2 Pro", "0", "0", 46_864, 46_864, cancellable=False,
        prices={"image_output": "0.00003"}, outputs=("image",),
    ),
    SimulatedModel(
        "bytedance-seed/seedream-4.5", "ByteDance Seed: Seedream 4.5", "0", "0", 4096, 4096, cancellable=False,
        outputs=("image",), unlisted_usd="0.04",
    ),
    SimulatedModel(
        "google/lyria-3-pro-preview", "Google: Lyria 3 Pro Preview", "0", "0", 1_048_576, 65_536, cancellable=False,
        outputs=("text", "audio"), unlisted_usd="0.08",
    ),
]  # fmt: skip
FAMILIES = [
    ("openai", "gpt", 0.00000125, True), ("anthropic", "claude", 0.000003, True), ("google", "gemini", 0.0000003, False),
    ("meta-llama", "llama", 0.00000004, True), ("mistralai", "mistral", 0.0000004, False), ("qwen", "qwen3", 0.0000001, True),
    ("deepseek", "deepseek-v3", 0.00000025, True), ("x-ai", "grok", 0.000003, True), ("cohere", "command", 0.0000025, True),
    ("amazon", "nova", 0.0000008, False), ("microsoft", "phi", 0.00000006, True), ("nvidia", "nemotron", 0.0000001, True),
    ("moonshotai", "kimi", 0.0000006, True), ("z-ai", "glm", 0.0000005, True), ("minimax", "minimax-m", 0.0000003, False),
    ("nousresearch", "hermes", 0.0000001, True),
]  # fmt: skip
SIZES = [("nano", 0.2), ("mini", 0.5), ("base", 1.0), ("pro", 3.0), ("ultra", 10.0)]


def make_model_library() -> dict[str, SimulatedModel]:
    """All models by id."""
    models = [*RECOMMENDED, *ROUTERS, *SPECIAL]
    generation = 1
    while len(models) < MODELS_TOTAL:
        for author, family, price, cancellable in FAMILIES:
            for size, factor in SIZES:
                prompt = Decimal(repr(round(price * factor, 12)))
                model_id = f"{author}/{family}-{generation}-{size}"
                models.append(
                    SimulatedModel(
                        model_id, f"{author}: {family} {generation} {size}", f"{prompt:f}", f"{prompt * 4:f}",
                        131_072, 16_384 if size != "ultra" else None, cancellable=cancellable,
                    )
                )  # fmt: skip
                if size == "nano":
                    models.append(SimulatedModel(model_id + ":free", f"{family} {generation} (free)", "0", "0", 32_768, 8192))
        generation += 1
    return {model.id: model for model in models[:MODELS_TOTAL]}


def find_model(library: Mapping[str, SimulatedModel], model_id: str) -> SimulatedModel | None:
    """The model with this id, which may have the suffix of a variant."""
    base, _, variant = model_id.rpartition(":")
    return library.get(model_id) or (library.get(base) if variant in VARIANTS else None)
