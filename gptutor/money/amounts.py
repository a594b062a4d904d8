"""Roubles as integers: one rouble is 1 000 000 000 nano-roubles, and every amount is a whole number of nano-roubles."""

import re
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_HALF_UP, Context, Decimal, InvalidOperation
from typing import NewType

AccountId = NewType("AccountId", int)
Nano = NewType("Nano", int)
"""An amount in nano-roubles."""

NANO_PER_RUB = 10**9
NANO_MAX = Nano(10**18)
"""The largest single amount: 10^9 roubles. Sums of such amounts fit into BIGINT (9.2 × 10^18)."""

# 200 digits: no product of a price, a token count and an exchange rate is rounded before the one intended rounding.
EXACT = Context(prec=200, traps=[InvalidOperation])

PLAIN_DECIMAL = re.compile(r"[+-]?[0-9]{1,13}(?:[.,][0-9]{1,20})?")
THOUSANDS = re.compile(
    r"[+-]?[1-9][0-9]{0,2}"
    r"(?:,[0-9]{3}"
    r"|[ '\u00a0\u202f][0-9]{3}"
    r"|(?:[ ,.'\u00a0\u202f][0-9]{3}){2,}"
    r"|(?:[ ,.'\u00a0\u202f][0-9]{3})+[.,][0-9]+)"
)
"""`1,000` may be a thousand or one; the other forms have separators of thousands. `0,125` and `1,5` are clear."""

PLACES_MAX = 60
"""Of a decimal that is shown in full; OpenRouter's costs have about twenty."""
SHOWN = Context(prec=PLACES_MAX, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


class InvalidAmount(ValueError):
    """The text is not a valid amount in roubles; the message says why."""


class AmbiguousAmount(InvalidAmount):
    """The text may be one amount or a thousand times as much."""


def parse_decimal(text: str) -> Decimal:
    """A plain decimal: `"99.5"`, or `"99,5"`. Raises InvalidAmount."""
    if THOUSANDS.fullmatch(text):
        raise AmbiguousAmount(
            f"{text[:40]!r} is ambiguous: write a thousand and a half as 1000.5, and one as 1, without more separators"
        )
    if not PLAIN_DECIMAL.fullmatch(text):  # Decimal also accepts 1_0, exponents, and the digits of every script
        raise InvalidAmount(f"{text[:40]!r} is not an amount in roubles, such as 100 or 99.50")
    return Decimal(text.replace(",", "."))


def parse_roubles(text: str) -> Nano:
    """`"99.5"` → 99 500 000 000. Raises InvalidAmount for anything but a plain decimal with at most nine places."""
    amount = parse_decimal(text)
    scaled = EXACT.multiply(amount, Decimal(NANO_PER_RUB))
    nano = int(scaled)
    if scaled != nano:
        raise InvalidAmount(f"{text[:40]!r} has more than nine decimal places")
    if abs(nano) > NANO_MAX:
        raise InvalidAmount(f"{text[:40]!r} is more than {NANO_MAX // NANO_PER_RUB} roubles")
    return Nano(nano)


def nano_of(amount: Decimal) -> Nano:
    """Roubles as a JSON number, `1e3` included → nano-roubles. Raises InvalidAmount."""
    # The exponent is checked before any arithmetic: 1e1000000 has a million digits.
    if not amount.is_finite() or abs(amount.adjusted()) > 12:
        raise InvalidAmount(f"{str(amount)[:40]} is not an amount in roubles, such as 100 or 99.50")
    return parse_roubles(f"{amount:f}")


def roubles(nano: int) -> str:
    """Nano-roubles as a decimal string in roubles: 99 500 000 000 → `"99.5"`. Exact, never in exponent form."""
    sign = "-" if nano < 0 else ""
    whole, fraction = divmod(abs(nano), NANO_PER_RUB)
    return f"{sign}{whole}.{fraction:09d}".rstrip("0").rstrip(".")


def decimal_text(number: Decimal) -> str:
    """`0.00000009`, exactly; beyond PLACES_MAX places with an exponent, `1E-999`, and at most so many significant digits."""
    if number.adjusted() <= PLACES_MAX and -int(number.as_tuple().exponent) <= PLACES_MAX:
        return f"{number:f}"
    return str(SHOWN.normalize(number))


def nano_half_up(roubles_exact: Decimal) -> Nano:
    """Roubles → nano-roubles, rounded half up: the only rounding of a charge."""
    return Nano(int(EXACT.multiply(roubles_exact, Decimal(NANO_PER_RUB)).quantize(Decimal(1), ROUND_HALF_UP, EXACT)))


def nano_ceiling(roubles_exact: Decimal) -> Nano:
    """Roubles → nano-roubles, rounded up: for ceilings, never for charges."""
    return Nano(int(EXACT.multiply(roubles_exact, Decimal(NANO_PER_RUB)).quantize(Decimal(1), ROUND_CEILING, EXACT)))
