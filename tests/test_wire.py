"""Raw sockets and unusual clients (contract A7, A8, B3, B7, F1; rows client-3, client-4, client-9, client-10, input-22 in part)."""

import asyncio
import gc
import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp.test_utils import make_mocked_request

from gptutor.api.chat.event_stream import EventStream, StreamLimits
from gptutor.http.connection import ClientConnection
from gptutor.money.amounts import AccountId
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import make_key
from gptutor.money.users import UserRepository
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import HTTP_SERVER_LOGGER
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import VAULT, Gateway
from tests.support.wire import post, raw


@pytest.mark.parametrize(
    "request_of",
    [
        lambda key: b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\x00\r\n\r\n" % key,
        lambda key: b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization Bearer %s\r\n\r\n" % key,
        lambda key: b"GET /health?key=%s HTTP/9.9x\r\nHost: x\r\n\r\n" % key,
        lambda key: b"GET /health HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (key * 500),
        lambda key: b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % key,
        lambda key: b"\x16\x03\x01 " + key + b"\r\n\r\n",
    ],
)
async def test_malformed_http_is_rejected_and_its_bytes_are_in_no_log(gateway: Gateway, tmp_path: Path, request_of: Any) -> None:
    client = await gateway.client()
    with logging_to(tmp_path / "wire", level="debug", retention_days=1, stdout=False):
        answer = await raw(gateway, request_of(client.key.encode()))
        HTTP_SERVER_LOGGER.error("at least one line")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 401")) or answer == b""
    (path,) = (tmp_path / "wire").glob("combined-*.log")
    text = path.read_text()
    assert "at least one line" in text
    assert "sk-user" not in text
    assert "Traceback" not in text


async def test_an_unknown_expectation_is_417(gateway: Gateway) -> None:
    client = await gateway.client()
    answer = await raw(gateway, post(client, extra="Expect: a miracle\r\nConnection: close\r\n"))
    assert answer.startswith(b"HTTP/1.1 417")
    assert b"X-Request-ID:" in answer


@pytest.mark.parametrize("extra", ["", "Connection: keep-alive\r\n"])
async def test_http_1_0_ends_a_stream_by_closing_the_connection(gateway: Gateway, extra: str) -> None:
    client = await gateway.client()
    answer = await raw(gateway, post(client, version="1.0", extra=extra, stream=True))
    assert answer.endswith(b"data: [DONE]\n\n")
    assert b"Transfer-Encoding" not in answer
    await assert_charges_match_bills(gateway, client)


async def test_a_connection_is_used_again_after_a_stream(gateway: Gateway) -> None:
    client = await gateway.client()
    answer = await raw(gateway, post(client, extra="", stream=True) + post(client))
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("tuned", [{"relay": {"write_timeout_s": 0.3, "buffer_bytes": 4096}}])
async def test_a_client_that_stops_reading_is_dropped_and_charged(gateway: Gateway) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "x" * 150 + " fault:flood=20000000"}], "stream": True}
    payload = json.dumps(body).encode()
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.1)
    await gateway.idle()  # it ends although nobody reads
    writer.transport.abort()
    await assert_charges_match_bills(gateway, client)
    assert gateway.billed_usd() > 0
    del reader


@pytest.mark.parametrize("tuned", [{"relay": {"write_timeout_s": 12.5}}])
async def test_the_kernel_drops_a_client_that_acknowledges_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row client-4, for every kind of response."""
    timeouts = []
    connection_made = ClientConnection.connection_made

    def watched(connection: ClientConnection, transport: asyncio.Transport) -> None:
        connection_made(connection, transport)
        sock = transport.get_extra_info("socket")
        timeouts.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

    monkeypatch.setattr(ClientConnection, "connection_made", watched)
    await gateway.session.get(f"{gateway.url}/nothing")
    assert timeouts == [12_500]


@pytest.mark.parametrize("tuned", [{"relay": {"write_timeout_s": 1}}])
async def test_a_client_that_reads_no_error_responses_is_dropped(gateway: Gateway) -> None:
    """Row client-4: error responses need no key."""
    parts = urlsplit(gateway.url)
    requests = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" * 200
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect((parts.hostname, parts.port))
        client.setblocking(False)
        async with asyncio.timeout(30):
            while True:
                try:
                    client.send(requests)
                except BlockingIOError:
                    await asyncio.sleep(0.05)
                except ConnectionError:
                    return


async def test_a_client_that_does_not_read_the_last_bytes_is_dropped() -> None:
    """The end of the body is written together with them."""
    writer = SimpleNamespace(drain=asyncio.Event().wait)
    request = make_mocked_request("POST", "/", writer=writer)
    limits = StreamLimits(heartbeat_s=1, buffer_bytes=1, write_timeout_s=0.05, disconnected_drain_s=1, disconnected_drain_bytes=1)
    stream = EventStream(request, asyncio.get_running_loop().create_future(), {}, limits)
    stream._connection = SimpleNamespace(writing_paused=True)  # type: ignore[assignment]
    async with asyncio.timeout(5):
        await stream.finish()
    request.transport.abort.assert_called_once_with()  # type: ignore[union-attr]


@pytest.mark.parametrize("tuned", [{"relay": {"disconnected_drain_s": 0.05}}])
async def test_disconnected_clients_leave_no_tasks_behind(gateway: Gateway) -> None:
    gateway.simulator.word_s = 0.05
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    for _ in range(3):
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            await response.content.readany()
            response.close()
    await gateway.idle()
    await asyncio.sleep(0.05)
    gc.collect()
    assert [task for task in asyncio.all_tasks() if "_ping" in repr(task.get_coro())] == []


async def test_an_unauthenticated_client_learns_nothing_from_validation_errors(gateway: Gateway) -> None:
    client = await gateway.client()
    await UserRepository(gateway.database).set_active(client.account_id, False)
    for key in (client.key, make_key(client.account_id), make_key(AccountId(10**12))):
        async with gateway.session.post(gateway.chat_url, json={}, headers={"Authorization": f"Bearer {key}"}) as response:
            assert (response.status, await response.json()) == (401, {"error": "Invalid API key or inactive user"})


async def test_an_unauthenticated_request_is_not_logged_under_an_account(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    client = await gateway.client()
    caplog.set_level(logging.INFO, "gptutor")
    forged = {"Authorization": f"Bearer {make_key(client.account_id)}"}
    async with gateway.session.post(
        gateway.chat_url, json={"messages": [{"role": "user", "content": "x"}]}, headers=forged
    ) as response:
        assert response.status == 401
    await gateway.idle()
    assert [record.getMessage() for record in caplog.records] == ["HTTP POST /v1/chat/completions 401"]


async def test_concurrent_rotations_leave_one_valid_key(gateway: Gateway) -> None:
    client = await gateway.client()
    keys = KeyRing(gateway.database, VAULT)
    await asyncio.gather(*(keys.renew(client.account_id) for _ in range(6)))
    assert [key.revoked_at for key in await keys.list(client.account_id)].count(None) == 1


@pytest.mark.parametrize(
    ("model", "fallbacks"),
    [("google/gemini-2.5-flash-lite", ["anthropic/claude-3-haiku"]), ("anthropic/claude-3-haiku:nitro", [])],
)
async def test_a_fallback_or_a_variant_cannot_take_a_balance_below_zero(
    gateway: Gateway, model: str, fallbacks: list[str]
) -> None:
    client = await gateway.client("1.01")
    body = {"messages": [{"role": "user", "content": "Hello"}], "model": model, "models": fallbacks}
    async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
        await response.read()
    await gateway.idle()
    (record,) = gateway.simulator.billing.records.values()
    assert "max_tokens" in json.loads(record.body)
    assert await client.balance() >= 0
