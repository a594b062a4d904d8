"""When nothing reaches OpenRouter, asking again and again helps nobody: a circuit breaker, pure but for the clock it is given."""

from dataclasses import dataclass

FAILURES_MAX = 10
PAUSE_S = 2.0


@dataclass(slots=True)
class CircuitBreaker:
    """After FAILURES_MAX calls in a row that reached nothing it is open: calls fail at once, and one each PAUSE_S may try."""

    failures: int = 0
    next_try_at: float = 0.0

    def lets_through(self, now: float) -> bool:
        if self.failures < FAILURES_MAX:
            return True
        if now < self.next_try_at:
            return False
        self.next_try_at = now + PAUSE_S  # this one tries for all
        return True

    def reached(self) -> None:
        self.failures = 0

    def missed(self, now: float) -> None:
        self.failures += 1
        if self.failures == FAILURES_MAX:
            self.next_try_at = now + PAUSE_S
