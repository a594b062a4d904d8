"""The listeners beside the public one: of what they receive, no bytes reach the log (contract F1). No listener names its software."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from gptutor.config.schema import Config, DocsSettings
from gptutor.server.listener import listening_on
from gptutor.server.runners import connection_factory
from gptutor.telemetry.metrics_page import build_metrics
from gptutor.web.site import documentation
from tests.support.gateway import Gateway

SECRET = b"sk-user-1-secret"


@asynccontextmanager
async def metrics() -> AsyncIterator[str]:
    async with listening_on(web.AppRunner(build_metrics(), access_log=None), "127.0.0.1", 0, connection_factory(Config())) as url:
        yield url


LISTENERS = {
    "docs": lambda: documentation(Config(docs=DocsSettings(port=0))),
    "metrics": metrics,
}


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + SECRET + b"\x00\r\n\r\n",
        SECRET + b"\r\n\r\n",
        b"GET /" + SECRET + b"\x01 HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" + SECRET + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + SECRET + b"\r\n",
        b"GET /?key=" + SECRET + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
async def test_malformed_bytes_are_not_logged(listener: str, request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with LISTENERS[listener]() as url:
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
        try:
            writer.write(request_bytes)
            async with asyncio.timeout(5):
                answer = await reader.read(65_536)
        finally:
            writer.close()
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4", b"HTTP/1.1 302")) or not answer
        assert b"secret" not in answer.partition(b"\r\n\r\n")[2]
    assert "secret" not in caplog.text
    assert "secret" not in "".join(str(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize(
    "request_bytes", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00\r\n\r\n"]
)
@pytest.mark.parametrize("listener", LISTENERS)
async def test_no_listener_names_its_software(listener: str, request_bytes: bytes) -> None:
    async with LISTENERS[listener]() as url:
        await assert_names_no_software(url, request_bytes)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nExpect: a-miracle\r\n\r\n",
        b"\x00\r\n\r\n",
    ],
)
async def test_the_gateway_does_not_name_its_software(gateway: Gateway, request_bytes: bytes) -> None:
    await assert_names_no_software(gateway.url, request_bytes)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_does_not_name_our_software(gateway: Gateway, stream: bool) -> None:
    response, _ = await gateway.chat(await gateway.client(), stream=stream)
    assert response.status == 200
    assert not response.headers.get("Server")


async def assert_names_no_software(url: str, request_bytes: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    try:
        writer.write(request_bytes)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
    assert head.startswith(b"HTTP/1.")
    assert b"aiohttp" not in head
    assert b"Python" not in head
    assert b"\r\nServer: \r\n" in head or b"\r\nServer:" not in head
