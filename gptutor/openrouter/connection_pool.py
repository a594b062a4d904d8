"""Connections to OpenRouter, opened when they are needed and kept for the next request; through a proxy if there is one."""

import asyncio
import base64
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs

from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.errors import PoolExhausted, UpstreamError
from gptutor.openrouter.retry import Failure

KEPT_S = 15.0
"""An idle connection is dropped well before OpenRouter's edge drops it: a request sent into a closing one is lost."""
NEXT_ADDRESS_S = 0.25
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a connection: OpenRouter's, or a proxy's."""

    host: str
    port: int
    is_secure: bool
    path: str = ""
    credentials: str = ""

    @classmethod
    def of(cls, url: str) -> "Endpoint":
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in PORTS or not parts.hostname:
            raise ValueError("not an address of HTTP")
        credentials = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials = base64.b64encode(pair.encode()).decode()
        host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
        return cls(host, parts.port or PORTS[parts.scheme], parts.scheme == "https", parts.path.rstrip("/"), credentials)

    @property
    def named(self) -> str:
        """As `Host` has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS["https" if self.is_secure else "http"] else f"{host}:{self.port}"

    @property
    def with_port(self) -> str:
        """As CONNECT has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ReusingContext(ssl.SSLContext):
    """Offers the last session again: a new connection's handshake is then half as long. There is one server behind it."""

    session: ssl.SSLSession | None = None

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or self.session)


def verifying_context() -> ReusingContext:
    """As `ssl.create_default_context` makes it: verified, by the certificates of this machine or of SSL_CERT_FILE, read now."""
    context = ReusingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


class ConnectionPool:
    """At most `connections_max`; who finds none free waits in line, for `connect_s` in all."""

    def __init__(self, end: Endpoint, proxy: Endpoint | None, *, connections_max: int, connect_s: float) -> None:
        self._end = end
        self._proxy = proxy
        self._connections_max = connections_max
        self._connect_s = connect_s
        # Reading the certificates takes 20 ms.
        self._tls = verifying_context() if end.is_secure else ReusingContext(ssl.PROTOCOL_TLS_CLIENT)
        self._proxy_tls = verifying_context() if proxy is not None and proxy.is_secure else None
        self._idle: deque[UpstreamConnection] = deque()
        self._busy: set[UpstreamConnection] = set()
        self._opening = 0
        self._line: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def target(self) -> str:
        """What stands before a path in the first line of a request: for a proxy that reads it, the whole address."""
        return f"http://{self._end.named}{self._end.path}" if self._reads_along else self._end.path

    @property
    def headers(self) -> dict[str, str]:
        """What a proxy that reads along is told; through a tunnel it was told before."""
        credentials = self._proxy.credentials if self._proxy is not None and self._reads_along else ""
        return {"Proxy-Authorization": f"Basic {credentials}"} if credentials else {}

    @property
    def _reads_along(self) -> bool:
        return self._proxy is not None and not self._end.is_secure

    def free(self) -> UpstreamConnection | None:
        """One that is kept, if there is any."""
        while self._idle:
            connection = self._idle.pop()  # the freshest: the oldest may go
            if connection.is_usable:
                self._busy.add(connection)
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """One that is kept, or a new one, as soon as there may be one. Raises UpstreamError: nothing was sent then."""
        deadline = self._loop.time() + self._connect_s
        again = False
        while len(self._busy) + self._opening >= self._connections_max:
            await self._queue(deadline, again)
            again = True
        if (kept := self.free()) is not None:
            return kept
        self._opening += 1
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._open()
            if not connection.is_open:
                raise ConnectionResetError
            self._busy.add(connection)
        except (OSError, TimeoutError, ValueError, UpstreamError):
            # Of a proxy's address, and its password with it, nothing is kept as a cause.
            raise UpstreamError(Failure("unreachable")) from None
        finally:
            self._opening -= 1
            self._call_next()
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keeps it if it may be used again, and drops it otherwise."""
        self._busy.discard(connection)
        connection.resume()
        if connection.is_usable:
            if connection.is_fresh and self._end.is_secure:
                self._tls.session = connection.tls_session
            connection.is_fresh = False
            connection.idle_since = self._loop.time()
            self._idle.append(connection)
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(KEPT_S, self._sweep)
        else:
            connection.abort()
        self._call_next()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in (*self._idle, *self._busy):
            connection.abort()

    def _sweep(self) -> None:
        self._sweeper = None
        long_ago = self._loop.time() - KEPT_S
        while self._idle and (self._idle[0].idle_since <= long_ago or not self._idle[0].is_usable):
            self._idle.popleft().abort()
        if self._idle:
            self._sweeper = self._loop.call_at(self._idle[0].idle_since + KEPT_S, self._sweep)

    async def _queue(self, deadline: float, again: bool) -> None:
        """Waits for a place; whoever was called `again`, and found it taken, is the first in line. Raises PoolExhausted."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._line.appendleft(turn) if again else self._line.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._call_next()  # the place was ours, and another may have it
            if isinstance(error, TimeoutError):
                raise PoolExhausted from None
            raise

    def _call_next(self) -> None:
        while self._line and len(self._busy) + self._opening < self._connections_max:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def _open(self) -> UpstreamConnection:
        """Raises OSError, UpstreamError."""
        reached = self._proxy or self._end
        found = await self._loop.getaddrinfo(reached.host, reached.port, type=1)
        sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1, loop=self._loop)
        secured = self._proxy_tls if self._proxy is not None else self._tls if self._end.is_secure else None
        transport, connection = await self._loop.create_connection(
            UpstreamConnection, sock=sock, ssl=secured, server_hostname=reached.host if secured is not None else None
        )
        if self._proxy is not None and self._end.is_secure:
            try:
                await self._tunnel(transport, connection, self._proxy)
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _tunnel(self, transport: asyncio.Transport, connection: UpstreamConnection, proxy: Endpoint) -> None:
        head = f"CONNECT {self._end.with_port} HTTP/1.1\r\nHost: {self._end.with_port}\r\n"
        if proxy.credentials:
            head += f"Proxy-Authorization: Basic {proxy.credentials}\r\n"
        await connection.ask(f"{head}\r\n".encode(), b"", self._connect_s)
        if connection.status != 200:
            raise UpstreamError(Failure("unreachable"))
        secure = await self._loop.start_tls(transport, connection, self._tls, server_hostname=self._end.host)
        if secure is None:
            raise UpstreamError(Failure("unreachable"))
        connection.replace_transport(secure)


@asynccontextmanager
async def pooled(
    base_url: str, proxy: str, *, connections_max: int, connect_s: float
) -> AsyncIterator[tuple[ConnectionPool, Endpoint]]:
    """Connections to `base_url`, closed at the end. Raises ValueError for an address that is none."""
    end = Endpoint.of(base_url)
    pool = ConnectionPool(end, Endpoint.of(proxy) if proxy else None, connections_max=connections_max, connect_s=connect_s)
    try:
        yield pool, end
    finally:
        pool.close()
