"""The running gateway does what its OpenAPI description says, for requests that follow it and for requests that do not
(contract A2, A7, B1, B2, B3, B5, C8, E1; rows input-1, -2, -10 to -21).

Schemathesis makes the requests from the description and checks the answers against it: no 5xx, only documented statuses, headers,
content types and shapes, nothing invalid accepted, nothing protected without a key.
"""

import asyncio
import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator

from gptutor.money.amounts import AccountId
from gptutor.money.keys import make_key
from gptutor.web import openapi
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Gateway
from tests.support.late import LateImport

if TYPE_CHECKING:
    import schemathesis
    from schemathesis import checks
else:
    schemathesis, checks = LateImport("schemathesis"), LateImport("schemathesis.checks")

CHAT = "POST /v1/chat/completions"
Answer = tuple[int] | tuple[int, str]
"""Status, and the error's code if it is one."""
INTEGERS = {"max_tokens", "max_completion_tokens", "n", "max_tool_calls"}
DOCUMENT = openapi.describe()
EVENTS = DOCUMENT["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
# The description speaks of the stream as a whole, Schemathesis of each event.
EVENTS["schema"] = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
CHUNK = Draft202012Validator({"$ref": "#/components/schemas/ChatCompletionChunk", "components": DOCUMENT["components"]})
LABELS = [f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods]


@functools.cache
def operations() -> dict[str, Any]:
    """What is described, by method and path."""
    described = {result.ok().label: result.ok() for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()}
    assert sorted(described) == sorted(LABELS)
    return described


@functools.cache
def all_checks() -> list[Any]:
    checks.load_all_checks()
    return list(checks.CHECKS.get_all())


@pytest.fixture
def tuned() -> dict[str, Any]:
    """Schemathesis sends more unauthenticated requests than the default allows."""
    return {"rate_limit": {"unauthenticated_per_minute": 0}}


def explore(
    gateway: Gateway, label: str, mode: "schemathesis.GenerationMode", examples: int, headers: dict[str, str], checks: list[Any]
) -> list[Answer]:
    """The answers to `examples` requests, each checked."""
    answers: list[Answer] = []
    with requests.Session() as session:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(operations()[label].as_strategy(generation_mode=mode))
        def claim(case: "schemathesis.Case[Any]") -> None:
            if label == CHAT and mode is schemathesis.GenerationMode.POSITIVE:
                make_sense(case)
            response = case.call_and_validate(base_url=gateway.url, session=session, headers=headers, checks=checks, timeout=30)
            answers.append((response.status_code, *response.headers.get("x-error-code", [])))
            if response.headers.get("content-type") == ["text/event-stream"]:
                assert_stream(response.content)

        claim()
    return answers


def make_sense(case: "schemathesis.Case[Any]") -> None:
    """What the schema says in words only: models and modalities exist, only some messages may be empty, an integer is not written as 1.0.

    And a request that is tried again must not bear a name that was used.
    """
    case.headers.pop("Idempotency-Key", None)
    body = {name: value for name, value in case.body.items() if name not in ("model", "models", "modalities")}
    for name in INTEGERS & body.keys():
        body[name] = None if body[name] is None else int(body[name])
    body["messages"] = [{**message, "content": message.get("content") or "Hello"} for message in body["messages"]]
    case.body = body


def assert_stream(stream: bytes) -> None:
    """Every event that Schemathesis has read; it does not read a long stream to its end."""
    for event in stream.split(b"\n\n")[:-1]:
        if event.startswith(b"data: ") and event != b"data: [DONE]":
            CHUNK.validate(json.loads(event.removeprefix(b"data: ")))


async def exploring(*arguments: Any) -> list[Answer]:
    """Schemathesis blocks, so it runs in a thread beside the gateway."""
    return await asyncio.to_thread(explore, *arguments)


@pytest.mark.parametrize("label", [label for label in LABELS if label != CHAT])
async def test_operations_without_credentials_are_as_described(gateway: Gateway, label: str) -> None:
    """Without credentials or parameters no request to them is invalid."""
    assert await exploring(gateway, label, schemathesis.GenerationMode.POSITIVE, 15, {}, all_checks())


async def test_valid_requests_get_the_described_responses(gateway: Gateway) -> None:
    client = await gateway.client("10000")
    but_acceptance = [check for check in all_checks() if check.__name__ != "positive_data_acceptance"]
    answers = await exploring(gateway, CHAT, schemathesis.GenerationMode.POSITIVE, 80, client.headers, but_acceptance)
    assert answers.count((200,)) > len(answers) / 2
    assert set(answers) <= {(200,), (400, "upstream_rejected")}  # OpenRouter may find fault with what passes us by
    await gateway.recovered(client)
    await assert_charges_match_bills(gateway, client, "10000")


async def test_invalid_requests_get_the_described_errors(gateway: Gateway) -> None:
    client = await gateway.client()
    answers = await exploring(gateway, CHAT, schemathesis.GenerationMode.NEGATIVE, 100, client.headers, all_checks())
    assert [status for status, *_ in answers].count(400) > len(
        answers
    ) / 4  # where the key alone was wrong, the good one has taken its place
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(
    "key", ["", "Bearer", "Basic eDp5", f"Bearer {make_key(AccountId(10**12))}"], ids=["none", "no key", "basic", "unknown"]
)
async def test_without_a_valid_key_everything_is_401(gateway: Gateway, mode: str, key: str) -> None:
    answers = await exploring(
        gateway, CHAT, schemathesis.GenerationMode(mode), 20, {"Authorization": key}, [checks.not_a_server_error]
    )
    assert set(answers) == {(401, "invalid_key")}
    assert gateway.billed_usd() == 0
