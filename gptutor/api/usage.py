"""`GET /v1/credits`, `/v1/usage`, `/v1/usage/totals` and `/v1/generation`: the account's balance and spending (contract D5).

Responses are in OpenRouter's envelope, `{"data": …}`. Amounts are exact decimal strings, because most clients read a JSON number
as a double, which cannot hold nano-roubles. The account is always the authenticated one, never a parameter.
"""

import uuid
from decimal import Decimal
from typing import Any

from aiohttp import web

from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE, USER
from gptutor.http.query import Query, encode_cursor
from gptutor.http.responses import json_response, timestamp
from gptutor.money.amounts import decimal_text, roubles
from gptutor.money.usage import Cursor, NoSuchRequest, RequestRecord, Total, Usage, UsageEntry

PAGE = 100
PAGE_MAX = 1000
DAYS = 30
DAYS_MAX = {"day": 366, "model": 366, "day,model": 31}
"""The groupings of totals, and the most days of each: one day may have hundreds of models."""


async def show_credits(request: web.Request) -> web.Response:
    Query(request, ())
    money = await Usage(request.app[DATABASE]).credits(request[USER].account_id)
    return json_response(
        {
            "data": {
                "balance": roubles(money.balance),
                "held": roubles(money.held),
                "available": roubles(money.balance - money.held),
                "total_spent": roubles(money.spent),
                "currency": "RUB",
            }
        }
    )


async def list_usage(request: web.Request) -> web.Response:
    """Newest first."""
    query = Query(request, ("limit", "cursor", "from", "to", "model"))
    limit = query.integer("limit", minimum=1, maximum=PAGE_MAX, default=PAGE)
    period = query.period(days_max=None)
    before = Cursor(period.end, uuid.UUID(int=0))
    if (cursor := query.cursor("cursor")) is not None:
        before = min(before, Cursor(*cursor))
    entries = await Usage(request.app[DATABASE]).entries(
        request[USER].account_id, before=before, since=period.start, limit=limit + 1, model=query.text("model")
    )
    page = entries[:limit]
    next_cursor = encode_cursor(*page[-1].place) if len(entries) > limit else None
    return json_response({"data": [entry_json(entry) for entry in page], "next_cursor": next_cursor})


async def sum_usage(request: web.Request) -> web.Response:
    query = Query(request, ("from", "to", "by"))
    by = query.one_of("by", tuple(DAYS_MAX))
    period = query.period(days=DAYS, days_max=DAYS_MAX[by])
    totals = await Usage(request.app[DATABASE]).totals(
        request[USER].account_id, period.first, period.last, by_day="day" in by, by_model="model" in by
    )
    return json_response({"data": [total_json(total) for total in totals], "from": period.first, "to": period.last, "by": by})


async def show_generation(request: web.Request) -> web.Response:
    request_or_generation_id = Query(request, ("id",)).text("id")
    if request_or_generation_id is None:
        raise ApiError("invalid_request", "id is required: a request id, or OpenRouter's generation id")
    try:
        found = await Usage(request.app[DATABASE]).request(request[USER].account_id, request_or_generation_id)
    except NoSuchRequest:
        raise ApiError("not_found", "No request of this account has this id") from None
    return json_response({"data": request_json(found)})


def entry_json(entry: UsageEntry) -> dict[str, Any]:
    return {
        "id": entry.entry_id,
        "created_at": timestamp(entry.created_at),
        "kind": entry.kind,
        "reason": entry.reason,
        "amount": roubles(entry.amount),
        "model": entry.model,
        "cost_usd": decimal_string(entry.cost_usd),
        "rate": decimal_string(entry.rub_per_usd),
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "generation_id": entry.generation_id,
        "request_id": entry.request_id,
        "key": entry.key,
    }


def total_json(total: Total) -> dict[str, Any]:
    return {
        **({} if total.day is None else {"day": total.day}),
        **({} if total.model is None else {"model": total.model}),
        "requests": total.requests,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cost_usd": decimal_string(total.cost_usd),
        "amount": roubles(total.charge),
    }


def request_json(request: RequestRecord) -> dict[str, Any]:
    return {
        "id": request.hold_id,
        "request_id": request.request_id,
        "generation_id": request.generation_id,
        "model": request.model,
        "state": request.state,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "cost_usd": decimal_string(request.cost_usd),
        "rate": decimal_string(request.rub_per_usd),
        "charged": None if request.charge is None else roubles(request.charge),
        "held": roubles(request.held),
        "created_at": timestamp(request.created_at),
        "closed_at": None if request.closed_at is None else timestamp(request.closed_at),
        "key": request.key,
    }


def decimal_string(number: Decimal | None) -> str | None:
    return None if number is None else decimal_text(number)
