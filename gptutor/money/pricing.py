"""What a request can cost at most, and what it did cost.

Two questions, two answers, both pure:

- before the call, the *ceiling*: an upper bound of the cost, which the ledger holds (contract C4);
- after it, the *charge*: OpenRouter's dollars × the rate, rounded once, half up, to a nano-rouble (contract C1).

The ceiling is `fixed + tokens × per_token`. The fixed part is the prompt, bounded by its bytes (a token is never shorter than
a byte) and by the model's context, images by count, and the per-request price. The second part is the output.

Where the caller sets no limit on the output, the hold covers a typical one. One request alone must still never take a balance
below zero, so whenever the balance does not cover all that a model can write, `Ceiling.output_limit` says what it does cover,
and that is sent upstream as `max_tokens`. Where several models may answer, all of them are covered.
"""

from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal
from typing import Protocol

import msgspec

from gptutor.money.amounts import EXACT, Nano, nano_ceiling, nano_half_up, parse_roubles

NANO = Decimal(10**9)
TOKENS_UNKNOWN = 2_000_000
"""The bound of a model that lists no limit: more than the largest context on the list."""


class Priced(Protocol):
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


class Size(msgspec.Struct, frozen=True):
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


class Output(msgspec.Struct, frozen=True):
    """What one model's output costs: `fixed` before the first token, then `token_nano` each, exact; at most `tokens_max`."""

    fixed: Nano
    token_nano: Decimal
    tokens_max: int

    def limit(self, available: Nano) -> int | None:
        """How many tokens are covered, if not all of them."""
        if not self.token_nano:
            return None
        covered = int(EXACT.divide(Decimal(available - self.fixed), self.token_nano).to_integral_value(ROUND_FLOOR))
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
        return min((limit for output in self.outputs if (limit := output.limit(available)) is not None), default=None)


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
        self._output_tokens_typical = output_tokens_typical
        self._output_tokens_min = output_tokens_min
        self._worst_case = reserve == "worst_case"
        self._image_tokens = image_tokens
        self._paid_tool_usd = paid_tool_usd
        self._cache_write_factor = cache_write_factor
        self._hurry_factor = hurry_factor

    def ceiling(self, size: Size, prices: Sequence[Priced | None]) -> Ceiling:
        """The most that a request of this size can cost, whichever of the models with these prices answers.

        `None` is a price that OpenRouter does not state: a default is held.
        """
        ceilings = [self._ceiling_of(size, price) for price in prices]
        return Ceiling(
            most=max(ceiling.most for ceiling in ceilings),
            least=max(ceiling.least for ceiling in ceilings),
            outputs=tuple(output for ceiling in ceilings for output in ceiling.outputs),
        )

    def _ceiling_of(self, size: Size, price: Priced | None) -> Ceiling:
        if price is None:
            most = Nano(self._hold_default + self._nano(EXACT.multiply(self._paid_tool_usd, size.paid_tools)))
            return Ceiling(most=most, least=max(most, self._balance_min))
        fixed_usd = self._prompt_usd(size, price)
        token_usd = EXACT.multiply(price.rich_completion_usd if size.more_than_text else price.completion_usd, size.choices)
        if size.hurried:
            token_usd = EXACT.multiply(token_usd, self._hurry_factor)
        tokens_max = price.output_tokens_max or price.context_tokens or TOKENS_UNKNOWN
        if size.output_tokens is not None or self._worst_case:
            most = self._nano(EXACT.fma(min(size.output_tokens or tokens_max, tokens_max), token_usd, fixed_usd))
            return Ceiling(most=most, least=max(most, self._balance_min))

        least_usd = EXACT.fma(min(self._output_tokens_min, tokens_max), token_usd, fixed_usd)
        most_usd = EXACT.fma(min(self._output_tokens_typical, tokens_max), token_usd, fixed_usd)
        token_nano = EXACT.multiply(EXACT.multiply(token_usd, self._ceiling_rate), NANO)
        return Ceiling(
            most=self._nano(most_usd),
            least=max(self._nano(least_usd), self._balance_min),
            outputs=(Output(self._nano(fixed_usd), token_nano, tokens_max),),
        )

    def _prompt_usd(self, size: Size, price: Priced) -> Decimal:
        """Everything before the first output token. No more tokens than the model's context holds can be read."""
        tokens = size.prompt_bytes + size.images * self._image_tokens
        context = price.context_tokens or TOKENS_UNKNOWN
        tokens = context if size.has_files else min(tokens, context)
        token_usd = max(price.prompt_usd, price.cache_write_usd)
        if size.images or size.has_files:
            token_usd = max(token_usd, price.media_usd)
        if size.caches_prompt:
            token_usd = max(token_usd, EXACT.multiply(price.prompt_usd, self._cache_write_factor))
        if size.hurried:
            token_usd = EXACT.multiply(token_usd, self._hurry_factor)
        usd = EXACT.fma(size.images, price.image_usd, price.request_usd)
        usd = EXACT.fma(size.paid_tools, max(self._paid_tool_usd, price.search_usd), usd)
        return EXACT.fma(tokens, token_usd, usd)

    def charge(self, cost_usd: Decimal) -> Nano:
        """The cost of a finished request, at the rate of today."""
        return charge(cost_usd, self.rub_per_usd)

    def _nano(self, usd: Decimal) -> Nano:
        return nano_ceiling(EXACT.multiply(usd, self._ceiling_rate))
