"""CORS: what a web page may send and read (contract A6, A7)."""

from typing import Any

import pytest

from gptutor.config.load import load
from gptutor.config.schema import ConfigError
from tests.support.gateway import Gateway

PAGE = "https://shop.example"
# What OpenAI's SDK for JavaScript 7 sends beside its key.
SDK = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)


async def preflight(gateway: Gateway, *, origin: str = PAGE, method: str = "POST", headers: str = SDK) -> Any:
    preflight = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    async with gateway.session.options(gateway.chat_url, headers=preflight) as response:
        return response


async def test_preflight_allows_all_headers_of_the_sdk(gateway: Gateway) -> None:
    leave = await preflight(gateway)
    assert leave.status == 204
    assert leave.headers["Access-Control-Allow-Origin"] == "*"
    assert leave.headers["Access-Control-Allow-Headers"].split(", ") == SDK.split(",")
    assert "POST" in leave.headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in leave.headers
    assert leave.headers["X-Request-ID"]


async def test_preflight_does_not_allow_unknown_headers(gateway: Gateway) -> None:
    leave = await preflight(gateway, headers="cookie, X-Forwarded-For, Idempotency-Key")
    assert leave.headers["Access-Control-Allow-Headers"] == "idempotency-key"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["Hello", "fault:status=400"])
async def test_a_page_may_read_responses_and_errors_with_their_headers(gateway: Gateway, stream: bool, text: str) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": text}], "stream": stream}
    async with gateway.session.post(gateway.chat_url, json=body, headers={**client.headers, "Origin": PAGE}) as response:
        await response.read()
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Request-ID", "X-Error-Code", "X-Generation-Id", "Retry-After"} <= set(exposed)
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        await response.read()
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("tuned", [{"server": {"cors_origins": f"https://other.example {PAGE}"}}])
async def test_origins_can_be_restricted(gateway: Gateway) -> None:
    allowed, refused = await preflight(gateway), await preflight(gateway, origin="https://evil.example")
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
    assert refused.status == 405
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert allowed.headers["Vary"] == refused.headers["Vary"] == "Origin"


@pytest.mark.parametrize("tuned", [{"server": {"cors_origins": ""}}])
async def test_cors_can_be_disabled(gateway: Gateway) -> None:
    assert "Access-Control-Allow-Origin" not in (await preflight(gateway)).headers


async def test_options_without_preflight_headers_is_405(gateway: Gateway) -> None:
    async with gateway.session.options(gateway.chat_url, headers={"Origin": PAGE}) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("origins", ["example.org", "https://a.example/", "https://*.example", "null"])
def test_an_invalid_origin_stops_the_start(origins: str) -> None:
    with pytest.raises(ConfigError, match=r"GPTUTOR_SERVER__CORS_ORIGINS must be \*, or origins such as"):
        load({"GPTUTOR_SERVER__CORS_ORIGINS": origins})
