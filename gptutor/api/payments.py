"""Top-ups by YooKassa: `POST /v1/payments` creates a payment, `POST /yookassa/webhook` receives its outcome (contract C11).

Notifications are not signed, so nothing in one is trusted but the id to look up. What is booked is what YooKassa's own API says
of that id, for the account in our own metadata there, once, under the reference `yookassa:<id>`. YooKassa repeats a
notification until it gets 200; so 200 means booked, or that there will never be anything to book.
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

from gptutor.errors import ApiError
from gptutor.http.app_keys import DATABASE, PAYMENTS, READINESS, USER
from gptutor.http.body import read_json_body
from gptutor.http.json_body import Amount
from gptutor.integrations.yookassa import ID_PATTERN, YooKassa, YooKassaUnavailable
from gptutor.money.administration import Bookkeeper
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, nano_of
from gptutor.money.bookings import AlreadyBooked, Booking
from gptutor.money.users import NoSuchUser
from gptutor.telemetry.metrics import PAYMENT_NOTIFICATIONS

LOGGER = logging.getLogger("gptutor.payments")
PROVIDER = "yookassa"
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")

Outcome = Literal["booked", "nothing", "conflict"]


class NewPayment(msgspec.Struct, forbid_unknown_fields=True):
    """`amount` is roubles with at most two decimal places."""

    amount: Amount


class NotificationObject(msgspec.Struct):
    id: str


class Notification(msgspec.Struct):
    """The trusted part of YooKassa's notification: neither its status nor its amounts are read."""

    event: str
    object: NotificationObject


class ConcurrencyLimit:
    """At most `concurrent_max` calls at once. A further one fails at once instead of being queued: the client retries."""

    def __init__(self, concurrent_max: int) -> None:
        self._free = concurrent_max

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Raises ApiError."""
        if not self._free:
            raise ApiError("payments_unavailable", cause="too many concurrent calls to YooKassa")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class PaymentService:
    """Payments by YooKassa; `yookassa` None: not configured. Raises ApiError, DatabaseUnavailable."""

    def __init__(
        self, yookassa: YooKassa | None, *, amount_min_rub: Decimal, amount_max_rub: Decimal, concurrent_max: int
    ) -> None:
        self._yookassa = yookassa
        self._amount_min_rub = amount_min_rub
        self._amount_max_rub = amount_max_rub
        self._payments_limit = ConcurrencyLimit(concurrent_max)
        self._notifications_limit = ConcurrencyLimit(concurrent_max)
        self._tasks: set[asyncio.Task[Outcome]] = set()

    def require_configured(self) -> YooKassa:
        if self._yookassa is None:
            raise ApiError("not_found", "Payments are not set up here")
        return self._yookassa

    def format_amount(self, amount_rub: Decimal) -> str:
        """The amount as YooKassa writes it, `100.00`, if it may be paid."""
        if not (amount_rub.is_finite() and self._amount_min_rub <= amount_rub <= self._amount_max_rub):
            raise ApiError(
                "invalid_request", f"amount: one payment must be from {self._amount_min_rub} to {self._amount_max_rub} roubles"
            )
        kopecks = amount_rub.quantize(Decimal("0.01"))
        if kopecks != amount_rub:
            raise ApiError("invalid_request", "amount: a payment is in roubles and kopecks, with two decimal places at most")
        return f"{kopecks:f}"

    async def create(self, account_id: AccountId, amount_rub: Decimal, idempotency_key: str | None) -> dict[str, str]:
        yookassa = self.require_configured()
        amount = self.format_amount(amount_rub)
        idempotence_key = None
        if idempotency_key is not None:
            idempotence_key = hashlib.sha256(f"{account_id} {amount} {idempotency_key}".encode()).hexdigest()
        with self._payments_limit.acquire(), _translated_errors():
            payment = await yookassa.create_payment(account_id, amount, idempotence_key)
        if payment.confirmation_url is None:
            LOGGER.error("YooKassa created the payment %s without a confirmation_url", payment.payment_id)
            raise ApiError("payments_unavailable", cause="no confirmation_url")
        return {
            "id": payment.payment_id,
            "status": payment.status,
            "amount": amount,
            "confirmation_url": payment.confirmation_url,
        }

    async def process(self, notification: Notification, bookkeeper: Bookkeeper) -> Outcome:
        """Looks up the payment or refund that a notification names, and books it, unless it is already booked.

        Runs in a task of its own, because a disconnected client must not cancel a booking before its audit line is written.
        """
        task = asyncio.create_task(self._process(notification, bookkeeper))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Waits for running notifications; each call to YooKassa has its timeout."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _process(self, notification: Notification, bookkeeper: Bookkeeper) -> Outcome:
        kind, _, _ = notification.event.partition(".")
        if kind == "payment":
            return await self._process_payment(notification.object.id, bookkeeper)
        if kind == "refund":
            return await self._process_refund(notification.object.id, bookkeeper)
        return "nothing"

    async def _process_payment(self, payment_id: str, bookkeeper: Bookkeeper) -> Outcome:
        yookassa = self.require_configured()
        reference = f"{PROVIDER}:{payment_id}"
        if not ID_PATTERN.fullmatch(payment_id) or await bookkeeper.bookings.find(reference):
            return "nothing"
        with self._notifications_limit.acquire(), _translated_errors():
            payment = await yookassa.payment(payment_id)
        if payment is None or not payment.is_captured or payment.account_id is None or payment.amount_rub is None:
            return "nothing"
        return await _book(bookkeeper.pay, AccountId(payment.account_id), payment.amount_rub, reference, "payment")

    async def _process_refund(self, refund_id: str, bookkeeper: Bookkeeper) -> Outcome:
        """Books the refunded payment first, in case its own notification was lost."""
        yookassa = self.require_configured()
        reference = f"{PROVIDER}-refund:{refund_id}"
        if not ID_PATTERN.fullmatch(refund_id) or await bookkeeper.bookings.find(reference):
            return "nothing"
        with self._notifications_limit.acquire(), _translated_errors():
            refund = await yookassa.refund(refund_id)
        if refund is None or refund.status != "succeeded" or refund.amount_rub is None:
            return "nothing"
        await self._process_payment(refund.payment_id, bookkeeper)
        payment = await bookkeeper.bookings.find(f"{PROVIDER}:{refund.payment_id}")
        if payment is None:
            return "nothing"
        reason = f"refund of {refund.payment_id}"
        return await _book(bookkeeper.pay_back, payment.account_id, refund.amount_rub, reference, reason)


async def _book(
    book: Callable[[AccountId, Nano, str, str], Awaitable[Booking]],
    account_id: AccountId,
    amount_rub: Decimal,
    reference: str,
    reason: str,
) -> Outcome:
    """A booking that fails now would fail each time: the operator gets an error log, and YooKassa need not repeat."""
    try:
        await book(account_id, nano_of(amount_rub), reference, reason)
    except (NoSuchUser, AlreadyBooked, InvalidAmount) as error:
        LOGGER.error("The payment %s cannot be booked: %s", reference, type(error).__name__)
        return "conflict"
    return "booked"


@contextmanager
def _translated_errors() -> Iterator[None]:
    """YooKassaUnavailable becomes ApiError."""
    try:
        yield
    except YooKassaUnavailable as error:
        LOGGER.error("The call to YooKassa failed: %s", error)
        raise ApiError("payments_unavailable", cause=str(error)) from error


async def create_payment(request: web.Request) -> web.Response:
    """`POST /v1/payments {"amount": …}` → `{"data": {"id", "status", "amount", "confirmation_url"}}`."""
    request.app[PAYMENTS].require_configured()
    idempotency_key = request.headers.get("Idempotency-Key")
    if idempotency_key is not None and not IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    new_payment = await read_json_body(request, NewPayment)
    payment = await request.app[PAYMENTS].create(request[USER].account_id, new_payment.amount, idempotency_key)
    return web.json_response({"data": payment})


async def receive_notification(request: web.Request) -> web.Response:
    """`POST /yookassa/webhook`: 200 if the named payment is booked or will never be, 503 if that is not known yet."""
    payments = request.app[PAYMENTS]
    payments.require_configured()
    notification = await read_json_body(request, Notification)
    request.app[READINESS].require()
    bookkeeper = Bookkeeper(request.app[DATABASE], PROVIDER)
    try:
        outcome: str = await payments.process(notification, bookkeeper)
    except ApiError:
        PAYMENT_NOTIFICATIONS.labels("unavailable").inc()
        raise
    PAYMENT_NOTIFICATIONS.labels(outcome).inc()
    return web.json_response({"status": "ok"})
