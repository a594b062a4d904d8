"""A simulator of YooKassa's API v3: payments, refunds, idempotence, authentication and outages."""

import asyncio
import base64
import copy
import datetime
import uuid
from typing import Any

from aiohttp import web

SHOP_ID = "506751"
SECRET_KEY = "test_kQd7-secret-of-the-shop"


class YooKassaStandIn:
    """`fault` replaces every response: a status, "silence" (none for 30 s) or "garbage" (HTML). `pause_s` delays every response."""

    def __init__(self) -> None:
        self.payments: dict[str, dict[str, Any]] = {}
        self.refunds: dict[str, dict[str, Any]] = {}
        self.idempotent_responses: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.calls: list[tuple[str, str]] = []
        self.fault: int | str | None = None
        self.in_flight = self.in_flight_max = 0
        self.pause_s = 0.0

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._handle])
        app.add_routes(
            [
                web.post("/v3/payments", self._create),
                web.get("/v3/payments/{id}", self._show_payment),
                web.get("/v3/refunds/{id}", self._show_refund),
            ]
        )
        return app

    # -- actions of the payer and of the shop

    def pay(self, payment_id: str) -> None:
        self.payments[payment_id] |= {"status": "succeeded", "paid": True, "captured_at": "2026-11-24T10:00:00.000Z"}

    def cancel(self, payment_id: str) -> None:
        self.payments[payment_id] |= {"status": "canceled", "paid": False}

    def add_payment(self, account_id: int | None, value: str = "100.00", **changed: Any) -> str:
        """Adds a payment, by default a succeeded one, and returns its id."""
        payment_id = _new_id()
        self.payments[payment_id] = {
            "id": payment_id,
            "status": "succeeded",
            "paid": True,
            "amount": {"value": value, "currency": "RUB"},
            "recipient": {"account_id": SHOP_ID, "gateway_id": "1"},
            "refundable": True,
            "test": False,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "metadata": {} if account_id is None else {"gptutor_account_id": str(account_id)},
            **changed,
        }
        return payment_id

    def add_refund(self, payment_id: str, value: str, **changed: Any) -> str:
        refund_id = _new_id()
        amount = {"value": value, "currency": "RUB"}
        self.refunds[refund_id] = {"id": refund_id, "payment_id": payment_id, "status": "succeeded", "amount": amount, **changed}
        return refund_id

    # -- its API

    @web.middleware
    async def _handle(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append((request.method, request.path))
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            await asyncio.sleep(self.pause_s)
            if self.fault == "silence":
                await asyncio.sleep(30)
            if self.fault == "garbage":
                return web.Response(text="<html>", content_type="text/html")
            if isinstance(self.fault, int):
                return _error(self.fault, "it is broken")
            expected = base64.b64encode(f"{SHOP_ID}:{SECRET_KEY}".encode()).decode()
            if request.headers.get("Authorization") != f"Basic {expected}":
                return _error(401, "Basic auth failed")
            response: web.StreamResponse = await handler(request)
            return response
        finally:
            self.in_flight -= 1

    async def _create(self, request: web.Request) -> web.Response:
        key = request.headers.get("Idempotence-Key")
        if not key or len(key) > 64:
            return _error(400, "Idempotence-Key is missing or too long")
        body = await request.json()
        if key in self.idempotent_responses:
            previous_body, response = self.idempotent_responses[key]
            return (
                web.json_response(response)
                if previous_body == body
                else _error(400, "Idempotence-Key was used for another request")
            )
        payment_id = self.add_payment(
            None,
            body["amount"]["value"],
            status="pending",
            paid=False,
            metadata=body["metadata"],
            confirmation={"type": "redirect", "confirmation_url": "https://yoomoney.ru/checkout/payments/v2/contract?orderId=1"},
        )
        self.idempotent_responses[key] = (body, copy.deepcopy(self.payments[payment_id]))
        return web.json_response(self.payments[payment_id])

    async def _show_payment(self, request: web.Request) -> web.Response:
        payment = self.payments.get(request.match_info["id"])
        return web.json_response(payment) if payment else _error(404, "no such payment")

    async def _show_refund(self, request: web.Request) -> web.Response:
        refund = self.refunds.get(request.match_info["id"])
        return web.json_response(refund) if refund else _error(404, "no such refund")


def notification(event: str, object_id: str, **claimed: Any) -> dict[str, Any]:
    """A notification as YooKassa sends it; `claimed` adds or forges fields of its object."""
    return {"type": "notification", "event": event, "object": {"id": object_id, "status": "succeeded", "paid": True, **claimed}}


def _error(status: int, description: str) -> web.Response:
    return web.json_response({"type": "error", "id": _new_id(), "code": "x", "description": description}, status=status)


def _new_id() -> str:
    return f"{uuid.uuid4()}"
