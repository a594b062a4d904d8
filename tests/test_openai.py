"""OpenAI's SDKs against a running gateway, with nothing changed but the base URL (contract A6, F5; `make test-openai`)."""

import json
import socket
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from tests.support.javascript import JAVASCRIPT, run_node
from tests.support.late import LateImport
from tests.support.readme import READMES, examples, here
from tests.support.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    import openai
    from openai import AsyncOpenAI, OpenAI
    from openai.lib.streaming.chat import ChatCompletionStreamEvent
else:
    openai = LateImport("openai")

MODEL = "google/gemini-2.5-flash-lite"
MESSAGES = [{"role": "user", "content": "Привет!"}]


class Weather(BaseModel):
    """The weather of a city, as a form that a model fills in."""

    city: str
    degrees: int
    winds: list[str]


FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
FILLED_IN = {"city": "text", "degrees": 1, "winds": ["text"]}


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(service: Service) -> "Iterator[OpenAI]":
    with openai.OpenAI(api_key=service.demo_key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(service: Service) -> Any:
    async with openai.AsyncOpenAI(api_key=service.demo_key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


class Account:
    """A user with fifty roubles, and their own client."""

    def __init__(self, service: Service, client: "OpenAI") -> None:
        created = service.command("user", "create", "--balance", "50")
        self.user_id = int(created["id"])
        self.client = client.with_options(api_key=created["apiKey"])
        self._service = service

    def settled(self) -> Decimal:
        """What was spent, once nothing is held any more."""
        for _ in range(20):
            shown = self._service.command("user", "show", str(self.user_id))
            if shown["held"] == "0":
                return 50 - Decimal(shown["balance"])
            time.sleep(0.1)
        raise AssertionError(f"{shown['held']} roubles are still held")

    def outcomes(self, count: int) -> list[str]:
        """How the requests of the user ended, of which `count` are expected."""
        return [line["outcome"] for line in self._service.lines_of(self.user_id, 2 * count) if "outcome" in line]


@pytest.fixture
def account(service: Service, client: "OpenAI") -> Account:
    return Account(service, client)


def test_create(client: "OpenAI") -> None:
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert "Привет" in completion.choices[0].message.content
    assert completion.usage.model_extra["cost"] > 0
    assert completion.choices[0].finish_reason == "stop"


def test_stream(client: "OpenAI") -> None:
    with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
        chunks = list(stream)
    assert "Привет" in "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert chunks[-1].choices[0].delta.content == ""
    assert chunks[-1].choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.model_extra["cost"] > 0


async def test_async_create_and_stream(async_client: "AsyncOpenAI") -> None:
    completion = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert completion.model == MODEL
    stream = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert [chunk async for chunk in stream][-1].usage is not None


def test_raw_and_streaming_response(client: "OpenAI") -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-generation-id"] == raw.parse().id
    assert raw.request_id
    raw_stream = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, stream=True)
    assert {chunk.id for chunk in raw_stream.parse()} == {raw_stream.headers["x-generation-id"]}
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES, stream=True) as response:
        assert b"".join(response.iter_bytes()).endswith(b"data: [DONE]\n\n")
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES) as response:
        assert "Привет" in response.parse().choices[0].message.content


async def test_async_raw_and_streaming_response(async_client: "AsyncOpenAI") -> None:
    chat = async_client.chat.completions
    raw = await chat.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-generation-id"] == raw.parse().id
    async with chat.with_streaming_response.create(model=MODEL, messages=MESSAGES, stream=True) as response:
        assert [line async for line in response.iter_lines() if line][-1] == "data: [DONE]"


# -- tools and forms


def test_a_tool_is_called_answered_and_spoken_of(client: "OpenAI") -> None:
    messages = says("tool:weather and tool:clock")
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[FUNCTION, CLOCK]).choices[0]
    assert first.finish_reason == "tool_calls"
    assert [call.function.name for call in first.message.tool_calls] == ["weather", "clock"]
    assert json.loads(first.message.tool_calls[0].function.arguments) == FILLED_IN
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "minus 40"} for call in first.message.tool_calls]
    last = client.chat.completions.create(model=MODEL, messages=[*messages, first.message, *answers], tools=[FUNCTION, CLOCK])
    assert last.choices[0].finish_reason == "stop"
    assert "minus 40" in last.choices[0].message.content


def test_streamed_tool_calls_are_assembled(client: "OpenAI") -> None:
    arguments: dict[int, str] = {}
    names: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=says("tool:weather and tool:clock"), tools=[CLOCK, FUNCTION], stream=True
    ):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            names[call.index] = names.get(call.index) or call.function.name
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert names == {0: "clock", 1: "weather"}
    assert [json.loads(arguments[index]) for index in (0, 1)] == [{}, FILLED_IN]


def test_parse_fills_in_a_model_and_the_arguments_of_a_tool(client: "OpenAI") -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(**FILLED_IN)
    tool = openai.pydantic_function_tool(Weather)
    called = client.chat.completions.parse(model=MODEL, messages=MESSAGES, tools=[tool], tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(**FILLED_IN)


def test_parse_refuses_a_form_that_was_cut_short(client: "OpenAI") -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=2)


async def test_async_parse_and_stream_helper(async_client: "AsyncOpenAI") -> None:
    parsed = await async_client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(**FILLED_IN)
    async with async_client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Weather) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == Weather(**FILLED_IN)


def events_of(client: "OpenAI", **members: Any) -> "tuple[list[ChatCompletionStreamEvent], Any]":
    with client.chat.completions.stream(model=MODEL, **members) as stream:
        return list(stream), stream.get_final_completion()


def test_stream_helper_tells_words_and_their_probabilities(client: "OpenAI") -> None:
    events, final = events_of(client, messages=MESSAGES, logprobs=True, top_logprobs=1)
    text = "".join(event.delta for event in events if event.type == "content.delta")
    (done,) = [event for event in events if event.type == "content.done"]
    assert text == done.content == final.choices[0].message.content
    assert "Привет" in text
    (logprobs,) = [event for event in events if event.type == "logprobs.content.done"]
    assert "".join(word.token for word in logprobs.content) == text
    assert final.usage.model_extra["cost"] > 0


def test_stream_helper_tells_calls_and_their_arguments(client: "OpenAI") -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    events, final = events_of(client, messages=says("use a tool"), tools=tools)
    text = "".join(event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta")
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert (json.loads(text), done.parsed_arguments) == (FILLED_IN, Weather(**FILLED_IN))
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(**FILLED_IN)


# -- what else a request may hold

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
FILE = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}
SOUND = {"type": "input_audio", "input_audio": {"format": "wav", "data": "UklGRg=="}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Привет!"}, IMAGE]}],
        [{"role": "user", "content": [{"type": "text", "text": "Привет!"}, FILE, SOUND]}],
        [{"role": "system", "content": "Будь краток."}, {"role": "developer", "content": "Да."}, *MESSAGES],
        [*MESSAGES, {"role": "assistant", "content": "Да?"}, {"role": "user", "name": "Ваня", "content": "Привет!"}],
    ],
)
def test_messages_of_all_kinds_are_answered(client: "OpenAI", messages: Any) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=messages)
    assert "Привет" in completion.choices[0].message.content


@pytest.mark.parametrize(
    "members",
    [
        {"seed": 7}, {"stop": ["\n"]}, {"stop": "\n"}, {"temperature": 0}, {"top_p": 0.5}, {"presence_penalty": -2},
        {"frequency_penalty": 2}, {"logit_bias": {"50256": -100}}, {"user": "Ваня"}, {"metadata": {"a": "b"}},
        {"stream_options": {"include_usage": True}, "stream": True}, {"max_completion_tokens": 2000},
        {"reasoning_effort": "low"}, {"verbosity": "low"}, {"store": False}, {"prompt_cache_key": "a"},
        {"extra_body": {"provider": {"sort": "price"}, "transforms": []}}, {"extra_query": {"a": "b"}},
    ],
)  # fmt: skip
def test_parameters_that_change_no_word_are_accepted(client: "OpenAI", members: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **members)
    if members.get("stream"):
        assert list(answer)[-1].usage.completion_tokens > 0
    else:
        assert "Привет" in answer.choices[0].message.content


def test_parameters_that_change_the_answer(client: "OpenAI") -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, max_tokens=3, logprobs=True, top_logprobs=2, service_tier="flex"
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}
    assert [len(choice.logprobs.content[0].top_logprobs) for choice in completion.choices] == [2, 2]
    assert (completion.service_tier, completion.usage.completion_tokens) == ("flex", 6)


def test_extra_body_reaches_openrouter(client: "OpenAI") -> None:
    other = "meta-llama/llama-3.1-8b-instruct"
    extra = {"models": [other], "reasoning": {"effort": "low"}}
    completion = client.chat.completions.create(model=MODEL, messages=says("fault:primary-down"), extra_body=extra)
    assert completion.model == other
    assert completion.choices[0].message.model_extra["reasoning"]
    assert completion.usage.completion_tokens_details.reasoning_tokens > 0


# -- disconnects, timeouts and retries


def test_a_stream_that_is_closed_early_is_paid_and_nothing_stays_held(account: Account) -> None:
    with account.client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
    assert account.settled() > 0


async def test_an_async_stream_that_is_closed_early_is_paid_and_nothing_stays_held(account: Account) -> None:
    async with (
        openai.AsyncOpenAI(api_key=account.client.api_key, base_url=account.client.base_url, max_retries=0) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream,
    ):
        async for event in stream:
            if event.type == "content.delta":
                break
    assert account.settled() > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_is_one_and_nothing_stays_held(account: Account, stream: bool) -> None:
    with_timeout = account.client.with_options(timeout=0.8)
    with pytest.raises(openai.APITimeoutError):
        with_timeout.chat.completions.create(model=MODEL, messages=says("fault:slow=1.5"), stream=stream)
    assert account.settled() > 0


def test_a_429_is_asked_again_after_its_pause(account: Account) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        account.client.with_options(max_retries=1).chat.completions.create(model=MODEL, messages=says("fault:status=429:0"))
    assert caught.value.response.headers["retry-after"] == "0"
    assert account.outcomes(2) == ["rate_limited_upstream"] * 2
    assert account.settled() == 0


def test_a_402_is_not_asked_again(service: Service, account: Account) -> None:
    poor = service.command("user", "create", "--balance", "0.5")
    with pytest.raises(openai.APIStatusError) as caught:
        account.client.with_options(api_key=poor["apiKey"], max_retries=5).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert str(caught.value) == 'Error code: 402 - Insufficient balance (insufficient credits, "code":402)'
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (402, "402", "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(service.lines_of(int(poor["id"]), 2)) == 2


# -- errors


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"messages": []}, "BadRequestError", "messages array is required"),
        ({"temperature": 5}, "BadRequestError", "temperature must be a number from 0 to 2"),
        ({"model": "no/such"}, "BadRequestError", "no/such"),
        ({"messages": says("fault:status=403")}, "PermissionDeniedError", "Simulated error 403"),
        ({"messages": says("fault:status=429:300")}, "RateLimitError", "overloaded"),
        ({"messages": says("fault:no-code")}, "RateLimitError", "overloaded"),
        ({"messages": says("fault:status=500")}, "InternalServerError", "Internal server error"),
        ({"messages": says("fault:cut-inside=0")}, "InternalServerError", "Internal server error"),
        ({"messages": says("fault:html=524")}, "InternalServerError", "Internal server error"),
    ],
)
def test_error_classes(client: "OpenAI", change: dict[str, object], error: str, text: str) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **change})
    assert text in str(caught.value)
    assert caught.value.code == caught.value.response.headers["X-Error-Code"]
    assert caught.value.request_id


def test_a_unauthenticated_is_an_authentication_error(client: "OpenAI") -> None:
    with pytest.raises(openai.AuthenticationError) as unauthenticated:
        client.with_options(api_key="sk-user-nobody").chat.completions.create(model=MODEL, messages=MESSAGES)
    assert str(unauthenticated.value) == "Error code: 401 - Invalid API key or inactive user"
    assert (unauthenticated.value.code, unauthenticated.value.type) == ("invalid_key", "authentication_error")


def test_an_unknown_model_is_not_found(client: "OpenAI") -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such")
    assert str(caught.value) == "Error code: 404 - Model not found"


def test_a_repeated_idempotency_key_is_a_conflict_and_another_body_unprocessable(account: Account) -> None:
    chat = account.client.with_options(max_retries=3).chat.completions
    key = {"Idempotency-Key": "order-66"}
    chat.create(model=MODEL, messages=MESSAGES, extra_headers=key)
    paid = account.settled()
    with pytest.raises(openai.ConflictError) as repeated:
        chat.create(model=MODEL, messages=MESSAGES, extra_headers=key)
    with pytest.raises(openai.UnprocessableEntityError) as mismatched:
        chat.create(model=MODEL, messages=says("Hello"), extra_headers=key)
    assert "already made" in str(repeated.value)
    assert "different request" in str(mismatched.value)
    assert account.settled() == paid > 0


def test_a_gateway_that_is_gone_is_a_connection_error() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        with openai.OpenAI(api_key="sk-user-x", base_url=url, max_retries=0) as client, pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(model=MODEL, messages=MESSAGES)


@pytest.mark.parametrize("fault", ["cut=0", "cut=1", "cut=5", "error=1", "error=5", "string-code=5"])
def test_a_stream_that_breaks_off_is_an_api_error_and_not_a_short_answer(client: "OpenAI", fault: str) -> None:
    with pytest.raises(openai.APIError, match=r"lost|disconnected|500"):
        list(client.chat.completions.create(model=MODEL, messages=says(f"fault:{fault}"), stream=True))


@pytest.mark.parametrize("fault", ["cut-inside=1", "cut-inside=5", "cut-inside=20", "bad-chunk=5"])
def test_a_stream_that_breaks_off_inside_an_event_never_looks_whole(client: "OpenAI", fault: str) -> None:
    with pytest.raises((openai.APIError, json.JSONDecodeError)):
        list(client.chat.completions.create(model=MODEL, messages=says(f"fault:{fault}"), stream=True))


@pytest.mark.parametrize(
    "fault",
    [
        "usage-twice",
        "usage-early",
        "usage-in-finish",
        "injected",
        "chunks=3",
        "one-write",
        "big-line=200000",
        "comments=20",
        "bad-length",
        "odd-headers",
    ],
)
def test_a_stream_of_odd_form_is_a_whole_answer(client: "OpenAI", fault: str) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=says(f"Привет! fault:{fault}"), stream=True)
    chunks = list(stream)
    assert "Вы написали" in "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert "stop" in [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [chunk for chunk in chunks if chunk.usage][-1].usage.model_extra["cost"] > 0


def test_a_plain_answer_that_failed_says_so(client: "OpenAI") -> None:
    choice = client.chat.completions.create(model=MODEL, messages=says("fault:plain-error")).choices[0]
    assert (choice.finish_reason, choice.model_extra["error"]["code"]) == ("error", 502)


def test_models(client: "OpenAI") -> None:
    assert len(list(client.models.list())) == 326
    assert client.models.retrieve(MODEL).owned_by == "google"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_python_example_of_the_readme_runs(service: Service, readme: Path) -> None:
    (example,) = examples(readme, "python")
    ran = subprocess.run([sys.executable, "-c", here(example, service)], check=True, capture_output=True, text=True)
    assert len(ran.stdout) > 20


def test_javascript(service: Service, account: Account, node: str) -> None:
    poor = service.command("user", "create", "--balance", "0.5")["apiKey"]
    said = run_node(node, "check.mjs", GATEWAY_URL=f"{service.url}/v1", GATEWAY_KEY=account.client.api_key, GATEWAY_POOR_KEY=poor)
    assert said.count("ok ") == (JAVASCRIPT / "check.mjs").read_text().count("  async '")
    assert account.settled() > 0


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_javascript_example_of_the_readme_runs(service: Service, node: str, readme: Path) -> None:
    (example,) = examples(readme, "javascript")
    assert len(run_node(node, "--input-type=module", "--eval", here(example, service))) > 20
