"""What clients can make the service keep in memory, however many they are (row sum-3).

Each phase is slow: headers, bodies, running streams and plain answers that end only when the client goes. The bound is the one of
the guide (processes.en.md), for the settings of the test. `python -m tests.abuse.test_memory 2000` uses so many connections and
the default settings, and prints a table.
"""

import asyncio
import itertools
import math
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

import gptutor
from gptutor.config.schema import OpenRouterSettings, ServerSettings
from gptutor.simulator.server import Simulator
from tests.support.service import Service, start

MB = 1024 * 1024
CONTENT_LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
ACCOUNTS = 4
"""Each may use a quarter of a budget."""
EVENT = b'data: {"id":"gen-1","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Generation-Id: gen-1-x\r\nTransfer-Encoding: chunked\r\n\r\n"
CONNECTION_BYTES = 400 * 1024
"""A connection in its most expensive phase: a stream whose client does not read."""
GUIDE = Path(gptutor.__file__).parent / "web" / "pages"
REST_BYTES = 150 * MB
PARSER_BYTES = 120 * MB
"""Parsing one body of 10 MB, and what the allocator keeps of it."""


@dataclass
class Rig:
    """The service, and an OpenRouter whose answers do not end."""

    service: Service
    keys: list[str]
    process: psutil.Process = field(init=False)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = psutil.Process(self.service.process.pid)

    @property
    def memory(self) -> int:
        rss: int = self.process.memory_info().rss
        return rss

    async def connect(self, sent: bytes, *, reads: bool = False) -> None:
        address = urlsplit(self.service.url)
        try:
            reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1024)
            self.writers.append(writer)
            writer.write(sent)
            if reads:
                await reader.read(100)
        except OSError:
            pass  # closed, because there are too many connections, or the body was rejected

    def disconnect(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    def chat(self, number: int, size: int, *, stream: bool, sent: int | None = None) -> bytes:
        body = b'{"model": "google/gemini-2.5-flash-lite", "max_tokens": 1, "stream": %b, "messages": [{"role": "user", "content": "%b"}]}'
        body %= (b"true" if stream else b"false", b"x" * size)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.keys[number % ACCOUNTS]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body[:sent]


async def unfinished_headers(rig: Rig, number: int) -> None:
    lines = b"".join(b"X-%d: %b\r\n" % (line, b"x" * 6000) for line in range(10))
    await rig.connect(b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines)


async def unfinished_bodies(rig: Rig, number: int) -> None:
    await rig.connect(rig.chat(number, 9_000_000, stream=False, sent=8_000_000))


async def running_streams(rig: Rig, number: int) -> None:
    await rig.connect(rig.chat(number, 1_000_000, stream=True), reads=True)


async def unread_streams(rig: Rig, number: int) -> None:
    await rig.connect(rig.chat(number, 10_000, stream=True).replace(b"xx", b"XX", 1))


async def unread_answers(rig: Rig, number: int) -> None:
    await rig.connect(rig.chat(number, 100, stream=False))


PHASES: dict[str, tuple[Callable[[Rig, int], Awaitable[None]], float]] = {
    # name: (what each connection does, how many of the connections do it)
    "unfinished headers": (unfinished_headers, 1),
    "unfinished bodies of 9 MB": (unfinished_bodies, 0.25),
    "running streams after 1 MB": (running_streams, 0.5),
    "unread streams": (unread_streams, 1),
    "unread answers of 20 MB": (unread_answers, 0.25),
}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """OpenRouter: a stream of one event, or of events without end if the prompt begins with XX; else 20 MB."""
    models = Simulator().model_list
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = CONTENT_LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(models) + models)
            elif b'"stream":true' in body:
                writer.write(STREAM)
                for _ in itertools.count() if b'"XX' in body else range(1):
                    writer.write(b"%x\r\n%b\r\n" % (len(EVENT) * 100, EVENT * 100))
                    await writer.drain()
                await asyncio.sleep(600)
            else:
                text = b'{"id": "gen-1", "choices": [], "usage": {"cost": 0.000001}, "x": "%b"}' % (b"x" * 20_000_000)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
            await writer.drain()
    except (OSError, EOFError, asyncio.CancelledError):
        pass
    finally:
        writer.transport.abort()


@asynccontextmanager
async def rig_in(directory: Path, **settings: str) -> AsyncIterator[Rig]:
    upstream = await asyncio.start_server(answer, "127.0.0.1", 0, limit=16 * MB)
    settings = {
        "GPTUTOR_LOGS__STDOUT": "false",
        "OPENROUTER_API_KEY": "sk-or-test",
        "OPENROUTER_BASE_URL": f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}",
        "GPTUTOR_SERVER__HEADER_S": "60",
        "GPTUTOR_SERVER__BODY_IDLE_S": "60",
        "GPTUTOR_SERVER__SHUTDOWN_S": "1",
        "GPTUTOR_SERVER__DRAIN_S": "1",
        "GPTUTOR_RATE_LIMIT__CHAT_PER_MINUTE": "0",
        "GPTUTOR_RATE_LIMIT__CHAT_CONCURRENT_MAX": "0",
        **settings,
    }
    service = await asyncio.to_thread(start, directory, **settings)
    try:
        keys = [service.command("user", "create", "--balance", "1000000")["apiKey"] for _ in range(ACCOUNTS)]
        rig = Rig(service, keys)
        await rig.connect(rig.chat(0, 100, stream=True), reads=True)
        rig.disconnect()
        yield rig
    finally:
        upstream.close()
        await asyncio.to_thread(service.stop)


async def most_memory_in(rig: Rig, name: str, connections: int, settle_s: float) -> int:
    """The most memory while so many connections, or a part of them, are in the phase."""
    work, part = PHASES[name]
    most = rig.memory
    numbers = iter(range(round(connections * part)))

    async def some() -> None:
        for number in numbers:
            await work(rig, number)

    working = asyncio.gather(*(some() for _ in range(20)))
    while not working.done():
        await asyncio.sleep(0.1)
        most = max(most, rig.memory)
    await working
    for _ in range(round(settle_s * 10)):
        await asyncio.sleep(0.1)
        most = max(most, rig.memory)
    rig.disconnect()
    await asyncio.sleep(0.5)
    return most


def bound(connections: int, budgets: int) -> int:
    """Beyond the memory at rest."""
    return budgets + PARSER_BYTES + connections * CONNECTION_BYTES


async def test_memory_stays_within_the_documented_bound(tmp_path: Path) -> None:
    """All phases one after the other in one process, which keeps what they leave."""
    budgets = {"GPTUTOR_SERVER__BODIES_BYTES_MAX": 64 * MB, "GPTUTOR_OPENROUTER__PLAIN_BYTES_TOTAL": 64 * MB}
    async with rig_in(tmp_path, **{setting: str(value) for setting, value in budgets.items()}) as rig:
        rest = rig.memory
        assert rest <= REST_BYTES
        for name in PHASES:
            growth = await most_memory_in(rig, name, 100, settle_s=0.5) - rest
            print(f"{name}: {growth / MB:+.0f} MB")
            assert growth <= bound(100, sum(budgets.values())), name


@pytest.mark.parametrize("language", ["en", "ru"])
def test_the_guide_has_the_worst_case_of_the_default_settings(language: str) -> None:
    server, openrouter = ServerSettings(), OpenRouterSettings()
    budgets = server.bodies_bytes_max + openrouter.plain_bytes_total
    text = (GUIDE / f"processes.{language}.md").read_text()
    for connections in (server.connections_max, 2000):
        worst_mb = math.ceil((REST_BYTES + bound(connections, budgets)) / MB / 10) * 10
        assert re.search(rf"\b{worst_mb}\b", text), worst_mb


async def main(connections: int) -> None:
    print("| Phase | Connections | Memory at rest | Growth |\n|---|---|---|---|")
    for name, (_, part) in PHASES.items():
        with tempfile.TemporaryDirectory() as directory:
            async with rig_in(Path(directory)) as rig:
                rest = rig.memory
                growth = await most_memory_in(rig, name, connections, settle_s=3) - rest
                print(f"| {name} | {round(connections * part)} | {rest / MB:.0f} MB | {growth / MB:+.0f} MB |", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
