"""OpenAI's SDKs against a running gateway, with nothing changed but the base URL (contract A6, F5; `make test-openai`)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.service import Service
from tests.test_completion import READMES, examples, here

JAVASCRIPT = Path(__file__).parent / "js"
MODEL = "google/gemini-2.5-flash-lite"
MESSAGES = [{"role": "user", "content": "Привет!"}]


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(api_key=service.demo_key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


def test_create(client: OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert "Привет" in completion.choices[0].message.content
    assert completion.usage.model_extra["cost"] > 0
    assert completion.choices[0].finish_reason == "stop"


def test_stream(client: OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
        chunks = list(stream)
    assert "Привет" in "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_extra["cost"] > 0


async def test_async_create_and_stream(service: Service) -> None:
    async with AsyncOpenAI(api_key=service.demo_key, base_url=f"{service.url}/v1", max_retries=0) as client:
        completion = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert completion.model == MODEL
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert [chunk async for chunk in stream][-1].usage is not None


def test_raw_and_streaming_response(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-generation-id"] == raw.parse().id
    assert raw.request_id
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES, stream=True) as response:
        assert b"".join(response.iter_bytes()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"messages": []}, openai.BadRequestError, "messages array is required"),
        ({"temperature": 5}, openai.BadRequestError, "temperature must be a number from 0 to 2"),
        ({"model": "no/such"}, openai.BadRequestError, "no/such"),
        ({"messages": [{"role": "user", "content": "fault:status=403"}]}, openai.PermissionDeniedError, "Simulated error 403"),
        ({"messages": [{"role": "user", "content": "fault:status=429:300"}]}, openai.RateLimitError, "overloaded"),
        ({"messages": [{"role": "user", "content": "fault:status=500"}]}, openai.InternalServerError, "Internal server error"),
    ],
)
def test_error_classes(client: OpenAI, change: dict[str, object], error: type[openai.APIStatusError], text: str) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **change})
    assert text in caught.value.body
    assert caught.value.request_id


def test_authentication_and_payment_errors(service: Service, client: OpenAI) -> None:
    poor = service.command("user", "create", "--balance", "0.5")["apiKey"]
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="sk-user-nobody").chat.completions.create(model=MODEL, messages=MESSAGES)
    with pytest.raises(openai.APIStatusError) as caught:
        client.with_options(api_key=poor, max_retries=5).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert stranger.value.body == "Invalid API key or inactive user"
    assert (caught.value.status_code, caught.value.body) == (402, "Insufficient balance")


def test_a_stream_that_breaks_off_is_an_error_and_not_a_short_answer(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "fault:cut=5"}], stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        list(stream)


def test_models(client: OpenAI) -> None:
    assert len(list(client.models.list())) == 326
    assert client.models.retrieve(MODEL).owned_by == "google"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_python_example_of_the_readme_runs(service: Service, readme: Path) -> None:
    (example,) = examples(readme, "python")
    ran = subprocess.run([sys.executable, "-c", here(example, service)], check=True, capture_output=True, text=True)
    assert len(ran.stdout) > 20


@pytest.fixture(scope="session")
def node() -> str:
    """Node with OpenAI's SDK beside it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed: OpenAI's SDK for JavaScript is not checked")
    if not (JAVASCRIPT / "node_modules" / "openai").exists():
        subprocess.run([npm, "install", "--no-save", "--no-package-lock", "--silent"], cwd=JAVASCRIPT, check=True)
    return node


def run_node(node: str, service: Service, *arguments: str) -> str:
    environ = {**os.environ, "GATEWAY_URL": f"{service.url}/v1", "GATEWAY_KEY": service.demo_key}
    ran = subprocess.run([node, *arguments], cwd=JAVASCRIPT, env=environ, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_javascript(service: Service, node: str) -> None:
    said = run_node(node, service, "check.mjs")
    assert said.count("ok ") == (JAVASCRIPT / "check.mjs").read_text().count("  async '")


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_javascript_example_of_the_readme_runs(service: Service, node: str, readme: Path) -> None:
    (example,) = examples(readme, "javascript")
    assert len(run_node(node, service, "--input-type=module", "--eval", here(example, service))) > 20
