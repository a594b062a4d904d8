"""The limits of a key as a person writes them: a cap in roubles, a day or a moment of its end. No I/O."""

import datetime
from typing import TypedDict

from gptutor.money.amounts import parse_positive
from gptutor.money.keyring import CapPeriod, KeyLimits

NAME_MAX = 100
PER_MINUTE_MAX = 1_000_000
LAST = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)


class InvalidLimit(ValueError):
    """A limit is not one; the text is a sentence."""


class KeyLimitChanges(TypedDict, total=False):
    """What is to be changed, as it is written; what is not here stays, and None lifts a limit."""

    cap: str | None
    cap_period: CapPeriod | None
    expires: str | None
    per_minute: int | None


def changed(limits: KeyLimits, changes: KeyLimitChanges) -> KeyLimits:
    """The limits after the changes; the period of a new cap is `total` unless it is said. Raises InvalidAmount, InvalidLimit."""
    cap, period, end, pace = limits.cap, limits.cap_period, limits.expires_at, limits.per_minute
    if "cap" in changes:
        cap = None if changes["cap"] is None else parse_positive(changes["cap"], or_zero=True)
    if changes.get("cap_period") is not None:
        if cap is None:
            raise InvalidLimit("A period needs a cap")
        period = changes["cap_period"]
    if "expires" in changes:
        end = None if changes["expires"] is None else end_of(changes["expires"])
    if "per_minute" in changes:
        pace = None if changes["per_minute"] is None else pace_of(changes["per_minute"])
    return KeyLimits(end, cap, None if cap is None else period or "total", pace)


def end_of(text: str) -> datetime.datetime:
    """`2026-12-31` is the end of that day, UTC; otherwise a moment with its zone. Raises InvalidLimit."""
    try:
        if len(text) == 10:
            moment = datetime.datetime.combine(datetime.date.fromisoformat(text), datetime.time(), datetime.UTC)
            moment += datetime.timedelta(days=1)
        else:
            moment = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise InvalidLimit(
            f"{text[:40]!r} is not a day such as 2026-12-31, or a moment such as 2026-12-31T18:00:00+03:00"
        ) from error
    if moment.tzinfo is None:
        raise InvalidLimit(f"{text[:40]!r} does not say of which time zone it is, such as +03:00 or Z")
    if not datetime.datetime.now(datetime.UTC) < moment < LAST:
        raise InvalidLimit(f"{text[:40]!r} is in the past, or too far ahead")
    return moment


def pace_of(number: int) -> int:
    """Raises InvalidLimit."""
    if not 1 <= number <= PER_MINUTE_MAX:
        raise InvalidLimit(f"A key has from 1 to {PER_MINUTE_MAX} requests per minute, not {number}")
    return number
