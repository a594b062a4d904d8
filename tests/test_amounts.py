"""Amounts are parsed and printed exactly (contract C1; row money-15)."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money.amounts import NANO_MAX, InvalidAmount, nano_ceiling, nano_half_up, parse_positive, parse_roubles, roubles


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
    ["", "ten", "NaN", "Infinity", "-Infinity", "1e1000000", "1e-1000000", "0.0000000001", "1000000000.1", "1,5", "9" * 50],
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
    "text", ["1e3", "1_0", "1__0", "１００", "٣", " 7", "7 ", "1\n", "\xa01", "5e-9", "0x1", ".5", "1.", "1,5", "--1"]
)
def test_only_a_plain_decimal_is_an_amount(text: str) -> None:
    with pytest.raises(InvalidAmount):
        parse_roubles(text)


@pytest.mark.parametrize(("text", "or_zero"), [("-1", False), ("-1", True), ("0", False)])
def test_an_amount_to_give_or_take_is_positive(text: str, or_zero: bool) -> None:
    with pytest.raises(InvalidAmount, match="must be zero or more" if or_zero else "must be more than zero"):
        parse_positive(text, or_zero=or_zero)
    assert parse_positive("0", or_zero=True) == 0
    assert parse_positive("0.5") == 500_000_000
