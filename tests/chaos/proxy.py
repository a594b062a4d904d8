"""Between the workers and PostgreSQL: a TCP proxy that makes the network worse, above all at the moment of a commit.

What matters most is the reply that never comes: the statement was carried out, and its sender cannot know it. So the proxy
knows just enough of the protocol to meet statements and not the small talk around them: asyncpg begins an execution with a Bind
message, and the server ends its answer with ReadyForQuery, which it sends after the commit.

Bytes of a caller who has died meanwhile are still delivered, as a kernel would deliver them.
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
READY = b"Z\x00\x00\x00\x05I"  # ReadyForQuery, no transaction open: whatever was asked is committed
PIECE = 1 << 16

# What becomes of a statement, and how often.
FATES = {
    "late": 0.10,  # it reaches the server a little later
    "very late": 0.002,  # … and its sender has given up by then
    "lost": 0.005,  # it never reaches the server, and the connection breaks
    "reply lost": 0.015,  # it is carried out, the reply is swallowed, and the connection breaks: commit unknown
    "reply torn": 0.003,  # … after half of the reply
}
LATE_S = (0.0, 0.1)
VERY_LATE_S = (2.0, 5.0)
CONNECTIONS_CUT = 0.02


@dataclass(slots=True)
class Link:
    """One connection, and what is to become of the reply that is awaited on it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    fate: str = ""


@dataclass
class Proxy:
    """`calm` ends all faults; `done` counts those that came to pass."""

    socket: Path
    dice: random.Random
    url: str = ""
    calm: bool = False
    done: Counter[str] = field(default_factory=Counter)
    _links: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the run; asyncio's own callback would complain of a cancelled handler
        finally:
            writer.transport.abort()
            self._links.discard(task)

    async def close(self) -> None:
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.calm and self.dice.random() < CONNECTIONS_CUT:
            self.done["connection refused"] += 1
            return
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return  # PostgreSQL is down
        link = Link(writer, server_writer)
        pumps = [asyncio.create_task(self._ask(reader, link)), asyncio.create_task(self._answer(server_reader, link))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server_writer.transport.abort()

    async def _ask(self, reader: asyncio.StreamReader, link: Link) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(PIECE):
                fate = self._draw() if chunk.startswith(BIND) else ""
                if fate == "lost":
                    self.done[fate] += 1
                    return
                if fate in ("late", "very late"):
                    self.done[fate] += 1
                    await asyncio.sleep(self.dice.uniform(*(LATE_S if fate == "late" else VERY_LATE_S)))
                elif fate:
                    link.fate = fate
                link.server.write(chunk)
                await link.server.drain()

    async def _answer(self, reader: asyncio.StreamReader, link: Link) -> None:
        held_back = b""
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(PIECE):
                if not link.fate:
                    link.client.write(chunk)
                    await link.client.drain()
                    continue
                held_back += chunk
                if not held_back.endswith(READY):
                    continue
                if link.fate == "reply torn":
                    link.client.write(held_back[: len(held_back) // 2])
                    await link.client.drain()
                self.done["refusal lost" if held_back.startswith(ERROR) else link.fate] += 1
                return

    def _draw(self) -> str:
        if self.calm:
            return ""
        return self.dice.choices([*FATES, ""], [*FATES.values(), 1 - sum(FATES.values())])[0]


@asynccontextmanager
async def proxied(socket: Path, dice: random.Random) -> AsyncIterator[Proxy]:
    proxy = Proxy(socket, dice)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()
