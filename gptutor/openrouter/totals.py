"""What OpenRouter charged us, by day."""

import datetime
from decimal import Decimal

import msgspec

from gptutor.openrouter.bill import parse_usd
from gptutor.openrouter.service import UpstreamLimits, connected


async def totals(base_url: str, api_key: str, management_key: str = "", *, proxy: str = "") -> dict[datetime.date, Decimal]:
    """Dollars by UTC day, as OpenRouter states them: today from `/key`, and, with a management key, earlier days from
    `/activity`.

    Raises UpstreamError.
    """
    today = datetime.datetime.now(datetime.UTC).date()
    limits = UpstreamLimits(connect_s=10, total_s=30, first_byte_s=30, idle_s=30, end_s=30, attempts_max=1)
    days: dict[datetime.date, Decimal] = {}
    async with connected(base_url, api_key, limits, referer="", title="", connections_max=2, proxy=proxy) as service:
        key = msgspec.json.decode(await service.get("/key"), type=_KeyResponse).data
        days[today] = parse_usd(bytes(key.usage_daily)) or Decimal(0)
    if management_key:
        async with connected(base_url, management_key, limits, referer="", title="", connections_max=2, proxy=proxy) as service:
            for row in msgspec.json.decode(await service.get("/activity"), type=_ActivityResponse).data:
                day = datetime.date.fromisoformat(row.date[:10])
                if day < today:
                    days[day] = days.get(day, Decimal(0)) + (parse_usd(bytes(row.usage)) or Decimal(0))
    return days


class _Key(msgspec.Struct):
    usage_daily: msgspec.Raw = msgspec.Raw(b"0")


class _KeyResponse(msgspec.Struct):
    data: _Key


class _Activity(msgspec.Struct):
    date: str
    usage: msgspec.Raw = msgspec.Raw(b"0")


class _ActivityResponse(msgspec.Struct):
    data: list[_Activity]
