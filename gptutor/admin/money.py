"""`/admin/…/bookings`, `payments`, `ledger`, `holds`, `export`: changing balances, and reading what has changed them."""

import logging
from contextlib import aclosing
from typing import Annotated

import msgspec
from aiohttp import web

from gptutor.admin.auth import administration_of
from gptutor.admin.responses import data_response
from gptutor.admin.users import ID_MAX, PAGE, PAGE_MAX, account_id_of, line
from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE
from gptutor.http.body import read_json_body
from gptutor.http.json_body import AN_AMOUNT, Amount, PrintableText
from gptutor.http.query import Query, encode_cursor
from gptutor.money.administration import REASON_MAX, REFERENCE_MAX, BookingKind
from gptutor.money.amounts import AccountId, InvalidAmount, nano_of, roubles
from gptutor.money.reconciliation import waiting_holds
from gptutor.money.records import booking_json, csv_header, csv_lines, entry_json, json_lines, user_json, waiting_hold_json
from gptutor.money.usage import Cursor

LOGGER = logging.getLogger("gptutor.admin")

EXACT_FLOAT_MAX = 2**53
Reason = Annotated[PrintableText, msgspec.Meta(max_length=REASON_MAX, description=line(REASON_MAX))]
A_REFERENCE = f"one line of 1 to {REFERENCE_MAX} printable characters"
Reference = Annotated[PrintableText, msgspec.Meta(min_length=1, max_length=REFERENCE_MAX, description=A_REFERENCE)]

# `5.0` is an integer in JSON; above EXACT_FLOAT_MAX a double may be another one.
Id = Annotated[int, msgspec.Meta(ge=1, lt=10**18)] | Annotated[float, msgspec.Meta(ge=1, le=EXACT_FLOAT_MAX, multiple_of=1)]


class NewBooking(msgspec.Struct, forbid_unknown_fields=True):
    """Only the amount of an adjustment may be negative."""

    kind: BookingKind
    amount: Annotated[Amount, msgspec.Meta(description=AN_AMOUNT)]
    reason: Reason = ""
    reference: Annotated[Reference | None, msgspec.Meta(description=f"{A_REFERENCE}, or null")] = None


class NewPayment(msgspec.Struct, forbid_unknown_fields=True):
    """A payment that a provider has received for a user, who is identified by one of the two ids."""

    amount: Annotated[Amount, msgspec.Meta(description=AN_AMOUNT)]
    reference: Reference
    provider: Annotated[
        str, msgspec.Meta(pattern=r"^[a-z0-9_-]{1,32}\Z", description="1 to 32 characters of a to z, 0 to 9, _ and -")
    ]
    user_id: Annotated[Id | None, msgspec.Meta(description="a user's id, from 1 to 999999999999999999")] = None
    vk_id: Annotated[
        Id | Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,17}\Z")] | None,
        msgspec.Meta(description="the user's VK id, such as 494075"),
    ] = None


async def book(request: web.Request) -> web.Response:
    body = await read_json_body(request, NewBooking)
    amount = nano_of(body.amount)
    user = await administration_of(request).book(
        account_id_of(request), body.kind, amount, reason=body.reason, reference=body.reference
    )
    return data_response(user_json(user), 201)


async def pay(request: web.Request) -> web.Response:
    """A repeated request gets the same response; 409 if the reference was booked with other values."""
    body = await read_json_body(request, NewPayment)
    if (body.user_id is None) == (body.vk_id is None):
        raise ApiError("invalid_request", "A payment needs user_id or vk_id, and not both")
    administration = administration_of(request)
    if body.user_id is None:
        account_id = (await administration.users.find_person("vk", str(int(body.vk_id or 0)))).account_id
    else:
        account_id = AccountId(int(body.user_id))
    reference = f"{body.provider}:{body.reference}"
    if (amount := nano_of(body.amount)) <= 0:
        raise InvalidAmount(f"A payment must be more than zero, not {roubles(amount)}; book what you pay back as a refund")
    booking = await administration.pay(account_id, amount, reference, "payment")
    return data_response(booking_json(booking) | {"reference": reference})


async def ledger(request: web.Request) -> web.Response:
    """A user's entries in pages, newest first."""
    query = Query(request, ("limit", "cursor"))
    limit = query.integer("limit", minimum=1, maximum=PAGE_MAX, default=PAGE)
    place = query.cursor("cursor")
    administration = administration_of(request)
    account_id = account_id_of(request)
    await administration.users.find(account_id)
    entries = await administration.bookings.entries(account_id, limit + 1, before=None if place is None else Cursor(*place))
    page = entries[:limit]
    next_cursor = encode_cursor(page[-1].created_at, page[-1].entry_id) if len(entries) > limit else None
    return data_response([entry_json(entry) for entry in page], next_cursor=next_cursor)


async def holds(request: web.Request) -> web.Response:
    Query(request, ())
    waiting = await waiting_holds(request.app[DATABASE])
    return data_response(
        [waiting_hold_json(hold) for hold in waiting.oldest],
        waiting_count=waiting.count,
        waiting_at_most=roubles(waiting.at_most),
    )


async def export_ledger(request: web.Request) -> web.StreamResponse:
    """CSV or JSON lines, streamed from one snapshot: `?from=&to=&user=&format=`.

    A failed export aborts the connection: it must not look complete.
    """
    query = Query(request, ("from", "to", "user", "format"))
    is_csv = query.one_of("format", ("csv", "jsonl")) == "csv"
    period = query.period(days_max=None)
    user = AccountId(query.integer("user", minimum=1, maximum=ID_MAX, default=0))
    administration = administration_of(request)
    if user:
        await administration.users.find(user)
    pages = administration.bookings.export(period.first, period.last, user or None)
    name = "ledger.csv" if is_csv else "ledger.jsonl"
    response = web.StreamResponse(headers={"Content-Disposition": f'attachment; filename="{name}"', "Server": ""})
    response.content_type = "text/csv" if is_csv else "application/jsonl"
    response.charset = "utf-8"
    await response.prepare(request)
    try:
        if is_csv:
            await response.write(csv_header().encode())
        async with aclosing(pages):
            async for entries in pages:
                await response.write(csv_lines(entries).encode() if is_csv else json_lines(entries))
    except ConnectionResetError:
        return response  # the client disconnected
    except Exception:
        LOGGER.exception("An export failed")
        if request.transport is not None:
            request.transport.abort()  # so that the client does not see the last chunk of a complete response
        return response
    await response.write_eof()
    return response
