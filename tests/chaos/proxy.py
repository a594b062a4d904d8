"""A TCP proxy between the workers and PostgreSQL that injects network faults, above all around commits.

The most important fault is the lost reply: the statement was executed, and its sender cannot know. So the proxy knows enough of the
protocol to hit statements and not other messages: asyncpg begins an execution with a Bind message, and the server ends its reply with
ReadyForQuery, which it sends after the commit.

Bytes that a worker sent before it died are still delivered, as a kernel would deliver them.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

BIND = b"B"
ERROR = b"E"
READY = b"Z\x00\x00\x00\x05I"  # ReadyForQuery, no transaction open: the statement is committed
CHUNK_BYTES = 1 << 16

# The faults of statements, with their probabilities.
FAULTS = {
    "late": 0.10,  # it reaches the server late
    "very late": 0.002,  # it reaches the server after the sender's timeout
    "lost": 0.005,  # it never reaches the server, and the connection breaks
    "reply lost": 0.015,  # it is executed, the reply is dropped, and the connection breaks
    "reply torn": 0.003,  # it is executed, and the connection breaks after half of the reply
}
LATE_S = (0.0, 0.1)
VERY_LATE_S = (2.0, 5.0)
CONNECTION_REFUSED = 0.02


@dataclass(slots=True)
class Link:
    """One proxied connection, and the fault to inject into the next reply."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    fault: str = ""


@dataclass
class Proxy:
    """`is_calm` disables all faults; `counts` are the injected ones by name."""

    socket: Path
    rng: random.Random
    url: str = ""
    is_calm: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    _links: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the run; asyncio would log the cancelled handler as an error
        finally:
            writer.transport.abort()
            self._links.discard(task)

    async def close(self) -> None:
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_calm and self.rng.random() < CONNECTION_REFUSED:
            self.counts["connection refused"] += 1
            return
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return  # PostgreSQL is down
        link = Link(writer, server_writer)
        pumps = [
            asyncio.create_task(self._forward_statements(reader, link)),
            asyncio.create_task(self._forward_replies(server_reader, link)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server_writer.transport.abort()

    async def _forward_statements(self, reader: asyncio.StreamReader, link: Link) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(CHUNK_BYTES):
                fault = self._choose_fault() if chunk.startswith(BIND) else ""
                if fault == "lost":
                    self.counts[fault] += 1
                    return
                if fault in ("late", "very late"):
                    self.counts[fault] += 1
                    await asyncio.sleep(self.rng.uniform(*(LATE_S if fault == "late" else VERY_LATE_S)))
                elif fault:
                    link.fault = fault
                link.server.write(chunk)
                await link.server.drain()

    async def _forward_replies(self, reader: asyncio.StreamReader, link: Link) -> None:
        withheld = b""
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(CHUNK_BYTES):
                if not link.fault:
                    link.client.write(chunk)
                    await link.client.drain()
                    continue
                withheld += chunk
                if not withheld.endswith(READY):
                    continue
                if link.fault == "reply torn":
                    link.client.write(withheld[: len(withheld) // 2])
                    await link.client.drain()
                self.counts["error lost" if withheld.startswith(ERROR) else link.fault] += 1
                return

    def _choose_fault(self) -> str:
        if self.is_calm:
            return ""
        return self.rng.choices([*FAULTS, ""], [*FAULTS.values(), 1 - sum(FAULTS.values())])[0]


@asynccontextmanager
async def proxied(socket: Path, rng: random.Random) -> AsyncIterator[Proxy]:
    proxy = Proxy(socket, rng)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()
