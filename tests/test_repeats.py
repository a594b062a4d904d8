"""A client that repeats a request by itself buys once. After a failure whose outcome is unknown, the repeat is answered without
buying; after a failure that bought nothing it is carried out, also with the same Idempotency-Key (contract B8, C10)."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import openai
import pytest
from aiohttp import web

from gptutor.config import schema
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.http.app_keys import DATABASE, JOURNAL
from gptutor.money import ledger
from gptutor.money.keyring import KeyRing
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import MODEL, VAULT, Client, Gateway, config_for, gateway_on
from tests.support.ledger import assert_invariants_hold

KEY = {"Idempotency-Key": "order-66"}
COST = 0.01
SHORT = {"openrouter": {"total_s": 0.3, "first_byte_s": 0.3, "attempts_max": 1}}
CUT = "fault:bad-length=100"
"""The simulator bills the response, and its end is missing."""


@dataclass
class Answer:
    status: int
    code: str | None
    should_retry: str | None
    text: str
    request_id: str


async def ask(
    gateway: Gateway, client: Client, text: str = "Hello", headers: dict[str, str] | None = None, *, key: str = "", **members: Any
) -> Answer:
    """Sends a request as a client does that repeats it: at once, while the exchange of the first one may not have ended."""
    body = {"messages": [{"role": "user", "content": text}], **members}
    sent_headers = {"Authorization": f"Bearer {key or client.key}", **(headers or {})}
    async with gateway.session.post(gateway.chat_url, json=body, headers=sent_headers) as response:
        document = await response.read()
    return Answer(
        response.status,
        response.headers.get("X-Error-Code"),
        response.headers.get("x-should-retry"),
        json.loads(document)["error"] if response.status >= 400 else "",
        response.headers["X-Request-ID"],
    )


class OpenRouter:
    """Plays one answer after the other, the last one again and again, and counts the requests."""

    def __init__(self, *answers: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self.requests = 0
        self._answers = answers

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        return await self._answers[min(self.requests, len(self._answers)) - 1](request)


async def completion(request: web.Request) -> web.Response:
    return web.json_response({"id": "gen-1", "choices": [], "usage": {"cost": COST}})


async def disconnect(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def edge_page(request: web.Request) -> web.Response:
    return web.Response(status=524, text="<html>", content_type="text/html")


async def silence(request: web.Request) -> web.Response:
    await asyncio.sleep(1)
    return web.Response()


def refusal(status: int) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def play(request: web.Request) -> web.Response:
        return web.json_response({"error": {"code": status, "message": "no"}}, status=status)

    return play


async def bought(gateway: Gateway, client: Client) -> int:
    """How many completions of COST dollars the client has paid for."""
    await gateway.idle()
    times = (100 - await client.balance()) / (Decimal(str(COST)) * 90)
    assert times == int(times)
    return int(times)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


# -- the outcome of the first request is unknown


@pytest.mark.parametrize("tuned", [SHORT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [disconnect, edge_page, silence])
async def test_a_repeat_of_a_request_whose_outcome_is_unknown_is_answered_without_buying(
    scripted: Any, failure: Any, stream: bool
) -> None:
    plays, gateway = scripted
    openrouter = OpenRouter(failure, completion)
    plays.append(openrouter)
    client = await gateway.client()
    first = await ask(gateway, client, stream=stream)
    assert (first.status in (500, 504), first.should_retry) == (True, "false")
    for _ in range(3):  # a client that ignores the header, such as the AI SDK
        repeat = await ask(gateway, client, stream=stream)
        assert (repeat.status, repeat.code, repeat.should_retry) == (422, "outcome_unknown", "false")
        assert repeat.text.endswith(f": {first.request_id}")
    assert openrouter.requests == 1
    assert await bought(gateway, client) == 0


async def test_a_request_that_was_billed_and_broke_is_charged_once_however_often_it_is_repeated(gateway: Gateway) -> None:
    client = await gateway.client()
    answers = [await ask(gateway, client, CUT) for _ in range(5)]
    assert [answer.status for answer in answers] == [500, 422, 422, 422, 422]
    assert len(gateway.simulator.billing.records) == 1
    await assert_charges_match_bills(gateway, client)
    assert (await ask(gateway, client, CUT)).status == 422  # its price is known by now; its response is still lost


async def test_a_large_body_is_recognised_too(gateway: Gateway) -> None:
    client = await gateway.client()
    text = f"{CUT} {'x' * 300_000}"
    assert [(await ask(gateway, client, text)).status for _ in range(2)] == [500, 422]


@pytest.mark.parametrize("tuned", [SHORT])
async def test_ten_repeats_at_once_buy_nothing(scripted: Any) -> None:
    plays, gateway = scripted
    openrouter = OpenRouter(disconnect, completion)
    plays.append(openrouter)
    client = await gateway.client()
    await ask(gateway, client)
    answers = await asyncio.gather(*(ask(gateway, client) for _ in range(10)))
    assert [answer.code for answer in answers] == ["outcome_unknown"] * 10
    assert openrouter.requests == 1


@pytest.mark.parametrize("tuned", [SHORT])
async def test_only_the_same_body_with_the_same_api_key_is_a_repeat(scripted: Any) -> None:
    plays, gateway = scripted
    plays.append(OpenRouter(disconnect, completion))
    client, neighbour = await gateway.client(), await gateway.client()
    other_key, _ = await KeyRing(gateway.database, VAULT).issue(client.account_id)
    assert (await ask(gateway, client)).status == 500
    assert (await ask(gateway, client, "Something else")).status == 200
    assert (await ask(gateway, client, temperature=0.5)).status == 200
    assert (await ask(gateway, client, key=other_key)).status == 200
    assert (await ask(gateway, neighbour)).status == 200
    assert (await ask(gateway, client)).status == 422
    assert await bought(gateway, client) == 3


@pytest.mark.parametrize("tuned", [SHORT])
async def test_a_new_idempotency_key_says_that_the_request_is_meant_to_be_bought_again(scripted: Any) -> None:
    plays, gateway = scripted
    plays.append(OpenRouter(disconnect, completion))
    client = await gateway.client()
    first = await ask(gateway, client, headers=KEY)
    assert (first.status, (await ask(gateway, client)).status) == (500, 422)  # the key is used up, and the body marked
    repeat = await ask(gateway, client, headers=KEY)
    assert (repeat.status, repeat.code, repeat.should_retry) == (409, "duplicate_request", "false")
    assert (await ask(gateway, client, headers={"Idempotency-Key": "order-67"})).status == 200
    assert await bought(gateway, client) == 1


@pytest.mark.parametrize("tuned", [SHORT])
async def test_after_three_minutes_the_request_is_a_new_one(scripted: Any, connection: asyncpg.Connection) -> None:
    plays, gateway = scripted
    plays.append(OpenRouter(disconnect, completion))
    client = await gateway.client()
    await ask(gateway, client)
    until = await connection.fetchval("SELECT repeats_rejected_until - now() FROM holds")
    assert until.total_seconds() == pytest.approx(180, abs=10)
    await connection.execute("UPDATE holds SET repeats_rejected_until = now()")
    assert (await ask(gateway, client)).status == 200


@pytest.mark.parametrize("tuned", [SHORT])
async def test_the_client_gets_its_error_after_the_mark_however_slow_that_is(
    scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays, gateway = scripted
    openrouter = OpenRouter(disconnect, completion)
    plays.append(openrouter)
    client = await gateway.client()
    fetch = gateway.app[DATABASE].fetch

    async def slow(statement: str, *arguments: Any) -> Any:
        if statement == "mark_outcomes_unknown":
            await asyncio.sleep(0.3)
        return await fetch(statement, *arguments)

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", slow)
    assert (await ask(gateway, client)).status == 500
    assert (await ask(gateway, client)).status == 422
    assert openrouter.requests == 1


@pytest.mark.parametrize("tuned", [SHORT])
@pytest.mark.parametrize("fails", [True, False])
async def test_a_mark_that_cannot_be_written_is_logged_and_delays_the_error_by_a_second_at_most(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    plays, gateway = scripted
    plays.append(disconnect)
    client = await gateway.client()
    fetch = gateway.app[DATABASE].fetch

    async def away(statement: str, *arguments: Any) -> Any:
        if statement == "mark_outcomes_unknown":
            if fails:
                raise DatabaseUnavailable("away")
            await asyncio.Event().wait()
        return await fetch(statement, *arguments)

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", away)
    monkeypatch.setattr(ledger, "MARK_S", 0.2)
    with caplog.at_level(logging.WARNING, "gptutor.ledger"):
        async with asyncio.timeout(5):
            assert (await ask(gateway, client)).code == "upstream_outcome_unknown"
    assert "would not be recognised" in caplog.text
    await gateway.idle()


async def test_a_client_that_disconnects_may_ask_again(gateway: Gateway) -> None:
    """A person who stops a response and asks for another one has not repeated by mistake."""
    client = await gateway.client()
    gateway.simulator.first_word_s = 0.5
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await ask(gateway, client)
    assert (await ask(gateway, client)).status == 200
    await assert_charges_match_bills(gateway, client)


async def test_repeats_are_recognised_in_all_processes_and_after_a_stop(
    database_url: str, database: Database, simulator: Simulator, tmp_path: Path
) -> None:
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        one, other = (config_for(database_url, base_url, tmp_path / name) for name in ("one", "other"))
        async with gateway_on(other, database, simulator) as living:
            async with gateway_on(one, database, simulator) as stopping:
                client = await stopping.client()
                assert (await ask(stopping, client, CUT)).status == 500
                assert (await ask(living, client, CUT)).status == 422
            async with gateway_on(one, database, simulator) as started:
                assert (await ask(started, client, CUT)).status == 422
            await assert_charges_match_bills(living, client)
    assert len(simulator.billing.records) == 1


async def test_a_request_that_the_end_of_a_stop_cut_off_is_not_bought_again_elsewhere(
    database_url: str, database: Database, simulator: Simulator, tmp_path: Path
) -> None:
    """The client gets an error, the purchase goes on, and the repeat reaches the next process."""
    simulator.first_word_s = 1
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        config = config_for(database_url, base_url, tmp_path, {"server": {"shutdown_s": 0.2}})
        async with aiohttp.ClientSession() as session, asyncio.timeout(20):
            async with gateway_on(config, database, simulator) as stopping:
                client = await stopping.client()
                outside = dataclasses.replace(stopping, session=session)
                cut_off = asyncio.create_task(ask(outside, client))
                while not stopping.app[JOURNAL].open_holds:
                    await asyncio.sleep(0.01)
            assert (await cut_off).status == 504
        async with gateway_on(config, database, simulator) as started:
            assert (await ask(started, client)).status == 422
            await started.recovered(client)
    assert len(simulator.billing.records) == 1


@pytest.mark.parametrize("tuned", [SHORT])
async def test_an_sdk_that_repeats_by_itself_buys_once(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's SDK stands for all others here: with the header taken away it repeats as they do."""
    plays, gateway = scripted
    openrouter = OpenRouter(disconnect, completion)
    plays.append(openrouter)
    client = await gateway.client()
    monkeypatch.setattr(openai._base_client.BaseClient, "_should_retry", lambda self, response: response.status_code >= 500)
    async with openai.AsyncOpenAI(api_key=client.key, base_url=f"{gateway.url}/v1", max_retries=3) as sdk:
        with pytest.raises(openai.UnprocessableEntityError):
            await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    assert openrouter.requests == 1


# -- the first request bought nothing


@pytest.mark.parametrize("tuned", [SHORT])
@pytest.mark.parametrize("status", [400, 402, 403, 429, 500, 503])
async def test_the_repeat_of_a_refused_request_is_carried_out_once_under_its_idempotency_key(scripted: Any, status: int) -> None:
    plays, gateway = scripted
    openrouter = OpenRouter(refusal(status), completion)
    plays.append(openrouter)
    client = await gateway.client()
    assert (await ask(gateway, client, headers=KEY)).status >= 400
    answers = await asyncio.gather(*(ask(gateway, client, headers=KEY) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 409, 409, 409, 409]
    assert openrouter.requests == 2
    assert await bought(gateway, client) == 1
    await assert_invariants_hold(gateway.database)


@pytest.mark.parametrize("tuned", [SHORT])
async def test_an_sdk_repeats_a_refused_request_under_its_idempotency_key(scripted: Any) -> None:
    plays, gateway = scripted
    openrouter = OpenRouter(refusal(500), refusal(429), completion)
    plays.append(openrouter)
    client = await gateway.client()
    async with openai.AsyncOpenAI(api_key=client.key, base_url=f"{gateway.url}/v1", max_retries=2, default_headers=KEY) as sdk:
        answer = await sdk.with_options(max_retries=2).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}]
        )
    assert answer.id == "gen-1"
    assert openrouter.requests == 3
    assert await bought(gateway, client) == 1


@pytest.mark.parametrize("tuned", [SHORT])
async def test_the_client_gets_its_error_after_the_key_is_free_however_slow_that_is(
    scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays, gateway = scripted
    plays.append(OpenRouter(refusal(500), completion))
    client = await gateway.client()
    fetch = gateway.app[DATABASE].fetch

    async def slow(statement: str, *arguments: Any) -> Any:
        if statement == "release_holds":
            await asyncio.sleep(0.3)
        return await fetch(statement, *arguments)

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", slow)
    assert [(await ask(gateway, client, headers=KEY)).status for _ in range(2)] == [500, 200]


@pytest.mark.parametrize("tuned", [SHORT])
async def test_a_release_that_hangs_delays_the_error_by_a_second_at_most(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plays, gateway = scripted
    plays.append(OpenRouter(refusal(500), completion))
    client = await gateway.client()
    fetch = gateway.app[DATABASE].fetch
    answered = asyncio.Event()

    async def away(statement: str, *arguments: Any) -> Any:
        if statement == "release_holds":
            await answered.wait()
        return await fetch(statement, *arguments)

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", away)
    async with asyncio.timeout(5):
        assert (await ask(gateway, client, headers=KEY)).code == "upstream_error"
        assert (await ask(gateway, client, headers=KEY)).status == 409  # the hold is open still: nobody knows more here
    answered.set()
    await gateway.idle()
    assert await client.held() == 0
    assert (await ask(gateway, client, headers=KEY)).status == 200


async def test_a_hold_whose_commit_was_not_acknowledged_leaves_the_key_free(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold is there, the client got a 503, and the release is under way when it repeats the request."""
    client = await gateway.client()
    fetch = gateway.app[DATABASE].fetch
    lost = ["settle_and_hold"]

    async def losing(statement: str, *arguments: Any) -> Any:
        if statement == "release_holds":
            await asyncio.sleep(0.2)
        rows = await fetch(statement, *arguments)
        if statement in lost:
            lost.remove(statement)
            raise DatabaseUnavailable("the response was lost")
        return rows

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", losing)
    first = await ask(gateway, client, headers=KEY)
    assert (first.status, first.code) == (503, "database_unavailable")
    assert (await ask(gateway, client, headers=KEY)).status == 200
    assert (await ask(gateway, client, headers=KEY)).status == 409
    await assert_charges_match_bills(gateway, client)


async def test_a_repeat_that_arrives_while_the_first_request_runs_is_rejected(gateway: Gateway) -> None:
    client = await gateway.client()
    gateway.simulator.first_word_s = 0.3
    first = asyncio.create_task(ask(gateway, client, headers=KEY))
    await asyncio.sleep(0.1)
    assert (await ask(gateway, client, headers=KEY)).status == 409
    assert (await first).status == 200
    await assert_charges_match_bills(gateway, client)
