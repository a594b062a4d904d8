"""The local clock, compared with the Date headers of OpenRouter's responses."""

import logging
import time
from email.utils import parsedate_to_datetime

from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import CLOCK_SKEW

LOGGER = logging.getLogger("gptutor.openrouter")

SKEW_S_MAX = 60
"""VK's launch parameters of a clock that is this far ahead are rejected (`integrations.vk.CLOCK_SKEW_S_MAX`)."""
AGREES_S = 30
"""Below this the clock agrees again: one that is off by about SKEW_S_MAX is one warning and not many."""


class ClockSkew:
    """Warns once while the clock is wrong, and tells when it is right again."""

    def __init__(self) -> None:
        self._is_wrong = False

    def observe(self, date: str | None) -> None:
        """`date` is the Date header of a response that has just arrived; None or a malformed one says nothing."""
        try:
            skew_s = time.time() - parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        CLOCK_SKEW.set(skew_s)
        if abs(skew_s) > SKEW_S_MAX and not self._is_wrong:
            self._is_wrong = True
            direction = "ahead of" if skew_s > 0 else "behind"
            text = f"The clock of this machine is {abs(skew_s):.0f} s {direction} OpenRouter's"
            ALERTS.report("clock_skew", text)
            LOGGER.warning(
                "%s: sign-in by VK fails. Set it by NTP (timedatectl)",
                text,
                extra={"type": "clock", "skewSeconds": round(skew_s)},
            )
        elif abs(skew_s) < AGREES_S and self._is_wrong:
            self._is_wrong = False
            ALERTS.report("clock_skew", None)
            LOGGER.warning("The clock of this machine agrees with OpenRouter's again", extra={"type": "clock"})
