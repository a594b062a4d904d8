"""The simulator responds and bills as OpenRouter's documentation of August 2026 describes, and applies faults on demand."""

import asyncio
import contextlib
import gzip
import itertools
import json
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import aiohttp
import jsonschema
import pytest

from gptutor.config import schema
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.faults import FAULTS
from gptutor.simulator.server import Simulator

AUTHORIZED = {"Authorization": "Bearer sk-or-x"}


@pytest.fixture
async def upstream(simulator: Simulator) -> AsyncIterator[Any]:
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as url,
        aiohttp.ClientSession(url + "/") as session,
    ):
        yield session


async def chat(
    upstream: aiohttp.ClientSession, text: str = "Hello", headers: Any = AUTHORIZED, **members: Any
) -> tuple[Any, bytes]:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": text}], **members}
    async with upstream.post("chat/completions", json=body, headers=headers, allow_redirects=False) as response:
        return response, await response.read()


async def completion(upstream: aiohttp.ClientSession, text: str = "Hello", **members: Any) -> Any:
    response, document = await chat(upstream, text, **members)
    assert response.status == 200, document
    return json.loads(document)


def events(stream: bytes) -> list[Any]:
    """The events of a whole stream, which ends in `[DONE]`."""
    *data, done = (event[6:] for event in stream.split(b"\n\n") if event.startswith(b"data: "))
    assert done == b"[DONE]"
    return [json.loads(each) for each in data]


def deltas(stream: bytes) -> list[Any]:
    return [event["choices"][0]["delta"] for event in events(stream) if event["choices"]]


async def test_the_model_list(upstream: aiohttp.ClientSession) -> None:
    async with upstream.get("models") as response:
        models = {model["id"]: model for model in (await response.json())["data"]}
    assert len(models) == 326
    for recommended in (
        "google/gemini-2.5-flash-lite", "anthropic/claude-3-haiku", "openai/gpt-4o-mini", "meta-llama/llama-3.1-8b-instruct",
    ):  # fmt: skip
        assert Decimal(models[recommended]["pricing"]["prompt"]) > 0
    prices = [(name, price) for model in models.values() for name, price in model["pricing"].items() if name != "overrides"]
    assert all(isinstance(price, str) for _, price in prices)
    assert {name for name, price in prices if price not in ("0", "-1")} == {
        "prompt", "completion", "request", "image", "audio", "audio_output", "image_output", "web_search", "internal_reasoning",
        "input_cache_read", "input_cache_write",
    }  # fmt: skip
    assert any("overrides" in model["pricing"] for model in models.values())
    assert {output for model in models.values() for output in model["architecture"]["output_modalities"]} == {
        "text", "image", "audio",
    }  # fmt: skip
    assert all(model["canonical_slug"] for model in models.values())
    assert any(identity.endswith(":free") and model["pricing"]["completion"] == "0" for identity, model in models.items())
    assert models["openrouter/auto"]["pricing"]["prompt"] == "-1"
    assert any(model["top_provider"]["max_completion_tokens"] is None for model in models.values())


async def test_a_plain_response_its_generation_and_its_key_usage_have_the_same_cost(
    upstream: aiohttp.ClientSession, simulator: Simulator
) -> None:
    response, document = await chat(upstream, max_tokens=7)
    completed = json.loads(document)
    assert completed["choices"][0]["finish_reason"] == "length"
    assert completed["usage"]["completion_tokens"] == 7
    prompt, completion = completed["usage"]["prompt_tokens"], completed["usage"]["completion_tokens"]
    expected = prompt * Decimal("0.00000015") + completion * Decimal("0.0000006")
    assert Decimal(str(completed["usage"]["cost"])) == expected == simulator.billing.total_usd()
    async with upstream.get("generation", params={"id": response.headers["X-Generation-Id"]}) as found:
        record = (await found.json())["data"]
    assert Decimal(str(record["total_cost"])) == expected
    assert (record["id"], record["native_tokens_completion"]) == (completed["id"], 7)
    async with upstream.get("key") as found:
        assert Decimal(str((await found.json())["data"]["usage_daily"])) == expected
    async with upstream.get("/simulator/bills") as found:
        bills = await found.json()
    assert (bills["total_usd"], bills["bills"][0]["id"]) == (str(expected), completed["id"])


async def test_a_generation_becomes_available_after_a_delay(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    simulator.generation_delay_s = 60
    response, _ = await chat(upstream)
    async with upstream.get("generation", params={"id": response.headers["X-Generation-Id"]}) as found:
        assert found.status == 404


async def test_invalid_requests_are_rejected_and_not_billed(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    assert (await chat(upstream, headers={}))[0].status == 401
    response, document = await chat(upstream, model="no/such")
    assert (response.status, json.loads(document)["error"]["code"]) == (400, 400)
    async with upstream.post("chat/completions", data=b"{", headers=AUTHORIZED) as response:
        assert response.status == 400
    response, document = await chat(upstream, "fault:no-such-fault")
    assert response.status == 400
    assert all(name in json.loads(document)["error"]["message"] for name in FAULTS)
    assert simulator.billing.total_usd() == 0


@pytest.mark.parametrize("status", [400, 402, 429, 503])
async def test_a_refusal_has_a_generation_id_that_nobody_knows(upstream: aiohttp.ClientSession, status: int) -> None:
    response, _ = await chat(upstream, f"fault:status={status}")
    generation_id = response.headers["X-Generation-Id"]
    async with upstream.get("generation", params={"id": generation_id}, headers=AUTHORIZED) as found:
        assert found.status == 404
    other, _ = await chat(upstream, f"fault:status={status}")
    assert other.headers["X-Generation-Id"] != generation_id
    for edge in ("html=503", "status=502"):
        assert "X-Generation-Id" not in (await chat(upstream, f"fault:{edge}"))[0].headers


async def test_faults_are_requested_by_header_or_in_the_message(upstream: aiohttp.ClientSession) -> None:
    response, document = await chat(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "status=529:3"})
    assert (response.status, response.headers["Retry-After"]) == (529, "3")
    assert json.loads(document)["error"]["code"] == 529
    assert (await chat(upstream, "please fault:html=524"))[1].startswith(b"<!DOCTYPE html>")


async def test_rechunking_keeps_the_bytes(upstream: aiohttp.ClientSession) -> None:
    def without_id(stream: bytes) -> bytes:
        return b"".join(json.dumps({**json.loads(line[6:]), "id": 0, "created": 0}).encode() if line[:7] == b"data: {" else line
                        for line in stream.split(b"\n\n"))  # fmt: skip

    _, whole = await chat(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "one-write"}, stream=True)
    _, pieces = await chat(upstream, headers={**AUTHORIZED, "X-Simulator-Fault": "chunks=3"}, stream=True)
    assert without_id(whole) == without_id(pieces)


async def test_every_fault_is_documented() -> None:
    for name, fault in FAULTS.items():
        assert fault.__doc__ is not None
        assert fault.__doc__.startswith((f"`{name}`", f"`{name}="))


# -- response content


def function(name: str, properties: Any = None, **schema: Any) -> Any:
    parameters = {"type": "object", "properties": properties or {}, "required": list(properties or {}), **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {"type": "string"}
WEATHER = function("weather", {"city": CITY, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}})
CLOCK = function("clock")


@pytest.mark.parametrize(
    ("text", "members", "called"),
    [
        ("Hello", {}, []),
        ("use a tool", {}, ["weather"]),
        ("tool:clock", {}, ["clock"]),
        ("tool:clock and tool:weather", {}, ["weather", "clock"]),
        ("tool:clock and tool:weather", {"parallel_tool_calls": False}, ["weather"]),
        ("Hello", {"tool_choice": "required"}, ["weather"]),
        ("Hello", {"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"]),
        ("use a tool", {"tool_choice": "none"}, []),
    ],
)
async def test_named_tools_are_called(upstream: aiohttp.ClientSession, text: str, members: Any, called: list[str]) -> None:
    choice = (await completion(upstream, text, tools=[WEATHER, CLOCK], **members))["choices"][0]
    assert [call["function"]["name"] for call in choice["message"].get("tool_calls", [])] == called
    assert choice["finish_reason"] == ("tool_calls" if called else "stop")
    assert (choice["message"]["content"] is None) is bool(called)


async def test_streamed_tool_calls_add_up_to_the_plain_ones(upstream: aiohttp.ClientSession) -> None:
    members: dict[str, Any] = {"text": "tool:weather tool:clock", "tools": [WEATHER, CLOCK]}
    plain = (await completion(upstream, **members))["choices"][0]["message"]["tool_calls"]
    _, stream = await chat(upstream, stream=True, **members)
    fragments = [call for delta in deltas(stream) for call in delta.get("tool_calls", ())]
    for expected, (index, group) in zip(plain, itertools.groupby(fragments, key=lambda call: call["index"]), strict=True):
        first, *others = group
        assert (first["index"], first["type"], first["function"]["arguments"]) == (index, "function", "")
        assert first["function"]["name"] == expected["function"]["name"]
        assert all(set(other) == {"index", "function"} and set(other["function"]) == {"arguments"} for other in others)
        assert "".join(other["function"]["arguments"] for other in others) == expected["function"]["arguments"]
    assert json.loads(plain[0]["function"]["arguments"]) == {"city": "text", "unit": "C", "days": 1}
    assert events(stream)[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_after_a_tool_result_the_model_quotes_it(upstream: aiohttp.ClientSession) -> None:
    call = (await completion(upstream, "tool:weather", tools=[WEATHER]))["choices"][0]["message"]
    messages = [
        {"role": "user", "content": "tool:weather"},
        call,
        {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "minus 40"},
    ]
    choice = (await completion(upstream, messages=messages, tools=[WEATHER], tool_choice="required"))["choices"][0]
    assert (choice["finish_reason"], "minus 40" in choice["message"]["content"]) == ("stop", True)


SCHEMAS = [
    {"type": "object", "properties": {"a": CITY, "b": {"type": "number"}}, "required": ["a", "b"]},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": 2}}},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "integer", "minimum": 7}, {"type": "null"}]}}, "required": ["a"]},
    {"$ref": "#/$defs/Tree", "$defs": {"Tree": {"type": "object", "properties": {"next": {"anyOf": [
        {"$ref": "#/$defs/Tree"}, {"type": "null"}]}}, "required": ["next"]}}},
    {"type": "object", "properties": {"a": {"type": ["string", "null"], "minLength": 9}, "b": {"const": 5}}, "required": ["a"]},
    {"allOf": [{"type": "object"}, {"properties": {"a": {"type": "string", "format": "date"}}, "required": ["a"]}]},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}, "b": {"type": "number", "maximum": 0.5}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("stream", [False, True])
async def test_structured_output_is_valid_for_its_schema(upstream: aiohttp.ClientSession, schema: Any, stream: bool) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    _, document = await chat(upstream, response_format=response_format, stream=stream)
    plain = "" if stream else json.loads(document)["choices"][0]["message"]["content"]
    content = plain or "".join(delta["content"] for delta in deltas(document))
    jsonschema.validate(json.loads(content), schema)


async def test_json_object_output_is_an_object(upstream: aiohttp.ClientSession) -> None:
    completed = await completion(upstream, "Привет", response_format={"type": "json_object"})
    assert json.loads(completed["choices"][0]["message"]["content"])["answer"].startswith("Привет!")


@pytest.mark.parametrize(
    ("members", "has_reasoning", "is_shown"),
    [
        ({}, False, False),
        ({"reasoning": {"effort": "high"}}, True, True),
        ({"reasoning": {"max_tokens": 3}}, True, True),
        ({"reasoning": {"enabled": True, "exclude": True}}, True, False),
        ({"reasoning": {"effort": "none"}}, False, False),
        ({"reasoning": {"enabled": False}}, False, False),
        ({"reasoning_effort": "low"}, True, True),
        ({"model": "openai/gpt-4o-mini:thinking"}, True, True),
    ],
)
async def test_reasoning_is_counted_and_shown(
    upstream: aiohttp.ClientSession, members: Any, has_reasoning: bool, is_shown: bool
) -> None:
    without_reasoning = (await completion(upstream))["usage"]["completion_tokens"]
    completed = await completion(upstream, **members)
    reasoning = completed["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert ((reasoning > 0), completed["usage"]["completion_tokens"]) == (has_reasoning, without_reasoning + reasoning)
    _, stream = await chat(upstream, stream=True, **members)
    streamed = "".join(delta.get("reasoning", "") for delta in deltas(stream))
    assert completed["choices"][0]["message"].get("reasoning", "") == streamed
    assert (bool(streamed), any("reasoning_details" in delta for delta in deltas(stream))) == (is_shown, is_shown)
    assert events(stream)[-1]["usage"] == completed["usage"]


async def test_logprobs_are_returned_only_on_request(upstream: aiohttp.ClientSession) -> None:
    choice = (await completion(upstream, logprobs=True, top_logprobs=2, max_tokens=3))["choices"][0]
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == choice["message"]["content"]
    assert {len(token["top_logprobs"]) for token in choice["logprobs"]["content"]} == {2}
    assert all(token["logprob"] < 0 for token in choice["logprobs"]["content"])
    assert (await completion(upstream))["choices"][0]["logprobs"] is None
    _, stream = await chat(upstream, logprobs=True, max_tokens=3, stream=True)
    streamed = [event["choices"][0]["logprobs"] for event in events(stream) if event["choices"]]
    assert [len(each["content"]) if each else None for each in streamed] == [None, 1, 1, 1, None, None]


async def test_models_with_image_or_audio_output_return_it(upstream: aiohttp.ClientSession) -> None:
    image: dict[str, Any] = {"model": "google/gemini-2.5-flash-image", "modalities": ["image", "text"]}
    plain = await completion(upstream, **image)
    assert plain["choices"][0]["message"]["images"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    _, stream = await chat(upstream, stream=True, **image)
    assert plain["choices"][0]["message"]["images"] in [delta.get("images") for delta in deltas(stream)]
    short = (await completion(upstream, max_tokens=1000, **image))["choices"][0]
    assert (short["finish_reason"], "images" in short["message"]) == ("length", False)
    audio = await completion(upstream, model="openai/gpt-4o-audio-preview", modalities=["text", "audio"])
    assert audio["choices"][0]["message"]["audio"]["data"]
    assert (await chat(upstream, modalities=["image"]))[0].status == 404


# -- costs

SMALL, COMPLETION = Decimal("0.00000015"), Decimal("0.0000006")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
FILE = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}
SOUND = {"type": "input_audio", "input_audio": {"format": "wav", "data": "A" * 1001}}
OCR = [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]
LONG = "x" * 800_000


def parts(*others: Any, **mark: Any) -> Any:
    return [{"role": "user", "content": [{"type": "text", "text": "Hello", **mark}, *others]}]


def cached(ttl: dict[str, str]) -> Any:
    return [*parts(cache_control={"type": "ephemeral", **ttl}), {"role": "user", "content": "Hello"}]


def tokens(usage: dict[str, int], prompt: str, completion: str) -> Decimal:
    return usage["prompt_tokens"] * Decimal(prompt) + usage["completion_tokens"] * Decimal(completion)


def text_only_cost(usage: dict[str, int]) -> Decimal:
    return usage["prompt_tokens"] * SMALL + usage["completion_tokens"] * COMPLETION


def details(usage: Any, side: str, name: str) -> Decimal:
    assert usage[f"{side}_tokens_details"][name] > 0
    return Decimal(usage[f"{side}_tokens_details"][name])


def cache_write_cost(usage: Any) -> Decimal:
    assert details(usage, "prompt", "cache_write_tokens") < usage["prompt_tokens"]
    return details(usage, "prompt", "cache_write_tokens") * SMALL


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"messages": parts(IMAGE)}, lambda u: text_only_cost(u) + Decimal("0.000217")),
        ({"messages": parts(IMAGE, IMAGE)}, lambda u: text_only_cost(u) + 2 * Decimal("0.000217")),
        ({"messages": cached({})}, lambda u: text_only_cost(u) + cache_write_cost(u) / 4),
        ({"messages": cached({"ttl": "1h"})}, lambda u: text_only_cost(u) + cache_write_cost(u)),
        ({"cache_control": {"type": "ephemeral"}}, lambda u: text_only_cost(u) + u["prompt_tokens"] * SMALL / 4),
        ({"plugins": [{"id": "web"}]}, lambda u: text_only_cost(u) + Decimal("0.02")),
        ({"plugins": [{"id": "web", "max_results": 10}]}, lambda u: text_only_cost(u) + Decimal("0.04")),
        ({"model": "openai/gpt-4o-mini:online"}, lambda u: text_only_cost(u) + Decimal("0.02")),
        ({"web_search_options": {}}, lambda u: text_only_cost(u) + Decimal("0.02")),
        ({"tools": [{"type": "openrouter:web_search"}]}, lambda u: text_only_cost(u) + Decimal("0.01")),
        ({"messages": parts(FILE, FILE), "plugins": OCR}, lambda u: text_only_cost(u) + Decimal("0.004")),
        ({"messages": parts(FILE)}, text_only_cost),
        ({"service_tier": "priority"}, lambda u: text_only_cost(u) * 2),
        ({"service_tier": "flex"}, lambda u: text_only_cost(u) / 2),
        ({"model": "openai/gpt-4o-mini:nitro"}, text_only_cost),
        ({"model": "openai/gpt-4o-mini:floor", "n": 3}, text_only_cost),
        ({"reasoning_effort": "high"}, text_only_cost),
        ({"text": "Hello fault:byok"}, lambda u: text_only_cost(u) * Decimal("1.05")),
        ({"model": "perplexity/sonar"}, lambda u: tokens(u, "0.000001", "0.000001") + Decimal("0.005")),
        ({"model": "anthropic/claude-sonnet-4.5"}, lambda u: tokens(u, "0.000003", "0.000015")),
        ({"model": "anthropic/claude-sonnet-4.5", "text": LONG}, lambda u: tokens(u, "0.000006", "0.0000225")),
        (
            {"model": "google/gemini-2.5-pro", "reasoning_effort": "low"},
            lambda u: tokens(u, "0.00000125", "0.00001") + details(u, "completion", "reasoning_tokens") * Decimal("0.000002"),
        ),
        (
            {"model": "google/gemini-2.5-flash-image", "modalities": ["image", "text"]},
            lambda u: tokens(u, "0.0000003", "0.0000025") + details(u, "completion", "image_tokens") * Decimal("0.0000275"),
        ),
        (
            {"model": "openai/gpt-4o-audio-preview", "modalities": ["text", "audio"], "messages": parts(SOUND)},
            lambda u: tokens(u, "0.0000025", "0.00001")
            + details(u, "prompt", "audio_tokens") * Decimal("0.0000375")
            + details(u, "completion", "audio_tokens") * Decimal("0.00007"),
        ),
        ({"models": ["perplexity/sonar"]}, text_only_cost),
        (
            {"models": ["openai/gpt-4o-mini", "perplexity/sonar"], "text": "fault:primary-down"},
            lambda u: tokens(u, "0.000001", "0.000001") + Decimal("0.005"),
        ),
    ],
)  # fmt: skip
async def test_usage_generation_key_and_bill_state_the_same_cost(
    upstream: aiohttp.ClientSession, simulator: Simulator, members: Any, expected: Callable[[Any], Decimal]
) -> None:
    completed = await completion(upstream, **members)
    usage = completed["usage"]
    provider = Decimal(str(usage["cost_details"]["upstream_inference_cost"])) if usage["is_byok"] else Decimal(0)
    assert abs(Decimal(str(usage["cost"])) + provider - expected(usage)) < Decimal("1e-15")
    assert Decimal(str(usage["cost"])) + provider == simulator.billing.total_usd()
    assert usage["is_byok"] is ("byok" in members.get("text", ""))
    assert usage["is_byok"] or usage["cost_details"]["upstream_inference_cost"] == usage["cost"]
    async with upstream.get("generation", params={"id": completed["id"]}) as found:
        record = (await found.json())["data"]
    async with upstream.get("key") as found:
        key = (await found.json())["data"]
    assert (key["usage"], Decimal(str(key["byok_usage"]))) == (usage["cost"], provider)
    assert (record["total_cost"], record["is_byok"], record["model"]) == (usage["cost"], usage["is_byok"], completed["model"])
    assert Decimal(str(record["upstream_inference_cost"])) == provider


async def test_fallback_models_must_exist(upstream: aiohttp.ClientSession) -> None:
    assert (await completion(upstream, "fault:primary-down", models=["perplexity/sonar"]))["model"] == "perplexity/sonar"
    assert (await chat(upstream, "fault:primary-down"))[0].status == 400
    assert (await chat(upstream, models=["no/such"]))[0].status == 400


@pytest.mark.parametrize(
    "members",
    [{"tools": {"a": 1}}, {"plugins": [1]}, {"reasoning": "much"}, {"model": ["a"]}, {"messages": [1]}, {"max_tokens": "x"},
     {"response_format": {"type": "json_schema"}}, {"plugins": [{"id": "web", "max_results": "x"}]}],
)  # fmt: skip
async def test_malformed_requests_are_rejected(upstream: aiohttp.ClientSession, simulator: Simulator, members: Any) -> None:
    assert (await chat(upstream, **members))[0].status == 400
    assert not simulator.billing.records


# -- faults


def costs(stream: bytes) -> list[float]:
    return [event["usage"]["cost"] for event in events(stream) if "usage" in event]


@pytest.mark.parametrize(
    ("fault", "stated"),
    [("", 1), ("usage-twice", 2), ("usage-early", 1), ("usage-in-finish", 1), ("usage-alone", 1), ("no-usage", 0), ("injected", 1),
     ("drip=200", 1), ("big-line=100000", 1), ("comments=5", 1), ("odd-headers", 1), ("byok", 1)],
)  # fmt: skip
async def test_how_often_a_stream_states_its_cost(
    upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, stated: int
) -> None:
    _, stream = await chat(upstream, f"fault:{fault}" if fault else "Hello", stream=True)
    (record,) = simulator.billing.records.values()
    assert len(costs(stream)) == stated
    assert costs(stream)[-1:] == [float(record.fee_usd)] * bool(stated)
    assert stated < 2 or costs(stream)[0] < costs(stream)[1]


async def test_a_response_has_the_fields_of_the_live_service(upstream: aiohttp.ClientSession) -> None:
    plain = await completion(upstream)
    assert plain["system_fingerprint"]
    assert plain["service_tier"] == "default"
    assert set(plain["usage"]["prompt_tokens_details"]) == {"cached_tokens", "cache_write_tokens", "audio_tokens", "video_tokens"}
    assert set(plain["usage"]["completion_tokens_details"]) == {"reasoning_tokens", "image_tokens", "audio_tokens"}
    *_, finish, last = events((await chat(upstream, stream=True))[1])
    assert [(choice["delta"]["content"], choice["finish_reason"]) for choice in last["choices"]] == [("", "stop")]
    assert finish["choices"][0]["finish_reason"] == "stop"
    async with upstream.get("models") as response:
        models = await response.json()
    assert models["total_count"] == len(models["data"])
    assert {"links", "default_parameters", "supported_voices"} <= set(models["data"][0])


async def test_where_a_stream_states_its_cost(upstream: aiohttp.ClientSession) -> None:
    async def position(fault: str) -> tuple[float, int]:
        stream_events = events((await chat(upstream, fault, stream=True))[1])
        ((number, event),) = [(number, event) for number, event in enumerate(stream_events) if "usage" in event]
        return (number + 1) / len(stream_events), len(event["choices"])

    assert await position("Hello") == (1, 1)
    assert await position("fault:usage-alone") == (1, 0)
    assert await position("fault:usage-in-finish") == (1, 1)
    part, choices = await position("fault:usage-early")
    assert (0.4 < part < 0.6, choices) == (True, 0)


async def test_a_client_that_disconnects_after_an_early_cost_is_billed_that_cost(
    upstream: aiohttp.ClientSession, simulator: Simulator
) -> None:
    simulator.word_s = 0.02
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:usage-early"}], "stream": True}
    async with upstream.post("chat/completions", json=body, headers=AUTHORIZED) as response:
        while b'"usage"' not in (line := await response.content.readline()):
            pass
        for _ in range(6):
            await response.content.readline()
        response.close()
    (record,) = simulator.billing.records.values()
    while not record.finished:
        await asyncio.sleep(0.005)
    assert record.cancelled
    assert float(record.fee_usd) == json.loads(line[6:])["usage"]["cost"]


async def test_injected_text_stays_inside_its_event(upstream: aiohttp.ClientSession) -> None:
    _, stream = await chat(upstream, "fault:injected", stream=True)
    text = "".join(delta["content"] for delta in deltas(stream))
    assert 'data: {"usage":{"cost":0}}\n\ndata: [DONE]\n\n' in text
    assert (await completion(upstream, "fault:injected"))["choices"][0]["message"]["content"].partition("Hello!")[0] in text


async def test_usage_hang_sends_everything_but_done(upstream: aiohttp.ClientSession) -> None:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:usage-hang"}], "stream": True}
    stream = b""
    async with upstream.post("chat/completions", json=body, headers=AUTHORIZED) as response:
        while b'"usage"' not in stream:
            stream += await response.content.readany()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                stream += await response.content.readany()
        assert not response.content.at_eof()
    assert b"[DONE]" not in stream


async def test_error_faults_of_plain_responses(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    failed = await completion(upstream, "fault:plain-error")
    assert (failed["choices"][0]["finish_reason"], failed["choices"][0]["error"]["code"]) == ("error", 502)
    assert Decimal(str(failed["usage"]["cost"])) == simulator.billing.total_usd() > 0
    response, document = await chat(upstream, "fault:top-error")
    assert (response.status, list(json.loads(document))) == (200, ["error"])
    record = simulator.billing.records[response.headers["X-Generation-Id"]]
    assert (record.finished, record.cost_usd) == (True, 0)


@pytest.mark.parametrize(("fault", "code"), [("error=3", 502), ("string-code=3", "server_error")])
async def test_an_error_ends_a_stream(upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, code: Any) -> None:
    _, stream = await chat(upstream, f"fault:{fault}", stream=True)
    last = json.loads(stream.rpartition(b"data: ")[2])
    assert (last["error"]["code"], last["choices"][0]["finish_reason"]) == (code, "error")
    assert simulator.billing.total_usd() == 0


async def test_error_responses_of_unusual_format(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    response, document = await chat(upstream, "fault:no-code")
    error = json.loads(document)["error"]
    assert (response.status, error["http_status"], "code" in error, "availability" in error) == (429, 429, False, True)
    response, _ = await chat(upstream, "fault:redirect=307")
    assert (response.status, response.headers["Location"].startswith("http://elsewhere")) == (307, True)
    assert not simulator.billing.records


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["bad-length", "cut=1", "cut-inside=0"])
async def test_a_broken_connection_is_noticed_and_billed(
    upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, stream: bool
) -> None:
    with pytest.raises(aiohttp.ClientError):
        await chat(upstream, f"fault:{fault}", stream=stream)
    assert simulator.billing.total_usd() > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_chunk_has_an_invalid_size(upstream: aiohttp.ClientSession, simulator: Simulator, stream: bool) -> None:
    base = upstream._base_url
    assert base is not None
    body = json.dumps({"model": "openai/gpt-4o-mini", "messages": parts(), "stream": stream}).encode()
    reader, writer = await asyncio.open_connection(base.host, base.port)
    writer.write(
        b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nX-Simulator-Fault: bad-chunk=1\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    received = await reader.read()
    writer.close()
    assert b"chunked" in received.partition(b"\r\n\r\n")[0]
    assert received.endswith(b"\r\nno-size\r\n{}\r\n")
    assert simulator.billing.total_usd() > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_gzip_is_sent_against_accept_encoding(upstream: aiohttp.ClientSession, stream: bool) -> None:
    headers = {**AUTHORIZED, "Accept-Encoding": "identity"}
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:gzip"}], "stream": stream}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as bare,
        bare.post(f"{upstream._base_url}chat/completions", json=body, headers=headers) as response,
    ):
        assert response.headers["Content-Encoding"] == "gzip"
        document = gzip.decompress(await response.read())
    assert b'"usage"' in document


async def test_unusual_headers_are_added_to_the_response(upstream: aiohttp.ClientSession) -> None:
    response, _ = await chat(upstream, "fault:odd-headers")
    assert {"Set-Cookie", "X-Evil", "X-Generation-Id"} <= set(response.headers)


async def test_a_big_line_has_the_requested_length(upstream: aiohttp.ClientSession) -> None:
    _, stream = await chat(upstream, "fault:big-line=70001", stream=True)
    assert max(len(line) for line in stream.split(b"\n")) == 70_001
    assert stream.count(b": OPENROUTER PROCESSING") == 1
    assert (await chat(upstream, "fault:comments=7", stream=True))[1].count(b": OPENROUTER PROCESSING") == 8


async def test_a_drip_arrives_in_single_bytes(upstream: aiohttp.ClientSession) -> None:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:drip=1"}], "max_tokens": 1}
    async with upstream.post("chat/completions", json={**body, "stream": True}, headers=AUTHORIZED) as response:
        pieces = [len(chunk) async for chunk in response.content.iter_any()]
    assert sum(size == 1 for size in pieces) > sum(pieces) / 2


@pytest.mark.parametrize("fault", ["usage-twice", "usage-early", "usage-hang", "usage-in-finish", "comments", "big-line=9999"])
async def test_stream_faults_are_rejected_for_plain_responses(upstream: aiohttp.ClientSession, fault: str) -> None:
    assert (await chat(upstream, f"fault:{fault}"))[0].status == 400


@pytest.mark.parametrize("fault", ["plain-error", "top-error", "big-line=9", "bad-chunk=9999"])
async def test_plain_response_faults_are_rejected_for_streams(upstream: aiohttp.ClientSession, fault: str) -> None:
    assert (await chat(upstream, f"fault:{fault}", stream=True))[0].status == 400
