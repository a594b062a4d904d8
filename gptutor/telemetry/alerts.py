"""Alerts: what the operator is told, once when it begins and once when it has ended, by whichever process comes first.

Two kinds. A *condition* lasts: who observes it calls `ALERTS.report(name, text)` while it is on, and with None when it is not. An
*event* happens: `ALERTS.count(name, text)`; a first one is told at once, further ones once an hour with their number. Both only
note something in memory, so they may be called anywhere, at any rate.

The rest is done by `Alerter`, a task of each process. Every `poll_s` it writes down what this process finds wrong (`AlertStore`,
in the database). What is written down for the first time is told by who wrote it. A condition that no process has written down
for LEASE_POLLS intervals has ended: a process that died ends its conditions thereby, and one that comes and goes is one alert.
While the database does not answer, each process decides by its own memory.
"""

import asyncio
import contextlib
import datetime
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from gptutor.telemetry.metrics import ALERTS_ON, ALERTS_SENT

LOGGER = logging.getLogger("gptutor.alerts")

CONDITIONS: dict[str, str] = {
    "account_refused": "OpenRouter serves completions again",
    "credit_low": "There is enough credit at OpenRouter again",
    "books_broken": "Every account that was broken agrees with its ledger again",
    "journal_nearly_full": "There is room in the journal again",
    "disk_nearly_full": "There is room on the disk again",
    "clock_skew": "The clock is right again",
}
"""Conditions, and what is told when one has ended."""
PROVEN_ENDS = frozenset({"books_broken"})
"""Conditions whose end somebody must have seen: a process that has just started does not know of them."""
EVENTS: dict[str, int] = {
    "hold_given_up": 1,
    "payment_not_credited": 1,
    "charge_overrun": 1,
    "commits_lost": 1,
    "request_too_dear": 1,
    "process_died": 3,
}
"""Events, and how many of them within EVENTS_APART_S are told."""
EVENTS_APART_S = 3600.0
LEASE_POLLS = 3.5
CHECKS_APART_S = 1.0
"""However much happens, the database is asked no more often."""
ATTEMPTS_MAX = 4
BACKOFF_FIRST_S = 1.0
WAITING_MAX = 100
"""Alerts that wait to be sent; the oldest is given up if there are more."""
STOP_S = 3.0
"""The longest that a stop of the service waits for alerts to be sent."""


class Undelivered(Exception):
    """An alert was not taken. The message has no secret; `is_final`: another attempt would not help."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None, is_final: bool = False) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class Alert:
    """`count` is the number of events; 1 for a condition. `since` is when the condition began."""

    kind: Literal["begin", "end", "event", "test"]
    name: str
    text: str
    count: int = 1
    since: datetime.datetime | None = None


class AlertStore(Protocol):
    """What all processes share."""

    async def write(self, conditions: Mapping[str, str], *, proven_ends: frozenset[str]) -> list[str]:
        """Writes down the texts of the conditions that are on, by name. Returns the names that were not on before."""

    async def end(self, name: str) -> None:
        """The end of a condition was seen; it is over when no other process writes it down any more."""

    async def ended(self, lease_s: float) -> list[tuple[str, datetime.datetime]]:
        """Deletes the conditions that are over, and returns their names and when they began, to one process only."""

    async def count(self, name: str, text: str, count: int, *, apart_s: float) -> None:
        """Adds events, the latest of which the text describes."""

    async def due_events(self, least: Mapping[str, int], *, apart_s: float) -> list[tuple[str, str, int]]:
        """The names, texts and numbers of events that are to be told, to one process only.

        `least` is how many there must be, by name.
        """


class Alerts:
    """What this process finds wrong, in memory."""

    def __init__(self) -> None:
        self.conditions: dict[str, str] = {}
        self.ended: set[str] = set()
        """Conditions whose end this process has seen, and has not written down."""
        self.events: dict[str, tuple[str, int]] = {}
        """The text of the latest, and how many."""
        self.wake: Callable[[], None] = lambda: None

    def report(self, name: str, text: str | None) -> None:
        """A condition of CONDITIONS is on, as the text says; None: it is not."""
        if name not in CONDITIONS:
            raise KeyError(name)
        if text is not None:
            is_new = name not in self.conditions
            self.conditions[name] = text
            self.ended.discard(name)
        else:
            is_new = self.conditions.pop(name, None) is not None
            if is_new:
                self.ended.add(name)
        ALERTS_ON.set(len(self.conditions))
        if is_new:
            self.wake()

    def count(self, name: str, text: str, count: int = 1) -> None:
        """Events of EVENTS, the latest of which the text describes."""
        if name not in EVENTS:
            raise KeyError(name)
        _, known = self.events.get(name, ("", 0))
        self.events[name] = text, known + count
        self.wake()

    def clear(self) -> None:
        """At the start of the service: nothing is known to be wrong."""
        self.conditions.clear()
        self.ended.clear()
        self.events.clear()


ALERTS = Alerts()
"""Of this process. It is written to from everywhere, as the metrics are."""


class Alerter:
    """`send` raises Undelivered. None: nobody is told, and the alerts are only listed.

    `unavailable` are the exceptions of the store while it cannot be reached.
    """

    def __init__(
        self,
        alerts: Alerts,
        store: AlertStore,
        send: Callable[[Alert], Awaitable[None]] | None,
        *,
        poll_s: float,
        unavailable: tuple[type[Exception], ...],
    ) -> None:
        self._alerts = alerts
        self._store = store
        self._send: Callable[[Alert], Awaitable[None]] = send or _tell_nobody
        self._is_listed_only = send is None
        self._poll_s = poll_s
        self._lease_s = LEASE_POLLS * poll_s
        self._unavailable = unavailable
        self._clock = asyncio.get_running_loop().time
        self._reached_since: float | None = None
        """Since when the store has been reachable; None: it is not."""
        self._reached_at = self._clock()
        self._waiting: deque[Alert] = deque()
        self._woken = asyncio.Event()
        self._has_waiting = asyncio.Event()
        self._written: set[str] = set()
        """Conditions that are in the store."""
        self._told_alone: dict[str, float] = {}
        """Conditions that this process told without the store, each with the time until which it was seen."""
        self._events_told_alone: dict[str, float] = {}
        """When this process told events without the store."""
        alerts.wake = self._woken.set

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._poll(), name="alerts")
            tasks.create_task(self._deliver(), name="sending alerts")

    async def close(self) -> None:
        """Sends what waits, for at most STOP_S. To be called when `run` was cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                while self._waiting:
                    await self._deliver_one(self._waiting.popleft())

    async def _poll(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.check()
            except Exception:
                LOGGER.exception("Alerts failed, and continue")
            apart_s = min(CHECKS_APART_S, self._poll_s)
            await asyncio.sleep(apart_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s - apart_s):
                    await self._woken.wait()

    async def check(self) -> None:
        """Writes down what is wrong, and puts what is to be told among the waiting alerts."""
        now = self._clock()
        try:
            await self._check_with_store(now)
        except self._unavailable:
            self._reached_since = None
            if now - self._reached_at >= self._lease_s:  # a moment's overload must not make every process tell it
                self._check_alone(now)

    async def _check_with_store(self, now: float) -> None:
        """Raises the exceptions of the store."""
        alerts, store = self._alerts, self._store
        on = dict(alerts.conditions)
        new = await store.write(on, proven_ends=PROVEN_ENDS) if on else []
        self._written = set(on)
        for name in new:
            if name not in self._told_alone:
                self._tell(Alert("begin", name, on[name], since=_now()))
        for name in [*self._told_alone]:
            del self._told_alone[name]
            if name not in on:
                self._tell(Alert("end", name, CONDITIONS[name]))
        for name in [*alerts.ended]:
            await store.end(name)
            alerts.ended.discard(name)
        while alerts.events:
            name, (text, count) = alerts.events.popitem()
            try:
                await store.count(name, text, count, apart_s=EVENTS_APART_S)
            except BaseException:
                _, later = alerts.events.get(name, ("", 0))
                alerts.events[name] = text, count + later
                raise
        for name, text, count in await store.due_events(EVENTS, apart_s=EVENTS_APART_S):
            self._tell(Alert("event", name, text, count))
        self._reached_at = now
        if self._reached_since is None:
            self._reached_since = now
        if now - self._reached_since > self._lease_s:  # by now every process has written down what it finds wrong
            for name, since in await store.ended(self._lease_s):
                self._tell(Alert("end", name, CONDITIONS.get(name, "It is over"), since=since))

    def _check_alone(self, now: float) -> None:
        """The store cannot be reached: what is written there is ended there, later."""
        alerts = self._alerts
        for name, text in alerts.conditions.items():
            if name not in self._told_alone and name not in self._written:
                self._tell(Alert("begin", name, text, since=_now()))
            if name not in self._written:
                self._told_alone[name] = now
        for name, seen_at in [*self._told_alone.items()]:
            if now - seen_at > self._lease_s:
                del self._told_alone[name]
                self._tell(Alert("end", name, CONDITIONS[name]))
        for name, (text, count) in [*alerts.events.items()]:
            told_at = self._events_told_alone.get(name)
            if count >= EVENTS[name] and (told_at is None or now - told_at > EVENTS_APART_S):
                self._events_told_alone[name] = now
                del alerts.events[name]
                self._tell(Alert("event", name, text, count))

    # -- sending

    def _tell(self, alert: Alert) -> None:
        level = logging.INFO if alert.kind == "end" else logging.WARNING
        LOGGER.log(level, "Alert (%s, %s): %s", alert.kind, alert.name, alert.text, extra={"type": "alert"})
        if self._is_listed_only:
            return
        if len(self._waiting) >= WAITING_MAX:
            self._give_up(self._waiting.popleft(), "too many are waiting")
        self._waiting.append(alert)
        self._has_waiting.set()

    async def _deliver(self) -> None:
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            while self._waiting:
                alert = self._waiting.popleft()
                try:
                    await self._deliver_one(alert)
                except asyncio.CancelledError:
                    self._waiting.appendleft(alert)  # `close` tries it once more
                    raise

    async def _deliver_one(self, alert: Alert) -> None:
        """Makes up to ATTEMPTS_MAX attempts."""
        try:
            await deliver(self._send, alert)
        except Undelivered as error:
            self._give_up(alert, str(error))
        else:
            ALERTS_SENT.labels("sent").inc()

    def _give_up(self, alert: Alert, reason: str) -> None:
        ALERTS_SENT.labels("failed").inc()
        LOGGER.error("The alert %s (%s) could not be sent: %s", alert.name, alert.kind, reason, extra={"type": "alert"})


async def deliver(send: Callable[[Alert], Awaitable[None]], alert: Alert) -> None:
    """Sends with up to ATTEMPTS_MAX attempts. Raises Undelivered."""
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            await send(alert)
        except Undelivered as error:
            if error.is_final or attempt == ATTEMPTS_MAX:
                raise
            await asyncio.sleep(error.retry_after_s or BACKOFF_FIRST_S * 4 ** (attempt - 1))
        else:
            return


async def _tell_nobody(alert: Alert) -> None:
    """Without an address, alerts are only logged and listed."""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def in_words(alert: Alert, host: str) -> str:
    """One alert as a sentence for people."""
    prefix = {"begin": "ALERT", "end": "OVER", "event": "ALERT", "test": "TEST"}[alert.kind]
    often = f" ({alert.count} times within an hour)" if alert.count > 1 else ""
    since = f" (since {alert.since:%Y-%m-%d %H:%M} UTC)" if alert.kind == "end" and alert.since is not None else ""
    return f"{prefix}: GPTutor on {host}: {alert.text}{often}{since} [{alert.name}]"
