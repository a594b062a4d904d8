"""Ceilings and charges (contract C1, C4)."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money.amounts import Nano, parse_roubles
from gptutor.money.pricing import LLMCostEvaluate, PriceCap, RequestSize


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


def test_without_a_limit_the_hold_is_between_the_fewest_tokens_and_all() -> None:
    ceiling = evaluate().ceiling(RequestSize(prompt_bytes=1000), [Price()])
    assert (ceiling.hold_min, ceiling.available_min, ceiling.hold_max) == (rub("0.09288"), rub("1"), rub("1.89"))


def test_a_hold_is_at_least_a_tenth_of_the_minimum_balance() -> None:
    assert evaluate().ceiling(RequestSize(1, output_tokens=1), [Price()]).hold_max == rub("0.1")


def test_a_hold_fits_into_the_database() -> None:
    dear = Price(completion_usd=Decimal(1000), output_tokens_max=10**9)
    assert evaluate().ceiling(RequestSize(1, choices=128), [dear]).hold_max == 10**18


@pytest.mark.parametrize(("held", "limit"), [("1.89", None), ("1.889999999", 9999), ("1", 5055), ("0.09288", 16), ("2", None)])
def test_the_output_limit_is_what_the_hold_covers(held: str, limit: int | None) -> None:
    ceiling = evaluate(balance_min_rub=Decimal(0)).ceiling(RequestSize(prompt_bytes=1000), [Price()])
    assert ceiling.output_limit(rub(held)) == limit


@given(
    st.integers(0, 10_000_000),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.integers(1, 8),
    st.integers(0, 5),
    st.decimals(0, 1, places=9),
    st.decimals(0, 1, places=9),
    st.integers(1, 10**15),
)
def test_a_hold_covers_whatever_the_request_can_cost(
    prompt: int, limit: int | None, choices: int, media: int, prompt_usd: Decimal, completion_usd: Decimal, available: int
) -> None:
    price = Price(prompt_usd, completion_usd, image_usd=Decimal("0.01"), context_tokens=10**9)
    ceiling = evaluate(margin=Decimal("1.1")).ceiling(RequestSize(prompt, media, False, choices, limit), [price])
    if available < ceiling.available_min:
        return
    least = ceiling.hold_max if ceiling.hold_min is None else ceiling.hold_min
    held = Nano(min(ceiling.hold_max, least + (available - least) // 8))  # as in place_holds
    sent = ceiling.output_limit(held)
    tokens = min(token for token in (sent, limit, 10_000) if token is not None)
    worst_usd = (prompt + media * 8192) * prompt_usd + media * Decimal("0.01") + tokens * choices * completion_usd
    assert evaluate().charge(worst_usd) <= held <= available
    assert sent is None or sent >= 16


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
    assert ceiling.hold_max == rub("10.8")  # 60 000 × 0.000002 × 90
    assert ceiling.hold_min == rub("0.144")  # 16 × 0.0001 × 90
    assert ceiling.output_limit(rub("1")) == 5555  # of the large model: 1 / (0.000002 × 90)
    assert ceiling.output_limit(rub("0.5")) == 55  # of the small one: 0.5 / (0.0001 × 90)
    assert evaluate().ceiling(RequestSize(0, output_tokens=1), [small, Price(request_usd=Decimal(1))]).hold_max == rub("90.00018")


def test_a_price_that_is_not_listed_is_bounded_by_a_cap() -> None:
    ceiling = evaluate().ceiling(RequestSize(1000, output_tokens=100), [None])
    assert ceiling.price_cap == PriceCap(Decimal("0.000005"), Decimal("0.000025"), Decimal("0.05"))
    assert ceiling.hold_max == rub("15.175")  # 10 + (1000 × 0.000005 + 100 × 0.000025 + 0.05) × 90
    assert evaluate().ceiling(RequestSize(0), [Price(), None]).hold_min == evaluate().ceiling(RequestSize(0), [None]).hold_min
    assert evaluate().ceiling(RequestSize(1000), [Price()]).price_cap is None


def test_a_cap_lets_the_listed_providers_of_every_model_pass() -> None:
    dear = Price(base_prompt_usd=Decimal(1), base_completion_usd=Decimal("0.00001"), request_usd=Decimal("0.5"))
    assert evaluate().ceiling(RequestSize(0), [dear, None]).price_cap == PriceCap(Decimal(1), Decimal("0.000025"), Decimal("0.5"))


def test_a_chosen_provider_may_cost_more_than_the_listed() -> None:
    size = RequestSize(1000, output_tokens=100, chooses_provider=True)
    ceiling = evaluate().ceiling(size, [Price(request_usd=Decimal("0.01"))])
    assert ceiling.price_cap == PriceCap(Decimal("0.000003"), Decimal("0.000006"), Decimal("0.03"))
    assert ceiling.hold_max == rub("3.024")  # (1000 × 0.000003 + 100 × 0.000006 + 0.03) × 90
    long = Price(prompt_usd=Decimal("0.000002"))  # from some length on; the cap is compared with the base price
    assert evaluate().ceiling(size, [long]).hold_max == rub("0.594")
    assert evaluate().ceiling(size, [None]).price_cap == evaluate().ceiling(RequestSize(0), [None]).price_cap


def test_with_a_common_cap_a_cheap_model_may_be_as_dear_as_the_others() -> None:
    cheap, dear = Price(output_tokens_max=10**6), Price(base_completion_usd=Decimal("0.001"), output_tokens_max=1)
    size = RequestSize(0, output_tokens=1000, chooses_provider=True)
    assert evaluate().ceiling(size, [cheap, dear]).hold_max == rub("270")  # 1000 × 0.001 × 3 × 90


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
        (RequestSize(1000, output_tokens=100, paid_tools=2), Price(), "9.288"),  # and 1000 tokens of results of each
        (RequestSize(1000, output_tokens=100, paid_tools=1), Price(search_usd=Decimal("0.5")), "45.198"),
        # The prompt of 1000 tokens is read three times, with 1000 and 2000 tokens of results; an output three times, and read thrice
        (RequestSize(1000, output_tokens=100, server_tools=1), Price(), "9.621"),
        (RequestSize(1000, output_tokens=100, server_tools=1, tool_steps=1), Price(), "4.815"),
        (RequestSize(100_000, output_tokens=1, server_tools=1, tool_steps=1), Price(), "22.50045"),  # twice the whole context
        (RequestSize(1000, output_tokens=100), Price(searches=True), "4.608"),
        (RequestSize(0, output_tokens=1), Price(searches=True, researches=True, search_usd=Decimal("0.01")), "40.50018"),
        (RequestSize(1000, output_tokens=100, documents=2), Price(), "360.108"),
        (RequestSize(1000, output_tokens=100, documents=2), Price(reads_documents=True), "0.108"),
        (RequestSize(1000, output_tokens=100, documents=2, has_paid_ocr=True), Price(reads_documents=True), "360.108"),
        (RequestSize(1000, output_tokens=100, documents=2, has_paid_ocr=False), Price(), "0.108"),
        (RequestSize(1000, output_tokens=100, reasoning_tokens=400), Price(), "0.18"),
        (RequestSize(1000, output_tokens=100, reasoning_tokens=10**6), Price(), "1.89"),
        (RequestSize(1000, output_tokens=100, prediction_bytes=400), Price(), "0.18"),
        (RequestSize(1000, output_tokens=100, has_unlisted_prices=True), Price(), "10.108"),
        (RequestSize(1000, output_tokens=100, choices=2), Price(has_unlisted_prices=True), "20.126"),
        (RequestSize(1000, output_tokens=100), Price(outputs_media=True), "0.468"),  # and 1000 tokens at 0.000004 dollars
        (RequestSize(1000, output_tokens=100, choices=2), Price(outputs_media=True, output_tokens_max=500), "0.486"),
        (RequestSize(1000, output_tokens=100, writes_prompt_cache=True), Price(), "0.198"),
        (RequestSize(1000, output_tokens=100), Price(cache_write_usd=Decimal("0.000004")), "0.378"),
        (RequestSize(1000, output_tokens=100, multimodal_output=True), Price(), "0.468"),
        (RequestSize(1000, output_tokens=100, priority_tier=True), Price(), "0.324"),
        (RequestSize(1000, output_tokens=100), Price(media_usd=Decimal(1)), "0.108"),
        (RequestSize(1000, images=1, output_tokens=100), Price(media_usd=Decimal("0.00001")), "8.2908"),
        (RequestSize(1000, has_files=True, output_tokens=100), Price(media_usd=Decimal("0.00001")), "90.018"),
    ],
)
def test_everything_that_raises_the_cost_is_in_the_ceiling(size: RequestSize, price: Price, held: str) -> None:
    assert evaluate().ceiling(size, [price]).hold_max == rub(held)


def test_a_limit_leaves_room_for_an_answer_after_the_reasoning() -> None:
    ceiling = evaluate(balance_min_rub=Decimal(0)).ceiling(RequestSize(0, reasoning_tokens=1000), [Price()])
    assert ceiling.hold_min == rub("0.36288")  # (1000 + 1016) × 0.000002 × 90: whether the limit counts the reasoning or not
    assert ceiling.output_limit(rub("0.36288")) == 1016
    assert (ceiling.hold_max, ceiling.output_limit(ceiling.hold_max)) == (rub("1.8"), None)


def test_the_limit_of_tool_steps_is_told() -> None:
    assert evaluate().ceiling(RequestSize(0, server_tools=1), [Price(), Price()]).tool_steps == 2
    assert evaluate().ceiling(RequestSize(0, server_tools=1, tool_steps=1, output_tokens=1), [Price()]).tool_steps == 1
    assert evaluate().ceiling(RequestSize(0, tool_steps=1), [Price()]).tool_steps is None


def test_the_cache_of_tariffs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.money.pricing.TARIFFS_MAX", 2)
    evaluator, prices = evaluate(), [Price(prompt_usd=Decimal(number) / 1000) for number in range(5)]
    ceilings = [evaluator.ceiling(RequestSize(prompt_bytes=1000), [price]) for price in prices]
    assert [evaluator.ceiling(RequestSize(prompt_bytes=1000), [price]) for price in prices] == ceilings
    assert len(evaluator._tariffs) <= 2
