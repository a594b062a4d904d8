"""Headers that pass the gateway: to OpenRouter, back to the client, and from a web page (contract A4, A7)."""

import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gptutor.openrouter.headers import FORWARDED_HEADERS, RETURNED_HEADERS
from tests.support.gateway import Gateway

PAGES = Path(__file__).parent.parent / "gptutor" / "web" / "pages"
SENT = {
    "X-Session-Id": "chat-17",
    "X-OpenRouter-Cache": "true",
    "X-OpenRouter-Cache-TTL": "600",
    "X-OpenRouter-Cache-Clear": "true",
    "X-OpenRouter-Metadata": "enabled",
    "x-anthropic-beta": "context-1m",
}
RETURNED = {
    "X-Generation-Id": "gen-1-abc",
    "X-OpenRouter-Cache-Status": "HIT",
    "X-OpenRouter-Cache-Age": "3",
    "X-OpenRouter-Cache-TTL": "297",
    "X-Provider-Name": "Google",
}
UNSENT = {"X-Api-Key": "sk-x", "traceparent": "00-1-1-00", "tracestate": "a=b", "X-Session-Token": "secret", "X-Title": "mine"}


async def test_listed_headers_reach_openrouter_as_they_are_and_no_others(gateway: Gateway) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    async with gateway.session.post(gateway.chat_url, json=body, headers={**client.headers, **SENT, **UNSENT}) as response:
        assert response.status == 200
    await gateway.idle()
    (record,) = gateway.simulator.billing.records.values()
    assert {name: record.headers.get(name) for name in FORWARDED_HEADERS} == SENT
    assert not set(UNSENT.values()) & set(record.headers.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_what_openrouter_says_of_its_cache_reaches_the_client(scripted: Any, stream: bool) -> None:
    plays, gateway = scripted

    async def play(_: web.Request) -> web.StreamResponse:
        if stream:
            text, kind = 'data: {"usage":{"cost":0}}\n\ndata: [DONE]\n\n', "text/event-stream"
        else:
            text, kind = '{"usage":{"cost":0}}', "application/json"
        return web.Response(text=text, content_type=kind, headers={**RETURNED, "X-Other": "1"})

    plays.append(play)
    response, _ = await gateway.chat(await gateway.client(), stream=stream)
    assert {name: response.headers.get(name) for name in RETURNED} == RETURNED
    assert "X-Other" not in response.headers


async def test_a_web_page_may_send_and_read_these_headers(gateway: Gateway) -> None:
    asked = [*(name.lower() for name in FORWARDED_HEADERS), "x-api-key", "traceparent", "tracestate"]
    preflight = {
        "Origin": "https://shop.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": ",".join(asked),
    }
    async with gateway.session.options(gateway.chat_url, headers=preflight) as response:
        assert response.headers["Access-Control-Allow-Headers"].split(", ") == asked
    async with gateway.session.get(gateway.url + "/health", headers={"Origin": "https://shop.example"}) as response:
        assert set(RETURNED_HEADERS) <= set(response.headers["Access-Control-Expose-Headers"].split(", "))


@pytest.mark.parametrize("language", ["en", "ru"])
def test_the_guide_lists_the_headers_that_pass(language: str) -> None:
    section = (PAGES / f"request.{language}.md").read_text().partition("OpenRouter\n\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE) == list(FORWARDED_HEADERS)
    first = (PAGES / f"response.{language}.md").read_text().split("\n\n")[1]
    assert set(RETURNED_HEADERS) == set(re.findall(r"`([^`]+)`", first))
