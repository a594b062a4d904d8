"""The simulator is a faithful OpenRouter (design of its answers: OpenRouter's documentation of August 2026), with books of its own."""

import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from gptutor import config as settings
from gptutor.openrouter.simulator.faults import FAULTS
from gptutor.openrouter.simulator.server import Simulator
from gptutor.serve import simulated_openrouter

AUTHORIZED = {"Authorization": "Bearer sk-or-x"}


@pytest.fixture
async def upstream(simulator: Simulator) -> AsyncIterator[Any]:
    async with simulated_openrouter(simulator, settings.Simulator(port=0)) as url, aiohttp.ClientSession(url + "/") as session:
        yield session


async def ask(
    upstream: aiohttp.ClientSession, text: str = "Hello", headers: Any = AUTHORIZED, **members: Any
) -> tuple[Any, bytes]:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": text}], **members}
    async with upstream.post("chat/completions", json=body, headers=headers) as response:
        return response, await response.read()


async def test_the_model_list(upstream: aiohttp.ClientSession) -> None:
    async with upstream.get("models") as response:
        models = {model["id"]: model for model in (await response.json())["data"]}
    assert len(models) == 326
    for recommended in (
        "google/gemini-2.5-flash-lite", "anthropic/claude-3-haiku", "openai/gpt-4o-mini", "meta-llama/llama-3.1-8b-instruct",
    ):  # fmt: skip
        assert Decimal(models[recommended]["pricing"]["prompt"]) > 0
    assert all(isinstance(price, str) for model in models.values() for price in model["pricing"].values())
    assert any(identity.endswith(":free") and model["pricing"]["completion"] == "0" for identity, model in models.items())
    assert models["openrouter/auto"]["pricing"]["prompt"] == "-1"
    assert any(model["top_provider"]["max_completion_tokens"] is None for model in models.values())


async def test_a_plain_answer_its_generation_and_the_key(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    response, document = await ask(upstream, max_tokens=7)
    answer = json.loads(document)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7
    prompt, completion = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    expected = prompt * Decimal("0.00000015") + completion * Decimal("0.0000006")
    assert Decimal(str(answer["usage"]["cost"])) == expected == simulator.books.total_usd()
    async with upstream.get("generation", params={"id": response.headers["X-Generation-Id"]}) as found:
        record = (await found.json())["data"]
    assert Decimal(str(record["total_cost"])) == expected
    assert (record["id"], record["native_tokens_completion"]) == (answer["id"], 7)
    async with upstream.get("key") as found:
        assert Decimal(str((await found.json())["data"]["usage_daily"])) == expected
    async with upstream.get("/simulator/bills") as found:
        bills = await found.json()
    assert (bills["total_usd"], bills["bills"][0]["id"]) == (str(expected), answer["id"])


async def test_a_generation_is_known_late(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    simulator.known_after_s = 60
    response, _ = await ask(upstream)
    async with upstream.get("generation", params={"id": response.headers["X-Generation-Id"]}) as found:
        assert found.status == 404


async def test_what_it_refuses(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    assert (await ask(upstream, headers={}))[0].status == 401
    response, document = await ask(upstream, model="no/such")
    assert (response.status, json.loads(document)["error"]["code"]) == (400, 400)
    async with upstream.post("chat/completions", data=b"{", headers=AUTHORIZED) as response:
        assert response.status == 400
    response, document = await ask(upstream, "fault:no-such-fault")
    assert response.status == 400
    assert all(name in json.loads(document)["error"]["message"] for name in FAULTS)
    assert simulator.books.total_usd() == 0


async def test_faults_are_asked_for_by_header_or_by_word(upstream: aiohttp.ClientSession) -> None:
    response, document = await ask(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "status=529:3"})
    assert (response.status, response.headers["Retry-After"]) == (529, "3")
    assert json.loads(document)["error"]["code"] == 529
    assert (await ask(upstream, "please fault:html=524"))[1].startswith(b"<!DOCTYPE html>")


async def test_odd_chunks_are_the_same_bytes(upstream: aiohttp.ClientSession) -> None:
    def without_id(stream: bytes) -> bytes:
        return b"".join(json.dumps({**json.loads(line[6:]), "id": 0, "created": 0}).encode() if line[:7] == b"data: {" else line
                        for line in stream.split(b"\n\n"))  # fmt: skip

    _, whole = await ask(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "one-write"}, stream=True)
    _, pieces = await ask(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "chunks=3"}, stream=True)
    assert without_id(whole) == without_id(pieces)


async def test_every_fault_says_what_it_does() -> None:
    assert all(fault.__doc__ for fault in FAULTS.values())
