"""Every wait is bounded, on either side (contract A3, A8, B6; rows client-5, client-6, client-8, input-22,
upstream-7, upstream-8, upstream-13)."""

import asyncio
import gzip
import io
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from gptutor.api.chat import completions
from gptutor.api.chat.exchange import STOPPED_EVENT, TRUNCATED_EVENT
from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.config import schema
from gptutor.database.pool import Database
from gptutor.http.app_keys import SERVICES
from gptutor.money.amounts import AccountId
from gptutor.money.holds import Hold, HoldRequest
from gptutor.money.keys import make_key
from gptutor.openrouter.relay import HEARTBEAT
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Gateway, config_for, gateway_on, make_client
from tests.support.wire import post, raw

REQUEST = {"messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def dripping(writer: asyncio.StreamWriter, drop: bytes) -> AsyncIterator[None]:
    async def drip() -> None:
        while True:
            writer.write(drop)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(drip())
    try:
        yield
    finally:
        task.cancel()


async def assert_serves(gateway: Gateway) -> None:
    async with gateway.session.get(f"{gateway.url}/health") as response:
        assert response.status == 200


async def read_health(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length
    await reader.readexactly(int(length[1]))
    return head


# -- the client's side


@pytest.mark.parametrize("tuned", [{"server": {"header_s": 0.3}}])
@pytest.mark.parametrize("beginning", [b"", b"GET /heal", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_headers_that_do_not_arrive_in_time_close_the_connection(gateway: Gateway, beginning: bytes) -> None:
    async with connected(gateway) as (reader, writer), dripping(writer, b"x" if beginning else b""):
        began = time.monotonic()
        writer.write(beginning)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        assert time.monotonic() - began >= 0.29
    await assert_serves(gateway)


@pytest.mark.parametrize("tuned", [{"server": {"header_s": 0.3, "keepalive_s": 20}}])
async def test_headers_that_begin_with_their_connection_have_no_more_time(gateway: Gateway) -> None:
    """Row client-5: the bytes arrive before the server reads."""
    parts = urlsplit(gateway.url)
    with socket.create_connection((parts.hostname, parts.port)) as client:  # the event loop is blocked meanwhile
        client.send(b"GET /heal")
        client.setblocking(False)
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(client, 100) == b""


@pytest.mark.parametrize("cut", [20, -5])
async def test_a_request_that_arrives_during_shutdown_is_answered(
    database_url: str, database: Database, simulator: Simulator, tmp_path: Path, cut: int
) -> None:
    """Row process-7: its headers or its body have begun to arrive when the service stops."""
    client = await make_client(database, "10")
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
    wire = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url, AsyncExitStack() as stack:
        config = config_for(database_url, base_url, tmp_path, {"server": {"shutdown_s": 4}})
        gateway = await stack.enter_async_context(gateway_on(config, database, simulator))
        async with connected(gateway) as (reader, writer):
            writer.write(wire[:cut])
            await asyncio.sleep(0.1)
            ending = asyncio.create_task(stack.aclose())
            await asyncio.sleep(0.3)
            writer.write(wire[cut:])
            async with asyncio.timeout(10):
                answer = await reader.read()
                await ending
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"X-Error-Code: not_ready" in answer


async def test_an_http_1_0_client_gets_no_100_continue(gateway: Gateway) -> None:
    """RFC 9110, 10.1.1: HTTP/1.0 has no interim responses."""
    async with connected(gateway) as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
        async with asyncio.timeout(5):
            answer = await reader.read()
    assert answer.count(b"HTTP/1.") == 1
    assert b" 401 " in answer


@pytest.mark.parametrize("tuned", [{"server": {"header_s": 0.3}}])
async def test_the_headers_of_a_second_request_have_their_own_timeout_and_idle_time_does_not_count(gateway: Gateway) -> None:
    async with connected(gateway) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await read_health(reader)
            await asyncio.sleep(0.5)  # longer than headers may take: between requests `keepalive_s` counts
        writer.write(b"GET /health HTTP/1.1\r\n")
        async with asyncio.timeout(5):
            assert await reader.read() == b""


@pytest.mark.parametrize("tuned", [{"server": {"body_idle_s": 0.2}}, {"server": {"body_s": 0.4}}])
@pytest.mark.parametrize("coding", ["Content-Length: 100\r\n", "Transfer-Encoding: chunked\r\n"])
async def test_a_body_that_arrives_too_slowly_is_rejected(gateway: Gateway, tuned: dict[str, Any], coding: str) -> None:
    client = await gateway.client()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n{coding}"
    drop = b"1\r\n{\r\n" if "chunked" in coding else b" "
    async with connected(gateway) as (reader, writer):
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + drop)
        async with asyncio.timeout(5), dripping(writer, drop if "body_s" in tuned["server"] else b""):
            answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"X-Error-Code: body_too_slow" in answer
    await assert_serves(gateway)
    await gateway.idle()
    assert not gateway.simulator.billing.records


@pytest.mark.parametrize("tuned", [{"server": {"linger_s": 0.1}}])
async def test_100_continue_is_sent_only_for_a_valid_key(gateway: Gateway) -> None:
    client = await gateway.client()
    for key in ("", "Bearer nonsense", f"Bearer {make_key(client.account_id)}", f"Bearer {make_key(AccountId(10**12))}"):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nExpect: 100-continue\r\n"
        answer = await raw(
            gateway, f"{head}Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n".encode(), until_close_s=9
        )
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"Connection: close" in answer
        assert b"100 Continue" not in answer

    whole = post(client, extra="Expect: 100-continue\r\nConnection: close\r\n")
    start, _, body = whole.partition(b"\r\n\r\n")
    async with connected(gateway) as (reader, writer):
        writer.write(start + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("tuned", [{"server": {"linger_s": 0.1}}])
@pytest.mark.parametrize("header", ["Content-Length: 99999999\r\n", "Content-Length: 10\r\nContent-Encoding: gzip\r\n"])
async def test_no_100_continue_for_a_body_that_would_be_rejected(gateway: Gateway, header: str) -> None:
    client = await gateway.client()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\nExpect: 100-continue\r\n"
    answer = await raw(gateway, f"{head}Content-Type: application/json\r\n{header}\r\n".encode(), until_close_s=9)
    assert answer.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 415 "))


async def test_pipelined_requests_are_served_in_order_and_block_no_other_client(gateway: Gateway) -> None:
    total = 2_000
    async with connected(gateway) as (reader, writer):
        writer.write(
            b"".join(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-ID: n%d\r\n\r\n" % number for number in range(total))
        )
        for number in range(total):
            assert b"X-Request-ID: n%d\r\n" % number in await read_health(reader)
            if number == 5:
                await assert_serves(gateway)


async def test_a_large_body_is_parsed_in_the_parser_thread(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def recorded(body: bytes, **settings: Any) -> ParsedRequest:
        threads.append((len(body) > 1_000_000, threading.current_thread().name))
        return parse_request(body, **settings)

    monkeypatch.setattr(completions, "parse_request", recorded)
    client = await gateway.client()
    assert await send_large(gateway, client.headers) == 200
    await gateway.chat(client, "x")
    assert threads == [(True, "large bodies_0"), (False, "MainThread")]
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("pieces", [False, True])
async def test_no_large_body_of_an_unauthenticated_client_is_parsed(
    gateway: Gateway, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "parse_request", None)
    headers = {"Authorization": f"Bearer {make_key(AccountId(10**12))}"}
    assert await send_large(gateway, headers, pieces=pieces) == 401


async def send_large(gateway: Gateway, headers: dict[str, str], *, pieces: bool = False) -> int:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2_000_000}]}).encode()

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    data = in_pieces() if pieces else io.BytesIO(body)
    headers = {**headers, "Content-Type": "application/json"}
    async with gateway.session.post(gateway.chat_url, data=data, headers=headers) as response:
        return response.status


# -- upstream's side


@pytest.mark.parametrize("tuned", [{"openrouter": {"first_byte_s": 2, "idle_s": 0.3}, "relay": {"heartbeat_s": 60}}])
async def test_the_first_byte_and_the_gaps_between_bytes_have_timeouts_of_their_own(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.8)  # longer than `idle_s`, and within `first_byte_s`
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": hello\n\n")
        await asyncio.sleep(60)
        return response

    plays.append(play)
    began = time.monotonic()
    response, stream = await gateway.chat(await gateway.client(), stream=True)
    assert response.status == 200
    assert stream.startswith(b": hello\n\n")
    assert stream.endswith(TRUNCATED_EVENT)
    assert 1.0 < time.monotonic() - began < 5


@pytest.mark.parametrize("tuned", [{"openrouter": {"total_s": 0.4}}])
async def test_a_plain_response_that_our_timeout_cuts_off_is_looked_up_and_charged(gateway: Gateway) -> None:
    """Contract C6: OpenRouter's headers, with the generation id, precede a plain body that takes long; and it bills all of it."""
    gateway.simulator.first_word_s = 2
    client = await gateway.client()
    response, _ = await gateway.chat(client, "fault:blanks=20")
    assert (response.status, response.headers["X-Error-Code"]) == (504, "upstream_timeout")
    assert response.headers["x-should-retry"] == "false"
    assert gateway.billed_usd() > 0
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("tuned", [{"openrouter": {"total_s": 0.4}, "recovery": {"give_up_s": 1}}])
async def test_without_headers_a_hold_waits_until_recovery_gives_up(gateway: Gateway) -> None:
    """Contract C6: there is no generation id to look up; the hold is released and listed for the operator, and nothing is guessed."""
    gateway.simulator.first_word_s = 2
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert (response.status, response.headers["x-should-retry"]) == (504, "false")
    (waiting,) = await gateway.database.fetch("list_waiting_holds", 1000)
    assert (waiting["state"], waiting["generation_id"]) == ("awaiting_evidence", None)
    assert await client.held() > 0
    await gateway.recovered(client)
    (waiting,) = await gateway.database.fetch("list_waiting_holds", 1000)
    assert waiting["state"] == "unresolved"
    assert await client.balance() == 100


async def test_a_plain_response_after_blank_lines_passes_unchanged_and_is_charged(gateway: Gateway) -> None:
    """Row sum-10."""
    client = await gateway.client()
    _, document = await gateway.chat(client, "fault:blanks=3")
    assert document.startswith(b"\n\n\n{")
    await assert_charges_match_bills(gateway, client)


# -- the end of a stop


def end_responses(gateway: Gateway) -> None:
    """As at the end of `server.shutdown_s`."""
    for exchange in list(gateway.app[SERVICES].exchanges):
        exchange.end_response()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_sent_at_the_end_of_a_stop_is_not_bought(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    client = await gateway.client()
    ledger = gateway.app[SERVICES].ledger
    hold_funds, is_held = ledger.hold_funds, asyncio.Event()

    async def slow_hold(request: HoldRequest) -> Hold:
        hold = await hold_funds(request)
        is_held.set()
        await asyncio.sleep(0.3)
        return hold

    monkeypatch.setattr(ledger, "hold_funds", slow_hold)
    answer = asyncio.create_task(gateway.chat(client, stream=stream))
    await is_held.wait()
    end_responses(gateway)
    response, _ = await answer
    assert (response.status, response.headers["X-Error-Code"]) == (503, "not_ready")
    assert "x-should-retry" not in response.headers
    await gateway.idle()
    assert not gateway.simulator.billing.records
    assert await client.held() == 0


@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 5}}])
async def test_nothing_is_retried_after_the_end_of_a_stop(scripted: Any) -> None:
    plays, gateway = scripted
    attempts = asyncio.Queue[None]()

    async def play(request: web.Request) -> web.StreamResponse:
        attempts.put_nowait(None)
        return web.json_response({"error": {"code": 429, "message": "later"}}, status=429, headers={"Retry-After": "1"})

    plays.append(play)
    client = await gateway.client()
    answer = asyncio.create_task(gateway.chat(client))
    await attempts.get()
    await asyncio.sleep(0.2)
    end_responses(gateway)
    response, _ = await answer
    assert (response.status, response.headers["X-Error-Code"]) == (503, "not_ready")
    await gateway.idle()
    assert attempts.empty()
    assert await client.held() == 0


@pytest.mark.parametrize("tuned", [{"relay": {"disconnected_drain_s": 0.5}}])
@pytest.mark.parametrize(("text", "is_compressed"), [("Hello", False), ("fault:drip=9", False), ("fault:gzip", True)])
async def test_a_stream_that_the_stop_ends_is_read_on_for_its_bill(gateway: Gateway, text: str, is_compressed: bool) -> None:
    """Contract B7, C7: the client gets an error event, or a broken connection if the stream is compressed."""
    gateway.simulator.word_s = 0.02
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        received = await response.content.readany()
        while b"delta" not in received and not is_compressed:
            received += await response.content.readany()
        end_responses(gateway)
        if is_compressed:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        else:
            received += await response.read()
            assert received.endswith(STOPPED_EVENT)
    await assert_charges_match_bills(gateway, client)


async def test_nothing_is_added_to_a_stream_that_has_ended_when_the_stop_does(scripted: Any) -> None:
    plays, gateway = scripted
    whole = b'data: {"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n'

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(whole)
        await asyncio.sleep(60)  # the end of the body is missing
        return response

    plays.append(play)
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        received = await response.content.readexactly(len(whole))
        end_responses(gateway)
        assert received + await response.read() == whole
    await gateway.idle()
    assert await client.held() == 0


# -- heartbeats and the end of a stream


@pytest.mark.parametrize("tuned", [{"relay": {"heartbeat_s": 0.1}}])
async def test_heartbeats_are_sent_between_events_and_never_inside_one(scripted: Any) -> None:
    plays, gateway = scripted
    event = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Generation-Id": "gen-1"})
        await response.prepare(request)
        await asyncio.sleep(0.25)
        await response.write(event + event[:20])
        await asyncio.sleep(0.35)
        await response.write(event[20:])
        await asyncio.sleep(0.25)
        await response.write(b'data: {"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n')
        return response

    plays.append(play)
    _, stream = await gateway.chat(await gateway.client(), stream=True)
    assert stream.replace(HEARTBEAT, b"") == event + event + b'data: {"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n'
    assert stream.count(HEARTBEAT) >= 2
    first, second, _ = stream.split(event)
    assert HEARTBEAT in first
    assert second == b""


@pytest.mark.parametrize("tuned", [{"openrouter": {"end_s": 0.3}}])
async def test_after_the_bill_the_end_of_the_stream_is_awaited_for_a_short_time(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"usage":{"cost":0.001}}\n\n')
        await asyncio.sleep(60)
        return response

    plays.append(play)
    client = await gateway.client()
    began = time.monotonic()
    _, stream = await gateway.chat(client, stream=True)
    assert time.monotonic() - began < 5
    assert stream.startswith(b'data: {"usage":{"cost":0.001}}\n\n')
    assert await client.held() == 0
    assert json.dumps(float(100 - await client.balance())) == "0.09"


@pytest.mark.parametrize("tuned", [{"openrouter": {"total_s": 30, "attempts_max": 9}}])
async def test_nothing_is_retried_for_a_client_that_disconnected_between_attempts(scripted: Any) -> None:
    plays, gateway = scripted
    attempts = asyncio.Queue[None]()

    async def play(request: web.Request) -> web.StreamResponse:
        attempts.put_nowait(None)
        return web.json_response({"error": {"code": 429, "message": "later"}}, status=429, headers={"Retry-After": "1"})

    plays.append(play)
    client = await gateway.client()
    async with connected(gateway) as (_, writer):
        writer.write(post(client))
        await attempts.get()
        await asyncio.sleep(0.1)
    await gateway.idle()
    assert attempts.empty()
    assert await client.held() == 0


@pytest.mark.parametrize("tuned", [{"openrouter": {"end_s": 0.2}}])
async def test_a_bill_in_mid_stream_does_not_shorten_the_timeout(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[],"usage":{"cost":0.001}}\n\n')
        await response.write(b'data: {"choices":[]}\n\n')
        await asyncio.sleep(0.6)
        await response.write(b'data: {"choices":[],"usage":{"cost":0.005}}\n\ndata: [DONE]\n\n')
        return response

    plays.append(play)
    client = await gateway.client()
    _, stream = await gateway.chat(client, stream=True)
    assert stream.endswith(b"data: [DONE]\n\n")
    assert await client.balance() == Decimal("99.55")


async def test_an_end_that_arrives_while_the_process_is_busy_is_no_timeout(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[]}\n\n')
        await asyncio.sleep(0.5)
        await response.write(b'data: {"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n')
        await response.write_eof()
        time.sleep(0.7)  # noqa: ASYNC251 - over the moment at which a silent connection is looked at
        return response

    plays.append(play)
    _, stream = await gateway.chat(await gateway.client(), stream=True)
    assert stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("tuned", [{"relay": {"heartbeat_s": 0.1}}])
async def test_no_heartbeat_is_written_into_a_compressed_stream(scripted: Any) -> None:
    plays, gateway = scripted
    document = gzip.compress(b'data: {"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n')

    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"})
        await response.prepare(request)
        await asyncio.sleep(0.4)
        await response.write(document)
        return response

    plays.append(play)
    _, stream = await gateway.chat(await gateway.client(), stream=True)
    assert stream == document
