"""When nothing reaches OpenRouter (row upstream-20)."""

import asyncio
import time

import pytest

from gptutor.http.app_keys import SERVICES
from gptutor.openrouter.circuit import FAILURES_MAX, PAUSE_S, CircuitBreaker
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.connection_pool import Endpoint
from tests.support.gateway import Gateway


def test_it_opens_after_failures_in_a_row_and_lets_one_try_at_a_time() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURES_MAX - 1):
        circuit.missed(now=100)
    circuit.reached()
    for _ in range(FAILURES_MAX):
        assert circuit.lets_through(100)
        circuit.missed(now=100)
    assert not circuit.lets_through(100 + PAUSE_S / 2)
    assert circuit.lets_through(100 + PAUSE_S)
    assert not circuit.lets_through(100 + PAUSE_S)  # the one that tries has not come back
    circuit.missed(now=100 + PAUSE_S)
    assert not circuit.lets_through(100 + 1.5 * PAUSE_S)
    assert circuit.lets_through(100 + 2 * PAUSE_S)
    circuit.reached()
    assert circuit.lets_through(100 + 2 * PAUSE_S)


@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 1}}])
async def test_while_openrouter_is_away_callers_learn_it_at_once_and_when_it_is_back_they_are_served(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await gateway.caller()
    upstream = gateway.app[SERVICES].upstream
    pool = upstream._pool
    real, pool._end = pool._end, Endpoint.of("http://127.0.0.1:1/api/v1")
    pool.close()
    asked = 0
    real_connect = pool.connect

    async def counted() -> UpstreamConnection:
        nonlocal asked
        asked += 1
        return await real_connect()

    monkeypatch.setattr(pool, "connect", counted)
    for _ in range(3 * FAILURES_MAX):
        response, _ = await gateway.chat(caller)
        assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_unreachable")
    assert FAILURES_MAX <= asked <= FAILURES_MAX + 2
    assert await caller.held() == 0
    pool._end = real
    began = time.monotonic()
    while (await gateway.chat(caller))[0].status != 200:
        await asyncio.sleep(0.1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("tuned", [{"openrouter": {"connections_max": 1, "connect_s": 0.2, "attempts_max": 1}}])
async def test_a_house_that_is_full_says_nothing_of_openrouter(gateway: Gateway) -> None:
    gateway.simulator.word_s = 0.1
    caller = await gateway.caller("10000")
    long = asyncio.create_task(gateway.chat(caller, stream=True))
    await asyncio.sleep(0.3)
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    for _ in range(FAILURES_MAX + 2):
        async with gateway.session.post(gateway.chat_url, json=body, headers=caller.headers) as response:
            assert response.headers["X-Error-Code"] == "upstream_unreachable"
    await long
    assert (await gateway.chat(caller))[0].status == 200
    assert await caller.held() == 0


async def test_a_connection_closes_the_circuit_and_not_only_an_answer(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row upstream-20: OpenRouter is back, and takes its time for the first answer."""
    circuit = gateway.app[SERVICES].upstream._circuit
    circuit.failures, circuit.next_try_at = FAILURES_MAX, 0
    monkeypatch.setattr(gateway.app[SERVICES].upstream._pool, "free", lambda: None)  # none is kept from before the outage
    gateway.simulator.first_word_s = 2
    caller = await gateway.caller()
    asking = asyncio.create_task(gateway.chat(caller))
    async with asyncio.timeout(1.5):
        while circuit.failures:
            await asyncio.sleep(0.01)
    assert not asking.done()
    assert (await asking)[0].status == 200
