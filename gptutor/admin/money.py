"""`/admin/…/bookings`, `ledger`, `holds`, `export`, `payments`: what has changed balances, and changing them."""

import logging
from contextlib import aclosing
from typing import Annotated

import msgspec
from aiohttp import web

from gptutor.admin.auth import administration_of
from gptutor.admin.parameters import ID_MAX, account
from gptutor.admin.responses import data_response
from gptutor.errors import ApiError
from gptutor.http.body import read_json_body
from gptutor.http.health import DATABASE
from gptutor.http.json_body import Amount
from gptutor.http.query import Query, cursor_of
from gptutor.money.administration import REASON_MAX, REFERENCE_MAX, BookingKind
from gptutor.money.amounts import AccountId, InvalidAmount, nano_of, roubles
from gptutor.money.reconciliation import waiting_holds
from gptutor.money.records import booking_json, csv_head, csv_lines, entry_json, user_json
from gptutor.money.usage import Cursor

LOGGER = logging.getLogger("gptutor.admin")
PAGE = 100
PAGE_MAX = 1000
LINE = r"^[^\x00-\x1f\x7f]*\Z"

Reason = Annotated[str, msgspec.Meta(max_length=REASON_MAX, pattern=LINE)]
Reference = Annotated[str, msgspec.Meta(min_length=1, max_length=REFERENCE_MAX, pattern=LINE)]


class NewBooking(msgspec.Struct, forbid_unknown_fields=True):
    """`amount` in roubles, exact: a text or a number. Only an adjustment may be negative."""

    kind: BookingKind
    amount: Amount
    reason: Reason = ""
    reference: Reference | None = None


class NewPayment(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A payment that a provider has taken for a user, who is named by one of the two ids."""

    amount: Amount
    reference: Reference
    provider: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_-]{1,32}\Z")]
    user_id: Annotated[int, msgspec.Meta(ge=1, lt=10**18)] | None = None
    vk_id: Annotated[
        Annotated[int, msgspec.Meta(ge=1, lt=10**18)] | Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,17}\Z")] | None,
        msgspec.Meta(description="VK's number of the user, such as 494075"),
    ] = None


async def book(request: web.Request) -> web.Response:
    form = await read_json_body(request, NewBooking)
    amount = nano_of(form.amount)
    user = await administration_of(request).book(
        account(request), form.kind, amount, reason=form.reason, reference=form.reference
    )
    return data_response(user_json(user), 201)


async def pay(request: web.Request) -> web.Response:
    """The same answer however often a payment is told of; 409 if its reference was booked as another payment."""
    form = await read_json_body(request, NewPayment)
    if (form.user_id is None) == (form.vk_id is None):
        raise ApiError("invalid_request", "A payment names its user by userId or by vkId, and by one of them only")
    administration = administration_of(request)
    if form.user_id is None:
        account_id = (await administration.users.find_person("vk", str(form.vk_id))).account_id
    else:
        account_id = AccountId(form.user_id)
    reference = f"{form.provider}:{form.reference}"
    if (amount := nano_of(form.amount)) <= 0:
        raise InvalidAmount("A payment must be more than zero")
    booking = await administration.pay(account_id, amount, reference, "payment")
    return data_response(booking_json(booking) | {"reference": reference})


async def ledger(request: web.Request) -> web.Response:
    """Newest first; `next` is the `before` of the next page, null on the last one."""
    asked = Query(request, ("limit", "before"))
    limit = asked.whole("limit", least=1, most=PAGE_MAX, default=PAGE)
    last = asked.place("before")
    administration = administration_of(request)
    await administration.users.find(account(request))
    entries = await administration.bookings.entries(account(request), limit + 1, before=last)
    shown = entries[:limit]
    more = cursor_of(Cursor(shown[-1].created_at, shown[-1].entry_id)) if len(entries) > limit else None
    return data_response([entry_json(entry) for entry in shown], next=more)


async def holds(request: web.Request) -> web.Response:
    Query(request, ())
    waiting = await waiting_holds(request.app[DATABASE])
    return data_response([hold.as_json() for hold in waiting.oldest], count=waiting.count, atMost=roubles(waiting.at_most))


async def export_ledger(request: web.Request) -> web.StreamResponse:
    """CSV, as it is read from one snapshot: `?from=&to=&user=`. What breaks off does so without a proper end."""
    asked = Query(request, ("from", "to", "user"))
    period = asked.period(days_max=None)
    user = AccountId(asked.whole("user", least=1, most=ID_MAX, default=0))
    administration = administration_of(request)
    if user:
        await administration.users.find(user)
    pages = administration.bookings.export(period.first, period.last, user or None)
    response = web.StreamResponse(headers={"Content-Disposition": 'attachment; filename="ledger.csv"'})
    response.content_type = "text/csv"
    response.charset = "utf-8"
    await response.prepare(request)
    try:
        await response.write(csv_head().encode())
        async with aclosing(pages):
            async for entries in pages:
                await response.write(csv_lines(entries).encode())
    except ConnectionResetError:
        return response  # nobody reads it any more
    except Exception:
        LOGGER.exception("An export broke off")
        if request.transport is not None:
            request.transport.abort()  # whoever reads a length of chunks must see that the last one is missing
        return response
    await response.write_eof()
    return response
