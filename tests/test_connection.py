"""The connection to OpenRouter, byte by byte: strict framing, back-pressure, reuse, and TLS (contract A3, F3)."""

import asyncio
import contextlib
import gc
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from gptutor.openrouter.connection import BUFFER_BYTES_MAX, UpstreamConnection
from gptutor.openrouter.connection_pool import ConnectionPool, Endpoint, pooled
from gptutor.openrouter.errors import PoolExhausted, UpstreamError
from gptutor.openrouter.response import UpstreamResponse
from gptutor.openrouter.response_parser import HEADERS_BYTES_MAX

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@asynccontextmanager
async def server(talk: Talk, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    talks: set[asyncio.Task[None]] = set()
    over = asyncio.Event()

    async def tolerant(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())  # type: ignore[arg-type]
        talking, ending = asyncio.ensure_future(talk(reader, writer)), asyncio.ensure_future(over.wait())
        await asyncio.wait({talking, ending}, return_when=asyncio.FIRST_COMPLETED)
        talking.cancel()
        ending.cancel()
        await asyncio.gather(talking, ending, return_exceptions=True)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(tolerant, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        over.set()
        await asyncio.gather(*talks)


def saying(*answers: bytes) -> Talk:
    """Answers the requests one after the other with these bytes, and then closes the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"{}")
            writer.write(answer)
            await writer.drain()
        await asyncio.sleep(0.05)

    return talk


def torrent(pieces: int, sent: list[int] | None = None) -> Talk:
    """Sends so many pieces of 32 KB, as fast as they are read; each piece sent is recorded in `sent`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(pieces):
            writer.write(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
            await writer.drain()
            if sent is not None:
                sent.append(0x8000)
        writer.write(b"0\r\n\r\n")

    return talk


@asynccontextmanager
async def pool_to(
    port: int, *, scheme: str = "http", connections_max: int = 2, connect_s: float = 2
) -> AsyncIterator[ConnectionPool]:
    async with pooled(f"{scheme}://localhost:{port}/v1", "", connections_max=connections_max, connect_s=connect_s) as (pool, _):
        yield pool


async def request(pool: ConnectionPool, timeout_s: float = 2) -> tuple[UpstreamConnection, bytes]:
    connection = pool.acquire_idle() or await pool.acquire()
    try:
        await connection.send_request(REQUEST, b"{}", timeout_s)
        return connection, await connection.read_body(timeout_s)
    finally:
        pool.release(connection)


def ok(body: bytes, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), extra, body)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (ok(b"abc"), b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX-Trailer: 1\r\n\r\n", b"abc"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nX-Generation-Id: no\r\n\r\n" + ok(b"abc"), b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nof an old server", b"of an old server"),
    ],
)
async def test_a_valid_response_is_read(answer: bytes, body: bytes) -> None:
    async with server(saying(answer)) as port, pool_to(port) as pool:
        connection, read = await request(pool)
        assert read == body
        assert "x-generation-id" not in connection.headers


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA b: c\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
    ],
)
async def test_a_malformed_response_breaks_the_connection(answer: bytes) -> None:
    async with server(saying(answer)) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await request(pool)
        assert raised.value.failure.kind == "broken"
        assert pool.acquire_idle() is None


async def test_a_response_that_breaks_in_its_first_packet_has_its_generation_id() -> None:
    """The headers arrived: the purchase can be looked up."""
    answer = b"HTTP/1.1 200 OK\r\nX-Generation-Id: gen-1\r\nTransfer-Encoding: chunked\r\n\r\nnonsense"
    async with server(saying(answer)) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await request(pool)
        assert (raised.value.failure.kind, raised.value.failure.generation_id) == ("broken", "gen-1")


async def test_endless_headers_break_the_connection() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(HEADERS_BYTES_MAX // 50):
            writer.write(b"X-Header-%06d: %b\r\n" % (number, b"x" * 40))
            await writer.drain()
        await asyncio.sleep(5)

    async with server(talk) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await request(pool)
        assert raised.value.failure.kind == "broken"


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b"\x00" * 10])
@pytest.mark.parametrize("pause_s", [0, 0.05])
async def test_data_without_a_request_reaches_no_client(more: bytes, pause_s: float) -> None:
    """Data after the end of a response must not become the response to the next request."""
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"{}")
        writer.write(ok(b"mine") if pause_s else ok(b"mine") + more)
        await asyncio.sleep(pause_s)
        writer.write(more if pause_s else b"")
        await asyncio.sleep(1)

    async with server(talk) as port, pool_to(port) as pool:
        assert (await request(pool))[1] == b"mine"
        await asyncio.sleep(2 * pause_s)
        assert (await request(pool))[1] == b"mine"
        assert connections == 2


async def test_a_connection_is_reused_while_its_responses_are_complete_and_allow_it() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for answer in (ok(b"1"), ok(b"2"), ok(b"3", b"Connection: close\r\n"), ok(b"never")):
            await reader.readuntil(b"{}")
            writer.write(answer)

    async with server(talk) as port, pool_to(port) as pool:
        assert [(await request(pool))[1] for _ in range(4)] == [b"1", b"2", b"3", b"1"]
        assert connections == 2


async def test_an_idle_connection_that_was_closed_is_not_used() -> None:
    async with server(saying(ok(b"1"))) as port, pool_to(port) as pool:
        assert (await request(pool))[1] == b"1"
        await asyncio.sleep(0.2)  # the server closes the connection
        assert pool.acquire_idle() is None
        assert (await request(pool))[1] == b"1"


async def test_a_slow_consumer_pauses_the_reading_and_memory_is_bounded() -> None:
    sent: list[int] = []
    async with server(torrent(1000, sent)) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        await connection.send_request(REQUEST, b"{}", 2)
        await asyncio.sleep(0.3)
        assert sum(sent) < 20_000_000
        assert sum(map(len, connection._buffer)) < BUFFER_BYTES_MAX + 300_000
        received = 0

        def consume(piece: bytes) -> None:
            nonlocal received
            received += len(piece)
            if received < 100_000:
                connection.pause_reading()
                asyncio.get_running_loop().call_later(0.05, connection.resume_reading)

        await connection.stream_body(consume)
        assert received == 1000 * 0x8000
        pool.release(connection)


async def test_an_error_of_the_consumer_ends_the_response_and_is_raised() -> None:
    async with server(saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        await connection.send_request(REQUEST, b"{}", 2)

        def consume(piece: bytes) -> None:
            raise LookupError

        with pytest.raises(LookupError):
            await connection.stream_body(consume)
        pool.release(connection)
        assert pool.acquire_idle() is None


async def test_a_large_request_can_be_rejected_before_its_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.5)

    async with server(talk) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        body = b"x" * 50_000_000
        await connection.send_request(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body, 5)
        assert connection.status == 413
        pool.release(connection)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("reads_on", [True, False])
async def test_a_connection_with_a_partly_sent_request_is_not_reused(kept: bool, reads_on: bool) -> None:
    """The next request would be read as the rest of it. The error is returned at once, even if the server reads no more."""
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        extra = b"" if kept else b"Connection: close\r\n"
        writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n%b\r\n{}" % extra)
        while reads_on and await reader.read(65536):
            pass
        await asyncio.sleep(5)

    async with server(talk) as port, pool_to(port) as pool:
        for number in (1, 2):
            connection = pool.acquire_idle() or await pool.acquire()
            body = b"x" * 30_000_000
            async with asyncio.timeout(3):
                await connection.send_request(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body, 10)
            assert connection.status == 429
            assert await connection.read_body(1) == b"{}"
            pool.release(connection)
            assert connections == number


async def test_an_idle_connection_keeps_no_reference_to_its_last_response() -> None:
    class Referent:
        pass

    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    async with server(saying(answer, answer)) as port, pool_to(port) as pool:
        referent = Referent()
        left = weakref.ref(referent)
        gc.collect()
        gc.disable()
        try:
            connection = await pool.acquire()
            await connection.send_request(REQUEST, b"{}", 2)
            response = UpstreamResponse(connection, pool.release, 5, 5)
            await response.stream_body(lambda piece, referent=referent: None, lambda referent=referent: None, 60)
            response.close()
            response.close()
            del response, referent
            assert left() is None
            assert pool.acquire_idle() is connection
            assert pool.acquire_idle() is None
        finally:
            gc.enable()
        pool.release(connection)


async def test_body_bytes_before_malformed_framing_are_delivered_before_the_error() -> None:
    """Row upstream-16: the bill may be in it, however the bytes were cut."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    async with server(saying(answer)) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        await connection.send_request(REQUEST, b"{}", 2)
        assert connection.status == 200
        assert await connection.wait_for_body(2)
        received = bytearray()
        with pytest.raises(UpstreamError, match="broken"):
            await connection.stream_body(received.extend, 2)
        assert received == b"abc"
        pool.release(connection)


async def test_a_closed_response_cannot_stop_the_next_one_of_its_connection() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"
    async with server(saying(answer, answer)) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        await connection.send_request(REQUEST, b"{}", 2)
        response = UpstreamResponse(connection, pool.release, 5, 5)
        assert await response.read_body(2) == b"a"
        response.close()
        assert pool.acquire_idle() is connection
        requesting = asyncio.create_task(connection.send_request(REQUEST, b"{}", 2))
        await asyncio.sleep(0)
        response.finish_early()
        await requesting
        assert await connection.read_body(2) == b"a"
        pool.release(connection)


async def test_a_pause_lasts_until_it_is_resumed_and_is_no_silence_of_upstream() -> None:
    async with server(torrent(300)) as port, pool_to(port) as pool:
        connection = await pool.acquire()
        await connection.send_request(REQUEST, b"{}", 2)
        response = UpstreamResponse(connection, pool.release, 0.3, 0.3)
        assert await response.wait_for_body(1)
        connection.pause_reading()
        received = bytearray()
        streaming = asyncio.create_task(response.stream_body(received.extend, lambda: None, 60))
        await asyncio.sleep(0.5)
        assert len(received) < 3_000_000
        assert not streaming.done()  # the pause is not counted as silence
        connection.resume_reading()
        await streaming
        assert len(received) == 300 * 0x8000
        response.close()


async def test_the_pool_opens_at_most_connections_max_and_queues_the_rest() -> None:
    most = now = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        try:
            while True:
                await reader.readuntil(b"{}")
                await asyncio.sleep(0.02)
                writer.write(ok(b"x"))
        finally:
            now -= 1

    async with server(talk) as port, pool_to(port, connections_max=3) as pool:
        answers = await asyncio.gather(*(request(pool) for _ in range(30)))
        assert {body for _, body in answers} == {b"x"}
        assert most == 3


async def test_a_waiter_that_times_out_or_is_cancelled_takes_no_connection() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"{}")
            await asyncio.sleep(0.3)
            writer.write(ok(b"x"))

    async with server(talk) as port, pool_to(port, connections_max=1, connect_s=0.15) as pool:
        first = asyncio.create_task(request(pool))
        await asyncio.sleep(0.05)
        cancelled = asyncio.create_task(request(pool))
        with pytest.raises(PoolExhausted):
            await request(pool)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert (await first)[1] == b"x"
        assert (await request(pool))[1] == b"x"


async def test_a_tls_handshake_resumes_the_last_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    reused: list[bool] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reused.append(writer.get_extra_info("ssl_object").session_reused)
        await reader.readuntil(b"{}")
        writer.write(ok(b"x", b"Connection: close\r\n") if len(reused) > 1 else ok(b"x"))
        await writer.drain()
        await asyncio.sleep(0.05)

    async with server(talk, context) as port, pool_to(port, scheme="https") as pool:
        for _ in range(3):
            assert (await request(pool))[1] == b"x"
            await asyncio.sleep(0.2)
    assert reused[0] is False
    assert reused[1:] == [True, True]


@pytest.mark.parametrize(
    ("url", "host_header", "authority", "path"),
    [
        ("https://openrouter.ai/api/v1", "openrouter.ai", "openrouter.ai:443", "/api/v1"),
        ("https://openrouter.ai:8443/api/v1/", "openrouter.ai:8443", "openrouter.ai:8443", "/api/v1"),
        ("http://127.0.0.1:80", "127.0.0.1", "127.0.0.1:80", ""),
        ("http://[::1]:8080/x", "[::1]:8080", "[::1]:8080", "/x"),
        ("https://пример.рф/v1", "xn--e1afmkfd.xn--p1ai", "xn--e1afmkfd.xn--p1ai:443", "/v1"),
    ],
)
def test_an_endpoint_is_parsed_from_a_url(url: str, host_header: str, authority: str, path: str) -> None:
    end = Endpoint.parse(url)
    assert (end.host_header, end.authority, end.path) == (host_header, authority, path)


@pytest.mark.parametrize("url", ["openrouter.ai", "ftp://x", "http://", "http://x:99999"])
def test_an_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Endpoint.parse(url)
