"""Bytes and money through the whole gateway, plain and streamed, with every fault of the simulator (contract A2, A3, A4, A7, B7, C1,
C4 to C8, F3; rows money-7 to -11, upstream-1, -6, -9 to -13, -15, client-2, client-3)."""

import asyncio
import json
import logging
import re
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gptutor.api.chat.exchange import TRUNCATED_EVENT
from tests.support.accounting import assert_charges_match_bills, charged_usd
from tests.support.gateway import MODEL, Gateway


async def test_a_plain_response_arrives_and_is_charged_exactly(gateway: Gateway) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client)
    answer = json.loads(document)
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/json"
    assert answer["model"] == MODEL
    assert response.headers["X-Generation-Id"] == answer["id"]
    assert await charged_usd(gateway, client) == Decimal(str(answer["usage"]["cost"])) > 0
    assert "upstream_inference_completions_cost" in answer["usage"]["cost_details"]
    await assert_charges_match_bills(gateway, client)


async def test_a_stream_arrives_and_is_charged_exactly(gateway: Gateway) -> None:
    client = await gateway.client()
    response, stream = await gateway.chat(client, stream=True)
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Generation-Id"].startswith("gen-")
    events = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n") if line.startswith(b"data: ")]
    assert stream.startswith(b": OPENROUTER PROCESSING\n\n")
    assert events[-1] == b"[DONE]"
    last = json.loads(events[-2])
    assert [(choice["delta"]["content"], choice["finish_reason"]) for choice in last["choices"]] == [("", "stop")]
    assert Decimal(str(last["usage"]["cost"])) == await charged_usd(gateway, client)
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("fault", ["", "fault:chunks=1", "fault:chunks=7", "fault:one-write"])
async def test_the_content_does_not_depend_on_the_chunks(gateway: Gateway, fault: str) -> None:
    client = await gateway.client()
    _, stream = await gateway.chat(client, fault, stream=True)
    said = [json.loads(line[6:]) for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
    text = "".join(choice["delta"]["content"] for event in said for choice in event["choices"])
    assert text.endswith(f"“{fault}”.")
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["no-usage", "cost=null", "cost=-1", "cost=1e400", 'cost="0.1"', "cost=NaN"])
async def test_a_missing_or_invalid_cost_is_looked_up_at_generation(gateway: Gateway, fault: str, stream: bool) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client, f"fault:{fault}", stream=stream)
    assert response.status == 200
    assert document
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("fault", ["cut=3", "cut-inside=3", "cut-inside=40", "chunks=9 fault:cut=5"])
async def test_a_broken_stream_ends_in_an_error_event_and_is_charged_by_generation(gateway: Gateway, fault: str) -> None:
    client = await gateway.client()
    response, stream = await gateway.chat(client, f"fault:{fault}", stream=True)
    assert response.status == 200
    event = json.loads(stream.rstrip(b"\n").rpartition(b"\n\n")[2].removeprefix(b"data: "))
    assert event["error"]["code"] == 502
    assert b"[DONE]" not in stream
    await assert_charges_match_bills(gateway, client)


def test_our_error_event_has_the_form_that_every_client_reports() -> None:
    """Contract B7. Tried in November 2026, with the event `{"error": {"code", "message"}}` alone, and with `choices` beside it:

    client                                                          alone     with `choices`
    openai-python, openai-node                                      raises    raises
    langchain-openai, llm, LiteLLM                                  raises    raises
    AI SDK: @ai-sdk/openai                                          raises    swallowed: finishReason "other"
    AI SDK: openai-compatible, openrouter                           raises    raises
    @openrouter/sdk, openrouter-py, langchain-openrouter            raises    fails validation: no `id`, `object`, `created`, `model`
    Open WebUI                                                      reports   swallowed: a cut answer is stored as whole
    opencode, Continue, pydantic-ai, instructor                     raises    raises
    """
    assert TRUNCATED_EVENT.startswith(b"data: ")
    assert TRUNCATED_EVENT.endswith(b"\n\n")
    event = json.loads(TRUNCATED_EVENT[6:])
    assert list(event) == ["error"]
    assert event["error"] == {"code": 502, "message": "The upstream connection was lost before the response was complete"}


@pytest.mark.parametrize("fault", ["no-done", "usage-alone fault:no-done", "usage-in-finish fault:no-done"])
@pytest.mark.parametrize("chunks", ["", " fault:one-write", " fault:chunks=7"])
async def test_a_complete_stream_without_done_is_complete(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, fault: str, chunks: str
) -> None:
    """Contract B7: no error event, and no cause in the log."""
    client = await gateway.client()
    with caplog.at_level(logging.INFO, "gptutor"):
        _, stream = await gateway.chat(client, f"fault:{fault}{chunks}", stream=True)
    assert b'"usage":{' in stream.rpartition(b"data: ")[2]
    assert b"[DONE]" not in stream
    assert b'"error"' not in stream
    (line,) = [record for record in caplog.records if record.message.startswith("LLM Response")]
    assert (line.outcome, getattr(line, "cause", None)) == ("settled", None)  # type: ignore[attr-defined]
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("fault", ["no-usage fault:no-done", "usage-early fault:cut=20", "usage-alone fault:cut=20"])
async def test_a_stream_without_done_that_lacks_something_is_not_complete(gateway: Gateway, fault: str) -> None:
    client = await gateway.client()
    _, stream = await gateway.chat(client, f"fault:{fault}", stream=True)
    assert stream.endswith(TRUNCATED_EVENT)
    await assert_charges_match_bills(gateway, client)


async def test_openrouters_own_error_event_passes_unchanged(gateway: Gateway) -> None:
    client = await gateway.client()
    _, stream = await gateway.chat(client, "fault:error=4", stream=True)
    events = [line for line in stream.split(b"\n\n") if line.startswith(b"data: ")]
    assert json.loads(events[-1][6:])["error"]["message"] == "Provider disconnected"
    assert len(events) == 4
    await assert_charges_match_bills(gateway, client)


async def test_a_truncated_plain_response_is_an_error_and_is_charged_by_generation(gateway: Gateway) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client, "fault:cut-inside=0")
    assert (response.status, json.loads(document)) == (500, {"error": "Internal server error"})
    assert response.headers["x-should-retry"] == "false"
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 524, 529])
async def test_a_retryable_error_is_retried_and_then_returned(gateway: Gateway, status: int) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client, f"fault:status={status}:0")
    assert response.status == {429: 429, 408: 504, 524: 504}.get(status, 500)
    assert list(json.loads(document)) == ["error"]
    assert gateway.billed_usd() == 0
    await assert_charges_match_bills(gateway, client)


async def test_a_disconnected_client_still_pays(gateway: Gateway) -> None:
    gateway.simulator.word_s = 0.01
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        await response.content.readany()
        response.close()
    await gateway.idle()
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("tuned", [{"relay": {"disconnected_drain_s": 0.05}}])
@pytest.mark.parametrize(
    "model", [MODEL, "openai/gpt-4o-mini"]
)  # the second provider stops, and stops billing, when the request is cancelled
async def test_upstream_is_read_for_a_bounded_time_after_the_client_disconnected(gateway: Gateway, model: str) -> None:
    gateway.simulator.word_s = 0.1
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "model": model}
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        while b"Hello!" not in await response.content.readany():
            pass
        response.close()
    await gateway.idle()
    (record,) = gateway.simulator.billing.records.values()
    assert record.cancelled
    assert record.completion_tokens < 10 or model == MODEL
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


async def test_a_client_that_disconnects_from_a_plain_request_still_pays(gateway: Gateway) -> None:
    gateway.simulator.first_word_s = 0.3
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with pytest.raises(TimeoutError):
        await gateway.session.post(gateway.chat_url, json=body, headers=client.headers, timeout=aiohttp.ClientTimeout(total=0.15))
    await gateway.idle()
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


async def test_sixty_concurrent_requests_with_a_balance_for_ten_never_overdraw(gateway: Gateway) -> None:
    # 16 384 tokens × 0.0000006 dollars × 90 roubles × 1.1 ≈ 0.973 roubles: ten such holds fit into ten roubles.
    client = await gateway.client("10")
    gateway.simulator.first_word_s = 2.0  # no response ends, and frees its hold, before the last request has arrived
    members: dict[str, Any] = {"model": "openai/gpt-4o-mini", "max_tokens": 16_384}
    replies = await asyncio.gather(*(gateway.chat(client, **members) for _ in range(60)))
    statuses = [response.status for response, _ in replies]
    assert statuses.count(200) == 10
    assert statuses.count(402) == 50
    assert {document for response, document in replies if response.status == 402} == {b'{"error": "Insufficient balance"}'}
    assert (await client.user()).balance >= 0
    await assert_charges_match_bills(gateway, client, "10")


async def test_where_the_balance_limits_the_output_max_tokens_is_sent_upstream(gateway: Gateway) -> None:
    client = await gateway.client("8")
    await gateway.chat(client)
    (record,) = gateway.simulator.billing.records.values()
    # 8 roubles / 8 / (0.0000004 dollars × 90 × 1.1) ≈ 25 252 tokens, and some for the smallest hold; the model could write 65 535
    assert 25_252 < json.loads(record.body)["max_tokens"] < 28_000
    await gateway.chat(await gateway.client("100"))
    assert "max_tokens" not in json.loads(list(gateway.simulator.billing.records.values())[1].body)


async def test_openrouter_gets_the_clients_request_and_nothing_that_identifies_the_client(gateway: Gateway) -> None:
    client = await gateway.client()
    body = b'{"messages":[{"role":"user","content":"Hi"}],"x_new":{"a":1.50,"b":1E+2},"temperature":1.0,"user":"ivan"}'
    headers = {**client.headers, "Content-Type": "application/json", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4", "X-Own": "1",
               "X-OpenRouter-Metadata": "enabled", "Proxy-Authorization": "x", "TE": "trailers", "HTTP-Referer": "https://own.example"}  # fmt: skip
    for _ in range(2):
        async with gateway.session.post(gateway.chat_url, data=body, headers=headers) as response:
            assert response.status == 200
    await gateway.idle()
    first, second = gateway.simulator.billing.records.values()
    assert first.body == second.body
    pseudonym = json.loads(first.body)["user"]
    assert re.fullmatch(r"[0-9a-f]{32}", pseudonym)
    assert first.body == body[:-14] + b'"user":"%s","usage":{"include":true},"model":"%s"}' % (pseudonym.encode(), MODEL.encode())
    assert set(first.headers) == {
        "Host", "Authorization", "Content-Type", "Accept-Encoding", "User-Agent", "X-Title", "Accept", "Content-Length", "X-OpenRouter-Metadata",
    }  # fmt: skip
    assert first.headers["Authorization"] == "Bearer sk-or-test"
    assert first.headers["Accept-Encoding"] == "identity"
    await gateway.chat(await gateway.client())
    assert json.loads(list(gateway.simulator.billing.records.values())[2].body)["user"] != pseudonym


# -- a scripted upstream: bytes that no simulator would send


ODD_STREAMS = [
    b"",
    b"data: x",
    b"\xff\xfe\x00 not utf-8 \xc3\r\n\r\n: c\r\rdata: [DONE]\n\n",
    b'event: x\ndata: {"usage":\r\ndata: {"cost":0.25}}\r\n\r\ndata: [DONE]\r\n\r\n',
    b"data: " + b"x" * 300_000 + b"\n\n",
]


@pytest.mark.parametrize("stream", ODD_STREAMS)
@pytest.mark.parametrize("size", [1_000_000, 5])
async def test_odd_bytes_pass_unchanged(scripted: Any, stream: bytes, size: int) -> None:
    plays, gateway = scripted
    if size == 5 and len(stream) > 10_000:
        size = 5_000

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Set-Cookie": "a=b", "X-Odd": "1"}
        )
        await response.prepare(request)
        for start in range(0, len(stream), size):
            await response.write(stream[start : start + size])
        return response

    plays.append(play)
    response, received = await gateway.chat(await gateway.client(), stream=True)
    ended = b"data: [DONE]" in stream
    assert received[: len(stream)] == stream
    assert (received == stream) is ended  # a stream that OpenRouter did not end gets our error event
    assert ended or received.endswith(TRUNCATED_EVENT)
    assert "Set-Cookie" not in response.headers
    assert "X-Odd" not in response.headers


async def test_a_compressed_body_passes_unchanged_and_is_never_decompressed(scripted: Any) -> None:
    plays, gateway = scripted
    document = b"\x1f\x8b\x08\x00 not really gzip"

    async def play(request: web.Request) -> web.StreamResponse:
        return web.Response(body=document, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})

    plays.append(play)
    response, received = await gateway.chat(await gateway.client())
    assert (response.status, received) == (200, document)
    assert response.headers["Content-Encoding"] == "gzip"


async def test_a_response_without_a_cost_or_a_generation_id_leaves_its_hold_open(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": []})

    plays.append(play)
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert response.status == 200
    assert await client.balance() == 100  # never silently estimated …
    assert await client.held() > 0  # … and never silently free


async def test_a_redirect_is_not_followed(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("http://localhost:1/steal")

    plays.append(play)
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert response.status == 500
    assert await client.held() == 0
