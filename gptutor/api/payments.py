"""Top-ups by YooKassa: `POST /v1/payments` makes a payment, `POST /yookassa/webhook` is told what became of it (contract C11).

A notification is signed by nobody, so nothing in it is believed but an id to ask about. What is booked is what YooKassa's own API
says of that id, for the account that our own metadata name there, once, by the reference `yookassa:<id>`. YooKassa repeats a
notification until it gets a 200; so 200 means booked, or nothing to do, ever.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Literal

import msgspec
from aiohttp import web

from gptutor.api.auth import USER
from gptutor.errors import ApiError
from gptutor.http.body import read_json_body
from gptutor.http.health import DATABASE, READINESS
from gptutor.http.json_body import Amount
from gptutor.integrations.yookassa import ID_PATTERN, YooKassa, YooKassaUnavailable
from gptutor.money.administration import Bookkeeper
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, parse_roubles
from gptutor.money.bookings import AlreadyBooked, Booking
from gptutor.money.users import NoSuchUser
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.metrics import PAYMENT_NOTIFICATIONS

LOGGER = logging.getLogger("gptutor.payments")
PROVIDER = "yookassa"
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")

Outcome = Literal["booked", "nothing", "conflict"]


class NewPayment(msgspec.Struct, forbid_unknown_fields=True):
    """Roubles, with kopecks at most."""

    amount: Amount


class Subject(msgspec.Struct):
    id: str


class Notification(msgspec.Struct):
    """What is read of YooKassa's notification; its status and amounts are not."""

    event: str
    object: Subject


class ConcurrencyLimit:
    """So many at once; the next one is refused, not queued: whoever is refused comes again."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Raises ApiError."""
        if not self._free:
            raise ApiError("payments_unavailable", cause="too many calls to YooKassa at once")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class PaymentService:
    """Payments by YooKassa, if they are set up. Raises ApiError, DatabaseUnavailable."""

    def __init__(self, yookassa: YooKassa | None, *, least_rub: Decimal, most_rub: Decimal, at_once: int) -> None:
        self._yookassa = yookassa
        self._least_rub = least_rub
        self._most_rub = most_rub
        self._payments = ConcurrencyLimit(at_once)
        self._notifications = ConcurrencyLimit(at_once)
        self._under_way = BackgroundTasks()

    def require(self) -> YooKassa:
        if self._yookassa is None:
            raise ApiError("not_found", "Payments are not set up here")
        return self._yookassa

    def check(self, amount_rub: Decimal) -> str:
        """The amount in YooKassa's spelling, `100.00`."""
        if not (amount_rub.is_finite() and self._least_rub <= amount_rub <= self._most_rub):
            raise ApiError("invalid_request", f"amount: from {self._least_rub} to {self._most_rub} roubles can be paid at once")
        kopecks = amount_rub.quantize(Decimal("0.01"))
        if kopecks != amount_rub:
            raise ApiError("invalid_request", "amount: a payment is in roubles and kopecks, with two decimal places at most")
        return f"{kopecks:f}"

    async def create(self, account_id: AccountId, amount_rub: Decimal, idempotency_key: str | None) -> dict[str, str]:
        yookassa = self.require()
        amount = self.check(amount_rub)
        name = None
        if idempotency_key is not None:
            name = hashlib.sha256(f"{account_id} {amount} {idempotency_key}".encode()).hexdigest()
        with self._payments.passing(), _asked():
            payment = await yookassa.create_payment(account_id, amount, name)
        if payment.confirmation_url is None:
            LOGGER.error("YooKassa made the payment %s without an address to pay it at", payment.payment_id)
            raise ApiError("payments_unavailable", cause="no confirmation_url")
        return {
            "id": payment.payment_id,
            "status": payment.status,
            "amount": amount,
            "confirmation_url": payment.confirmation_url,
        }

    async def take(self, notification: Notification, books: Bookkeeper) -> Outcome:
        """Asks YooKassa about what a notification names, and books it. Once it is booked, nobody is asked again.

        It goes on when the one who told of it has left: what is booked has its audit line.
        """
        return await asyncio.shield(self._under_way.start(self._take(notification, books)))

    async def drain(self) -> None:
        """Waits for what is under way; each call to YooKassa has its time limit."""
        await self._under_way.drain(None)

    async def _take(self, notification: Notification, books: Bookkeeper) -> Outcome:
        kind, _, _ = notification.event.partition(".")
        name = notification.object.id
        if kind == "payment":
            return await self._take_payment(name, books)
        if kind == "refund":
            return await self._take_refund(name, books)
        return "nothing"

    async def _take_payment(self, payment_id: str, books: Bookkeeper) -> Outcome:
        yookassa = self.require()
        reference = f"{PROVIDER}:{payment_id}"
        if not ID_PATTERN.fullmatch(payment_id) or await books.bookings.find(reference):
            return "nothing"
        with self._notifications.passing(), _asked():
            payment = await yookassa.payment(payment_id)
        if payment is None or not payment.is_captured or payment.account_id is None or payment.amount_rub is None:
            return "nothing"
        return await _booked(books.pay, AccountId(payment.account_id), payment.amount_rub, reference, "payment")

    async def _take_refund(self, refund_id: str, books: Bookkeeper) -> Outcome:
        """A refund is of a payment that was booked: if its notification was lost, it is booked now, before the refund."""
        yookassa = self.require()
        reference = f"{PROVIDER}-refund:{refund_id}"
        if not ID_PATTERN.fullmatch(refund_id) or await books.bookings.find(reference):
            return "nothing"
        with self._notifications.passing(), _asked():
            refund = await yookassa.refund(refund_id)
        if refund is None or refund.status != "succeeded" or refund.amount_rub is None:
            return "nothing"
        await self._take_payment(refund.payment_id, books)
        payment = await books.bookings.find(f"{PROVIDER}:{refund.payment_id}")
        if payment is None:
            return "nothing"
        reason = f"refund of {refund.payment_id}"
        return await _booked(books.pay_back, payment.account_id, refund.amount_rub, reference, reason)


async def _booked(
    book: Callable[[AccountId, Nano, str, str], Awaitable[Booking]],
    account_id: AccountId,
    amount_rub: Decimal,
    reference: str,
    reason: str,
) -> Outcome:
    """What cannot be booked will not be bookable later: the operator is told, and YooKassa need not repeat."""
    try:
        await book(account_id, parse_roubles(f"{amount_rub:f}"), reference, reason)
    except (NoSuchUser, AlreadyBooked, InvalidAmount) as error:
        LOGGER.error("The payment %s cannot be booked: %s", reference, type(error).__name__)
        return "conflict"
    return "booked"


@contextmanager
def _asked() -> Iterator[None]:
    try:
        yield
    except YooKassaUnavailable as error:
        LOGGER.error("YooKassa cannot be asked: %s", error)
        raise ApiError("payments_unavailable", cause=str(error)) from error


PAYMENTS = web.AppKey("cashier", PaymentService)


async def create_payment(request: web.Request) -> web.Response:
    """`POST /v1/payments {"amount": …}` → `{"data": {"id", "status", "amount", "confirmation_url"}}`."""
    request.app[PAYMENTS].require()
    key = request.headers.get("Idempotency-Key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    form = await read_json_body(request, NewPayment)
    return web.json_response({"data": await request.app[PAYMENTS].create(request[USER].account_id, form.amount, key)})


async def notified(request: web.Request) -> web.Response:
    """`POST /yookassa/webhook`: 200 if what it names is booked or nothing is to be booked, 503 if that is not known yet."""
    cashier = request.app[PAYMENTS]
    cashier.require()
    notification = await read_json_body(request, Notification)
    request.app[READINESS].require()
    books = Bookkeeper(request.app[DATABASE], PROVIDER)
    try:
        outcome: str = await cashier.take(notification, books)
    except ApiError:
        PAYMENT_NOTIFICATIONS.labels("unavailable").inc()
        raise
    PAYMENT_NOTIFICATIONS.labels(outcome).inc()
    return web.json_response({"status": "ok"})
