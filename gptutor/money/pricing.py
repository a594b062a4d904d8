"""What a request can cost at most, and what it did cost.

Two questions, two answers, both pure:

- before the call, the *ceiling*: an upper bound of the cost, which the ledger holds (contract C4);
- after it, the *charge*: OpenRouter's dollars × the rate, rounded once, half up, to a nano-rouble (contract C1).

The ceiling is `fixed + tokens × per_token`, in whole numbers, since an upper bound may be rounded up. The fixed part is the
prompt, bounded by its bytes (a token is never shorter than a byte) and by the model's context, images by count, and the
per-request price. The second part is the output.

Where the caller sets no limit on the output, the hold covers a typical one. One request alone must still never take a balance
below zero, so whenever the balance does not cover all that a model can write, `Ceiling.output_limit` says what it does cover,
and that is sent upstream as `max_tokens`. Where several models may answer, all of them are covered.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Protocol

import msgspec

from gptutor.money.amounts import EXACT, Nano, nano_ceiling, nano_half_up, parse_roubles

GRAINS = 10**12
"""In a nano-rouble: prices of single tokens are far below it."""
TARIFFS_MAX = 5000
TOKENS_UNKNOWN = 2_000_000
"""The bound of a model that lists no limit: more than the largest context on the list."""


class ModelPrices(Protocol):
    """A model's price list in US dollars, and its limits in tokens; prices are finite and not negative.

    Per token of the prompt: `prompt_usd`; `media_usd` where pictures, sounds or files are in it; `cache_write_usd` where it may
    be written to a cache unasked. Per token of the output: `completion_usd`, or `rich_completion_usd` if it may be more than
    text.
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
    """What a request asks for, as far as its price is concerned."""

    prompt_bytes: int
    """All bytes of the request that may be read as text; those of images are not among them."""
    images: int = 0
    has_files: bool = False
    """Whether there are files, sounds or films, whose cost nothing but the model's context bounds."""
    choices: int = 1
    output_tokens: int | None = None
    """`max_tokens` or `max_completion_tokens`, as the caller set it."""
    paid_tools: int = 0
    """Plugins, server tools and web searches: what each may cost is a setting."""
    caches_prompt: bool = False
    """Whether it asks for its prompt to be kept, which costs more than reading it."""
    more_than_text: bool = False
    """Whether pictures or sounds are asked for."""
    hurried: bool = False
    """Whether a dearer service tier is asked for."""


class Tariff(msgspec.Struct, frozen=True):
    """A model's price list in our money: whole GRAINS, each rounded up. Only for ceilings; a charge never sees them."""

    price: ModelPrices
    """What it is made of."""
    prompt: int
    media: int
    cache_write: int
    cached_prompt: int
    """Where the caller asks for his prompt to be kept."""
    completion: int
    rich_completion: int
    request: int
    image: int
    tool: int
    context_tokens: int
    output_tokens: int


class Output(msgspec.Struct, frozen=True):
    """What one model's output costs: `fixed` grains before the first token, then `token` each; at most `tokens_max`."""

    fixed: int
    token: int
    tokens_max: int

    def limit(self, available: Nano) -> int | None:
        """How many tokens are covered, if not all of them."""
        if not self.token:
            return None
        covered = (available * GRAINS - self.fixed) // self.token
        return covered if covered < self.tokens_max else None


class Ceiling(msgspec.Struct, frozen=True):
    """What to hold. `most` is held if it is available, else all that is available, but never less than `least`.

    `outputs`, one for each model that may answer, are given where the caller set no limit and the balance may have to.
    """

    most: Nano
    least: Nano
    outputs: tuple[Output, ...] = ()

    def output_limit(self, available: Nano) -> int | None:
        """`max_tokens` to send upstream, given what was available before the hold; None where none is needed."""
        limits = [limit for output in self.outputs if (limit := output.limit(available)) is not None]
        return min(limits, default=None)


def charge(cost_usd: Decimal, rub_per_usd: Decimal) -> Nano:
    """Dollars × rate, rounded once. `cost_usd` is finite and not negative, as `openrouter.bill` guarantees."""
    return nano_half_up(EXACT.multiply(cost_usd, rub_per_usd))


class LLMCostEvaluate:
    """Prices in dollars → amounts in nano-roubles, under one rate and one policy of reserving."""

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
        hurry_factor: Decimal,
    ) -> None:
        self.rub_per_usd = rub_per_usd
        self._balance_min = parse_roubles(f"{balance_min_rub:f}")
        self._hold_default = parse_roubles(f"{hold_default_rub:f}")
        self._ceiling_rate = EXACT.multiply(rub_per_usd, margin)
        self._tariffs: dict[int, Tariff] = {}
        """By the identity of what they are made of."""
        self._output_tokens_typical = output_tokens_typical
        self._output_tokens_min = output_tokens_min
        self._worst_case = reserve == "worst_case"
        self._image_tokens = image_tokens
        self._tool = self._grains(paid_tool_usd)
        self._cache_write_factor = cache_write_factor
        self._hurry_factor = hurry_factor.as_integer_ratio()

    def ceiling(self, size: RequestSize, prices: Sequence[ModelPrices | None]) -> Ceiling:
        """The most that a request of this size can cost, whichever of the models with these prices answers.

        `None` is a price that OpenRouter does not state: a default is held.
        """
        ceilings = [self._ceiling_of(size, price) for price in prices]
        if len(ceilings) == 1:
            return ceilings[0]
        return Ceiling(
            most=max(ceiling.most for ceiling in ceilings),
            least=max(ceiling.least for ceiling in ceilings),
            outputs=tuple(output for ceiling in ceilings for output in ceiling.outputs),
        )

    def _ceiling_of(self, size: RequestSize, price: ModelPrices | None) -> Ceiling:
        if price is None:
            most = Nano(self._hold_default + _nano(self._tool * size.paid_tools))
            return Ceiling(most=most, least=max(most, self._balance_min))
        tariff = self._tariff(price)
        prompt, token = self._prompt(size, tariff), tariff.rich_completion if size.more_than_text else tariff.completion
        token *= size.choices
        if size.hurried:
            prompt, token = _times(prompt, self._hurry_factor), _times(token, self._hurry_factor)
        fixed = prompt + tariff.request + size.images * tariff.image + size.paid_tools * tariff.tool
        tokens_max = tariff.output_tokens
        if size.output_tokens is not None or self._worst_case:
            most = _nano(fixed + min(size.output_tokens or tokens_max, tokens_max) * token)
            return Ceiling(most=most, least=max(most, self._balance_min))
        return Ceiling(
            most=_nano(fixed + min(self._output_tokens_typical, tokens_max) * token),
            least=max(_nano(fixed + min(self._output_tokens_min, tokens_max) * token), self._balance_min),
            outputs=(Output(fixed, token, tokens_max),),
        )

    def _prompt(self, size: RequestSize, tariff: Tariff) -> int:
        """No more tokens than the model's context holds can be read; each costs the dearest of what it may be."""
        tokens, token = size.prompt_bytes + size.images * self._image_tokens, max(tariff.prompt, tariff.cache_write)
        if size.images or size.has_files:
            token = max(token, tariff.media)
        if size.caches_prompt:
            token = max(token, tariff.cached_prompt)
        return token * (tariff.context_tokens if size.has_files else min(tokens, tariff.context_tokens))

    def _tariff(self, price: ModelPrices) -> Tariff:
        """Made once for each price list: the same object has the same prices."""
        known = self._tariffs.get(id(price))
        if known is None or known.price is not price:
            if len(self._tariffs) >= TARIFFS_MAX:
                self._tariffs.clear()
            known = self._tariffs[id(price)] = self._made_of(price)
        return known

    def _made_of(self, price: ModelPrices) -> Tariff:
        context = price.context_tokens or TOKENS_UNKNOWN
        return Tariff(
            price=price,
            prompt=self._grains(price.prompt_usd),
            media=self._grains(price.media_usd),
            cache_write=self._grains(price.cache_write_usd),
            cached_prompt=self._grains(EXACT.multiply(price.prompt_usd, self._cache_write_factor)),
            completion=self._grains(price.completion_usd),
            rich_completion=self._grains(price.rich_completion_usd),
            request=self._grains(price.request_usd),
            image=self._grains(price.image_usd),
            tool=max(self._tool, self._grains(price.search_usd)),
            context_tokens=context,
            output_tokens=price.output_tokens_max or context,
        )

    def _grains(self, usd: Decimal) -> int:
        return nano_ceiling(EXACT.multiply(EXACT.multiply(usd, self._ceiling_rate), Decimal(GRAINS)))

    def charge(self, cost_usd: Decimal) -> Nano:
        """The cost of a finished request, at the rate of today."""
        return charge(cost_usd, self.rub_per_usd)


def _nano(grains: int) -> Nano:
    """Rounded up."""
    return Nano(-(-grains // GRAINS))


def _times(amount: int, factor: tuple[int, int]) -> int:
    """Rounded up."""
    return -(-amount * factor[0] // factor[1])
