"""What real clients show of our errors, and what they repeat (contract B1, B7, B8). The table of the errors page is checked here."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from threading import Thread
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gptutor.database.errors import DatabaseUnavailable
from gptutor.http.app_keys import DATABASE
from gptutor.web import page
from tests.support.gateway import Gateway
from tests.support.javascript import packages, run_node
from tests.support.service import Service

MODEL = "google/gemini-2.5-flash-lite"
INSUFFICIENT = 'Insufficient balance (insufficient credits, "code":402)'
Ask = Callable[..., Awaitable[Any]]
"""Requests a completion with the given fields; raises the SDK's error."""


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- OpenAI's SDK for Python


@pytest.fixture(params=["sync", "async"])
async def ask(request: pytest.FixtureRequest, gateway: Gateway) -> AsyncIterator[Ask]:
    client = await gateway.client()
    options: Any = {"api_key": client.key, "base_url": f"{gateway.url}/v1", "max_retries": 0}
    with OpenAI(**options) as blocking:
        async with AsyncOpenAI(**options) as waiting:

            async def create(*, key: str = client.key, **fields: Any) -> Any:
                fields = {"model": MODEL, "messages": says("Hello"), **fields}
                if request.param == "async":
                    return await waiting.with_options(api_key=key).chat.completions.create(**fields)
                completions: Any = blocking.with_options(api_key=key).chat.completions
                return await asyncio.to_thread(completions.create, **fields)

            yield create


@pytest.mark.parametrize("tuned", [{"server": {"body_bytes_max": 65_536}, "openrouter": {"total_s": 0.3, "first_byte_s": 0.3}}])
@pytest.mark.parametrize(
    ("fields", "text", "kind"),
    [
        ({"messages": []}, "400 - messages array is required", "invalid_request_error"),
        ({"key": "sk-user-nobody"}, "401 - Invalid API key or inactive user", "authentication_error"),
        ({"messages": says("fault:status=403")}, "403 - Simulated error 403", "permission_error"),
        ({"messages": says("x" * 70_000)}, "413 - Request body is larger than 65536 bytes", "invalid_request_error"),
        ({"messages": says("fault:status=429:300")}, "429 - The model is overloaded, try again later", "rate_limit_error"),
        ({"messages": says("fault:status=500")}, "500 - Internal server error", "server_error"),
        ({"messages": says("fault:slow=2")}, "504 - OpenRouter did not answer in time", "server_error"),
    ],
)
async def test_openai_prints_the_text_of_an_error(ask: Ask, fields: dict[str, Any], text: str, kind: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(**fields)
    assert str(caught.value) == f"Error code: {text}"
    assert (caught.value.type, caught.value.param) == (kind, None)
    assert caught.value.code == caught.value.response.headers["X-Error-Code"]


async def test_openai_prints_the_text_of_a_402(gateway: Gateway, ask: Ask) -> None:
    poor = await gateway.client("0.5")
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(key=poor.key)
    assert str(caught.value) == f"Error code: 402 - {INSUFFICIENT}"
    assert (caught.value.type, caught.value.code) == ("insufficient_quota", "402")


async def test_openai_prints_the_text_of_a_503(gateway: Gateway, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable("ConnectionRefusedError")

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", away)
    with pytest.raises(openai.InternalServerError) as caught:
        await ask()
    assert str(caught.value) == "Error code: 503 - Service temporarily unavailable"


async def test_openai_prints_the_text_of_a_404(gateway: Gateway) -> None:
    async with AsyncOpenAI(api_key="sk-user-x", base_url=f"{gateway.url}/v1", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match=r"^Error code: 404 - Model not found$"):
            await client.models.retrieve("no/such")
        with pytest.raises(openai.NotFoundError, match=r"^Error code: 404 - Not found$"):
            await client.embeddings.create(model="no/such", input="Hello")


# -- all clients


class NoRetry(BaseHTTPRequestHandler):
    """Answers everything with a 500 that says not to repeat it."""

    requests = 0

    def do_POST(self) -> None:
        type(self).requests += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"error":{"message":"Internal server error","type":"server_error","code":500,"param":null}}'
        self.send_response(500)
        for name, value in (
            ("Content-Type", "application/json"),
            ("x-should-retry", "false"),
            ("Content-Length", str(len(body))),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def error_of(call: Callable[[], Any]) -> dict[str, Any] | None:
    try:
        call()
    except openai.APIError as error:
        return {"kind": type(error).__name__, "text": str(error), "status": getattr(error, "status_code", None)}
    return None


def observe_python(url: str, key: str, poor_key: str) -> dict[str, Any]:
    """What `tests/js/clients.mjs` says of the others, about OpenAI's SDK for Python, with its own number of retries."""

    def create(text: str, **fields: Any) -> Any:
        with OpenAI(base_url=fields.pop("url", url), api_key=fields.pop("key", key)) as client:
            completion = client.chat.completions.create(model=MODEL, messages=says(text), **fields)
            return list(completion) if fields.get("stream") else completion

    server = HTTPServer(("127.0.0.1", 0), NoRetry)
    Thread(target=server.serve_forever, daemon=True).start()
    NoRetry.requests = 0
    error_of(lambda: create("Hello", url=f"http://127.0.0.1:{server.server_port}/v1"))
    server.shutdown()
    server.server_close()
    return {
        "insufficient": error_of(lambda: create("Hello", key=poor_key)),
        "unknown": error_of(lambda: create("Hello", key="sk-user-nobody")),
        "invalid": error_of(lambda: create("fault:status=400")),
        "broken": error_of(lambda: create("fault:cut=3", stream=True)),
        "complete": error_of(lambda: create("Hello", stream=True)),
        "requests": NoRetry.requests,
    }


@pytest.fixture(scope="module")
def observed(service: Service, node: str) -> dict[str, dict[str, Any]]:
    """How each client told each error, by name and major version."""
    rich, poor = (str(service.command("user", "create", "--balance", balance)["apiKey"]) for balance in ("50", "0.5"))
    url = f"{service.url}/v1"
    told = json.loads(run_node(node, "clients.mjs", GATEWAY_URL=url, GATEWAY_KEY=rich, GATEWAY_POOR_KEY=poor))
    versions = packages()
    named = {f"{name} {versions[name].partition('.')[0]}": of_client for name, of_client in told.items()}
    python = f"openai-python {version('openai').partition('.')[0]}"
    return {python: observe_python(url, rich, poor), **named}


def test_every_client_shows_the_text_of_an_error(observed: dict[str, dict[str, Any]]) -> None:
    assert len(observed) == 6
    for client, told in observed.items():
        assert INSUFFICIENT in told["insufficient"]["text"], client
        assert "Invalid API key or inactive user" in told["unknown"]["text"], client
        assert "Simulated error 400" in told["invalid"]["text"], client


def test_every_client_reports_a_broken_stream_and_no_client_a_complete_one(observed: dict[str, dict[str, Any]]) -> None:
    assert [client for client, told in observed.items() if told["broken"] is None] == []
    assert [client for client, told in observed.items() if told["complete"] is not None] == []


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_the_table_of_clients_is_what_they_do(observed: dict[str, dict[str, Any]], language: str) -> None:
    text = (page.HERE / "pages" / f"errors.{language}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([@\w/-]+ \d+)` \| `(\w+)` \| (\d)[^|]* \| `(\w+)` \|$", text, re.MULTILINE)
    assert rows == [
        (client, told["insufficient"]["kind"], str(told["requests"]), told["broken"] and told["broken"]["kind"])
        for client, told in observed.items()
    ]
