"""When a request to OpenRouter is retried (contract F3; rows upstream-1, upstream-6): the decision as a table."""

import pytest

from gptutor.openrouter.errors import error_from_response
from gptutor.openrouter.retry import Failure, retry_delay_s


@pytest.mark.parametrize(
    # kind, status, Retry-After, generation id, attempt, seconds left → delay
    ("kind", "status", "retry_after", "generation", "attempt", "left", "delay"),
    [
        ("unreachable", 0, None, None, 1, 60, 0.375),
        ("unreachable", 0, None, None, 2, 60, 0.75),
        ("unreachable", 0, None, None, 3, 60, None),  # the last attempt
        ("unreachable", 0, None, None, 1, 0.3, None),  # no time left for it
        ("timeout", 0, None, None, 1, 60, None),  # it may have been bought
        ("broken", 0, None, None, 1, 60, None),
        ("status", 429, None, None, 1, 60, 0.375),
        ("status", 429, 7, None, 1, 60, 7.25),
        ("status", 429, 7, None, 1, 6, None),  # longer than there is time
        ("status", 408, None, None, 1, 60, 0.375),
        ("status", 502, None, None, 1, 60, 0.375),
        ("status", 503, 0, None, 2, 60, 0.25),
        ("status", 524, None, None, 1, 60, 0.375),
        ("status", 529, None, None, 1, 60, 0.375),
        ("status", 502, None, "gen-1", 1, 60, None),  # with a generation id, something may have been bought
        ("status", 500, None, None, 1, 60, None),
        ("status", 400, None, None, 1, 60, None),
        ("status", 401, None, None, 1, 60, None),
        ("status", 402, None, None, 1, 60, None),  # our credit is used up
        ("status", 402, 2, None, 1, 60, 2.25),  # our credit is held for requests in flight, for a moment
        ("status", 403, 2, None, 1, 60, None),
        ("status", 302, None, None, 1, 60, None),
    ],
)
def test_the_retry_decision(
    kind: str, status: int, retry_after: float | None, generation: str | None, attempt: int, left: float, delay: float | None
) -> None:
    failure = Failure(kind, status, retry_after, generation)  # type: ignore[arg-type]
    assert retry_delay_s(failure, attempt=attempt, attempts_max=3, left_s=left, jitter=0.5) == delay


def test_backoff_is_jittered_and_bounded() -> None:
    failure = Failure("unreachable")
    delays = {retry_delay_s(failure, attempt=1, attempts_max=3, left_s=60) for _ in range(50)}
    assert len(delays) > 10
    assert all(0.25 <= delay <= 0.5 for delay in delays if delay is not None)
    assert retry_delay_s(failure, attempt=20, attempts_max=99, left_s=60, jitter=1.0) == 8


def test_an_error_message_does_not_show_our_api_key() -> None:
    error = error_from_response(401, {}, b'{"error": {"message": "Incorrect API key provided: sk-or-v1-abc_DEF. See our site."}}')
    assert error.message == "Incorrect API key provided: sk-…. See our site."
