"""A circuit breaker: while OpenRouter is unreachable, requests fail at once. Pure: the time is a parameter."""

from dataclasses import dataclass

FAILURES_MAX = 10
PROBE_INTERVAL_S = 2.0


@dataclass(slots=True)
class CircuitBreaker:
    """Opens after FAILURES_MAX failures to connect in a row. Then requests fail at once, but for one each PROBE_INTERVAL_S."""

    failures: int = 0
    next_probe_at: float = 0.0

    def allows_request(self, now: float) -> bool:
        if self.failures < FAILURES_MAX:
            return True
        if now < self.next_probe_at:
            return False
        self.next_probe_at = now + PROBE_INTERVAL_S  # this request is the probe
        return True

    def record_success(self) -> None:
        self.failures = 0

    def record_failure(self, now: float) -> None:
        self.failures += 1
        if self.failures == FAILURES_MAX:
            self.next_probe_at = now + PROBE_INTERVAL_S
