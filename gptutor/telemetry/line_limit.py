"""A limit of log lines per kind and minute. Further lines are counted, and one line reports the count when the minute is over."""

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass

MINUTE_S = 60.0
LOOK_S = 1.0
KINDS_MAX = 2000
"""Kinds that are counted apart; further ones share one count."""


@dataclass(slots=True)
class _Kind:
    ends: float
    level: int
    message: str
    admitted: int = 0
    suppressed: int = 0


@dataclass(frozen=True, slots=True)
class Repeated:
    """`count` more lines like this one were not written."""

    level: int
    message: str
    count: int


class LineLimit:
    """Thread-safe."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._ended: list[Repeated] = []
        self._next_look = float("-inf")
        self._lock = threading.Lock()

    def admits(self, kind: Hashable, per_minute: int, level: int, message: str, now: float) -> bool:
        """Whether a line of this kind is written. `message` stands for the others if they are not."""
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
                if now >= self._next_look:  # not for each line of a flood
                    self._next_look = now + LOOK_S
                    self._drop_ended(now)
                kind = kind if len(self._kinds) < KINDS_MAX else None
            state = self._kinds.get(kind)
            if state is None or now >= state.ends:
                if state is not None:
                    self._end(state)
                state = self._kinds[kind] = _Kind(now + MINUTE_S, level, message)
            if state.admitted < per_minute:
                state.admitted += 1
                return True
            state.suppressed += 1
            return False

    @property
    def has_suppressed(self) -> bool:
        """Whether there is, or will be, something for `ended`."""
        return bool(self._kinds or self._ended)

    def ended(self, now: float) -> list[Repeated]:
        """What was not written in the minutes that are over; infinity as `now` ends them all."""
        with self._lock:
            self._drop_ended(now)
            ended, self._ended = self._ended, []
            return ended

    def _drop_ended(self, now: float) -> None:
        for kind in [kind for kind, state in self._kinds.items() if now >= state.ends]:
            self._end(self._kinds.pop(kind))

    def _end(self, state: _Kind) -> None:
        if state.suppressed:
            self._ended.append(Repeated(state.level, state.message, state.suppressed))


def kinds_of(record: logging.LogRecord) -> tuple[Hashable, Hashable]:
    """The narrow kind of a record, identical lines, and the wide one: lines of the same place in the code.

    Tracebacks are identical if they end in the same place, whatever the message.
    """
    wide = (record.name, record.levelno, str(record.msg))
    if record.exc_info and record.exc_info[0] is not None:
        traceback = record.exc_info[2]
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = traceback and (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
        return (*wide, record.exc_info[0].__name__, place), wide
    return (*wide, message_of(record), getattr(record, "userId", None), getattr(record, "requestId", None)), wide


def message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit: the formatter will report it
        return str(record.msg)
