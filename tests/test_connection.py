"""The connection to OpenRouter, byte by byte: framing that must be strict, back-pressure, reuse, and TLS (contract A3, F3)."""

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

from gptutor.openrouter.body_buffer import KEPT_BYTES_MAX
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.connection_pool import ConnectionPool, Endpoint, pooled
from gptutor.openrouter.errors import PoolExhausted, UpstreamError
from gptutor.openrouter.response import UpstreamResponse
from gptutor.openrouter.response_parser import HEAD_BYTES_MAX

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ASK = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


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
    """Answers one request after the other with these bytes, and then hangs up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"{}")
            writer.write(answer)
            await writer.drain()
        await asyncio.sleep(0.05)

    return talk


def torrent(pieces: int, sent: list[int] | None = None) -> Talk:
    """So many pieces of 32 KB, as fast as they are taken; each that has gone is noted in `sent`."""

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


async def asked(pool: ConnectionPool, within_s: float = 2) -> tuple[UpstreamConnection, bytes]:
    connection = pool.free() or await pool.connect()
    try:
        await connection.ask(ASK, b"{}", within_s)
        return connection, await connection.read(within_s)
    finally:
        pool.give_back(connection)


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
async def test_what_is_an_answer_is_read(answer: bytes, body: bytes) -> None:
    async with server(saying(answer)) as port, pool_to(port) as pool:
        connection, read = await asked(pool)
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
async def test_what_is_none_breaks_the_connection(answer: bytes) -> None:
    async with server(saying(answer)) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await asked(pool)
        assert raised.value.failure.kind == "broken"
        assert pool.free() is None


async def test_an_answer_that_breaks_in_its_first_packet_has_its_name() -> None:
    """The head was there: what was bought can be looked up."""
    answer = b"HTTP/1.1 200 OK\r\nX-Generation-Id: gen-1\r\nTransfer-Encoding: chunked\r\n\r\nnonsense"
    async with server(saying(answer)) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await asked(pool)
        assert (raised.value.failure.kind, raised.value.failure.generation_id) == ("broken", "gen-1")


async def test_a_head_without_an_end_is_not_kept() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(HEAD_BYTES_MAX // 50):
            writer.write(b"X-Header-%06d: %b\r\n" % (number, b"x" * 40))
            await writer.drain()
        await asyncio.sleep(5)

    async with server(talk) as port, pool_to(port) as pool:
        with pytest.raises(UpstreamError) as raised:
            await asked(pool)
        assert raised.value.failure.kind == "broken"


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b"\x00" * 10])
@pytest.mark.parametrize("pause_s", [0, 0.05])
async def test_an_answer_that_nobody_asked_for_reaches_nobody(more: bytes, pause_s: float) -> None:
    """Whoever gets to speak after an answer's end must not speak to the next who asks."""
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
        assert (await asked(pool))[1] == b"mine"
        await asyncio.sleep(2 * pause_s)
        assert (await asked(pool))[1] == b"mine"
        assert connections == 2


async def test_a_connection_is_kept_while_its_answers_end_as_they_said() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for answer in (ok(b"1"), ok(b"2"), ok(b"3", b"Connection: close\r\n"), ok(b"never")):
            await reader.readuntil(b"{}")
            writer.write(answer)

    async with server(talk) as port, pool_to(port) as pool:
        assert [(await asked(pool))[1] for _ in range(4)] == [b"1", b"2", b"3", b"1"]
        assert connections == 2


async def test_one_that_was_closed_meanwhile_is_not_used() -> None:
    async with server(saying(ok(b"1"))) as port, pool_to(port) as pool:
        assert (await asked(pool))[1] == b"1"
        await asyncio.sleep(0.2)  # the server hangs up
        assert pool.free() is None
        assert (await asked(pool))[1] == b"1"


async def test_whoever_does_not_take_is_waited_for_in_the_kernel_and_not_in_memory() -> None:
    sent: list[int] = []
    async with server(torrent(1000, sent)) as port, pool_to(port) as pool:
        connection = await pool.connect()
        await connection.ask(ASK, b"{}", 2)
        await asyncio.sleep(0.3)
        assert sum(sent) < 20_000_000
        assert sum(map(len, connection._intake._kept)) < KEPT_BYTES_MAX + 300_000
        taken = 0

        def take(piece: bytes) -> None:
            nonlocal taken
            taken += len(piece)
            if taken < 100_000:
                connection.pause()
                asyncio.get_running_loop().call_later(0.05, connection.resume)

        await connection.take(take)
        assert taken == 1000 * 0x8000
        pool.give_back(connection)


async def test_a_taker_that_fails_ends_it_with_his_own_error() -> None:
    async with server(saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")) as port, pool_to(port) as pool:
        connection = await pool.connect()
        await connection.ask(ASK, b"{}", 2)

        def take(piece: bytes) -> None:
            raise LookupError

        with pytest.raises(LookupError):
            await connection.take(take)
        pool.give_back(connection)
        assert pool.free() is None


async def test_a_large_question_is_refused_before_its_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.5)

    async with server(talk) as port, pool_to(port) as pool:
        connection = await pool.connect()
        body = b"x" * 50_000_000
        await connection.ask(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body, 5)
        assert connection.status == 413
        pool.give_back(connection)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("reads_on", [True, False])
async def test_a_question_that_was_not_sent_to_its_end_ends_its_connection(kept: bool, reads_on: bool) -> None:
    """Whoever came next on it would speak into the middle of it. The refusal is told at once, also when nobody reads any more."""
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
            connection = pool.free() or await pool.connect()
            body = b"x" * 30_000_000
            async with asyncio.timeout(3):
                await connection.ask(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body, 10)
            assert connection.status == 429
            assert await connection.read(1) == b"{}"
            pool.give_back(connection)
            assert connections == number


async def test_nothing_of_an_answer_stays_with_its_connection() -> None:
    class Known:
        pass

    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    async with server(saying(answer, answer)) as port, pool_to(port) as pool:
        known = Known()
        left = weakref.ref(known)
        gc.collect()
        gc.disable()
        try:
            connection = await pool.connect()
            await connection.ask(ASK, b"{}", 2)
            reply = UpstreamResponse(connection, pool.give_back, 5, 5)
            await reply.pump(lambda piece, known=known: None, lambda known=known: None, 60)  # type: ignore[misc]
            reply.close()
            reply.close()
            del reply, known
            assert left() is None
            assert pool.free() is connection
            assert pool.free() is None
        finally:
            gc.enable()
        pool.give_back(connection)


async def test_what_came_before_the_framing_broke_passes_before_that_is_told() -> None:
    """Row upstream-16: the bill may be in it, however the bytes were cut."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    async with server(saying(answer)) as port, pool_to(port) as pool:
        connection = await pool.connect()
        await connection.ask(ASK, b"{}", 2)
        assert connection.status == 200
        assert await connection.heard(2)
        taken = bytearray()
        with pytest.raises(UpstreamError, match="broken"):
            await connection.take(taken.extend, 2)
        assert taken == b"abc"
        pool.give_back(connection)


async def test_an_answer_that_is_closed_stops_nobody_elses() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"
    async with server(saying(answer, answer)) as port, pool_to(port) as pool:
        connection = await pool.connect()
        await connection.ask(ASK, b"{}", 2)
        reply = UpstreamResponse(connection, pool.give_back, 5, 5)
        assert await reply.read(2) == b"a"
        reply.close()
        assert pool.free() is connection
        asking = asyncio.create_task(connection.ask(ASK, b"{}", 2))
        await asyncio.sleep(0)
        reply.stop()
        await asking
        assert await connection.read(2) == b"a"
        pool.give_back(connection)


async def test_a_pause_of_the_takers_lasts_until_he_ends_it() -> None:
    async with server(torrent(300)) as port, pool_to(port) as pool:
        connection = await pool.connect()
        await connection.ask(ASK, b"{}", 2)
        reply = UpstreamResponse(connection, pool.give_back, 0.3, 0.3)
        assert await reply.heard(1)
        reply.pause()
        taken = bytearray()
        pumping = asyncio.create_task(reply.pump(taken.extend, lambda: None, 60))
        await asyncio.sleep(0.5)
        assert len(taken) < 3_000_000
        assert not pumping.done()  # it is not OpenRouter who is silent
        reply.resume()
        await pumping
        assert len(taken) == 300 * 0x8000
        reply.close()


async def test_so_many_connections_and_no_more_and_a_line_for_the_rest() -> None:
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
        answers = await asyncio.gather(*(asked(pool) for _ in range(30)))
        assert {body for _, body in answers} == {b"x"}
        assert most == 3


async def test_whoever_waits_in_line_too_long_or_leaves_it_takes_nobodys_place() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"{}")
            await asyncio.sleep(0.3)
            writer.write(ok(b"x"))

    async with server(talk) as port, pool_to(port, connections_max=1, connect_s=0.15) as pool:
        first = asyncio.create_task(asked(pool))
        await asyncio.sleep(0.05)
        leaver = asyncio.create_task(asked(pool))
        with pytest.raises(PoolExhausted):
            await asked(pool)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert (await first)[1] == b"x"
        assert (await asked(pool))[1] == b"x"


async def test_a_handshake_begins_with_the_session_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            assert (await asked(pool))[1] == b"x"
            await asyncio.sleep(0.2)
    assert reused[0] is False
    assert reused[1:] == [True, True]


@pytest.mark.parametrize(
    ("url", "named", "with_port", "path"),
    [
        ("https://openrouter.ai/api/v1", "openrouter.ai", "openrouter.ai:443", "/api/v1"),
        ("https://openrouter.ai:8443/api/v1/", "openrouter.ai:8443", "openrouter.ai:8443", "/api/v1"),
        ("http://127.0.0.1:80", "127.0.0.1", "127.0.0.1:80", ""),
        ("http://[::1]:8080/x", "[::1]:8080", "[::1]:8080", "/x"),
        ("https://пример.рф/v1", "xn--e1afmkfd.xn--p1ai", "xn--e1afmkfd.xn--p1ai:443", "/v1"),
    ],
)
def test_an_end_has_its_names(url: str, named: str, with_port: str, path: str) -> None:
    end = Endpoint.of(url)
    assert (end.named, end.with_port, end.path) == (named, with_port, path)


@pytest.mark.parametrize("url", ["openrouter.ai", "ftp://x", "http://", "http://x:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Endpoint.of(url)
