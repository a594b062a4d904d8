"""Top-ups by YooKassa: `POST /v1/payments` creates a payment, `POST /yookassa/webhook` receives its outcome (contract C11).

Notifications are not signed, so nothing in one is trusted but the id to look up. What is booked is what YooKassa's own API says
of that id, for the account in our own metadata there, once, under the reference `yookassa:<id>`. YooKassa repeats a
notification until it gets 200; so 200 means booked, or that there will never be anything to book.

A payment is remembered until it has ended, and `payment_lookups.py` asks YooKassa about it: a notification may be lost.
"""

import asyncio
import datetime
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Annotated, Literal

import msgspec
from aiohttp import web

from gptutor.database.pool import Database
from gptutor.errors import ApiError
from gptutor.http.address_limits import Network, RequestCounter, client_address
from gptutor.http.app_keys import PAYMENTS, READINESS, USER
from gptutor.http.body import read_json_body
from gptutor.http.json_body import AN_AMOUNT, Amount
from gptutor.http.rate_limit import RateLimit
from gptutor.integrations.yookassa import ID_PATTERN, Payment, YooKassa, YooKassaUnavailable, format_created
from gptutor.money.administration import Bookkeeper
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, nano_of
from gptutor.money.bookings import AlreadyBooked, Booking
from gptutor.money.pending_payments import DuePayment, PendingPayments
from gptutor.money.users import NoSuchUser, User, UserRepository
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import PAYMENT_NOTIFICATIONS, PAYMENTS_NOT_CREDITED

LOGGER = logging.getLogger("gptutor.payments")
PROVIDER = "yookassa"
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")

PENDING_MAX = 50
"""Payments of one account that have not ended. YooKassa cancels unpaid ones after about an hour."""

Outcome = Literal["booked", "nothing", "pending", "not_found", "currency", "test", "account", "conflict"]
"""What became of a payment or a refund. The last five need the operator's attention."""
OPEN: tuple[Outcome, ...] = ("pending", "not_found")
"""Outcomes after which the payment is looked up again."""
SUCCEEDED = ("payment.succeeded", "refund.succeeded")
"""Notifications that YooKassa must repeat while its API does not say the same."""
HOW_TO_BOOK = "Find out who paid, and pay it back at YooKassa or book it: gptutor user topup ID ROUBLES --reference %s"


class NewPayment(msgspec.Struct, forbid_unknown_fields=True):
    """`amount` is roubles with at most two decimal places."""

    amount: Annotated[Amount, msgspec.Meta(description=AN_AMOUNT)]


class NotificationObject(msgspec.Struct):
    """`payment_id` of a refund only decides which limit counts the notification."""

    id: str
    payment_id: str = ""


class Notification(msgspec.Struct):
    """The trusted part of YooKassa's notification: neither its status nor its amounts are read."""

    event: Annotated[str, msgspec.Meta(description="a string such as payment.succeeded")]
    object: Annotated[NotificationObject, msgspec.Meta(description="an object with the id of a payment or a refund")]


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
    """Payments by YooKassa; `yookassa` None: not configured. Raises ApiError, DatabaseUnavailable.

    `credits_tests`: whether payments that nobody has paid are credited. `unknown_ids` counts, by address, notifications of ids
    that YooKassa does not know.
    """

    def __init__(
        self,
        yookassa: YooKassa | None,
        database: Database,
        pending: PendingPayments,
        *,
        amount_min_rub: Decimal,
        amount_max_rub: Decimal,
        concurrent_max: int,
        credits_tests: bool,
        unknown_ids: RequestCounter,
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._yookassa = yookassa
        self._bookkeeper = Bookkeeper(database, PROVIDER)
        self._users = UserRepository(database)
        self._pending = pending
        self._amount_min_rub = amount_min_rub
        self._amount_max_rub = amount_max_rub
        self._credits_tests = credits_tests
        self._unknown_ids = unknown_ids
        self._trusted_proxies = trusted_proxies
        self._payments_limit = ConcurrencyLimit(concurrent_max)
        self._known_limit = ConcurrencyLimit(concurrent_max)
        self._unknown_limit = ConcurrencyLimit(concurrent_max)
        self._job_limit = ConcurrencyLimit(1)
        self._tasks = BackgroundTasks()

    @property
    def is_configured(self) -> bool:
        return self._yookassa is not None

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

    async def create(self, user: User, amount_rub: Decimal, idempotency_key: str | None) -> dict[str, str]:
        yookassa = self.require_configured()
        amount = self.format_amount(amount_rub)
        if await self._pending.count(user.account_id) >= PENDING_MAX:
            raise ApiError("rate_limited", f"The account has {PENDING_MAX} unpaid payments: pay one, or wait an hour")
        idempotence_key = None
        if idempotency_key is not None:
            order = f"{user.account_id} {format_created(user.created_at)} {amount} {idempotency_key}"
            idempotence_key = hashlib.sha256(order.encode()).hexdigest()
        with self._payments_limit.acquire(), _translated_errors():
            payment = await yookassa.create_payment(user.account_id, user.created_at, amount, idempotence_key)
        if payment.confirmation_url is None:
            LOGGER.error("YooKassa created the payment %s without a confirmation_url", payment.payment_id)
            raise ApiError("payments_unavailable", cause="no confirmation_url")
        await self._pending.remember(user.account_id, payment.payment_id)  # before anybody can pay it
        return {
            "id": payment.payment_id,
            "status": payment.status,
            "amount": amount,
            "confirmation_url": payment.confirmation_url,
        }

    def address_of(self, request: web.Request) -> str:
        return client_address(request, self._trusted_proxies)

    async def process(self, notification: Notification, address: str) -> Outcome:
        """Looks up the payment or refund that a notification names, and books it, unless it is already booked.

        Runs in a task of its own, because a disconnected client must not cancel a booking before its audit line is written.
        """
        return await asyncio.shield(self._tasks.start(self._process(notification, address)))

    async def look_up(self, due: DuePayment) -> Outcome:
        """Looks up a payment that is due, in a task of its own as above, and books it. Gives it up if it is too old."""
        return await asyncio.shield(self._tasks.start(self._look_up_due(due)))

    async def drain(self) -> None:
        """Waits for running notifications; each call to YooKassa has its timeout."""
        await self._tasks.drain(None)

    async def _process(self, notification: Notification, address: str) -> Outcome:
        kind, _, _ = notification.event.partition(".")
        named = notification.object
        if kind not in ("payment", "refund") or not ID_PATTERN.fullmatch(named.id):
            return "nothing"
        if await self._is_ours(named.id if kind == "payment" else named.payment_id):
            limit = self._known_limit
        elif self._unknown_ids.is_used_up(address):
            raise RateLimit(self._unknown_ids.per_minute).error()
        else:
            limit = self._unknown_limit
        settle = self._settle_payment if kind == "payment" else self._settle_refund
        outcome = await settle(named.id, limit)
        if outcome == "not_found" and address:
            self._unknown_ids.add(address)
        return outcome

    async def _is_ours(self, payment_id: str) -> bool:
        """Whether the payment is remembered or booked: nobody else knows its id."""
        return await self._pending.contains(payment_id) or await self._booking_of(payment_id) is not None

    async def _booking_of(self, payment_id: str) -> Booking | None:
        return await self._bookkeeper.bookings.find(_reference(payment_id))

    async def _look_up_due(self, due: DuePayment) -> Outcome:
        outcome = await self._settle_payment(due.payment_id, self._job_limit)
        if outcome in OPEN and due.is_last_lookup:
            _refuse("given_up", "The payment %s has not ended at YooKassa, and is not looked up any more", due.payment_id)
            await self._pending.forget(due.payment_id)
        return outcome

    async def _settle_payment(self, payment_id: str, limit: ConcurrencyLimit) -> Outcome:
        outcome: Outcome = "nothing"
        if await self._booking_of(payment_id) is None:
            with limit.acquire(), _translated_errors():
                payment = await self.require_configured().payment(payment_id)
            outcome = "not_found" if payment is None else await self._credit(payment)
            if payment is None:
                _refuse(outcome, "YooKassa has no payment %s: it was made up, or it is another shop's", payment_id)
        if outcome not in OPEN:
            await self._pending.forget(payment_id)
        return outcome

    async def _credit(self, payment: Payment) -> Outcome:
        verdict = payment.verdict(credits_tests=self._credits_tests)
        if verdict == "nothing" or payment.account_id is None:
            return "nothing"
        account_id, reference = AccountId(payment.account_id), _reference(payment.payment_id)
        if verdict == "pending":
            await self._pending.remember(account_id, payment.payment_id)  # also if a restore has lost it
            return "pending"
        if verdict == "currency" or payment.amount_rub is None:
            _refuse("currency", f"The payment %s is not in roubles, and is not credited. {HOW_TO_BOOK}", reference, reference)
            return "currency"
        if verdict == "test":
            _refuse("test", "The payment %s is a test, and is not credited: yookassa.test_mode is off", reference)
            return "test"
        created_at = await self._created_at(account_id)
        if created_at is not None and not payment.is_of_account(created_at):
            _refuse(
                "account",
                "The payment %s was made for an earlier user %d, whom a restore of the database has lost: user %d is another one "
                f"now, and is not credited. {HOW_TO_BOOK}",
                reference, account_id, account_id, reference,
            )  # fmt: skip
            return "account"
        return await _book(self._bookkeeper.pay, account_id, payment.amount_rub, reference, "payment")

    async def _created_at(self, account_id: AccountId) -> datetime.datetime | None:
        try:
            return (await self._users.find(account_id)).created_at
        except NoSuchUser:
            return None

    async def _settle_refund(self, refund_id: str, limit: ConcurrencyLimit) -> Outcome:
        """Books the refunded payment first, in case its own notification was lost."""
        reference = f"{PROVIDER}-refund:{refund_id}"
        if await self._bookkeeper.bookings.find(reference):
            return "nothing"
        with limit.acquire(), _translated_errors():
            refund = await self.require_configured().refund(refund_id)
        if refund is None:
            _refuse("not_found", "YooKassa has no refund %s: it was made up, or it is another shop's", refund_id)
            return "not_found"
        if refund.status != "succeeded":
            return "nothing" if refund.status == "canceled" else "pending"
        outcome = await self._settle_payment(refund.payment_id, limit)
        payment = await self._booking_of(refund.payment_id)
        if payment is None:
            return outcome
        if refund.amount_rub is None:
            _refuse("currency", "The refund %s is not in roubles, and is not debited", reference)
            return "currency"
        reason = f"refund of {refund.payment_id}"
        return await _book(self._bookkeeper.pay_back, payment.account_id, refund.amount_rub, reference, reason)


def _reference(payment_id: str) -> str:
    return f"{PROVIDER}:{payment_id}"


def _refuse(reason: str, message: str, *arguments: object) -> None:
    PAYMENTS_NOT_CREDITED.labels(reason).inc()
    LOGGER.error(message, *arguments)
    if reason != "not_found":  # anybody can make up ids
        ALERTS.count("payment_not_credited", message % arguments)


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
        _refuse("conflict", "The payment %s cannot be booked: %s", reference, type(error).__name__)
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
    payment = await request.app[PAYMENTS].create(request[USER], new_payment.amount, idempotency_key)
    return web.json_response({"data": payment})


async def receive_notification(request: web.Request) -> web.Response:
    """`POST /yookassa/webhook`: 200 if the named payment is booked or will never be, 503 if that is not known yet."""
    payments = request.app[PAYMENTS]
    payments.require_configured()
    notification = await read_json_body(request, Notification)
    request.app[READINESS].require()
    try:
        outcome = await payments.process(notification, payments.address_of(request))
    except ApiError:
        PAYMENT_NOTIFICATIONS.labels("unavailable").inc()
        raise
    PAYMENT_NOTIFICATIONS.labels(outcome).inc()
    if outcome == "pending" and notification.event in SUCCEEDED:
        raise ApiError("payments_unavailable", cause="YooKassa's API does not call it succeeded yet")
    return web.json_response({"status": "ok"})
