"""The limits of an API key: changing some of them, and checking what they are changed to. No I/O."""

import datetime
from typing import TypedDict

from gptutor.money.amounts import NANO_MAX, Nano, roubles
from gptutor.money.keyring import KeyLimits, LimitReset

NAME_MAX = 100
REQUESTS_PER_MINUTE_MAX = 1_000_000
EXPIRY_MAX = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)


class InvalidLimit(ValueError):
    """A limit is malformed or out of range; the text is a sentence."""


class KeyLimitChanges(TypedDict, total=False):
    """The limits to change: an absent one stays as it is, None lifts it (`limit_reset` None: the limit never resets)."""

    limit: Nano | None
    limit_reset: LimitReset | None
    requests_per_minute: int | None
    expires_at: datetime.datetime | None


def changed_limits(limits: KeyLimits, changes: KeyLimitChanges, limit_min: Nano) -> KeyLimits:
    """The limits after the changes. Lifting `limit` lifts `limit_reset` with it. Raises InvalidLimit."""
    require_usable(changes.get("limit"), limit_min)
    limit = changes.get("limit", limits.limit)
    limit_reset = changes.get("limit_reset", limits.limit_reset)
    if limit is None:
        if changes.get("limit_reset") is not None:
            raise InvalidLimit("limit_reset needs a limit; set limit as well")
        limit_reset = None
    requests_per_minute = changes.get("requests_per_minute", limits.requests_per_minute)
    if requests_per_minute is not None and not 1 <= requests_per_minute <= REQUESTS_PER_MINUTE_MAX:
        raise InvalidLimit(f"requests_per_minute must be from 1 to {REQUESTS_PER_MINUTE_MAX}, not {requests_per_minute}")
    return KeyLimits(changes.get("expires_at", limits.expires_at), limit, limit_reset, requests_per_minute)


def require_usable(limit: Nano | None, limit_min: Nano) -> None:
    """Raises InvalidLimit for a limit that no request fits into: each needs `limit_min`, the minimum balance."""
    if limit is not None and not limit_min <= limit <= NANO_MAX:
        raise InvalidLimit(
            f"limit must be from {roubles(limit_min)}, which each request needs, to {roubles(NANO_MAX)} roubles, "
            f"not {roubles(limit)}; without a limit the key may spend the whole balance"
        )


def parse_expiry(text: str) -> datetime.datetime:
    """`2026-12-31` is the end of that day in UTC; otherwise a time with its time zone. Raises InvalidLimit."""
    try:
        if len(text) == 10:
            expires_at = datetime.datetime.combine(datetime.date.fromisoformat(text), datetime.time(), datetime.UTC)
            expires_at += datetime.timedelta(days=1)
        else:
            expires_at = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise InvalidLimit(
            f"expires_at must be a day such as 2026-12-31, or a time such as 2026-12-31T18:00:00+03:00, not {text[:40]!r}"
        ) from error
    if expires_at.tzinfo is None:
        raise InvalidLimit(f"expires_at must name its time zone, such as +03:00 or Z, not {text[:40]!r}")
    if not datetime.datetime.now(datetime.UTC) < expires_at < EXPIRY_MAX:
        raise InvalidLimit(f"expires_at must be in the future and before the year {EXPIRY_MAX.year}, not {text[:40]!r}")
    return expires_at
