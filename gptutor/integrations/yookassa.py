"""YooKassa's API, as far as top-ups need it: make a payment, look a payment or a refund up. No money of ours, no database.

Every call has Basic authentication by the shop's id and secret key. Source: yookassa.ru/developers/api.
"""

import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import aiohttp
import orjson

ID_FORM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""All ids of YooKassa are written so; anything else need not be asked about."""
ACCOUNT = "gptutor_account_id"
"""Our own mark on a payment. A shop may have other sellers beside us, whose payments are not ours to credit."""


class YooKassaUnavailable(Exception):
    """YooKassa did not answer, or not as it should; the text is for the log, and has no secret in it."""


@dataclass(frozen=True, slots=True)
class Payment:
    """`account_id` is what our own metadata name, `amount_rub` None if the currency is another."""

    payment_id: str
    status: str
    is_paid: bool
    amount_rub: Decimal | None
    account_id: int | None
    confirmation_url: str | None

    @property
    def is_money(self) -> bool:
        """Whether it has been paid, and is ours to keep."""
        return self.status == "succeeded" and self.is_paid


@dataclass(frozen=True, slots=True)
class Refund:
    refund_id: str
    payment_id: str
    status: str
    amount_rub: Decimal | None


class YooKassa:
    """`session` bears the shop's authentication."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, return_url: str) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._return_url = return_url

    async def create_payment(self, account_id: int, amount_rub: str, idempotence_key: str | None) -> Payment:
        """A payment that waits for the person at `confirmation_url`. Raises YooKassaUnavailable."""
        body = {
            "amount": {"value": amount_rub, "currency": "RUB"},
            "capture": True,
            "confirmation": {"type": "redirect", "return_url": self._return_url},
            "description": f"GPTutor, account {account_id}",
            "metadata": {ACCOUNT: str(account_id)},
        }
        headers = {"Idempotence-Key": idempotence_key or str(uuid.uuid4())}
        document = await self._call("POST", "/payments", body, headers)
        if document is None:
            raise YooKassaUnavailable("404 for a new payment")
        return payment_of(document)

    async def payment(self, payment_id: str) -> Payment | None:
        """None: this shop has no such payment. Raises YooKassaUnavailable."""
        document = await self._look_up("payments", payment_id)
        return None if document is None else payment_of(document)

    async def refund(self, refund_id: str) -> Refund | None:
        """None: this shop has no such refund. Raises YooKassaUnavailable."""
        document = await self._look_up("refunds", refund_id)
        return None if document is None else refund_of(document)

    async def _look_up(self, kind: str, name: str) -> Mapping[str, Any] | None:
        if not ID_FORM.fullmatch(name):
            return None
        document = await self._call("GET", f"/{kind}/{name}")
        if document is not None and document.get("id") != name:
            raise YooKassaUnavailable(f"another of the {kind} than was asked for")
        return document

    async def _call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, Any] | None:
        data = None if body is None else orjson.dumps(body)
        named = {**(headers or {}), **({} if body is None else {"Content-Type": "application/json"})}
        try:
            async with self._session.request(
                method, self._base_url + path, data=data, headers=named, allow_redirects=False
            ) as response:
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise YooKassaUnavailable(f"status {response.status}: {_description(await response.read())}")
                document = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise YooKassaUnavailable(type(error).__name__) from error
        if not isinstance(document, dict):
            raise YooKassaUnavailable("the answer is no object")
        return document


def _description(answer: bytes) -> str:
    """What YooKassa says is wrong, such as a receipt that the shop must send."""
    try:
        return str(orjson.loads(answer)["description"])[:200]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "without a description"


def payment_of(document: Mapping[str, Any]) -> Payment:
    """Raises YooKassaUnavailable where the form is not YooKassa's."""
    metadata = document.get("metadata")
    account = metadata.get(ACCOUNT) if isinstance(metadata, dict) else None
    confirmation = document.get("confirmation")
    url = confirmation.get("confirmation_url") if isinstance(confirmation, dict) else None
    return Payment(
        payment_id=_text(document, "id"),
        status=_text(document, "status"),
        is_paid=document.get("paid") is True,
        amount_rub=_roubles(document),
        account_id=int(account) if isinstance(account, str) and re.fullmatch(r"[1-9][0-9]{0,17}", account) else None,
        confirmation_url=url if isinstance(url, str) else None,
    )


def refund_of(document: Mapping[str, Any]) -> Refund:
    """Raises YooKassaUnavailable where the form is not YooKassa's."""
    return Refund(_text(document, "id"), _text(document, "payment_id"), _text(document, "status"), _roubles(document))


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise YooKassaUnavailable(f"no {name} in the answer")
    return value


def _roubles(document: Mapping[str, Any]) -> Decimal | None:
    amount = document.get("amount")
    value = amount.get("value") if isinstance(amount, dict) else None
    if not isinstance(amount, dict) or not isinstance(value, str):
        raise YooKassaUnavailable("no amount in the answer")
    try:
        number = Decimal(value)
    except InvalidOperation as error:
        raise YooKassaUnavailable("the amount is no number") from error
    if not number.is_finite() or number <= 0:
        raise YooKassaUnavailable("the amount is no amount")
    return number if amount.get("currency") == "RUB" else None


@asynccontextmanager
async def connected(
    *, shop_id: str, secret_key: str, base_url: str, return_url: str, timeout_s: float
) -> AsyncIterator[YooKassa]:
    """A session with the shop's authentication, closed at the end."""
    async with aiohttp.ClientSession(
        headers={"Authorization": aiohttp.encode_basic_auth(shop_id, secret_key)},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        trust_env=False,
    ) as session:
        yield YooKassa(session, base_url, return_url)
