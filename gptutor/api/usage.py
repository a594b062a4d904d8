"""`GET /v1/credits`, `/v1/usage`, `/v1/usage/totals` and `/v1/generation`: what the caller's account has and spent (contract D5).

Answers are in OpenRouter's envelope, `{"data": …}`. Amounts are decimal strings, exact: a number in JSON is a double to most
readers, and nano-roubles do not fit. Times are ISO 8601 in UTC. Whose account it is says the key, never a parameter.
"""

import datetime
from decimal import Decimal
from typing import Any

from aiohttp import web

from gptutor.api.auth import USER
from gptutor.errors import ApiError
from gptutor.http.health import DATABASE
from gptutor.http.json_response import answer
from gptutor.http.query import Query, cursor_of
from gptutor.money.amounts import roubles
from gptutor.money.usage import NoSuchRequest, RequestRecord, Total, Usage, UsageEntry

LIMIT = 100
LIMIT_MAX = 1000
DAYS = 30
DAYS_MAX = {"day": 366, "model": 366, "day,model": 31}
"""What totals are made for, and of how many days at most: a day may have hundreds of models."""


async def show_credits(request: web.Request) -> web.Response:
    Query(request, ())
    money = await Usage(request.app[DATABASE]).credits(request[USER].account_id)
    shown = {
        "balance": roubles(money.balance),
        "held": roubles(money.held),
        "available": roubles(money.balance - money.held),
        "total_spent": roubles(money.spent),
        "currency": "RUB",
    }
    return answer({"data": shown})


async def list_usage(request: web.Request) -> web.Response:
    query = Query(request, ("limit", "cursor", "from", "to", "model"))
    limit = query.whole("limit", least=1, most=LIMIT_MAX, default=LIMIT)
    period = query.period(days_max=None)
    before = min(period.end, query.place("cursor") or period.end)
    entries = await Usage(request.app[DATABASE]).entries(
        request[USER].account_id, before=before, since=period.begin, limit=limit + 1, model=query.text("model")
    )
    shown = entries[:limit]
    next_cursor = cursor_of(shown[-1].place) if len(entries) > limit else None
    return answer({"data": [entry_as_json(entry) for entry in shown], "next_cursor": next_cursor})


async def sum_usage(request: web.Request) -> web.Response:
    query = Query(request, ("from", "to", "by"))
    by = query.choice("by", tuple(DAYS_MAX))
    period = query.period(days=DAYS, days_max=DAYS_MAX[by])
    totals = await Usage(request.app[DATABASE]).totals(
        request[USER].account_id, period.first, period.last, by_day="day" in by, by_model="model" in by
    )
    return answer({"data": [total_as_json(total) for total in totals], "from": period.first, "to": period.last, "by": by})


async def show_generation(request: web.Request) -> web.Response:
    name = Query(request, ("id",)).text("id")
    if name is None:
        raise ApiError("invalid_request", "id is required: a request id, or OpenRouter's id of a generation")
    try:
        found = await Usage(request.app[DATABASE]).request(request[USER].account_id, name)
    except NoSuchRequest:
        raise ApiError("not_found", "No request of this account has this id") from None
    return answer({"data": request_as_json(found)})


def entry_as_json(entry: UsageEntry) -> dict[str, Any]:
    return {
        "id": entry.entry_id,
        "created_at": utc(entry.created_at),
        "kind": entry.kind,
        "reason": entry.reason,
        "amount": roubles(entry.amount),
        "model": entry.model,
        "cost_usd": plain(entry.cost_usd),
        "rate": plain(entry.rub_per_usd),
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "generation_id": entry.generation_id,
        "request_id": entry.request_id,
        "key": entry.key,
    }


def total_as_json(total: Total) -> dict[str, Any]:
    return {
        **({} if total.day is None else {"day": total.day}),
        **({} if total.model is None else {"model": total.model}),
        "requests": total.requests,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cost_usd": plain(total.cost_usd),
        "amount": roubles(total.charge),
    }


def request_as_json(request: RequestRecord) -> dict[str, Any]:
    return {
        "id": request.hold_id,
        "request_id": request.request_id,
        "generation_id": request.generation_id,
        "model": request.model,
        "state": request.state,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "cost_usd": plain(request.cost_usd),
        "rate": plain(request.rub_per_usd),
        "charged": None if request.charge is None else roubles(request.charge),
        "held": roubles(request.held),
        "created_at": utc(request.created_at),
        "closed_at": utc(request.closed_at),
        "key": request.key,
    }


def plain(number: Decimal | None) -> str | None:
    """Never in exponent form."""
    return None if number is None else f"{number:f}"


def utc(moment: datetime.datetime | None) -> str | None:
    """`2026-11-24T09:30:00.000000Z`: always of one width, so that texts sort as times do."""
    return None if moment is None else f"{moment.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
