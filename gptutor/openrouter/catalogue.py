"""OpenRouter's models: what exists, what it costs, how much it can write.

Prices are strings of dollars per token; some are `"-1"` (a router's price, known only afterwards) or absent. A price that is not
a finite number from zero up never enters arithmetic: such a model has `price None`, and the ledger holds a configured default.
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

LOGGER = logging.getLogger("gptutor.catalogue")
PRICE_USD_MAX = Decimal(1000)
MEDIA_PRICES = ("audio", "image_token", "video", "input_audio_cache")
RICH_PRICES = ("image_output", "image_token", "audio_output")
PRICES = (
    "prompt",
    "completion",
    "request",
    "image",
    "internal_reasoning",
    "input_cache_write",
    "web_search",
    *MEDIA_PRICES,
    *RICH_PRICES,
)
"""Names of prices that a request may have to pay. One that is listed, but is no price, leaves the model without any."""
RETRY_S = 5.0
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
FRESH_REFRESHES = 3
"""A list is fresh until so many refreshes have failed."""


class CatalogueError(Exception):
    """The model list is not one."""


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """US dollars per token, per request, image and search, each the dearest of what is listed; tokens that fit in."""

    prompt_usd: Decimal
    completion_usd: Decimal
    request_usd: Decimal
    image_usd: Decimal
    media_usd: Decimal
    cache_write_usd: Decimal
    rich_completion_usd: Decimal
    search_usd: Decimal
    context_tokens: int | None
    output_tokens_max: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """One model: its fields as OpenRouter spelled them, and its price where it states one."""

    id: str
    slug: str
    fields: Mapping[str, msgspec.Raw]
    pricing: Mapping[str, Decimal]
    """Every usable price by OpenRouter's name for it, dollars."""
    price: ModelPrice | None


@dataclass(slots=True)
class Catalogue:
    fresh_s: float = math.inf
    """How long a list may be trusted to be complete."""
    models: dict[str, Model] = field(default_factory=dict)
    version: int = 0
    """Grows with every change; what was made from an older version is stale."""
    read_at: float = -math.inf
    """When OpenRouter told it, on the monotonic clock; a copy from the disk has no such time."""
    _by_slug: dict[str, Model] = field(default_factory=dict)
    """Models by their permanent names, which are as good as their ids."""
    _document: bytes = b""

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.read_at

    @property
    def is_fresh(self) -> bool:
        return self.age_s < self.fresh_s

    def lacks(self, model_id: str) -> bool:
        """Whether OpenRouter surely has no such model. Presets and aliases (`@…`, `~…`) are not listed, and never lacking."""
        return self.is_fresh and "@" not in model_id and "~" not in model_id and self._find(model_id) is None

    def price(self, model_id: str) -> ModelPrice | None:
        """The price of a model or of a variant of it, such as `…:nitro`; None where OpenRouter states none."""
        model = self._find(model_id)
        return model.price if model is not None else None

    def _find(self, model_id: str) -> Model | None:
        base = model_id.partition(":")[0]
        return self.models.get(model_id) or self.models.get(base) or self._by_slug.get(base)

    def replace(self, document: bytes) -> None:
        """Takes a new model list. Raises CatalogueError, and keeps the old one, if it is not a model list."""
        models = {model.id: model for model in parse_models(document)}
        if not models:
            raise CatalogueError("the model list is empty")
        if document != self._document:
            self.models, self._document = models, document
            self._by_slug = {model.slug: model for model in models.values() if ":" not in model.id}
            self.version += 1


class _TopProvider(msgspec.Struct):
    max_completion_tokens: int | None = None
    context_length: int | None = None


class _ModelFacts(msgspec.Struct):
    id: str
    canonical_slug: str | None = None
    pricing: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)
    context_length: int | None = None
    top_provider: _TopProvider | None = None


class _List(msgspec.Struct):
    data: list[msgspec.Raw]


def parse_models(document: bytes) -> list[Model]:
    """The models of a list; one that makes no sense is left out. Raises CatalogueError if the whole is not a list."""
    try:
        items = msgspec.json.decode(document, type=_List).data
    except UNREADABLE as error:
        raise CatalogueError(str(error)) from error
    models = []
    for item in items:
        try:
            facts = msgspec.json.decode(item, type=_ModelFacts)
            fields = msgspec.json.decode(item, type=dict[str, msgspec.Raw])
        except UNREADABLE as error:
            LOGGER.warning("A model of the list is left out: %s", error)
            continue
        pricing = {name: usd for name, raw in facts.pricing.items() if (usd := parse_price(raw)) is not None}
        models.append(Model(facts.id, facts.canonical_slug or facts.id, fields, pricing, _price(facts, pricing)))
    return models


def parse_price(raw: msgspec.Raw) -> Decimal | None:
    """A price string (or number) as exact dollars; None for `"-1"`, for nonsense, and for anything above PRICE_USD_MAX."""
    text = bytes(raw).strip().strip(b'"')
    if len(text) > 40:
        return None
    try:
        usd = Decimal(text.decode("ascii"))
    except (InvalidOperation, UnicodeDecodeError):
        return None
    return usd if usd.is_finite() and 0 <= usd <= PRICE_USD_MAX and usd.as_tuple().exponent >= -40 else None  # type: ignore[operator]


def _price(facts: _ModelFacts, pricing: Mapping[str, Decimal]) -> ModelPrice | None:
    """What bounds the cost: of each kind of price the dearest, whatever the conditions of `overrides` are."""
    if "prompt" not in pricing or "completion" not in pricing:
        return None
    dearest = dict(pricing)
    for override in _overrides(facts.pricing):
        for name in {*override} & {*PRICES}:
            usd = parse_price(override[name])
            if usd is None:
                return None
            dearest[name] = max(usd, dearest.get(name, Decimal(0)))
    if any(name in facts.pricing and name not in dearest for name in PRICES):
        return None

    def most(*names: str) -> Decimal:
        return max(dearest.get(name, Decimal(0)) for name in names)

    top = facts.top_provider or _TopProvider()
    return ModelPrice(
        prompt_usd=dearest["prompt"],
        completion_usd=most("completion", "internal_reasoning"),
        request_usd=most("request"),
        image_usd=most("image"),
        media_usd=most(*MEDIA_PRICES),
        cache_write_usd=most("input_cache_write"),
        rich_completion_usd=most("completion", "internal_reasoning", *RICH_PRICES),
        search_usd=most("web_search"),
        context_tokens=max(filter(None, (facts.context_length, top.context_length)), default=None),
        output_tokens_max=top.max_completion_tokens,
    )


def _overrides(pricing: Mapping[str, msgspec.Raw]) -> list[dict[str, msgspec.Raw]]:
    """Prices of other conditions: a longer context, another time of day."""
    try:
        return msgspec.json.decode(pricing.get("overrides", b"[]"), type=list[dict[str, msgspec.Raw]])
    except UNREADABLE:
        return []


@asynccontextmanager
async def refreshed(service: OpenRouterService, refresh_s: float, kept: Path) -> AsyncIterator[Catalogue]:
    """A catalogue that is read now, and again about every `refresh_s`.

    While OpenRouter is away the last good copy stays; the file `kept` carries it over a restart, and then nobody waits for a
    new one.
    """
    catalogue = Catalogue(fresh_s=FRESH_REFRESHES * refresh_s)
    _recall(catalogue, kept)
    if not catalogue.models:
        await _refresh(catalogue, service, kept)
    CATALOGUE_AGE.set_function(lambda: catalogue.age_s)
    task = asyncio.create_task(_keep_fresh(catalogue, service, refresh_s, kept), name="catalogue")
    try:
        yield catalogue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _keep_fresh(catalogue: Catalogue, service: OpenRouterService, refresh_s: float, kept: Path) -> None:
    if catalogue.models and not catalogue.is_fresh:
        await _refresh(catalogue, service, kept)  # what was recalled is from before the restart
    while True:
        # Many gateways that were started together must not ask together for ever.
        pause_s = refresh_s * random.uniform(0.8, 1.2)  # noqa: S311
        await asyncio.sleep(pause_s if catalogue.is_fresh else min(RETRY_S, pause_s))
        await _refresh(catalogue, service, kept)


async def _refresh(catalogue: Catalogue, service: OpenRouterService, kept: Path) -> None:
    try:
        document = await service.models()
        catalogue.replace(document)
        catalogue.read_at = time.monotonic()
    except (UpstreamError, CatalogueError) as error:
        LOGGER.warning("The model list could not be read (%s); the last good copy stays: %d models", error, len(catalogue.models))
        return
    try:
        _keep(document, kept)
    except OSError as error:
        LOGGER.warning("The model list cannot be kept in %s: %s", kept, error.strerror)


def _recall(catalogue: Catalogue, kept: Path) -> None:
    try:
        catalogue.replace(kept.read_bytes())
    except FileNotFoundError:
        return
    except (CatalogueError, OSError) as error:
        LOGGER.warning("The kept model list %s is not used: %s", kept, error)


def _keep(document: bytes, kept: Path) -> None:
    """In one step, so that a reader, or a death, never sees half of it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=kept.name, delete=False) as file:
        file.write(document)
    os.replace(file.name, kept)
