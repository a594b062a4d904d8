"""Amounts are parsed and printed exactly (contract C1; row money-15)."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money.amounts import (
    NANO_MAX,
    AmbiguousAmount,
    InvalidAmount,
    decimal_text,
    nano_ceiling,
    nano_half_up,
    nano_of,
    parse_roubles,
    roubles,
)


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("100", 100 * 10**9),
        ("99.50", 99_500_000_000),
        ("0.000000001", 1),
        ("-5", -5 * 10**9),
        ("0", 0),
        ("1000000000", NANO_MAX),
    ],
)
def test_an_amount_is_parsed_exactly(text: str, nano: int) -> None:
    assert parse_roubles(text) == nano


@pytest.mark.parametrize(
    "text",
    ["", "ten", "NaN", "Infinity", "-Infinity", "1e1000000", "1e-1000000", "0.0000000001", "1000000000.1", "1,5,0", "9" * 50],
)
def test_an_invalid_amount_is_rejected_with_a_sentence(text: str) -> None:
    with pytest.raises(InvalidAmount, match=r"roubles|decimal places"):
        parse_roubles(text)


@given(st.integers(-NANO_MAX, NANO_MAX))
def test_a_printed_amount_parses_to_itself(nano: int) -> None:
    assert parse_roubles(roubles(nano)) == nano
    assert "e" not in roubles(nano).lower()


@pytest.mark.parametrize(
    ("exact", "rounded"),
    [("0.0000000005", 1), ("0.00000000049999999999999999999999999999999", 0), ("0.0000000015", 2), ("1", 10**9)],
)
def test_a_charge_is_rounded_once_and_half_up(exact: str, rounded: int) -> None:
    assert nano_half_up(Decimal(exact)) == rounded


def test_a_ceiling_is_rounded_up() -> None:
    assert nano_ceiling(Decimal("0.00000000000000000001")) == 1
    assert nano_ceiling(Decimal(0)) == 0


@pytest.mark.parametrize(
    "text",
    ["1e3", "1_0", "1__0", "１００", "٣", " 7", "7 ", "1\n", "\xa01", "5e-9", "0x1", ".5", ",5", "1.", "1,", "1,5.0", "--1"],
)
def test_only_a_plain_decimal_is_an_amount(text: str) -> None:
    with pytest.raises(InvalidAmount):
        parse_roubles(text)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1,5", "1.5"), ("-0,000000001", "-0.000000001"), ("0,125", "0.125"), ("1,0000", "1"), ("1234,567", "1234.567")],
)
def test_a_comma_is_a_decimal_separator(text: str, amount: str) -> None:
    assert roubles(parse_roubles(text)) == amount


@pytest.mark.parametrize(
    "text",
    [
        "1,000",
        "-12,345",
        "+999,999",
        "1,000.5",
        "1.000,5",
        "1,000,000",
        "1.000.000",
        "1 000",
        "1\u00a0000,50",
        "1\u202f000",
        "1'000.00",
    ],
)
def test_an_amount_that_may_be_a_thousand_times_as_much_is_rejected(text: str) -> None:
    with pytest.raises(AmbiguousAmount, match=r"is ambiguous: write a thousand and a half as 1000\.5"):
        parse_roubles(text)


@pytest.mark.parametrize("number", ["1e-999", "1e999", "1e-999999999", "1e999999999", "NaN", "0e-999", "1e-10", "1e10"])
def test_a_json_number_that_is_no_amount_is_quoted_as_it_is_and_never_expanded(number: str) -> None:
    with pytest.raises(InvalidAmount) as caught:
        nano_of(Decimal(number))
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("number", "text"),
    [("9e-8", "0.00000009"), ("1E+2", "100"), ("0", "0"), ("1.2300", "1.2300"), ("1e-999", "1E-999"), ("-2e-999999", "-2E-999999"),
     ("1e999999999", "1E+999999999")],
)  # fmt: skip
def test_a_decimal_is_shown_in_full_unless_that_would_be_long(number: str, text: str) -> None:
    assert decimal_text(Decimal(number)) == text
    assert Decimal(text) == Decimal(number)


def test_a_sum_of_a_cost_and_a_tiny_one_is_shown_without_the_tiny_one() -> None:
    assert decimal_text(Decimal("0.000093" + "0" * 900 + "1")) == "0.000093"
