"""What a request can cost at most, and what it did cost.

Two pure computations:

- before the call, the *ceiling*: an upper bound of the cost, which the ledger holds (contract C4);
- after the call, the *charge*: OpenRouter's cost in dollars × the rate, rounded once, half up, to a nano-rouble (contract C1).

The ceiling is `fixed + tokens × per_token`, in integers, since an upper bound may be rounded up. The fixed part is the prompt,
bounded by its bytes (a token is never shorter than a byte) and by the model's context, and everything that no limit on the output
bounds: images and audio in the output, searches, tools, OCR. The second part is the output.

The hold always covers the whole ceiling, so no number of parallel requests can take a balance below zero. Where the client sets
no limit on the output, the hold may be smaller than for the model's longest output, down to `Ceiling.hold_min`: the ledger holds
the fixed part and a share of what is left of the balance. `Ceiling.output_limit` then gives the number of tokens that the hold
covers, which is sent upstream as `max_tokens`. Where several models may answer, all of them are covered.

A price that OpenRouter does not list is unknown, not zero. It is bounded by a `PriceCap`, which is sent upstream, or, where
OpenRouter has no such bound, by a hold of a configured amount. The same cap applies where the client chooses the provider: the
listed price is the one of the provider that OpenRouter would choose.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Protocol

import msgspec

from gptutor.money.amounts import EXACT, Nano, nano_ceiling, nano_half_up, parse_roubles

PRICE_SCALE = 10**12
"""Prices are fixed-point integers in units of 10^-12 nano-rouble: a single token costs far less than one nano-rouble."""
TARIFFS_MAX = 5000
CONTEXT_TOKENS_DEFAULT = 2_000_000
"""For a model that lists no context length: more than the longest that any model lists."""
HOLDS_PER_BALANCE_MIN = 10
"""A hold is at least this part of the minimum balance (a share of an eighth is more): what no ceiling foresees stays small for
many requests together."""
HOLD_NANO_MAX = 10**18
"""A billion roubles: nobody has so much, and it fits into the database."""


class ModelPrices(Protocol):
    """A model's prices in US dollars, and its limits in tokens. Prices are finite and not negative.

    Per token of the prompt: `prompt_usd`; `media_usd` if the prompt contains images, audio or files; `cache_write_usd` if the
    provider may write the prompt to a cache on its own. Per token of the output: `completion_usd`, and `rich_completion_usd` for
    images and audio. `base_prompt_usd` and `base_completion_usd` are the listed prices without those for other conditions, such
    as a long prompt.

    `outputs_media`: the model may output images or audio. `has_unlisted_prices`: some of what it does has no listed price.
    `reads_documents`: it reads files itself. `searches`: it searches the web without being asked to; `researches`: many times,
    and it reads what it found and reasons about it beyond any limit on the output.
    """

    @property
    def prompt_usd(self) -> Decimal: ...
    @property
    def completion_usd(self) -> Decimal: ...
    @property
    def request_usd(self) -> Decimal: ...
    @property
    def image_usd(self) -> Decimal: ...
    @property
    def media_usd(self) -> Decimal: ...
    @property
    def cache_write_usd(self) -> Decimal: ...
    @property
    def rich_completion_usd(self) -> Decimal: ...
    @property
    def search_usd(self) -> Decimal: ...
    @property
    def base_prompt_usd(self) -> Decimal: ...
    @property
    def base_completion_usd(self) -> Decimal: ...
    @property
    def outputs_media(self) -> bool: ...
    @property
    def has_unlisted_prices(self) -> bool: ...
    @property
    def reads_documents(self) -> bool: ...
    @property
    def searches(self) -> bool: ...
    @property
    def researches(self) -> bool: ...
    @property
    def context_tokens(self) -> int | None: ...
    @property
    def output_tokens_max(self) -> int | None: ...


class RequestSize(msgspec.Struct, frozen=True):
    """The properties of a request that its price depends on."""

    prompt_bytes: int
    """All bytes of the request that the model may read as text, without those of images."""
    images: int = 0
    has_files: bool = False
    """Whether the prompt has files, audio or video: only the model's context bounds their tokens."""
    choices: int = 1
    output_tokens: int | None = None
    """`max_tokens` or `max_completion_tokens`, as the client set it."""
    paid_tools: int = 0
    """The number of plugins and web searches; the most that each costs, and adds to the prompt, are settings."""
    writes_prompt_cache: bool = False
    """Whether the request asks for prompt caching: writing a cache costs more than reading the prompt."""
    multimodal_output: bool = False
    """Whether the request asks for images or audio in the output."""
    priority_tier: bool = False
    """Whether the request asks for a service tier with higher prices."""
    reasoning_tokens: int = 0
    """`reasoning.max_tokens`: some models spend them beside `max_tokens`."""
    prediction_bytes: int = 0
    """The bytes of `prediction`: its tokens are billed like the output's if they are not accepted."""
    server_tools: int = 0
    """The number of tools that OpenRouter or the provider runs, as often as the model calls them."""
    tool_steps: int | None = None
    """How many times the model may be called again after such tools ran, if the client limits that."""
    documents: int = 0
    """The number of attached files whose text may be found by OCR, at a price."""
    has_paid_ocr: bool | None = None
    """Whether the request asks for it; None: only where the model cannot read files itself."""
    has_unlisted_prices: bool = False
    """Whether the request asks for something that no price is known of."""
    chooses_provider: bool = False
    """Whether the client excludes providers or sorts them: a dearer one than the listed may answer."""


class PriceCap(msgspec.Struct, frozen=True):
    """The highest prices in dollars, per token and per request, that a provider may have: sent as `provider.max_price`."""

    prompt_usd: Decimal
    completion_usd: Decimal
    request_usd: Decimal


class UnlistedPrices(msgspec.Struct, frozen=True):
    """The prices of a model for which OpenRouter lists none: those of the cap that is sent. These are `ModelPrices`."""

    prompt_usd: Decimal
    completion_usd: Decimal
    request_usd: Decimal
    image_usd: Decimal = Decimal(0)
    search_usd: Decimal = Decimal(0)
    outputs_media: bool = False
    has_unlisted_prices: bool = True
    reads_documents: bool = False
    searches: bool = False
    researches: bool = False
    context_tokens: int | None = None
    output_tokens_max: int | None = None

    @property
    def base_prompt_usd(self) -> Decimal:
        return self.prompt_usd

    @property
    def base_completion_usd(self) -> Decimal:
        return self.completion_usd

    @property
    def media_usd(self) -> Decimal:
        return self.prompt_usd

    @property
    def cache_write_usd(self) -> Decimal:
        return self.prompt_usd

    @property
    def rich_completion_usd(self) -> Decimal:
        return self.completion_usd


class Tariff(msgspec.Struct, frozen=True):
    """A model's prices in roubles, as PRICE_SCALE integers, each rounded up. Used for ceilings only, never for charges."""

    prices: ModelPrices
    """The prices in dollars that this tariff was made from."""
    prompt: int
    media: int
    cache_write: int
    requested_cache_write: int
    """Per token of the prompt, if the client asks for prompt caching."""
    completion: int
    rich_completion: int
    request: int
    image: int
    tool: int
    search: int
    context_tokens: int
    output_tokens: int


class Output(msgspec.Struct, frozen=True):
    """What one model's output costs, in PRICE_SCALE units: `fixed`, and `per_token` for each of at most `tokens_max` tokens."""

    fixed: int
    per_token: int
    tokens_max: int

    def limit(self, held: Nano) -> int | None:
        """How many tokens the amount covers; None if it covers all `tokens_max`."""
        if not self.per_token:
            return None
        covered = (held * PRICE_SCALE - self.fixed) // self.per_token
        return covered if covered < self.tokens_max else None


class Ceiling(msgspec.Struct, frozen=True):
    """How much to hold: `hold_max`, the whole ceiling. The hold is rejected if less than `available_min` is available.

    With `hold_min`, the hold may be smaller: that, and a share of what is available beyond it. `outputs` has then one item for
    each model that may answer. `price_cap` and `tool_steps` are sent upstream where the ceiling is only true with them.
    """

    hold_max: Nano
    available_min: Nano
    hold_min: Nano | None = None
    outputs: tuple[Output, ...] = ()
    price_cap: PriceCap | None = None
    tool_steps: int | None = None
    """How many times the model may be called again after server tools ran, each time with their results in the prompt."""

    def output_limit(self, held: Nano) -> int | None:
        """`max_tokens` to send upstream, given the amount of the hold; None if no limit is needed."""
        limits = [limit for output in self.outputs if (limit := output.limit(held)) is not None]
        return min(limits, default=None)


class Charge(msgspec.Struct, frozen=True):
    """What a finished request costs: `amount` is charged to the account, `cost_usd` is OpenRouter's cost. And token counts."""

    amount: Nano
    cost_usd: Decimal
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def charge_amount(cost_usd: Decimal, rub_per_usd: Decimal) -> Nano:
    """Dollars × rate, rounded once. `cost_usd` is finite and not negative, as `openrouter.bill` guarantees."""
    return nano_half_up(EXACT.multiply(cost_usd, rub_per_usd))


class LLMCostEvaluate:
    """Prices in dollars → amounts in nano-roubles, with one exchange rate and one hold policy."""

    def __init__(
        self,
        *,
        rub_per_usd: Decimal,
        balance_min_rub: Decimal,
        margin: Decimal,
        output_tokens_min: int,
        output_media_tokens: int,
        hold_default_rub: Decimal,
        image_tokens: int,
        paid_tool_usd: Decimal,
        tool_prompt_tokens: int,
        server_tool_steps: int,
        ocr_document_usd: Decimal,
        research_searches: int,
        cache_write_factor: Decimal,
        priority_tier_factor: Decimal,
        provider_price_factor: Decimal,
        unlisted_prompt_usd: Decimal,
        unlisted_completion_usd: Decimal,
    ) -> None:
        self.rub_per_usd = rub_per_usd
        self._balance_min = parse_roubles(f"{balance_min_rub:f}")
        self._hold_least = Nano(-(-self._balance_min // HOLDS_PER_BALANCE_MIN))
        self._hold_default = parse_roubles(f"{hold_default_rub:f}") * PRICE_SCALE
        self._ceiling_rate = EXACT.multiply(rub_per_usd, margin)
        self._tariffs: dict[int, Tariff] = {}
        """By `id(prices)`."""
        self._output_tokens_min = output_tokens_min
        self._output_media_tokens = output_media_tokens
        self._image_tokens = image_tokens
        self._paid_tool = self._scaled(paid_tool_usd)
        self._tool_prompt_tokens = tool_prompt_tokens
        self._server_tool_steps = server_tool_steps
        self._ocr_document = self._scaled(ocr_document_usd)
        self._research_searches = research_searches
        self._cache_write_factor = cache_write_factor
        self._priority_tier_factor = priority_tier_factor.as_integer_ratio()
        self._provider_price_factor = provider_price_factor
        self._unlisted = UnlistedPrices(unlisted_prompt_usd / 10**6, unlisted_completion_usd / 10**6, paid_tool_usd)

    def ceiling(self, size: RequestSize, prices: Sequence[ModelPrices | None]) -> Ceiling:
        """The most that a request of this size can cost, whichever of the models with these prices answers.

        `None` stands for a model whose price OpenRouter does not list: the ceiling then has a price cap.
        """
        if size.chooses_provider or None in prices:
            known = [each or self._unlisted for each in prices]
            cap = self._price_cap(size, known)
            ceilings = [self._ceiling_of(size, each, cap) for each in known]
        else:
            cap = None
            ceilings = [self._ceiling_of(size, each, None) for each in prices if each is not None]
        if len(ceilings) == 1:
            return ceilings[0]
        return Ceiling(
            hold_max=max(ceiling.hold_max for ceiling in ceilings),
            available_min=max(ceiling.available_min for ceiling in ceilings),
            hold_min=max((ceiling.hold_min for ceiling in ceilings if ceiling.hold_min is not None), default=None),
            outputs=tuple(output for ceiling in ceilings for output in ceiling.outputs),
            price_cap=cap,
            tool_steps=ceilings[0].tool_steps,
        )

    def _price_cap(self, size: RequestSize, prices: Sequence[ModelPrices]) -> PriceCap:
        """What lets the listed providers of every model pass, and dearer ones up to a factor if the client chooses."""

        def highest(price_of: Callable[[ModelPrices], Decimal]) -> Decimal:
            return max(EXACT.multiply(price_of(each), self._factor(size, each)) for each in prices)

        return PriceCap(
            highest(lambda each: each.base_prompt_usd),
            highest(lambda each: each.base_completion_usd),
            highest(lambda each: each.request_usd),
        )

    def _factor(self, size: RequestSize, prices: ModelPrices) -> Decimal:
        return self._provider_price_factor if size.chooses_provider and prices is not self._unlisted else Decimal(1)

    def _ceiling_of(self, size: RequestSize, prices: ModelPrices, cap: PriceCap | None) -> Ceiling:
        tariff = self._tariff(prices)
        prompt_token, token, rich_token = self._prompt_token(size, tariff), tariff.completion, tariff.rich_completion
        request, image, search = tariff.request, tariff.image, tariff.search
        if cap is not None:
            factor = self._factor(size, prices).as_integer_ratio()
            prompt_token = max(_multiply_up(prompt_token, factor), self._scaled(cap.prompt_usd))
            token = max(_multiply_up(token, factor), self._scaled(cap.completion_usd))
            rich_token = max(_multiply_up(rich_token, factor), token)
            request = max(_multiply_up(request, factor), self._scaled(cap.request_usd))
            image, search = _multiply_up(image, factor), _multiply_up(search, factor)
        if size.priority_tier:
            prompt_token, token, rich_token = (
                _multiply_up(each, self._priority_tier_factor) for each in (prompt_token, token, rich_token)
            )
        steps = (size.tool_steps or self._server_tool_steps) if size.server_tools else 0
        fixed = (
            prompt_token * self._prompt_tokens(size, tariff, steps)
            + (request + size.images * image) * (steps + 1)
            + tariff.tool * (size.paid_tools + size.server_tools * steps + prices.searches)
        )
        # An output is generated at every step, and read again at every later one.
        token = (token * (steps + 1) + (prompt_token * (steps * (steps + 1) // 2))) * size.choices
        fixed += size.prediction_bytes * token
        if prices.outputs_media or size.multimodal_output:
            fixed += min(self._output_media_tokens, tariff.output_tokens) * rich_token * size.choices * (steps + 1)
        if prices.researches:
            fixed += tariff.context_tokens * (prompt_token + token) + self._research_searches * search
        if size.documents and (not prices.reads_documents if size.has_paid_ocr is None else size.has_paid_ocr):
            fixed += size.documents * self._ocr_document
        if prices.has_unlisted_prices or size.has_unlisted_prices:
            fixed += self._hold_default * size.choices
        reasoning = min(size.reasoning_tokens, tariff.output_tokens)
        if size.output_tokens is not None:
            hold_max = self._hold(fixed + min(size.output_tokens + reasoning, tariff.output_tokens) * token)
            return Ceiling(
                hold_max=hold_max, available_min=max(hold_max, self._balance_min), price_cap=cap, tool_steps=steps or None
            )
        # The limit that is sent must leave room for an answer after the reasoning, or the request would be rejected.
        fixed += reasoning * token
        tokens_max = tariff.output_tokens - reasoning
        hold_min = _nano_up(fixed + min(reasoning + self._output_tokens_min, tokens_max) * token)
        return Ceiling(
            hold_max=self._hold(fixed + tokens_max * token),
            available_min=max(hold_min, self._balance_min),
            hold_min=hold_min,
            outputs=(Output(fixed, token, tokens_max),),
            price_cap=cap,
            tool_steps=steps or None,
        )

    def _hold(self, scaled: int) -> Nano:
        """The amount to hold; nothing for what is free."""
        return max(_nano_up(scaled), self._hold_least) if scaled else Nano(0)

    def _prompt_token(self, size: RequestSize, tariff: Tariff) -> int:
        """The highest price that may apply to a token of the prompt."""
        token = max(tariff.prompt, tariff.cache_write)
        if size.images or size.has_files:
            token = max(token, tariff.media)
        if size.writes_prompt_cache:
            token = max(token, tariff.requested_cache_write)
        return token

    def _prompt_tokens(self, size: RequestSize, tariff: Tariff, steps: int) -> int:
        """The most tokens that are read, at all steps together: each time no more than the context holds."""
        context = tariff.context_tokens
        tokens = size.prompt_bytes + size.images * self._image_tokens + size.paid_tools * self._tool_prompt_tokens
        if size.has_files:
            tokens = context
        if not steps:
            return min(tokens, context)
        results = size.server_tools * self._tool_prompt_tokens * (steps * (steps + 1) // 2)
        return min(tokens * (steps + 1) + results, context * (steps + 1))

    def _tariff(self, prices: ModelPrices) -> Tariff:
        """The tariff of these prices, cached by the identity of the object: prices are immutable."""
        cached = self._tariffs.get(id(prices))
        if cached is None or cached.prices is not prices:
            if len(self._tariffs) >= TARIFFS_MAX:
                self._tariffs.clear()
            cached = self._tariffs[id(prices)] = self._make_tariff(prices)
        return cached

    def _make_tariff(self, prices: ModelPrices) -> Tariff:
        context = prices.context_tokens or CONTEXT_TOKENS_DEFAULT
        return Tariff(
            prices=prices,
            prompt=self._scaled(prices.prompt_usd),
            media=self._scaled(prices.media_usd),
            cache_write=self._scaled(prices.cache_write_usd),
            requested_cache_write=self._scaled(EXACT.multiply(prices.prompt_usd, self._cache_write_factor)),
            completion=self._scaled(prices.completion_usd),
            rich_completion=self._scaled(prices.rich_completion_usd),
            request=self._scaled(prices.request_usd),
            image=self._scaled(prices.image_usd),
            tool=max(self._paid_tool, self._scaled(prices.search_usd)),
            search=self._scaled(prices.search_usd) or self._paid_tool,
            context_tokens=context,
            output_tokens=prices.output_tokens_max or context,
        )

    def _scaled(self, usd: Decimal) -> int:
        """Dollars → roubles with the safety margin, in PRICE_SCALE units, rounded up."""
        return nano_ceiling(EXACT.multiply(EXACT.multiply(usd, self._ceiling_rate), Decimal(PRICE_SCALE)))

    def charge(self, cost_usd: Decimal) -> Nano:
        """The amount to charge for a finished request, at the current rate."""
        return charge_amount(cost_usd, self.rub_per_usd)


def _nano_up(scaled: int) -> Nano:
    """PRICE_SCALE units → nano-roubles, rounded up."""
    return Nano(min(-(-scaled // PRICE_SCALE), HOLD_NANO_MAX))


def _multiply_up(amount: int, factor: tuple[int, int]) -> int:
    """`amount` × a fraction, rounded up."""
    return -(-amount * factor[0] // factor[1])
