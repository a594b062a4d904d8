"""The job that asks YooKassa about payments that have not ended: a notification may be lost, or come before the payment's end.

Every process runs it; a payment that is due is claimed by one of them. Without pending payments it costs one indexed query per
`poll_s`.
"""

import asyncio
import logging

from gptutor.api.payments import PaymentService
from gptutor.database.errors import DatabaseUnavailable
from gptutor.errors import ApiError
from gptutor.money.pending_payments import PendingPayments
from gptutor.telemetry.metrics import PAYMENT_LOOKUPS

LOGGER = logging.getLogger("gptutor.payments")


class PaymentLookups:
    """Looks for due payments every `poll_s` seconds."""

    def __init__(self, payments: PaymentService, pending: PendingPayments, poll_s: float) -> None:
        self._payments = payments
        self._pending = pending
        self._poll_s = poll_s

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self.look_up_due()
            except (ApiError, DatabaseUnavailable):
                pass  # YooKassa's failure is logged by the service, the database's by recovery
            except Exception:
                LOGGER.exception("The look-up of payments failed, and continues")
            await asyncio.sleep(self._poll_s)

    async def look_up_due(self) -> None:
        """Looks up all payments that are due, one after the other. Raises ApiError, DatabaseUnavailable."""
        while due := await self._pending.claim():
            try:
                outcome: str = await self._payments.look_up(due)
            except ApiError:
                PAYMENT_LOOKUPS.labels("unavailable").inc()
                raise
            PAYMENT_LOOKUPS.labels(outcome).inc()
