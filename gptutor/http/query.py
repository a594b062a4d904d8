"""Query parameters, checked: error texts name the parameter, its fault and the allowed range (contract B2).

Unknown and repeated parameters are rejected, because a misspelled filter must not return more than was asked for.
"""

import base64
import binascii
import datetime
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from aiohttp import web

from gptutor.errors import ApiError

UTC = datetime.UTC
ONE_DAY = datetime.timedelta(days=1)
DATE_PATTERN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
DATE_MIN = datetime.date(2000, 1, 1)
DATE_MAX = datetime.date(2999, 12, 31)
TEXT_CHARACTERS_MAX = 200
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
CURSOR_TIME_BYTES = 8


@dataclass(frozen=True, slots=True)
class Period:
    """Whole UTC days, the last one included."""

    first: datetime.date
    last: datetime.date

    @property
    def start(self) -> datetime.datetime:
        return datetime.datetime.combine(self.first, datetime.time(), UTC)

    @property
    def end(self) -> datetime.datetime:
        """The start of the day after the last one."""
        return datetime.datetime.combine(self.last, datetime.time(), UTC) + ONE_DAY


class Query:
    """The parameters of a request. `known` are those that it may have. All methods raise ApiError."""

    def __init__(self, request: web.Request, known: Collection[str]) -> None:
        self._values = dict(request.query)
        for name in self._values:
            if name not in known:
                known_names = f"known parameters: {', '.join(known)}" if known else "there are none"
                raise ApiError("invalid_request", f"{name[:40]!r} is not a parameter here; {known_names}")
            if len(request.query.getall(name)) > 1:
                raise ApiError("invalid_request", f"{name} is given more than once")

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and (not 1 <= len(value) <= TEXT_CHARACTERS_MAX or not value.isprintable()):
            raise ApiError("invalid_request", f"{name} must be a text of 1 to {TEXT_CHARACTERS_MAX} printable characters")
        return value

    def integer(self, name: str, *, minimum: int, maximum: int, default: int) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if not re.fullmatch(r"[0-9]{1,18}", value) or not minimum <= int(value) <= maximum:
            raise ApiError("invalid_request", f"{name} must be a whole number from {minimum} to {maximum}")
        return int(value)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """The first of the choices is the default."""
        value = self._values.get(name, choices[0])
        if value not in choices:
            raise ApiError("invalid_request", f"{name} must be one of: {'; '.join(choices)}")
        return value

    def period(self, *, days: int | None = None, days_max: int | None) -> Period:
        """The parameters `from` and `to`. By default the last `days` days up to today, or if `days` is None all days."""
        last = self._date("to") or (DATE_MAX if days is None else datetime.datetime.now(UTC).date())
        first = self._date("from") or (DATE_MIN if days is None else max(DATE_MIN, last - (days - 1) * ONE_DAY))
        if first > last:
            raise ApiError("invalid_request", f"from must not be later than to: {first} is later than {last}")
        if days_max is not None and (last - first).days >= days_max:
            raise ApiError("invalid_request", f"from and to must span at most {days_max} days: {first} to {last} is more")
        return Period(first, last)

    def cursor(self, name: str) -> tuple[datetime.datetime, uuid.UUID] | None:
        """The time and id that `encode_cursor` was given."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            decoded = base64.b64decode(value.encode("ascii"), b"-_", validate=True)
            at = EPOCH + int.from_bytes(decoded[:CURSOR_TIME_BYTES], "big", signed=True) * MICROSECOND
            return at, uuid.UUID(bytes=decoded[CURSOR_TIME_BYTES:])
        except (UnicodeEncodeError, binascii.Error, OverflowError, ValueError):
            raise ApiError("invalid_request", f"{name} must be the next_cursor of an earlier response, unchanged") from None

    def _date(self, name: str) -> datetime.date | None:
        value = self._values.get(name)
        if value is None:
            return None
        try:
            date = datetime.date.fromisoformat(value) if DATE_PATTERN.fullmatch(value) else None
        except ValueError:
            date = None
        if date is None or not DATE_MIN <= date <= DATE_MAX:
            raise ApiError("invalid_request", f"{name} must be a day, such as 2026-01-31, from {DATE_MIN} to {DATE_MAX}")
        return date


def encode_cursor(at: datetime.datetime, entry_id: uuid.UUID) -> str:
    """The position of an entry in a list that is ordered by time and id: 32 opaque characters, safe in a URL."""
    microseconds = (at - EPOCH) // MICROSECOND
    return base64.urlsafe_b64encode(microseconds.to_bytes(CURSOR_TIME_BYTES, "big", signed=True) + entry_id.bytes).decode()
