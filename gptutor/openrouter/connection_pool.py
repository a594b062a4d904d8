"""A pool of connections to OpenRouter, opened on demand and reused; through a proxy if one is set."""

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

IDLE_MAX_S = 15.0
"""An idle connection is closed well before OpenRouter's edge closes it: a request sent into a closing connection is lost."""
HAPPY_EYEBALLS_DELAY_S = 0.25
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An HTTP server to connect to: OpenRouter, or a proxy."""

    host: str
    port: int
    is_secure: bool
    path: str = ""
    credentials: str = ""

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError("not an http or https URL")
        credentials = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials = base64.b64encode(pair.encode()).decode()
        host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
        return cls(host, parts.port or DEFAULT_PORTS[parts.scheme], parts.scheme == "https", parts.path.rstrip("/"), credentials)

    @property
    def host_header(self) -> str:
        """The value of the `Host` header: without a default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS["https" if self.is_secure else "http"] else f"{host}:{self.port}"

    @property
    def authority(self) -> str:
        """The target of CONNECT: always with a port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ResumingContext(ssl.SSLContext):
    """Resumes the last TLS session, which halves the handshake of a new connection. To be used for one server only."""

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


def verifying_context() -> ResumingContext:
    """Verifies as `ssl.create_default_context` does, by the certificates of this machine or of SSL_CERT_FILE, read now."""
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


class ConnectionPool:
    """At most `connections_max` connections; acquiring one takes at most `connect_s`, the wait for a free one included."""

    def __init__(self, origin: Endpoint, proxy: Endpoint | None, *, connections_max: int, connect_s: float) -> None:
        self._origin = origin
        self._proxy = proxy
        self._connections_max = connections_max
        self._connect_s = connect_s
        self._tls = verifying_context() if origin.is_secure else None  # reading the certificates takes 20 ms
        self._proxy_tls = verifying_context() if proxy is not None and proxy.is_secure else None
        self._idle: deque[UpstreamConnection] = deque()
        self._busy: set[UpstreamConnection] = set()
        self._opening = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def target_prefix(self) -> str:
        """What precedes the path in a request line: the whole URL for a forwarding proxy, else the path of the base URL."""
        return f"http://{self._origin.host_header}{self._origin.path}" if self._is_forwarded else self._origin.path

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request for a forwarding proxy; a tunnelling proxy gets them with CONNECT."""
        credentials = self._proxy.credentials if self._proxy is not None and self._is_forwarded else ""
        return {"Proxy-Authorization": f"Basic {credentials}"} if credentials else {}

    @property
    def _is_forwarded(self) -> bool:
        """Whether the proxy forwards plain HTTP; for HTTPS it makes a tunnel."""
        return self._proxy is not None and not self._origin.is_secure

    def acquire_idle(self) -> UpstreamConnection | None:
        """An idle connection, if there is one."""
        while self._idle:
            connection = self._idle.pop()  # the most recently used: the oldest may expire
            if connection.is_reusable:
                self._busy.add(connection)
                return connection
        return None

    async def acquire(self) -> UpstreamConnection:
        """An idle connection, or a new one, once the pool has room. Raises UpstreamError: nothing was sent then."""
        deadline = self._loop.time() + self._connect_s
        has_waited = False
        while len(self._busy) + self._opening >= self._connections_max:
            await self._wait_for_room(deadline, has_waited)
            has_waited = True
        if (idle := self.acquire_idle()) is not None:
            return idle
        self._opening += 1
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._open()
            if not connection.is_open:
                raise ConnectionResetError
            self._busy.add(connection)
        except (OSError, TimeoutError, ValueError, UpstreamError):
            # No cause: it could show the proxy's address, which includes a password.
            raise UpstreamError(Failure("unreachable")) from None
        finally:
            self._opening -= 1
            self._wake_next_waiter()
        return connection

    def release(self, connection: UpstreamConnection) -> None:
        """Makes the connection idle if it is reusable, and closes it otherwise."""
        self._busy.discard(connection)
        connection.resume_reading()
        if connection.is_reusable:
            if connection.is_new and self._tls is not None:
                self._tls.session = connection.tls_session
            connection.is_new = False
            connection.idle_since = self._loop.time()
            self._idle.append(connection)
            if self._idle_timer is None:
                self._idle_timer = self._loop.call_later(IDLE_MAX_S, self._close_expired)
        else:
            connection.abort()
        self._wake_next_waiter()

    def close(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for connection in (*self._idle, *self._busy):
            connection.abort()

    def _close_expired(self) -> None:
        self._idle_timer = None
        expired_at = self._loop.time() - IDLE_MAX_S
        while self._idle and (self._idle[0].idle_since <= expired_at or not self._idle[0].is_reusable):
            self._idle.popleft().abort()
        if self._idle:
            self._idle_timer = self._loop.call_at(self._idle[0].idle_since + IDLE_MAX_S, self._close_expired)

    async def _wait_for_room(self, deadline: float, has_waited: bool) -> None:
        """Waits for room in the pool. A waiter that was woken, and found the room taken, is first in the queue again.

        Raises PoolExhausted.
        """
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.appendleft(waiter) if has_waited else self._waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._wake_next_waiter()  # this waiter does not use the room
            if isinstance(error, TimeoutError):
                raise PoolExhausted from None
            raise

    def _wake_next_waiter(self) -> None:
        while self._waiters and len(self._busy) + self._opening < self._connections_max:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _open(self) -> UpstreamConnection:
        """Raises OSError, UpstreamError."""
        server = self._proxy or self._origin
        addresses = await self._loop.getaddrinfo(server.host, server.port, type=1)
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, interleave=1, loop=self._loop
        )
        tls = self._proxy_tls if self._proxy is not None else self._tls
        transport, connection = await self._loop.create_connection(
            UpstreamConnection, sock=sock, ssl=tls, server_hostname=server.host if tls is not None else None
        )
        if self._proxy is not None and self._tls is not None:
            try:
                await self._tunnel(transport, connection, self._proxy, self._tls)
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _tunnel(
        self, transport: asyncio.Transport, connection: UpstreamConnection, proxy: Endpoint, tls: ssl.SSLContext
    ) -> None:
        """Begins TLS with OpenRouter inside a tunnel through the proxy. Raises OSError, UpstreamError."""
        headers = f"CONNECT {self._origin.authority} HTTP/1.1\r\nHost: {self._origin.authority}\r\n"
        if proxy.credentials:
            headers += f"Proxy-Authorization: Basic {proxy.credentials}\r\n"
        await connection.send_request(f"{headers}\r\n".encode(), b"", self._connect_s)
        if connection.status != 200:
            raise UpstreamError(Failure("unreachable"))
        tls_transport = await self._loop.start_tls(transport, connection, tls, server_hostname=self._origin.host)
        if tls_transport is None:
            raise UpstreamError(Failure("unreachable"))
        connection.replace_transport(tls_transport)


@asynccontextmanager
async def pooled(
    base_url: str, proxy: str, *, connections_max: int, connect_s: float
) -> AsyncIterator[tuple[ConnectionPool, Endpoint]]:
    """A pool of connections to `base_url`, closed on exit. Raises ValueError for an invalid URL."""
    origin = Endpoint.parse(base_url)
    pool = ConnectionPool(origin, Endpoint.parse(proxy) if proxy else None, connections_max=connections_max, connect_s=connect_s)
    try:
        yield pool, origin
    finally:
        pool.close()
