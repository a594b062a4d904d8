"""The circuit breaker, while OpenRouter is unreachable (row upstream-20)."""

import asyncio
import time

import pytest

from gptutor.http.app_keys import SERVICES
from gptutor.openrouter.circuit import FAILURES_MAX, PROBE_INTERVAL_S, CircuitBreaker
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.connection_pool import Endpoint
from tests.support.gateway import Gateway


def test_the_circuit_opens_after_failures_in_a_row_and_allows_one_probe_at_a_time() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURES_MAX - 1):
        circuit.record_failure(now=100)
    circuit.record_success()
    for _ in range(FAILURES_MAX):
        assert circuit.allows_request(100)
        circuit.record_failure(now=100)
    assert not circuit.allows_request(100 + PROBE_INTERVAL_S / 2)
    assert circuit.allows_request(100 + PROBE_INTERVAL_S)
    assert not circuit.allows_request(100 + PROBE_INTERVAL_S)  # the probe has no result yet
    circuit.record_failure(now=100 + PROBE_INTERVAL_S)
    assert not circuit.allows_request(100 + 1.5 * PROBE_INTERVAL_S)
    assert circuit.allows_request(100 + 2 * PROBE_INTERVAL_S)
    circuit.record_success()
    assert circuit.allows_request(100 + 2 * PROBE_INTERVAL_S)


@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 1}}])
async def test_while_openrouter_is_unreachable_requests_fail_at_once_and_afterwards_they_are_served(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await gateway.client()
    upstream = gateway.app[SERVICES].upstream
    pool = upstream._pool
    real, pool._origin = pool._origin, Endpoint.parse("http://127.0.0.1:1/api/v1")
    pool.close()
    acquired = 0
    real_acquire = pool.acquire

    async def counted() -> UpstreamConnection:
        nonlocal acquired
        acquired += 1
        return await real_acquire()

    monkeypatch.setattr(pool, "acquire", counted)
    for _ in range(3 * FAILURES_MAX):
        response, _ = await gateway.chat(client)
        assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_unreachable")
    assert FAILURES_MAX <= acquired <= FAILURES_MAX + 2
    assert await client.held() == 0
    pool._origin = real
    began = time.monotonic()
    while (await gateway.chat(client))[0].status != 200:
        await asyncio.sleep(0.1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("tuned", [{"openrouter": {"connections_max": 1, "connect_s": 0.2, "attempts_max": 1}}])
async def test_an_exhausted_pool_does_not_open_the_circuit(gateway: Gateway) -> None:
    gateway.simulator.word_s = 0.1
    client = await gateway.client("10000")
    long = asyncio.create_task(gateway.chat(client, stream=True))
    await asyncio.sleep(0.3)
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    for _ in range(FAILURES_MAX + 2):
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            assert response.headers["X-Error-Code"] == "upstream_unreachable"
    await long
    assert (await gateway.chat(client))[0].status == 200
    assert await client.held() == 0


async def test_a_connection_closes_the_circuit_before_any_response(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row upstream-20: OpenRouter is reachable again, and its first response is slow."""
    circuit = gateway.app[SERVICES].upstream._circuit
    circuit.failures, circuit.next_probe_at = FAILURES_MAX, 0
    monkeypatch.setattr(
        gateway.app[SERVICES].upstream._pool, "acquire_idle", lambda: None
    )  # no idle connection from before the outage
    gateway.simulator.first_word_s = 2
    client = await gateway.client()
    requesting = asyncio.create_task(gateway.chat(client))
    async with asyncio.timeout(1.5):
        while circuit.failures:
            await asyncio.sleep(0.01)
    assert not requesting.done()
    assert (await requesting)[0].status == 200
