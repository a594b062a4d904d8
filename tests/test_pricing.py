"""Ceilings and charges (contract C1, C4)."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money.amounts import Nano, parse_roubles
from gptutor.money.pricing import LLMCostEvaluate, RequestSize


@dataclass
class Price:
    prompt_usd: Decimal = Decimal("0.000001")
    completion_usd: Decimal = Decimal("0.000002")
    request_usd: Decimal = Decimal(0)
    image_usd: Decimal = Decimal(0)
    media_usd: Decimal = Decimal(0)
    cache_write_usd: Decimal = Decimal(0)
    rich_completion_usd: Decimal = Decimal("0.000004")
    search_usd: Decimal = Decimal(0)
    base_prompt_usd: Decimal = Decimal("0.000001")
    base_completion_usd: Decimal = Decimal("0.000002")
    outputs_media: bool = False
    has_unlisted_prices: bool = False
    reads_documents: bool = False
    searches: bool = False
    researches: bool = False
    context_tokens: int | None = 100_000
    output_tokens_max: int | None = 10_000


def evaluate(**changes: Any) -> LLMCostEvaluate:
    policy: dict[str, Any] = {
        "rub_per_usd": Decimal(90),
        "balance_min_rub": Decimal(1),
        "margin": Decimal(1),
        "output_tokens_min": 16,
        "output_media_tokens": 1000,
        "hold_default_rub": Decimal(10),
        "image_tokens": 8192,
        "paid_tool_usd": Decimal("0.05"),
        "tool_prompt_tokens": 1000,
        "server_tool_steps": 2,
        "research_searches": 10,
        "ocr_document_usd": Decimal(2),
        "cache_write_factor": Decimal(2),
        "priority_tier_factor": Decimal(3),
        "provider_price_factor": Decimal(3),
        "unlisted_prompt_usd": Decimal(5),
        "unlisted_completion_usd": Decimal(25),
    }
    return LLMCostEvaluate(**{**policy, **changes})


def rub(text: str) -> Nano:
    return parse_roubles(text)


def test_with_a_limit_the_hold_covers_all_of_it() -> None:
    ceiling = evaluate().ceiling(RequestSize(prompt_bytes=1000, output_tokens=5000), [Price()])
    assert ceiling.hold_max == rub("0.99")  # (1000 × 0.000001 + 5000 × 0.000002) × 90
    assert ceiling.available_min == rub("1")  # the minimum balance is more
    assert ceiling.output_limit(rub("1")) is None


def test_a_limit_above_the_models_own_does_not_cost_more() -> None:
    assert evaluate().ceiling(RequestSize(0, output_tokens=10**9), [Price()]).hold_max == rub("1.8")


def test_without_a_limit_the_hold_covers_a_typical_output() -> None:
    ceiling = evaluate().ceiling(RequestSize(prompt_bytes=1000), [Price()])
    assert ceiling.hold_max == rub("0.82728")
    assert evaluate(reserve="worst_case").ceiling(RequestSize(prompt_bytes=1000), [Price()]).hold_max == rub("1.89")


@pytest.mark.parametrize(
    ("available", "limit"),
    [("1.89", None), ("1.889999999", 9999), ("1", 5055), ("0.09288", 16), ("2", None)],
)
def test_the_output_limit_is_what_the_balance_covers(available: str, limit: int | None) -> None:
    ceiling = evaluate(balance_min_rub=Decimal(0)).ceiling(RequestSize(prompt_bytes=1000), [Price()])
    assert ceiling.available_min == rub("0.09288")  # the prompt and 16 tokens
    assert ceiling.output_limit(rub(available)) == limit


@given(
    st.integers(0, 10_000_000),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.integers(1, 8),
    st.integers(0, 5),
    st.decimals(0, 1, places=9),
    st.decimals(0, 1, places=9),
    st.integers(1, 10**15),
)
def test_one_request_alone_never_takes_a_balance_below_zero(
    prompt: int, limit: int | None, choices: int, media: int, prompt_usd: Decimal, completion_usd: Decimal, available: int
) -> None:
    price = Price(prompt_usd, completion_usd, image_usd=Decimal("0.01"), context_tokens=10**9)
    ceiling = evaluate(margin=Decimal("1.1")).ceiling(RequestSize(prompt, media, False, choices, limit), [price])
    if available < ceiling.available_min:
        return
    sent = ceiling.output_limit(Nano(available))
    tokens = min(token for token in (sent, limit, 10_000) if token is not None)
    worst_usd = (prompt + media * 8192) * prompt_usd + media * Decimal("0.01") + tokens * choices * completion_usd
    assert evaluate().charge(worst_usd) <= available
    assert sent is None or sent >= 16
    assert ceiling.available_min <= max(ceiling.hold_max, rub("1"))


def test_images_cost_by_count_and_the_prompt_is_bounded_by_the_context() -> None:
    price = Price(image_usd=Decimal("0.5"), request_usd=Decimal("0.25"))
    assert evaluate().ceiling(RequestSize(0, images=2, output_tokens=1), [price]).hold_max == rub("113.97474")
    assert evaluate().ceiling(RequestSize(10**9, output_tokens=1), [price]).hold_max == rub("31.50018")


def test_a_file_may_cost_all_that_the_model_can_read() -> None:
    assert evaluate().ceiling(RequestSize(1, has_files=True, output_tokens=1), [Price()]).hold_max == rub("9.00018")


def test_every_model_that_may_answer_is_covered() -> None:
    small = Price(completion_usd=Decimal("0.0001"), output_tokens_max=100)  # expensive tokens, but few of them
    large = Price(completion_usd=Decimal("0.000002"), output_tokens_max=60_000)
    ceiling = evaluate().ceiling(RequestSize(0), [small, large])
    assert ceiling.hold_max == rub("0.9")  # 100 × 0.0001 × 90
    assert ceiling.output_limit(rub("1")) == 5555  # of the large model: 1 / (0.000002 × 90)
    assert evaluate().ceiling(RequestSize(0), [small, None]).hold_max == rub("10")


def test_without_a_known_price_the_default_is_held() -> None:
    ceiling = evaluate().ceiling(RequestSize(10**6), [None])
    assert (ceiling.hold_max, ceiling.available_min) == (rub("10"), rub("10"))
    assert ceiling.output_limit(rub("10")) is None


def test_a_free_model_holds_nothing_but_requires_the_minimum_balance() -> None:
    ceiling = evaluate().ceiling(RequestSize(1000), [Price(Decimal(0), Decimal(0))])
    assert (ceiling.hold_max, ceiling.available_min, ceiling.output_limit(rub("1"))) == (0, rub("1"), None)


@given(st.decimals(0, 99_999, places=30), st.decimals(min_value=Decimal("0.0001"), max_value=100_000, places=4))
def test_the_charge_is_one_rounding_of_the_exact_product(cost: Decimal, rate: Decimal) -> None:
    with localcontext() as context:
        context.prec = 150
        expected = (cost * rate * 10**9).quantize(Decimal(1), ROUND_HALF_UP)
    assert evaluate(rub_per_usd=rate).charge(cost) == int(expected)


@pytest.mark.parametrize(
    ("size", "price", "held"),
    [
        # 1000 × 0.000001 + 100 × 0.000002 dollars, × 90 roubles, unless a higher price applies
        (RequestSize(1000, output_tokens=100), Price(), "0.108"),
        (RequestSize(1000, output_tokens=100, paid_tools=2), Price(), "9.108"),
        (RequestSize(1000, output_tokens=100, paid_tools=1), Price(search_usd=Decimal("0.5")), "45.108"),
        (RequestSize(1000, output_tokens=100, writes_prompt_cache=True), Price(), "0.198"),
        (RequestSize(1000, output_tokens=100), Price(cache_write_usd=Decimal("0.000004")), "0.378"),
        (RequestSize(1000, output_tokens=100, multimodal_output=True), Price(), "0.126"),
        (RequestSize(1000, output_tokens=100, priority_tier=True), Price(), "0.324"),
        (RequestSize(1000, output_tokens=100), Price(media_usd=Decimal(1)), "0.108"),
        (RequestSize(1000, images=1, output_tokens=100), Price(media_usd=Decimal("0.00001")), "8.2908"),
        (RequestSize(1000, has_files=True, output_tokens=100), Price(media_usd=Decimal("0.00001")), "90.018"),
    ],
)
def test_everything_that_raises_the_cost_is_in_the_ceiling(size: RequestSize, price: Price, held: str) -> None:
    assert evaluate().ceiling(size, [price]).hold_max == rub(held)


def test_paid_tools_are_held_for_even_without_a_known_price() -> None:
    assert evaluate().ceiling(RequestSize(1000, paid_tools=2), [None]).hold_max == rub("19")


def test_the_cache_of_tariffs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.money.pricing.TARIFFS_MAX", 2)
    evaluator, prices = evaluate(), [Price(prompt_usd=Decimal(number) / 1000) for number in range(5)]
    ceilings = [evaluator.ceiling(RequestSize(prompt_bytes=1000), [price]) for price in prices]
    assert [evaluator.ceiling(RequestSize(prompt_bytes=1000), [price]) for price in prices] == ceilings
    assert len(evaluator._tariffs) <= 2
