"""The headers of relayed responses, which the gateway serializes itself (contract A1, A5, A7)."""

import asyncio
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from gptutor.api.chat.event_stream import EventStream, StreamLimits
from gptutor.http.connection import ClientConnection
from gptutor.http.unbuffered_response import JOINED_BYTES_MAX, CompleteResponse
from gptutor.openrouter.connection import UpstreamConnection
from tests.support.gateway import Gateway
from tests.support.wire import post, raw


def fields_of(answer: bytes) -> tuple[bytes, dict[str, str]]:
    """The status line, and the headers by lower-case name, each of which occurs once."""
    first, *lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
    pairs = [line.decode().split(": ", 1) for line in lines]
    fields = {name.lower(): value for name, value in pairs}
    assert len(fields) == len(pairs)
    return first, fields


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("version", "requested", "answered"),
    [
        ("1.1", "", None),
        ("1.1", "Connection: close\r\n", "close"),
        ("1.0", "", None),
        ("1.0", "Connection: keep-alive\r\n", "keep-alive"),
    ],
)
async def test_the_connection_header_is_correct(
    gateway: Gateway, version: str, requested: str, answered: str | None, stream: bool
) -> None:
    client = await gateway.client()
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(post(client, version=version, extra=requested, stream=stream))
    async with asyncio.timeout(10):
        first, fields = fields_of(head := await reader.readuntil(b"\r\n\r\n"))
        assert first == f"HTTP/{version} 200 OK".encode()
        assert head.endswith(b"\r\n\r\n")
        assert {"date", "content-type", "x-request-id", "x-generation-id"} <= fields.keys()
        is_chunked = stream and version == "1.1"
        assert fields.get("transfer-encoding") == ("chunked" if is_chunked else None)
        assert ("content-length" in fields) is (not stream)
        is_kept = (answered == "keep-alive" or (version == "1.1" and answered is None)) and (is_chunked or not stream)
        assert fields.get("connection") == (answered if is_kept or version == "1.1" else None)
        if is_chunked:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        elif not stream:
            await reader.readexactly(int(fields["content-length"]))
        if is_kept:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        else:
            assert (await reader.read()).endswith(b"data: [DONE]\n\n" if stream and not is_chunked else b"")
    writer.transport.abort()
    await gateway.idle()


async def test_a_streams_headers_leave_with_its_first_bytes() -> None:
    transport = Mock(spec=asyncio.Transport, **{"is_closing.return_value": False})
    connection = Mock(spec=ClientConnection, transport=transport, writing_paused=False)
    limits = StreamLimits(heartbeat_s=1, buffer_bytes=1, write_timeout_s=1, disconnected_drain_s=1, disconnected_drain_bytes=1)
    request = make_mocked_request("POST", "/", protocol=connection, transport=transport)
    stream = EventStream(request, asyncio.get_running_loop().create_future(), {}, limits)
    await stream.start(Mock(spec=UpstreamConnection))
    assert not stream.has_started
    stream.write(b"data: 1\n\n")
    stream.write(b"data: 2\n\n", is_last=True)
    stream.write(b": a heartbeat\n\n")
    await stream.finish()
    assert stream.has_started
    first, second = (call.args[0] for call in transport.write.call_args_list)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n9\r\ndata: 1\n\n\r\n")
    assert second == b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_response_without_a_body_does_not_begin_the_next_one(scripted: Any, kind: str) -> None:
    plays, gateway = scripted

    async def play(request: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Content-Type": kind})

    plays.append(play)
    client = await gateway.client()
    answers = await raw(
        gateway, post(client, extra="", stream=True) + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    head, _, rest = answers.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204")
    assert not {"content-length", "transfer-encoding"} & fields_of(head)[1].keys()
    assert rest.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\rb"])
async def test_a_header_with_a_line_break_is_rejected(value: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        await CompleteResponse(b"{}", status=200, headers={"X-Generation-Id": value}).serialize_headers(
            make_mocked_request("POST", "/"), 2
        )


@pytest.mark.parametrize("size", [0, JOINED_BYTES_MAX, JOINED_BYTES_MAX + 1, 3_000_000])
async def test_a_body_of_any_size_arrives(scripted: Any, size: int) -> None:
    plays, gateway = scripted
    document = b"x" * size

    async def play(request: web.Request) -> web.StreamResponse:
        return web.Response(body=document, content_type="application/json")

    plays.append(play)
    response, received = await gateway.chat(await gateway.client())
    assert (response.status, response.headers["Content-Length"]) == (200, str(size))
    assert received == document
