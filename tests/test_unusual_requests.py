"""Requests that are unusual and valid: they pass unchanged, and the hold covers what they may cost (contract A4, A5, C4; rows input-9, -11,
-14, -15, -16, -17, -18, -19, -20)."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from gptutor.openrouter.connection import UpstreamConnection
from gptutor.telemetry.log_writer import logging_to
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Client, Gateway

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TEXT = {"type": "text", "text": "Hello"}


def said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [TEXT, *parts]}]}


async def send(gateway: Gateway, client: Client, body: bytes) -> int:
    headers = {**client.headers, "Content-Type": "application/json"}
    async with gateway.session.post(gateway.chat_url, data=io.BytesIO(body), headers=headers) as response:
        await response.read()
    await gateway.idle()
    return response.status


@pytest.mark.parametrize("text", [r"\u0000", r"\ud83d", r"\udc00 \u0000 \ud83d\ude00", r"\u2028"])
async def test_characters_that_are_hard_on_databases_and_logs_pass_and_are_charged(
    gateway: Gateway, tmp_path: Path, text: str
) -> None:
    client = await gateway.client()
    body = b'{"messages":[{"role":"user","content":"%s"}],"x_new":"%s"}' % ((text.encode(),) * 2)
    with logging_to(tmp_path / "odd", level="debug", retention_days=1, stdout=False):
        assert await send(gateway, client, body) == 200
    (record,) = gateway.simulator.billing.records.values()
    assert record.body.startswith(body[:-1])
    (path,) = (tmp_path / "odd").glob("combined-*.log")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["message"].partition(":")[0] for line in lines] == ["LLM Request", "LLM Response"]
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "http://localhost:1/x.png", "gopher://x", "", "data:,"],
)
async def test_an_image_url_is_never_fetched_and_is_sent_upstream_unchanged(
    gateway: Gateway, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await gateway.client()
    requested = []
    real, real_send = aiohttp.ClientSession._request, UpstreamConnection.send_request

    async def recorded(session: aiohttp.ClientSession, method: str, address: Any, **request: Any) -> Any:
        requested.append(urlsplit(str(address)).path)
        return await real(session, method, address, **request)

    async def recorded_upstream(connection: UpstreamConnection, headers: bytes, body: bytes, timeout_s: float) -> None:
        requested.append(headers.split()[1].decode())
        await real_send(connection, headers, body, timeout_s)

    monkeypatch.setattr(aiohttp.ClientSession, "_request", recorded)
    monkeypatch.setattr(UpstreamConnection, "send_request", recorded_upstream)
    part = b'{"type":"image_url","image_url":{"url":"%s"}}' % url.encode()
    body = b'{"messages":[{"role":"user","content":[%s]}],"max_tokens":1}' % part
    assert await send(gateway, client, body) == 200
    (record,) = gateway.simulator.billing.records.values()
    assert part in record.body
    assert requested == ["/v1/chat/completions", "/api/v1/chat/completions"]
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize(
    "members",
    [
        {"n": 128},
        {"logprobs": True, "top_logprobs": 20},
        {"models": ["anthropic/claude-3-haiku"] * 10},
        {"messages": [{"role": "user", "content": "fault:primary-down"}], "models": ["anthropic/claude-3-haiku"]},
        {"plugins": [{"id": "web"}]},
        {"plugins": [{"id": "web", "max_results": 5}, {"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]},
        {"model": "openai/gpt-4o-mini:online"},
        {"web_search_options": {"search_context_size": "high"}},
        {"plugins": [{"id": "web", "max_results": 50}]},
        {"tools": [{"type": "openrouter:web_search"}] * 30},
        {"service_tier": "priority"},
        {"service_tier": "flex"},
        {"model": "google/gemini-2.5-flash-image", "modalities": ["text", "image"]},
        {"model": "openai/gpt-4o-audio-preview", "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"model": "google/gemini-2.5-pro", "messages": [{"role": "user", "content": "x" * 900_000}], "reasoning": {"effort": "high"}},
        {"reasoning": {"effort": "high"}},
        {"reasoning_effort": "high"},
        {"model": "openrouter/auto"},
        {"messages": [{"role": "system", "content": [{**TEXT, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
                      {"role": "user", "content": "x" * 20_000}]},
        said({"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}),
        said({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "A" * 5000}}),
        said({"type": "input_audio", "input_audio": {"data": "A" * 5000, "format": "wav"}}),
        {"max_tokens": 1},
        {"model": "anthropic/claude-3-haiku", "max_completion_tokens": 3},
    ],
    ids=lambda members: json.dumps(members)[:60],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_the_hold_covers_what_makes_a_request_expensive(gateway: Gateway, members: dict[str, Any], stream: bool) -> None:
    """The gateway fixture asserts after every test that no bill of the simulator was above its hold."""
    client = await gateway.client("10000")
    body = {"messages": [{"role": "user", "content": "Hello"}], **members, "stream": stream}
    assert await send(gateway, client, json.dumps(body).encode()) == 200
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client, "10000")


@pytest.mark.parametrize("wish", [{"include_usage": False}, {}, None])
async def test_usage_is_requested_whatever_the_client_sends(gateway: Gateway, wish: dict[str, Any] | None) -> None:
    client = await gateway.client()
    await gateway.chat(client, stream=True, stream_options=wish, usage={"include": False})
    (record,) = gateway.simulator.billing.records.values()
    assert json.loads(record.body)["stream_options"]["include_usage"] is True
    assert json.loads(record.body)["usage"]["include"] is True
    await assert_charges_match_bills(gateway, client)


async def test_many_messages_and_a_long_one_are_served_or_rejected_and_block_no_other_client(gateway: Gateway) -> None:
    client = await gateway.client("10000")
    many = b'{"messages":[%s]}' % b",".join([b'{"role":"user","content":"x"}'] * 120_000)
    long = b'{"messages":[{"role":"user","content":"%s"}]}' % (b"x" * 4_000_000)
    for body in (many, long):
        large = asyncio.create_task(send(gateway, client, body))
        answers = 0
        while not large.done():
            async with gateway.session.get(f"{gateway.url}/health") as response:
                answers += response.status == 200
        assert large.result() == 200
        assert answers > 5
    await assert_charges_match_bills(gateway, client, "10000")
