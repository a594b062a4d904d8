"""The parameters of a question, checked: what is wrong is told by name, fault and range, and nothing is ignored (contract B2).

A list that says what was spent must not be a wider one than was asked for: unknown and repeated parameters are refused.
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
from gptutor.money.usage import Cursor

UTC = datetime.UTC
DAY = datetime.timedelta(days=1)
DAY_FORM = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
FIRST_DAY = datetime.date(2000, 1, 1)
LAST_DAY = datetime.date(2999, 12, 31)
TEXT_CHARACTERS_MAX = 200
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
TIME_BYTES = 8


@dataclass(frozen=True, slots=True)
class Period:
    """Whole UTC days, the last one included."""

    first: datetime.date
    last: datetime.date

    @property
    def begin(self) -> datetime.datetime:
        return datetime.datetime.combine(self.first, datetime.time(), UTC)

    @property
    def end(self) -> Cursor:
        """Where the day after begins."""
        return Cursor(datetime.datetime.combine(self.last, datetime.time(), UTC) + DAY, uuid.UUID(int=0))


class Query:
    """All methods raise ApiError."""

    def __init__(self, request: web.Request, known: Collection[str]) -> None:
        self._values = dict(request.query)
        for name in self._values:
            if name not in known:
                known_names = f"known are {', '.join(known)}" if known else "there are none"
                raise ApiError("invalid_request", f"{name[:40]!r} is not a parameter here; {known_names}")
            if len(request.query.getall(name)) > 1:
                raise ApiError("invalid_request", f"{name} is given more than once")

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and (not 1 <= len(value) <= TEXT_CHARACTERS_MAX or not value.isprintable()):
            raise ApiError("invalid_request", f"{name} must be a text of 1 to {TEXT_CHARACTERS_MAX} printable characters")
        return value

    def whole(self, name: str, *, least: int, most: int, default: int) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if not re.fullmatch(r"[0-9]{1,18}", value) or not least <= int(value) <= most:
            raise ApiError("invalid_request", f"{name} must be a whole number from {least} to {most}")
        return int(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """The first of the choices is the default."""
        value = self._values.get(name, choices[0])
        if value not in choices:
            raise ApiError("invalid_request", f"{name} must be one of: {'; '.join(choices)}")
        return value

    def period(self, *, days: int | None = None, days_max: int | None) -> Period:
        """`from` and `to`. Without them: `days` days up to today, or where `days` is None all that there is."""
        last = self._day("to") or (LAST_DAY if days is None else datetime.datetime.now(UTC).date())
        first = self._day("from") or (FIRST_DAY if days is None else max(FIRST_DAY, last - (days - 1) * DAY))
        if first > last:
            raise ApiError("invalid_request", f"from must not be later than to: {first} is later than {last}")
        if days_max is not None and (last - first).days >= days_max:
            raise ApiError("invalid_request", f"from and to must span at most {days_max} days: {first} to {last} is more")
        return Period(first, last)

    def place(self, name: str) -> Cursor | None:
        """What `cursor_of` wrote."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            spelt = base64.b64decode(value.encode("ascii"), b"-_", validate=True)
            moment = EPOCH + int.from_bytes(spelt[:TIME_BYTES], "big", signed=True) * MICROSECOND
            place = Cursor(moment, uuid.UUID(bytes=spelt[TIME_BYTES:]))
        except (UnicodeEncodeError, binascii.Error, OverflowError, ValueError):
            raise ApiError("invalid_request", f"{name} must be the next_cursor of an earlier answer, unchanged") from None
        return place

    def _day(self, name: str) -> datetime.date | None:
        value = self._values.get(name)
        if value is None:
            return None
        try:
            day = datetime.date.fromisoformat(value) if DAY_FORM.fullmatch(value) else None
        except ValueError:
            day = None
        if day is None or not FIRST_DAY <= day <= LAST_DAY:
            raise ApiError("invalid_request", f"{name} must be a day, such as 2026-01-31, from {FIRST_DAY} to {LAST_DAY}")
        return day


def cursor_of(place: Cursor) -> str:
    """A place, opaque: 32 characters that need no escaping in a URL."""
    moment = (place.created_at - EPOCH) // MICROSECOND
    return base64.urlsafe_b64encode(moment.to_bytes(TIME_BYTES, "big", signed=True) + place.entry_id.bytes).decode()
