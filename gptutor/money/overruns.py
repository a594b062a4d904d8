"""Charges above their holds (contract C5): booked in full, and told to the operator.

The ceiling is an upper bound by OpenRouter's own list. A charge above it means that OpenRouter billed more than it lists, or that
the ceiling misses something.
"""

import logging

from gptutor.money.amounts import AccountId, Nano, roubles
from gptutor.money.holds import HoldFacts
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import CHARGE_OVERRUNS

LOGGER = logging.getLogger("gptutor.overruns")


def report_overrun(account_id: AccountId, hold: HoldFacts, charged: Nano, *, overdraft_max: Nano) -> None:
    """Counts and logs a charge above its hold; an error if the difference alone is more than a balance may fall below zero."""
    CHARGE_OVERRUNS.inc()
    ALERTS.count("charge_overrun", f"The charge of the request {hold.request_id} ({hold.model}) exceeds its hold")
    LOGGER.log(
        logging.ERROR if charged - hold.amount > overdraft_max else logging.WARNING,
        "A charge exceeds its hold",
        extra={
            "type": "overrun",
            "model": hold.model,
            "userId": str(account_id),
            "requestId": hold.request_id,
            "holdRub": roubles(hold.amount),
            "costRub": roubles(charged),
        },
    )
