"""The simulator is a faithful OpenRouter (design of its answers: OpenRouter's documentation of August 2026), with books of its own."""

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


async def ask(
    upstream: aiohttp.ClientSession, text: str = "Hello", headers: Any = AUTHORIZED, **members: Any
) -> tuple[Any, bytes]:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": text}], **members}
    async with upstream.post("chat/completions", json=body, headers=headers, allow_redirects=False) as response:
        return response, await response.read()


async def answer(upstream: aiohttp.ClientSession, text: str = "Hello", **members: Any) -> Any:
    response, document = await ask(upstream, text, **members)
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
    for name, fault in FAULTS.items():
        assert fault.__doc__ is not None
        assert fault.__doc__.startswith((f"`{name}`", f"`{name}="))


# -- what a model says


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
async def test_tools_are_called_as_they_are_named(
    upstream: aiohttp.ClientSession, text: str, members: Any, called: list[str]
) -> None:
    said = (await answer(upstream, text, tools=[WEATHER, CLOCK], **members))["choices"][0]
    assert [call["function"]["name"] for call in said["message"].get("tool_calls", [])] == called
    assert said["finish_reason"] == ("tool_calls" if called else "stop")
    assert (said["message"]["content"] is None) is bool(called)


async def test_a_streamed_tool_call_is_the_plain_one_in_fragments(upstream: aiohttp.ClientSession) -> None:
    members: dict[str, Any] = {"text": "tool:weather tool:clock", "tools": [WEATHER, CLOCK]}
    plain = (await answer(upstream, **members))["choices"][0]["message"]["tool_calls"]
    _, stream = await ask(upstream, stream=True, **members)
    fragments = [call for delta in deltas(stream) for call in delta.get("tool_calls", ())]
    for wanted, (index, its) in zip(plain, itertools.groupby(fragments, key=lambda call: call["index"]), strict=True):
        first, *others = its
        assert (first["index"], first["type"], first["function"]["arguments"]) == (index, "function", "")
        assert first["function"]["name"] == wanted["function"]["name"]
        assert all(set(other) == {"index", "function"} and set(other["function"]) == {"arguments"} for other in others)
        assert "".join(other["function"]["arguments"] for other in others) == wanted["function"]["arguments"]
    assert json.loads(plain[0]["function"]["arguments"]) == {"city": "text", "unit": "C", "days": 1}
    assert events(stream)[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_after_a_tool_the_model_speaks_of_its_result(upstream: aiohttp.ClientSession) -> None:
    call = (await answer(upstream, "tool:weather", tools=[WEATHER]))["choices"][0]["message"]
    messages = [
        {"role": "user", "content": "tool:weather"},
        call,
        {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "minus 40"},
    ]
    said = (await answer(upstream, messages=messages, tools=[WEATHER], tool_choice="required"))["choices"][0]
    assert (said["finish_reason"], "minus 40" in said["message"]["content"]) == ("stop", True)


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
async def test_a_structured_answer_is_valid_for_its_schema(upstream: aiohttp.ClientSession, schema: Any, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    _, document = await ask(upstream, response_format=form, stream=stream)
    plain = "" if stream else json.loads(document)["choices"][0]["message"]["content"]
    content = plain or "".join(delta["content"] for delta in deltas(document))
    jsonschema.validate(json.loads(content), schema)


async def test_a_json_object_holds_the_answer(upstream: aiohttp.ClientSession) -> None:
    said = await answer(upstream, "Привет", response_format={"type": "json_object"})
    assert json.loads(said["choices"][0]["message"]["content"])["answer"].startswith("Привет!")


@pytest.mark.parametrize(
    ("members", "thinks", "is_told"),
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
async def test_reasoning_is_told_and_counted(upstream: aiohttp.ClientSession, members: Any, thinks: bool, is_told: bool) -> None:
    quiet = (await answer(upstream))["usage"]["completion_tokens"]
    said = await answer(upstream, **members)
    reasoning = said["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert ((reasoning > 0), said["usage"]["completion_tokens"]) == (thinks, quiet + reasoning)
    _, stream = await ask(upstream, stream=True, **members)
    thoughts = "".join(delta.get("reasoning", "") for delta in deltas(stream))
    assert said["choices"][0]["message"].get("reasoning", "") == thoughts
    assert (bool(thoughts), any("reasoning_details" in delta for delta in deltas(stream))) == (is_told, is_told)
    assert events(stream)[-1]["usage"] == said["usage"]


async def test_logprobs_are_told_where_they_are_asked_for(upstream: aiohttp.ClientSession) -> None:
    said = (await answer(upstream, logprobs=True, top_logprobs=2, max_tokens=3))["choices"][0]
    assert "".join(word["token"] for word in said["logprobs"]["content"]) == said["message"]["content"]
    assert {len(word["top_logprobs"]) for word in said["logprobs"]["content"]} == {2}
    assert all(word["logprob"] < 0 for word in said["logprobs"]["content"])
    assert (await answer(upstream))["choices"][0]["logprobs"] is None
    _, stream = await ask(upstream, logprobs=True, max_tokens=3, stream=True)
    told = [event["choices"][0]["logprobs"] for event in events(stream) if event["choices"]]
    assert [len(each["content"]) if each else None for each in told] == [None, 1, 1, 1, None]


async def test_images_and_sounds_are_made_where_a_model_makes_them(upstream: aiohttp.ClientSession) -> None:
    drawn: dict[str, Any] = {"model": "google/gemini-2.5-flash-image", "modalities": ["image", "text"]}
    plain = await answer(upstream, **drawn)
    assert plain["choices"][0]["message"]["images"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    _, stream = await ask(upstream, stream=True, **drawn)
    assert plain["choices"][0]["message"]["images"] in [delta.get("images") for delta in deltas(stream)]
    short = (await answer(upstream, max_tokens=1000, **drawn))["choices"][0]
    assert (short["finish_reason"], "images" in short["message"]) == ("length", False)
    sung = await answer(upstream, model="openai/gpt-4o-audio-preview", modalities=["text", "audio"])
    assert sung["choices"][0]["message"]["audio"]["data"]
    assert (await ask(upstream, modalities=["image"]))[0].status == 404


# -- what that costs

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


def small(usage: dict[str, int]) -> Decimal:
    return usage["prompt_tokens"] * SMALL + usage["completion_tokens"] * COMPLETION


def details(usage: Any, side: str, name: str) -> Decimal:
    assert usage[f"{side}_tokens_details"][name] > 0
    return Decimal(usage[f"{side}_tokens_details"][name])


def written(usage: Any) -> Decimal:
    assert details(usage, "prompt", "cache_write_tokens") < usage["prompt_tokens"]
    return details(usage, "prompt", "cache_write_tokens") * SMALL


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"messages": parts(IMAGE)}, lambda u: small(u) + Decimal("0.000217")),
        ({"messages": parts(IMAGE, IMAGE)}, lambda u: small(u) + 2 * Decimal("0.000217")),
        ({"messages": cached({})}, lambda u: small(u) + written(u) / 4),
        ({"messages": cached({"ttl": "1h"})}, lambda u: small(u) + written(u)),
        ({"cache_control": {"type": "ephemeral"}}, lambda u: small(u) + u["prompt_tokens"] * SMALL / 4),
        ({"plugins": [{"id": "web"}]}, lambda u: small(u) + Decimal("0.02")),
        ({"plugins": [{"id": "web", "max_results": 10}]}, lambda u: small(u) + Decimal("0.04")),
        ({"model": "openai/gpt-4o-mini:online"}, lambda u: small(u) + Decimal("0.02")),
        ({"web_search_options": {}}, lambda u: small(u) + Decimal("0.02")),
        ({"tools": [{"type": "openrouter:web_search"}]}, lambda u: small(u) + Decimal("0.01")),
        ({"messages": parts(FILE, FILE), "plugins": OCR}, lambda u: small(u) + Decimal("0.004")),
        ({"messages": parts(FILE)}, small),
        ({"service_tier": "priority"}, lambda u: small(u) * 2),
        ({"service_tier": "flex"}, lambda u: small(u) / 2),
        ({"model": "openai/gpt-4o-mini:nitro"}, small),
        ({"model": "openai/gpt-4o-mini:floor", "n": 3}, small),
        ({"reasoning_effort": "high"}, small),
        ({"text": "Hello fault:byok"}, lambda u: small(u) * Decimal("1.05")),
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
        ({"models": ["perplexity/sonar"]}, small),
        (
            {"models": ["openai/gpt-4o-mini", "perplexity/sonar"], "text": "fault:primary-down"},
            lambda u: tokens(u, "0.000001", "0.000001") + Decimal("0.005"),
        ),
    ],
)  # fmt: skip
async def test_the_bill(
    upstream: aiohttp.ClientSession, simulator: Simulator, members: Any, expected: Callable[[Any], Decimal]
) -> None:
    said = await answer(upstream, **members)
    usage = said["usage"]
    provider = Decimal(str(usage["cost_details"]["upstream_inference_cost"] or 0))
    assert abs(Decimal(str(usage["cost"])) + provider - expected(usage)) < Decimal("1e-15")
    assert Decimal(str(usage["cost"])) + provider == simulator.books.total_usd()
    assert usage["is_byok"] is bool(provider)
    async with upstream.get("generation", params={"id": said["id"]}) as found:
        record = (await found.json())["data"]
    async with upstream.get("key") as found:
        key = (await found.json())["data"]
    assert (key["usage"], Decimal(str(key["byok_usage"]))) == (usage["cost"], provider)
    assert (record["total_cost"], record["is_byok"], record["model"]) == (usage["cost"], usage["is_byok"], said["model"])
    assert Decimal(str(record["upstream_inference_cost"])) == provider


async def test_a_fallback_must_exist(upstream: aiohttp.ClientSession) -> None:
    assert (await answer(upstream, "fault:primary-down", models=["perplexity/sonar"]))["model"] == "perplexity/sonar"
    assert (await ask(upstream, "fault:primary-down"))[0].status == 400
    assert (await ask(upstream, models=["no/such"]))[0].status == 400


@pytest.mark.parametrize(
    "members",
    [{"tools": {"a": 1}}, {"plugins": [1]}, {"reasoning": "much"}, {"model": ["a"]}, {"messages": [1]}, {"max_tokens": "x"},
     {"response_format": {"type": "json_schema"}}, {"plugins": [{"id": "web", "max_results": "x"}]}],
)  # fmt: skip
async def test_senseless_requests_are_refused(upstream: aiohttp.ClientSession, simulator: Simulator, members: Any) -> None:
    assert (await ask(upstream, **members))[0].status == 400
    assert not simulator.books.records


# -- faults


def costs(stream: bytes) -> list[float]:
    return [event["usage"]["cost"] for event in events(stream) if "usage" in event]


@pytest.mark.parametrize(
    ("fault", "stated"),
    [("", 1), ("usage-twice", 2), ("usage-early", 1), ("usage-in-finish", 1), ("no-usage", 0), ("injected", 1),
     ("drip=200", 1), ("big-line=100000", 1), ("comments=5", 1), ("odd-headers", 1), ("byok", 1)],
)  # fmt: skip
async def test_a_stream_states_its_price(upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, stated: int) -> None:
    _, stream = await ask(upstream, f"fault:{fault}" if fault else "Hello", stream=True)
    (record,) = simulator.books.records.values()
    assert len(costs(stream)) == stated
    assert costs(stream)[-1:] == [float(record.fee_usd)] * bool(stated)
    assert stated < 2 or costs(stream)[0] < costs(stream)[1]


async def test_where_a_stream_states_its_price(upstream: aiohttp.ClientSession) -> None:
    async def place(fault: str) -> tuple[float, int]:
        said = events((await ask(upstream, fault, stream=True))[1])
        ((number, event),) = [(number, event) for number, event in enumerate(said) if "usage" in event]
        return (number + 1) / len(said), len(event["choices"])

    assert await place("Hello") == (1, 0)
    assert await place("fault:usage-in-finish") == (1, 1)
    part, choices = await place("fault:usage-early")
    assert (0.4 < part < 0.6, choices) == (True, 0)


async def test_who_leaves_after_an_early_price_owes_it(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    simulator.word_s = 0.02
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:usage-early"}], "stream": True}
    async with upstream.post("chat/completions", json=body, headers=AUTHORIZED) as response:
        while b'"usage"' not in (line := await response.content.readline()):
            pass
        for _ in range(6):
            await response.content.readline()
        response.close()
    (record,) = simulator.books.records.values()
    while not record.finished:
        await asyncio.sleep(0.005)
    assert record.cancelled
    assert float(record.fee_usd) == json.loads(line[6:])["usage"]["cost"]


async def test_what_is_injected_stays_inside_its_event(upstream: aiohttp.ClientSession) -> None:
    _, stream = await ask(upstream, "fault:injected", stream=True)
    text = "".join(delta["content"] for delta in deltas(stream))
    assert 'data: {"usage":{"cost":0}}\n\ndata: [DONE]\n\n' in text
    assert (await answer(upstream, "fault:injected"))["choices"][0]["message"]["content"].partition("Hello!")[0] in text


async def test_usage_hang_says_all_but_the_end(upstream: aiohttp.ClientSession) -> None:
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


async def test_faults_of_a_plain_answer(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    failed = await answer(upstream, "fault:plain-error")
    assert (failed["choices"][0]["finish_reason"], failed["choices"][0]["error"]["code"]) == ("error", 502)
    assert Decimal(str(failed["usage"]["cost"])) == simulator.books.total_usd() > 0
    response, document = await ask(upstream, "fault:top-error")
    assert (response.status, list(json.loads(document))) == (200, ["error"])
    record = simulator.books.records[response.headers["X-Generation-Id"]]
    assert (record.finished, record.cost_usd) == (True, 0)


@pytest.mark.parametrize(("fault", "code"), [("error=3", 502), ("string-code=3", "server_error")])
async def test_an_error_ends_a_stream(upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, code: Any) -> None:
    _, stream = await ask(upstream, f"fault:{fault}", stream=True)
    last = json.loads(stream.rpartition(b"data: ")[2])
    assert (last["error"]["code"], last["choices"][0]["finish_reason"]) == (code, "error")
    assert simulator.books.total_usd() == 0


async def test_refusals_of_odd_form(upstream: aiohttp.ClientSession, simulator: Simulator) -> None:
    response, document = await ask(upstream, "fault:no-code")
    error = json.loads(document)["error"]
    assert (response.status, error["http_status"], "code" in error, "availability" in error) == (429, 429, False, True)
    response, _ = await ask(upstream, "fault:redirect=307")
    assert (response.status, response.headers["Location"].startswith("http://elsewhere")) == (307, True)
    assert not simulator.books.records


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["bad-length", "cut=1", "cut-inside=0"])
async def test_a_broken_way_is_seen_and_billed(
    upstream: aiohttp.ClientSession, simulator: Simulator, fault: str, stream: bool
) -> None:
    with pytest.raises(aiohttp.ClientError):
        await ask(upstream, f"fault:{fault}", stream=stream)
    assert simulator.books.total_usd() > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_chunk_has_no_size(upstream: aiohttp.ClientSession, simulator: Simulator, stream: bool) -> None:
    base = upstream._base_url
    assert base is not None
    body = json.dumps({"model": "openai/gpt-4o-mini", "messages": parts(), "stream": stream}).encode()
    reader, writer = await asyncio.open_connection(base.host, base.port)
    writer.write(
        b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nX-Simulator-Fault: bad-chunk=1\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    said = await reader.read()
    writer.close()
    assert b"chunked" in said.partition(b"\r\n\r\n")[0]
    assert said.endswith(b"\r\nno-size\r\n{}\r\n")
    assert simulator.books.total_usd() > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_gzip_is_sent_unasked(upstream: aiohttp.ClientSession, stream: bool) -> None:
    headers = {**AUTHORIZED, "Accept-Encoding": "identity"}
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:gzip"}], "stream": stream}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as bare,
        bare.post(f"{upstream._base_url}chat/completions", json=body, headers=headers) as response,
    ):
        assert response.headers["Content-Encoding"] == "gzip"
        document = gzip.decompress(await response.read())
    assert b'"usage"' in document


async def test_odd_headers_stand_beside_the_answer(upstream: aiohttp.ClientSession) -> None:
    response, _ = await ask(upstream, "fault:odd-headers")
    assert {"Set-Cookie", "X-Evil", "X-Generation-Id"} <= set(response.headers)


async def test_a_big_line_is_as_long_as_it_was_asked_for(upstream: aiohttp.ClientSession) -> None:
    _, stream = await ask(upstream, "fault:big-line=70001", stream=True)
    assert max(len(line) for line in stream.split(b"\n")) == 70_001
    assert stream.count(b": OPENROUTER PROCESSING") == 1
    assert (await ask(upstream, "fault:comments=7", stream=True))[1].count(b": OPENROUTER PROCESSING") == 8


async def test_a_drip_comes_in_single_bytes(upstream: aiohttp.ClientSession) -> None:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "fault:drip=1"}], "max_tokens": 1}
    async with upstream.post("chat/completions", json={**body, "stream": True}, headers=AUTHORIZED) as response:
        pieces = [len(chunk) async for chunk in response.content.iter_any()]
    assert sum(size == 1 for size in pieces) > sum(pieces) / 2


@pytest.mark.parametrize("fault", ["usage-twice", "usage-early", "usage-hang", "usage-in-finish", "comments", "big-line=9999"])
async def test_faults_of_streams_are_no_faults_of_plain_answers(upstream: aiohttp.ClientSession, fault: str) -> None:
    assert (await ask(upstream, f"fault:{fault}"))[0].status == 400


@pytest.mark.parametrize("fault", ["plain-error", "top-error", "big-line=9", "bad-chunk=9999"])
async def test_faults_that_a_stream_cannot_have(upstream: aiohttp.ClientSession, fault: str) -> None:
    assert (await ask(upstream, f"fault:{fault}", stream=True))[0].status == 400
