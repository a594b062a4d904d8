"""OpenRouter's models: which exist, their prices, their output limits.

Prices are strings of dollars per token; some are `"-1"` (a router's price, known only afterwards) or absent. A price that is not
a finite number from zero up never enters arithmetic: such a model has `price None`. A price that is not listed is unknown, not
zero: only a model whose id ends in `:free` costs nothing.
"""

import asyncio
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

import msgspec

from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.service import OpenRouterService
from gptutor.telemetry.metrics import CATALOGUE_AGE
from gptutor.telemetry.model_labels import MODEL_LABELS

LOGGER = logging.getLogger("gptutor.catalogue")
PRICE_USD_MAX = Decimal(1000)
MEDIA_PRICES = ("audio", "image_token", "video", "input_audio_cache")
MEDIA_OUTPUT_PRICES = ("image_output", "image_token", "audio_output")
PRICES = (
    "prompt",
    "completion",
    "request",
    "image",
    "internal_reasoning",
    "input_cache_write",
    "web_search",
    *MEDIA_PRICES,
    *MEDIA_OUTPUT_PRICES,
)
"""Names of the prices that a request may have to pay. If one is listed, but invalid, the model has `price None`."""
MEDIA_PRICES_OUT = {"image": ("image_output", "image_token"), "audio": ("audio_output",)}
"""By what a model may output beside text: the prices of which one must be listed."""
FREE = ":free"
RESEARCH = "deep-research"
"""In the ids of models that search many times, and reason about what they found."""
RETRY_S = 5.0
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
FRESH_REFRESHES = 3
"""A list is fresh for this many refresh intervals."""


class CatalogueError(Exception):
    """The document is not a model list."""


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """US dollars per token, per request, per image and per search, each the highest that is listed but for the two base prices;
    what the model may do at a price without being asked to (see `money.pricing.ModelPrices`); limits in tokens."""

    prompt_usd: Decimal
    completion_usd: Decimal
    request_usd: Decimal
    image_usd: Decimal
    media_usd: Decimal
    cache_write_usd: Decimal
    rich_completion_usd: Decimal
    search_usd: Decimal
    base_prompt_usd: Decimal
    base_completion_usd: Decimal
    outputs_media: bool
    has_unlisted_prices: bool
    reads_documents: bool
    searches: bool
    researches: bool
    context_tokens: int | None
    output_tokens_max: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """One model: its fields as OpenRouter encoded them, and its price where OpenRouter states one."""

    id: str
    slug: str
    fields: Mapping[str, msgspec.Raw]
    pricing: Mapping[str, Decimal]
    """Every valid price in dollars, by OpenRouter's name for it."""
    price: ModelPrice | None


@dataclass(slots=True)
class Catalogue:
    fresh_s: float = math.inf
    """How long a list is taken to be complete."""
    models: dict[str, Model] = field(default_factory=dict)
    version: int = 0
    """Incremented by every change: what was derived from an older version is stale."""
    fetched_at: float = -math.inf
    """When the list came from OpenRouter, on the monotonic clock; -inf for the copy on the disk."""
    _by_slug: dict[str, Model] = field(default_factory=dict)
    """Models by their permanent slugs, which OpenRouter accepts like ids."""
    _document: bytes = b""

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.fetched_at

    @property
    def is_fresh(self) -> bool:
        return self.age_s < self.fresh_s

    def is_unknown(self, model_id: str) -> bool:
        """Whether OpenRouter surely has no such model. Presets and aliases (`@…`, `~…`) are not listed, and never unknown."""
        return self.is_fresh and "@" not in model_id and "~" not in model_id and self._find(model_id) is None

    def price(self, model_id: str) -> ModelPrice | None:
        """The price of a model, or of a variant such as `…:nitro`; None where OpenRouter states none."""
        model = self._find(model_id)
        return model.price if model is not None else None

    def _find(self, model_id: str) -> Model | None:
        base = model_id.partition(":")[0]
        return self.models.get(model_id) or self.models.get(base) or self._by_slug.get(base)

    def replace(self, document: bytes) -> None:
        """Takes the models of a new list. Raises CatalogueError, and keeps the old ones, if the document is not a model list."""
        models = {model.id: model for model in parse_models(document)}
        if not models:
            raise CatalogueError("the model list is empty")
        if document != self._document:
            self.models, self._document = models, document
            self._by_slug = {model.slug: model for model in models.values() if ":" not in model.id}
            self.version += 1
            MODEL_LABELS.learn({**{slug: model.id for slug, model in self._by_slug.items()}, **{name: name for name in models}})


class _TopProvider(msgspec.Struct):
    max_completion_tokens: int | None = None
    context_length: int | None = None


class _Architecture(msgspec.Struct):
    input_modalities: list[str] | None = None
    output_modalities: list[str] | None = None


class _ListedModel(msgspec.Struct):
    id: str
    canonical_slug: str | None = None
    architecture: _Architecture | None = None
    supported_parameters: list[str] | None = None
    pricing: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)
    context_length: int | None = None
    top_provider: _TopProvider | None = None


class _ModelList(msgspec.Struct):
    data: list[msgspec.Raw]


def parse_models(document: bytes) -> list[Model]:
    """The models of a list; invalid ones are left out. Raises CatalogueError if the document is not a model list."""
    try:
        items = msgspec.json.decode(document, type=_ModelList).data
    except DECODE_ERRORS as error:
        raise CatalogueError(str(error)) from error
    models = []
    for item in items:
        try:
            listed = msgspec.json.decode(item, type=_ListedModel)
            fields = msgspec.json.decode(item, type=dict[str, msgspec.Raw])
        except DECODE_ERRORS as error:
            LOGGER.warning("An invalid model of the model list is left out: %s", error)
            continue
        pricing = {name: usd for name, raw in listed.pricing.items() if (usd := parse_price(raw)) is not None}
        models.append(Model(listed.id, listed.canonical_slug or listed.id, fields, pricing, _price(listed, pricing)))
    return models


def parse_price(raw: msgspec.Raw) -> Decimal | None:
    """A price string (or number) as exact dollars; None for `"-1"`, for invalid ones, and for those above PRICE_USD_MAX."""
    text = bytes(raw).strip().strip(b'"')
    if len(text) > 40:
        return None
    try:
        usd = Decimal(text.decode("ascii"))
    except (InvalidOperation, UnicodeDecodeError):
        return None
    return usd if usd.is_finite() and 0 <= usd <= PRICE_USD_MAX and usd.as_tuple().exponent >= -40 else None  # type: ignore[operator]


def _price(listed: _ListedModel, pricing: Mapping[str, Decimal]) -> ModelPrice | None:
    """The prices that bound the cost: of each kind the highest, whatever the conditions of `overrides` are."""
    if "prompt" not in pricing or "completion" not in pricing:
        return None
    highest = dict(pricing)
    for override in _overrides(listed.pricing):
        for name in {*override} & {*PRICES}:
            usd = parse_price(override[name])
            if usd is None:
                return None
            highest[name] = max(usd, highest.get(name, Decimal(0)))
    if any(name in listed.pricing and name not in highest for name in PRICES):
        return None

    def highest_of(*names: str) -> Decimal:
        return max(highest.get(name, Decimal(0)) for name in names)

    top, architecture = listed.top_provider or _TopProvider(), listed.architecture or _Architecture()
    media = _media_outputs(architecture, highest)
    researches = RESEARCH in listed.id
    return ModelPrice(
        prompt_usd=highest["prompt"],
        completion_usd=highest_of("completion", "internal_reasoning"),
        request_usd=highest_of("request"),
        image_usd=highest_of("image"),
        media_usd=highest_of(*MEDIA_PRICES),
        cache_write_usd=highest_of("input_cache_write"),
        rich_completion_usd=highest_of("completion", "internal_reasoning", *MEDIA_OUTPUT_PRICES),
        search_usd=highest_of("web_search"),
        base_prompt_usd=pricing["prompt"],
        base_completion_usd=pricing["completion"],
        outputs_media=bool(media),
        has_unlisted_prices=not listed.id.endswith(FREE)
        and (not (pricing["prompt"] or pricing["completion"]) or any(not highest_of(*MEDIA_PRICES_OUT[kind]) for kind in media)),
        reads_documents="file" in (architecture.input_modalities or ()),
        searches=researches or (highest_of("web_search") > 0 and _searches(listed)),
        researches=researches,
        context_tokens=max(filter(None, (listed.context_length, top.context_length)), default=None),
        output_tokens_max=top.max_completion_tokens,
    )


def _media_outputs(architecture: _Architecture, prices: Mapping[str, Decimal]) -> set[str]:
    """What the model may output beside text, images and audio; by the listed prices if its modalities are not listed."""
    if architecture.output_modalities is None:
        return {kind for kind, names in MEDIA_PRICES_OUT.items() if any(prices.get(name) for name in names)}
    return {*architecture.output_modalities} & {*MEDIA_PRICES_OUT}


def _searches(listed: _ListedModel) -> bool:
    """Whether a model with a price for searches makes them by itself: others, which call tools, search if they are asked to."""
    return "search" in listed.id or "perplexity/" in listed.id or "tools" not in (listed.supported_parameters or ())


def _overrides(pricing: Mapping[str, msgspec.Raw]) -> list[dict[str, msgspec.Raw]]:
    """Prices under other conditions: a longer context, another time of day."""
    try:
        return msgspec.json.decode(pricing.get("overrides", b"[]"), type=list[dict[str, msgspec.Raw]])
    except DECODE_ERRORS:
        return []


@asynccontextmanager
async def refreshed(service: OpenRouterService, refresh_s: float, copy: Path) -> AsyncIterator[Catalogue]:
    """A catalogue that is fetched now, and again about every `refresh_s`.

    While OpenRouter is unreachable the last good list stays in use. The file `copy` keeps the list over a restart, which then
    does not wait for a new one.
    """
    catalogue = Catalogue(fresh_s=FRESH_REFRESHES * refresh_s)
    _load(catalogue, copy)
    if not catalogue.models:
        await _refresh(catalogue, service, copy)
    CATALOGUE_AGE.set_function(lambda: catalogue.age_s)
    task = asyncio.create_task(_refresh_periodically(catalogue, service, refresh_s, copy), name="catalogue")
    try:
        yield catalogue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _refresh_periodically(catalogue: Catalogue, service: OpenRouterService, refresh_s: float, copy: Path) -> None:
    if catalogue.models and not catalogue.is_fresh:
        await _refresh(catalogue, service, copy)  # the copy is from before the restart
    while True:
        # Gateways that were started together must not refresh together for ever.
        pause_s = refresh_s * random.uniform(0.8, 1.2)  # noqa: S311
        await asyncio.sleep(pause_s if catalogue.is_fresh else min(RETRY_S, pause_s))
        await _refresh(catalogue, service, copy)


async def _refresh(catalogue: Catalogue, service: OpenRouterService, copy: Path) -> None:
    try:
        document = await service.models()
        catalogue.replace(document)
        catalogue.fetched_at = time.monotonic()
    except (UpstreamError, CatalogueError) as error:
        LOGGER.warning(
            "The model list could not be fetched (%s); the last good one stays in use: %d models", error, len(catalogue.models)
        )
        return
    try:
        _save(document, copy)
    except OSError as error:
        LOGGER.warning("The model list cannot be saved in %s: %s", copy, error.strerror)


def _load(catalogue: Catalogue, copy: Path) -> None:
    try:
        catalogue.replace(copy.read_bytes())
    except FileNotFoundError:
        return
    except (CatalogueError, OSError) as error:
        LOGGER.warning("The saved model list %s is not used: %s", copy, error)


def _save(document: bytes, copy: Path) -> None:
    """Replaces the file in one step, so that neither a reader nor a crash leaves half of it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=copy.parent, prefix=copy.name, delete=False) as file:
        file.write(document)
    os.replace(file.name, copy)
