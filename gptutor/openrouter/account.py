"""Our account at OpenRouter, watched: what is left of its limit and its credit, and whether OpenRouter refuses it.

While it does, completions are rejected before anything is held for them (`account_state.py` has the rules). Each process watches
for itself: its own completions and its own look at `/key` tell it enough.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal

from gptutor.openrouter.account_state import (
    ENDED_BY_KEY,
    TEXTS,
    AccountGate,
    KeyReport,
    Refusal,
    Trouble,
    describe,
    read_credit,
    read_key,
)
from gptutor.openrouter.errors import AccountRefused, UpstreamError
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import OPENROUTER_CREDIT_LEFT, OPENROUTER_LIMIT, OPENROUTER_LIMIT_LEFT, OPENROUTER_REFUSES

LOGGER = logging.getLogger("gptutor.account")
LOOK_S = 20.0
"""The longest look."""
LOOKS_APART_S = 1.0
"""However many completions fail, `/key` is asked no more often."""

Get = Callable[[str, Mapping[str, str]], Awaitable[bytes]]
"""The body of OpenRouter's response to `GET <path>`, with these headers beside the usual ones. Raises UpstreamError."""


class Account:
    """`credit_warning_usd`: with less left of the limit or the credit, the operator is warned."""

    def __init__(
        self, *, poll_s: float = 300, probe_s: float = 15, credit_warning_usd: Decimal = Decimal(0), management_key: str = ""
    ) -> None:
        self.gate = AccountGate(probe_s)
        self._poll_s = poll_s
        self._credit_warning_usd = credit_warning_usd
        self._management_key = management_key
        self._clock = asyncio.get_running_loop().time
        self._look_wanted = asyncio.Event()
        self._is_readable = True
        self._is_credit_low = False

    # -- completions

    @property
    def obstacle(self) -> str | None:
        """Why a completion would be rejected now; None: it would be requested."""
        refusal = self.gate.refusal
        return TEXTS[refusal] if refusal is not None and self.gate.wait_s(self._clock()) is not None else None

    def require(self) -> None:
        """Raises AccountRefused."""
        if (wait_s := self.gate.wait_s(self._clock())) is not None and self.gate.refusal is not None:
            raise AccountRefused(TEXTS[self.gate.refusal], wait_s)

    def begin_completion(self) -> bool:
        """To be called before a completion is requested; returns whether it is the probe. Raises AccountRefused."""
        if self.gate.refusal is None:
            return False
        self.require()
        return self.gate.begin_probe(self._clock())

    def record_success(self) -> None:
        """The probe has succeeded."""
        self._open()

    def record_trouble(self, trouble: Trouble) -> None:
        """What the error of a completion said of our account."""
        if trouble == "no_credit":
            self._close("no_credit")
        if trouble == "too_dear":
            ALERTS.count("request_too_dear", "OpenRouter refused a request that may cost more than the credit that is left")
        if trouble in ("invalid_key", "key_limit"):
            self._look_wanted.set()

    # -- looks

    async def watch(self, get: Get) -> None:
        """Runs until cancelled: looks at once, then every `poll_s`, or every `probe_s` until a refusal has ended."""
        is_asked = False
        """Whether a completion has raised a question that `/key` has not answered yet."""
        while True:
            is_asked = is_asked or self._look_wanted.is_set()
            try:
                async with asyncio.timeout(LOOK_S):
                    is_asked = not await self.look(get) and is_asked
            except TimeoutError:
                self._report_unreadable("no response in time")
            except Exception:
                LOGGER.exception("OpenRouter's account cannot be read")
            await asyncio.sleep(min(LOOKS_APART_S, self.gate.probe_s))
            is_urgent = is_asked or self.gate.refusal in ENDED_BY_KEY
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.gate.probe_s if is_urgent else self._poll_s):
                    await self._look_wanted.wait()

    async def look(self, get: Get) -> bool:
        """Reads `/key`, and with a management key `/credits`. Returns whether OpenRouter said what it says of our key."""
        self._look_wanted.clear()  # first: an error that comes during this look is asked about by the next one
        try:
            key = read_key(await get("/key", {}))
        except UpstreamError as error:
            if error.trouble == "invalid_key":
                self._close("invalid_key")
                return True
            self._report_unreadable(str(error))
            return False
        except ValueError as error:
            self._report_unreadable(str(error))
            return False
        if key.is_used_up:
            self._close("key_limit")
        elif self.gate.refusal in ENDED_BY_KEY:
            self._open()
        self._report(key, await self._credit(get) if self._management_key else None)
        return True

    async def _credit(self, get: Get) -> Decimal | None:
        try:
            return read_credit(await get("/credits", {"Authorization": f"Bearer {self._management_key}"}))
        except (UpstreamError, ValueError) as error:
            LOGGER.warning("OpenRouter's /credits cannot be read with openrouter.management_key: %s", error)
            return None

    # -- reports

    def _report(self, key: KeyReport, credit_usd: Decimal | None) -> None:
        self._is_readable = True
        OPENROUTER_LIMIT.set(math.inf if key.limit_usd is None else float(key.limit_usd))
        OPENROUTER_LIMIT_LEFT.set(math.inf if key.limit_left_usd is None else float(key.limit_left_usd))
        if credit_usd is not None:
            OPENROUTER_CREDIT_LEFT.set(float(credit_usd))
        elif self._management_key:
            return
        left = [usd for usd in (key.limit_left_usd, credit_usd) if usd is not None]
        is_low = bool(left) and min(left) < self._credit_warning_usd
        text = f"Little is left at OpenRouter: {describe(key, credit_usd)}"
        if is_low and not self._is_credit_low:
            LOGGER.warning("%s. Raise the limit of the key, or buy credit", text)
        self._is_credit_low = is_low
        ALERTS.report("credit_low", text if is_low else None)

    def _report_unreadable(self, reason: str) -> None:
        if self._is_readable:
            LOGGER.warning("OpenRouter's /key cannot be read, and the credit is not watched: %s", reason)
        self._is_readable = False

    def _close(self, refusal: Refusal) -> None:
        if self.gate.refusal != refusal:
            LOGGER.error("Completions are rejected until this has ended: %s", TEXTS[refusal], extra={"type": "account"})
        self.gate.close(refusal, self._clock())
        OPENROUTER_REFUSES.set(1)
        ALERTS.report("account_refused", f"Completions are rejected: {TEXTS[refusal]}")

    def _open(self) -> None:
        if self.gate.refusal is not None:
            LOGGER.warning("OpenRouter accepts our account again: completions are served", extra={"type": "account"})
        self.gate.open()
        OPENROUTER_REFUSES.set(0)
        ALERTS.report("account_refused", None)
