"""A client of YooKassa's API: create a payment, get a payment or a refund. No ledger and no database.

Every call uses Basic authentication with the shop's id and secret key. Source: yookassa.ru/developers/api.
"""

import datetime
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import aiohttp
import orjson

ID_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""All ids of YooKassa have this format; no request is made for any other."""
ACCOUNT_ID_METADATA = "gptutor_account_id"
"""The metadata field by which payments of GPTutor are recognised. Other payments of the same shop must not be credited."""
ACCOUNT_CREATED_METADATA = "gptutor_account_created_at"
"""When the account was created: after a restore of the database, another account may have the same number."""

Verdict = Literal["credit", "nothing", "pending", "currency", "test"]


class YooKassaUnavailable(Exception):
    """No response from YooKassa, an error, or a malformed response. The message is for the log and contains no secrets."""


@dataclass(frozen=True, slots=True)
class Payment:
    """`account_id` and `account_created` are read from the metadata, None if absent; so is `created_at` if it is malformed.

    `amount_rub` is None if the currency is not the rouble. `is_test`: nobody has paid; the shop is in test mode.
    """

    payment_id: str
    status: str
    is_paid: bool
    amount_rub: Decimal | None
    account_id: int | None
    account_created: str | None
    created_at: datetime.datetime | None
    is_test: bool
    confirmation_url: str | None

    @property
    def is_captured(self) -> bool:
        """Whether the payment was made and the money captured."""
        return self.status == "succeeded" and self.is_paid

    def verdict(self, *, credits_tests: bool) -> Verdict:
        """What follows from the payment itself. `nothing`: it is not GPTutor's, or was cancelled; `pending`: it has not ended."""
        if self.account_id is None or self.status == "canceled":
            return "nothing"
        if not self.is_captured:
            return "pending"
        if self.amount_rub is None:
            return "currency"
        return "test" if self.is_test and not credits_tests else "credit"

    def is_of_account(self, created_at: datetime.datetime) -> bool:
        """Whether the account that was created then is the one that the payment was made for, not a later one of the same number.

        A payment without `account_created` must be younger than the account.
        """
        if self.account_created is not None:
            return self.account_created == format_created(created_at)
        return self.created_at is not None and created_at < self.created_at


@dataclass(frozen=True, slots=True)
class Refund:
    refund_id: str
    payment_id: str
    status: str
    amount_rub: Decimal | None


class YooKassa:
    """`session` carries the shop's authentication. `return_url` is where people land after paying."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, return_url: str) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._return_url = return_url

    async def create_payment(
        self, account_id: int, account_created_at: datetime.datetime, amount_rub: str, idempotence_key: str | None
    ) -> Payment:
        """Creates a payment, which the person then makes at its `confirmation_url`. Raises YooKassaUnavailable."""
        body = {
            "amount": {"value": amount_rub, "currency": "RUB"},
            "capture": True,
            "confirmation": {"type": "redirect", "return_url": self._return_url},
            "description": f"GPTutor, account {account_id}",
            "metadata": {ACCOUNT_ID_METADATA: str(account_id), ACCOUNT_CREATED_METADATA: format_created(account_created_at)},
        }
        headers = {"Idempotence-Key": idempotence_key or str(uuid.uuid4())}
        document = await self._call("POST", "/payments", body, headers)
        if document is None:
            raise YooKassaUnavailable("status 404 for a new payment")
        return parse_payment(document)

    async def payment(self, payment_id: str) -> Payment | None:
        """The payment, or None if the shop has no such payment. Raises YooKassaUnavailable."""
        document = await self._get("payments", payment_id)
        return None if document is None else parse_payment(document)

    async def refund(self, refund_id: str) -> Refund | None:
        """The refund, or None if the shop has no such refund. Raises YooKassaUnavailable."""
        document = await self._get("refunds", refund_id)
        return None if document is None else parse_refund(document)

    async def _get(self, collection: str, object_id: str) -> Mapping[str, Any] | None:
        if not ID_PATTERN.fullmatch(object_id):
            return None
        document = await self._call("GET", f"/{collection}/{object_id}")
        if document is not None and document.get("id") != object_id:
            raise YooKassaUnavailable(f"the response of /{collection} has another id than the request")
        return document

    async def _call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, Any] | None:
        data = None if body is None else orjson.dumps(body)
        content_type = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, self._base_url + path, data=data, headers={**(headers or {}), **content_type}, allow_redirects=False
            ) as response:
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise YooKassaUnavailable(f"status {response.status}: {_description(await response.read())}")
                document = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise YooKassaUnavailable(type(error).__name__) from error
        if not isinstance(document, dict):
            raise YooKassaUnavailable("the response is not a JSON object")
        return document


def _description(body: bytes) -> str:
    """YooKassa's own description of an error, such as a missing receipt."""
    try:
        return str(orjson.loads(body)["description"])[:200]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "no description"


def format_created(created_at: datetime.datetime) -> str:
    """The time in which an account was created, exact to the microsecond, in UTC."""
    return created_at.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def parse_payment(document: Mapping[str, Any]) -> Payment:
    """Raises YooKassaUnavailable if a field is missing or malformed."""
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    account = metadata.get(ACCOUNT_ID_METADATA)
    account_created = metadata.get(ACCOUNT_CREATED_METADATA)
    confirmation = document.get("confirmation")
    url = confirmation.get("confirmation_url") if isinstance(confirmation, dict) else None
    return Payment(
        payment_id=_string(document, "id"),
        status=_string(document, "status"),
        is_paid=document.get("paid") is True,
        amount_rub=_amount_rub(document),
        account_id=int(account) if isinstance(account, str) and re.fullmatch(r"[1-9][0-9]{0,17}", account) else None,
        account_created=None if account_created is None else str(account_created),
        created_at=_time(document.get("created_at")),
        is_test=document.get("test") is True,
        confirmation_url=url if isinstance(url, str) else None,
    )


def parse_refund(document: Mapping[str, Any]) -> Refund:
    """Raises YooKassaUnavailable if a field is missing or malformed."""
    return Refund(_string(document, "id"), _string(document, "payment_id"), _string(document, "status"), _amount_rub(document))


def _time(value: Any) -> datetime.datetime | None:
    """A time with its time zone."""
    try:
        moment = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def _string(document: Mapping[str, Any], field: str) -> str:
    value = document.get(field)
    if not isinstance(value, str):
        raise YooKassaUnavailable(f"no {field} in the response")
    return value


def _amount_rub(document: Mapping[str, Any]) -> Decimal | None:
    amount = document.get("amount")
    value = amount.get("value") if isinstance(amount, dict) else None
    if not isinstance(amount, dict) or not isinstance(value, str):
        raise YooKassaUnavailable("no amount in the response")
    try:
        number = Decimal(value)
    except InvalidOperation as error:
        raise YooKassaUnavailable("the amount is not a number") from error
    if not number.is_finite() or number <= 0:
        raise YooKassaUnavailable("the amount is not positive")
    return number if amount.get("currency") == "RUB" else None


@asynccontextmanager
async def connected(
    *, shop_id: str, secret_key: str, base_url: str, return_url: str, timeout_s: float
) -> AsyncIterator[YooKassa]:
    """A client whose session is closed at the end of the context."""
    async with aiohttp.ClientSession(
        headers={"Authorization": aiohttp.encode_basic_auth(shop_id, secret_key)},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        trust_env=False,
    ) as session:
        yield YooKassa(session, base_url, return_url)
