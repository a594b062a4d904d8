"""Any bytes, split anyhow and sent at any speed, pass unchanged, and the bill in them is the one that is charged
(contract A2, A3, B7, C1, C6; rows upstream-9, -10, -11, -13, -15, -16, money-9 to money-11).

Upstream is a bare socket that sends prepared bytes: no HTTP library shapes its chunks or its writes.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptutor.database import pool
from gptutor.money.bookings import Bookings
from gptutor.money.invariants import check
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.service import UpstreamLimits, connected
from gptutor.simulator.server import Simulator
from tests.support.gateway import Gateway, config_for, gateway_on

EXAMPLES = 200
RATE = Decimal(90)
NANO = Decimal("1e-9")
COST_MAX = Decimal(100_000)


@dataclass(frozen=True)
class Play:
    """One response: its body, and how the body is split on the wire."""

    stream: bool
    body: bytes
    chunks: tuple[int, ...] = ()
    """Where the transfer coding splits the body."""
    writes: tuple[int, ...] = ()
    """Where the socket's writes split the coded body."""
    pauses_ms: tuple[int, ...] = ()
    generation_id: bytes = b""
    """In the headers."""
    breaks_off: bool = False
    """Whether the connection ends before the transfer coding does."""


# -- an independent parser, by the specification of event streams


def events(stream: bytes) -> Iterator[bytes]:
    """The data of each event. An event that lacks only its blank line counts as well."""
    data: list[bytes] = []
    for line in [*re.split(rb"\r\n|\n|\r", stream), b""]:
        if not line and data:
            yield b"\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line.removeprefix(b"data:").removeprefix(b" "))


def parsed(document: bytes) -> Any:
    """A JSON value with exact numbers; None for invalid JSON."""
    try:
        return json.loads(document.decode(), parse_float=Decimal, parse_int=Decimal, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def cost_of(document: Any) -> Decimal | None:
    usage = document.get("usage") if isinstance(document, dict) else None
    cost = usage.get("cost") if isinstance(usage, dict) else None
    return cost if isinstance(cost, Decimal) and 0 <= cost < COST_MAX else None


def true_cost(play: Play) -> Decimal | None:
    documents = [parsed(data) for data in events(play.body)] if play.stream else [parsed(play.body)]
    costs = [cost for document in documents if (cost := cost_of(document)) is not None]
    return costs[-1] if costs else None


def is_ended(stream: bytes) -> bool:
    """Whether the stream itself states its end."""
    for data in events(stream):
        document = parsed(data)
        if data.strip() == b"[DONE]" or (isinstance(document, dict) and document.get("error") is not None):
            return True
    return False


# -- what upstream may send

line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
costs = st.decimals(min_value=0, max_value=50, places=12)
spelled_costs = st.one_of(
    costs.map(str), st.integers(0, 9).map(str), st.sampled_from(["0.10", "1E-3", "2.5e-05", "0", "0.0", "1e1", "12e+0"])
)
texts = st.one_of(
    st.text(alphabet='aя🙂"\\{}:,\n\r\u2028\x00', max_size=30),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").decode()),
    st.sampled_from(
        [
            '{"usage":{"cost":7}}',
            'data: {"usage":{"cost":7}}\n\n',
            "data: [DONE]\n\n",
            '"usage"',
            '\\"usage\\":{\\"cost\\":7}',
            "",
        ]
    ),
    st.integers(1, 70_000).map(lambda size: "ы" * size),
)
garbage = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"\xff\xfe\x00",
            b"\xc3",
            b"\xf0\x9f\x99",
            b"data",
            b"data:",
            b"event: x",
            b"id: 5",
            b"retry: 1",
            b'data: {"usage":',
            b"\r",
        ]
    ),
)
others = st.sampled_from(
    [
        '{"usage":{"cost":null}}',
        '{"usage":{"cost":-1}}',
        '{"usage":null}',
        '{"usage":{}}',
        '{"x":{"usage":{"cost":8}}}',
        "[]",
        "5",
    ]
)


@st.composite
def event_parts(draw: st.DrawFn, kind: str, end: bytes) -> bytes:
    if kind == "comment":
        return b": OPENROUTER PROCESSING" + end + end
    if kind == "garbage":
        return draw(garbage) + draw(st.sampled_from([b"", end, end + end]))
    if kind == "other":
        return b"data: " + draw(others).encode() + end + end
    if kind == "error":
        return b'data: {"error":{"code":502,"message":"x"},"choices":[]}' + end + end
    document = json.dumps(
        {"id": "gen-1", "choices": [{"delta": {"content": draw(texts)}}]}, ensure_ascii=draw(st.booleans())
    ).encode()
    if kind == "bill":
        usage = draw(st.sampled_from(["%s", '%s, "is_byok": false', '%s, "prompt_tokens": 3'])) % draw(spelled_costs)
        seam = draw(st.sampled_from([b" ", end + b"data: ", end + b"data:", end + b": between" + end + b"data: "]))
        document = document[:-1] + b',"usage":' + seam + b'{"cost":' + usage.encode() + b"}}"
    return draw(st.sampled_from([b"data: ", b"data:"])) + document + end + end


@st.composite
def event_streams(draw: st.DrawFn) -> bytes:
    end = draw(line_ends)
    kinds = draw(st.lists(st.sampled_from(["text", "text", "comment", "garbage", "other", "bill", "bill"]), max_size=8))
    kinds += draw(st.sampled_from([[], ["bill"], ["bill"], ["error"]]))
    stream = b"".join(draw(event_parts(kind, end)) for kind in kinds)
    return stream + draw(
        st.sampled_from([b"data: [DONE]" + end + end, b"data: [DONE]" + end + end, b"data: [DONE]", b"", b"data: "])
    )


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["id", "usage", "я", "error"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    members = draw(st.dictionaries(st.sampled_from(["id", "object", "choices", "ключ", "error"]), json_values, max_size=4))
    if isinstance(name := members.get("id"), str):
        members["id"] = "gen-1" + name  # two responses with one generation id cannot both be real
    spelled = json.dumps(
        {**members, "usage": "HERE"}, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    ).encode()
    usage = draw(st.one_of(spelled_costs.map('{{"cost": {}}}'.format), json_values.map(json.dumps))).encode()
    padding = draw(st.sampled_from([b"", b"\n", b" \r\n"]))
    return padding + spelled.replace(b'"HERE"', usage) + padding


@st.composite
def plays(draw: st.DrawFn) -> Play:
    stream = draw(st.sampled_from([True, True, False]))
    cuts = st.lists(st.integers(0, 100_000), max_size=12).map(tuple)
    return Play(
        stream=stream,
        body=draw(event_streams() if stream else documents()),
        chunks=draw(cuts),
        writes=draw(cuts),
        pauses_ms=tuple(draw(st.lists(st.sampled_from([0, 0, 0, 1, 4]), max_size=8))),
        generation_id=draw(st.sampled_from([b"gen-1", b""])),
        breaks_off=stream and draw(st.sampled_from([False, False, False, True])),
    )


EVERYWHERE = tuple(range(400))
BILL = '{"id":"gen-1","choices":[{"delta":{"content":"я🙂"}}],"usage":{"cost":0.000093}}'.encode()
CUT_EVERYWHERE = b": c\r\n\r\ndata: " + BILL + b"\r\n\r\ndata: [DONE]\r\n\r\n"
TWO_BILLS = b"data: " + BILL + b"\n\ndata: " + BILL.replace(b"0.000093", b"0.5") + b"\n\ndata: [DONE]\n\n"
CUT_SHORT = b"data: " + BILL + b"\n\ndata: \xf0\x9f"


# -- the wire


def cut(whole: bytes, places: tuple[int, ...]) -> list[bytes]:
    edges = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[start:end] for start, end in itertools.pairwise(edges)]


def coded(play: Play) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in cut(play.body, play.chunks) if chunk)
    return chunks + (b"" if play.breaks_off else b"0\r\n\r\n")


class Upstream:
    """A hand-made HTTP server: the model list, and the response that is set before each request."""

    play: Play

    def __init__(self) -> None:
        self.talks: set[asyncio.Task[None] | None] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.talks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
                    await reader.readexactly(int(length[1]))
                if head.startswith(b"POST /chat/completions "):
                    await self.perform(writer)
                    if self.play.breaks_off:
                        return
                else:
                    self.look_up(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def look_up(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        body = Simulator().model_list if head.startswith(b"GET /models ") else b"{}"
        status = b"200 OK" if head.startswith(b"GET /models ") else b"404 Not Found"
        writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    async def perform(self, writer: asyncio.StreamWriter) -> None:
        play = self.play
        kind = b"text/event-stream" if play.stream else b"application/json"
        name = b"X-Generation-Id: %s\r\n" % play.generation_id if play.generation_id else b""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%sTransfer-Encoding: chunked\r\n\r\n" % (kind, name))
        for piece, pause in itertools.zip_longest(cut(coded(play), play.writes), play.pauses_ms, fillvalue=None):
            if piece is None:
                break
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep((pause or 0) / 1000)


@asynccontextmanager
async def stage(database_url: str, directory: Path) -> AsyncIterator[tuple[Upstream, Gateway]]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.talk, "127.0.0.1", 0)
    tuned = {"recovery": {"poll_s": 3600}}  # no recovery: holds that are left open stay open
    config = config_for(database_url, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", directory, tuned)
    try:
        async with (
            pool.open_database(database_url, connections_max=4) as database,
            gateway_on(config, database, Simulator()) as gateway,
        ):
            yield upstream, gateway
    finally:
        server.close()
        await asyncio.gather(*filter(None, upstream.talks))  # the gateway has closed its connections, so they end


# -- the property


GENERATION_IDS = (b"g%04d" % number for number in itertools.count())


async def perform(upstream: Upstream, gateway: Gateway, play: Play) -> None:
    generation_id = next(GENERATION_IDS)
    play = upstream.play = replace(
        play, body=play.body.replace(b"gen-1", generation_id), generation_id=generation_id if play.generation_id else b""
    )
    client = await gateway.client()
    response, received = await gateway.chat(client, stream=play.stream)
    if play.breaks_off and not play.body:
        assert (response.status, list(json.loads(received))) == (500, ["error"])
    else:
        assert response.status == 200
        assert_bytes(play, received)
    charges = [entry for entry in await Bookings(gateway.database).entries(client.account_id, 10) if entry.kind == "charge"]
    cost = true_cost(play)
    assert [entry.cost_usd for entry in charges] == ([] if cost is None else [cost])
    roubles = Decimal(0) if cost is None else (cost * RATE).quantize(NANO, ROUND_HALF_UP)
    assert await client.balance() == 100 - roubles
    assert (await client.held() > 0) is (cost is None)  # without a cost the hold stays open


def assert_bytes(play: Play, received: bytes) -> None:
    ours = received[len(play.body) :]
    assert received[: len(play.body)] == play.body
    if not play.stream or is_ended(play.body):
        assert ours == b""
    else:  # one event of our own, which every parser finds
        (end,) = events(ours)
        assert "error" in json.loads(end)
        assert list(events(received))[-1] == end
        assert not any(data.strip() == b"[DONE]" for data in events(received))


@pytest.mark.timeout(300)
def test_any_bytes_pass_unchanged_and_their_bill_is_charged(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "gptutor")  # the report of a failure shows its example, not the log of all others
    with asyncio.Runner() as runner:
        staged = stage(database_url, tmp_path)
        upstream, gateway = runner.run(staged.__aenter__())

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(plays())
        @example(Play(True, CUT_EVERYWHERE, EVERYWHERE, tuple(range(1000))))
        @example(Play(True, CUT_EVERYWHERE, (), tuple(range(1000)), (1,) * 30, generation_id=b"gen-1"))
        @example(Play(True, TWO_BILLS))
        @example(Play(True, CUT_SHORT))
        @example(Play(True, CUT_SHORT, EVERYWHERE, (), breaks_off=True))
        @example(Play(True, b"", breaks_off=True))
        @example(Play(False, b" " + BILL + b"\r\n", EVERYWHERE, tuple(range(1000)), (1,) * 30))
        def claim(play: Play) -> None:
            runner.run(perform(upstream, gateway, play))

        try:
            claim()
            broken = runner.run(broken_invariants(gateway))
            assert broken == []
        finally:
            runner.run(staged.__aexit__(None, None, None))


async def broken_invariants(gateway: Gateway) -> list[str]:
    return [finding.invariant.name async for finding in check(gateway.database) if finding.rows]


async def test_bytes_before_a_broken_connection_reach_a_slow_client() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n: a\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"3\r\n: b\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    limits = UpstreamLimits(connect_s=5, total_s=5, first_byte_s=5, idle_s=5, end_s=5, attempts_max=1)
    received = bytearray()

    def take(piece: bytes) -> None:
        received.extend(piece)
        connection = response.connection
        connection.pause_reading()  # a client that does not read as fast as upstream writes
        asyncio.get_running_loop().call_later(0.2, connection.resume_reading)

    async with server, connected(address, "sk-or-test", limits, referer="", title="", connections_max=1) as upstream:
        response, _ = await upstream.complete(
            b"{}", {}, stream=True, is_wanted=bool, before_attempt=lambda: None, nothing_bought=lambda: None
        )
        with contextlib.suppress(UpstreamError):
            await response.stream_body(take, lambda: None, 60)
        response.close()
    assert received == b": a: b"
