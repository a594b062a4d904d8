"""What a request can cost at most, and what it did cost.

Two pure computations:

- before the call, the *ceiling*: an upper bound of the cost, which the ledger holds (contract C4);
- after the call, the *charge*: OpenRouter's cost in dollars × the rate, rounded once, half up, to a nano-rouble (contract C1).

The ceiling is `fixed + tokens × per_token`, in integers, since an upper bound may be rounded up. The fixed part is the prompt,
bounded by its bytes (a token is never shorter than a byte) and by the model's context, images by count, and the per-request
price. The second part is the output.

Where the client sets no limit on the output, the hold covers a typical one. One request alone must still never take a balance
below zero. So whenever the balance does not cover the model's longest output, `Ceiling.output_limit` gives the number of tokens
that the balance covers, which is sent upstream as `max_tokens`. Where several models may answer, all of them are covered.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Protocol

import msgspec

from gptutor.money.amounts import EXACT, Nano, nano_ceiling, nano_half_up, parse_roubles

PRICE_SCALE = 10**12
"""Prices are fixed-point integers in units of 10^-12 nano-rouble: a single token costs far less than one nano-rouble."""
TARIFFS_MAX = 5000
CONTEXT_TOKENS_DEFAULT = 2_000_000
"""For a model that lists no context length: more than the longest that any model lists."""


class ModelPrices(Protocol):
    """A model's prices in US dollars, and its limits in tokens. Prices are finite and not negative.

    Per token of the prompt: `prompt_usd`; `media_usd` if the prompt contains images, audio or files; `cache_write_usd` if the
    provider may write the prompt to a cache on its own. Per token of the output: `completion_usd`, or `rich_completion_usd` if it
    may be more than text.
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
    """The number of plugins, server tools and web searches; the most that each costs is a setting."""
    writes_prompt_cache: bool = False
    """Whether the request asks for prompt caching: writing a cache costs more than reading the prompt."""
    multimodal_output: bool = False
    """Whether the request asks for images or audio in the output."""
    priority_tier: bool = False
    """Whether the request asks for a service tier with higher prices."""


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
    context_tokens: int
    output_tokens: int


class Output(msgspec.Struct, frozen=True):
    """What one model's output costs, in PRICE_SCALE units: `fixed`, and `per_token` for each of at most `tokens_max` tokens."""

    fixed: int
    per_token: int
    tokens_max: int

    def limit(self, available: Nano) -> int | None:
        """How many tokens the amount covers; None if it covers all `tokens_max`."""
        if not self.per_token:
            return None
        covered = (available * PRICE_SCALE - self.fixed) // self.per_token
        return covered if covered < self.tokens_max else None


class Ceiling(msgspec.Struct, frozen=True):
    """How much to hold: `hold_max`, or all that is available if that is less. The hold is rejected below `available_min`.

    `outputs` has one item for each model that may answer, if the client set no limit on the output and the balance may have to.
    """

    hold_max: Nano
    available_min: Nano
    outputs: tuple[Output, ...] = ()

    def output_limit(self, available: Nano) -> int | None:
        """`max_tokens` to send upstream, given the amount available before the hold; None if no limit is needed."""
        limits = [limit for output in self.outputs if (limit := output.limit(available)) is not None]
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
        output_tokens_typical: int,
        output_tokens_min: int,
        reserve: str,
        hold_default_rub: Decimal,
        image_tokens: int,
        paid_tool_usd: Decimal,
        cache_write_factor: Decimal,
        priority_tier_factor: Decimal,
    ) -> None:
        self.rub_per_usd = rub_per_usd
        self._balance_min = parse_roubles(f"{balance_min_rub:f}")
        self._hold_default = parse_roubles(f"{hold_default_rub:f}")
        self._ceiling_rate = EXACT.multiply(rub_per_usd, margin)
        self._tariffs: dict[int, Tariff] = {}
        """By `id(prices)`."""
        self._output_tokens_typical = output_tokens_typical
        self._output_tokens_min = output_tokens_min
        self._worst_case = reserve == "worst_case"
        self._image_tokens = image_tokens
        self._paid_tool = self._scaled(paid_tool_usd)
        self._cache_write_factor = cache_write_factor
        self._priority_tier_factor = priority_tier_factor.as_integer_ratio()

    def ceiling(self, size: RequestSize, prices: Sequence[ModelPrices | None]) -> Ceiling:
        """The most that a request of this size can cost, whichever of the models with these prices answers.

        `None` stands for a model whose price OpenRouter does not state: a default amount is held.
        """
        ceilings = [self._ceiling_of(size, each) for each in prices]
        if len(ceilings) == 1:
            return ceilings[0]
        return Ceiling(
            hold_max=max(ceiling.hold_max for ceiling in ceilings),
            available_min=max(ceiling.available_min for ceiling in ceilings),
            outputs=tuple(output for ceiling in ceilings for output in ceiling.outputs),
        )

    def _ceiling_of(self, size: RequestSize, prices: ModelPrices | None) -> Ceiling:
        if prices is None:
            hold_max = Nano(self._hold_default + _nano_up(self._paid_tool * size.paid_tools))
            return Ceiling(hold_max=hold_max, available_min=max(hold_max, self._balance_min))
        tariff = self._tariff(prices)
        prompt, token = self._prompt(size, tariff), tariff.rich_completion if size.multimodal_output else tariff.completion
        token *= size.choices
        if size.priority_tier:
            prompt, token = _multiply_up(prompt, self._priority_tier_factor), _multiply_up(token, self._priority_tier_factor)
        fixed = prompt + tariff.request + size.images * tariff.image + size.paid_tools * tariff.tool
        tokens_max = tariff.output_tokens
        if size.output_tokens is not None or self._worst_case:
            hold_max = _nano_up(fixed + min(size.output_tokens or tokens_max, tokens_max) * token)
            return Ceiling(hold_max=hold_max, available_min=max(hold_max, self._balance_min))
        return Ceiling(
            hold_max=_nano_up(fixed + min(self._output_tokens_typical, tokens_max) * token),
            available_min=max(_nano_up(fixed + min(self._output_tokens_min, tokens_max) * token), self._balance_min),
            outputs=(Output(fixed, token, tokens_max),),
        )

    def _prompt(self, size: RequestSize, tariff: Tariff) -> int:
        """The most that the prompt can cost: no more tokens than the context holds, each at the highest price that may apply."""
        tokens, token = size.prompt_bytes + size.images * self._image_tokens, max(tariff.prompt, tariff.cache_write)
        if size.images or size.has_files:
            token = max(token, tariff.media)
        if size.writes_prompt_cache:
            token = max(token, tariff.requested_cache_write)
        return token * (tariff.context_tokens if size.has_files else min(tokens, tariff.context_tokens))

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
    return Nano(-(-scaled // PRICE_SCALE))


def _multiply_up(amount: int, factor: tuple[int, int]) -> int:
    """`amount` × a fraction, rounded up."""
    return -(-amount * factor[0] // factor[1])
