"""OpenRouter's API as a client sees it: `OpenRouterService`.

Nothing is decompressed (identity is asked for), re-framed or decoded. Redirects are not followed: our key must not travel.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode

import msgspec

from gptutor.openrouter.bill import Bill, parse_usd
from gptutor.openrouter.circuit import CircuitBreaker
from gptutor.openrouter.connection import UpstreamConnection
from gptutor.openrouter.connection_pool import ConnectionPool, pooled
from gptutor.openrouter.errors import PoolExhausted, UpstreamError, error_from_response
from gptutor.openrouter.response import UpstreamResponse
from gptutor.openrouter.retry import Failure, pause_before_retry
from gptutor.telemetry.metrics import CLOCK_SKEW, UPSTREAM_FAILURES, UPSTREAM_RETRIES

LOGGER = logging.getLogger("gptutor.openrouter")

# The headers of a request that reach OpenRouter beside our own: they change what the answer is, and say nothing of the caller.
# The list is complete: cookies, addresses and hop-by-hop headers do not pass.
SENT_ON = ("X-OpenRouter-Metadata", "x-anthropic-beta")
GET_S = 30.0
ANOTHER_KEY_MAY_KNOW = frozenset({401, 403, 404})
"""OpenRouter's answers about a generation that was made with a key of before."""


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    """Seconds and counts for one request; the names are those of `config.yaml`, section `openrouter`."""

    connect_s: float
    total_s: float
    first_byte_s: float
    idle_s: float
    end_s: float
    attempts_max: int


class OpenRouterService:
    """`headers` go with every request; `target` is what stands before the path in its first line."""

    def __init__(
        self,
        pool: ConnectionPool,
        target: str,
        headers: Mapping[str, str],
        limits: UpstreamLimits,
        old_api_keys: Sequence[str] = (),
    ) -> None:
        self._pool = pool
        self._target = target.encode()
        self._headers = headers
        self._fixed = _spelled(headers)
        self._old_api_keys = old_api_keys
        self._limits = limits
        self._circuit = CircuitBreaker()
        self._clock = asyncio.get_running_loop().time

    async def complete(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        stream: bool,
        wanted: Callable[[], bool],
        attempting: Callable[[], None],
        refused: Callable[[], None],
    ) -> tuple[UpstreamResponse, float]:
        """Sends a request for a completion, and again where that is harmless and still `wanted`.

        `headers` are those of SENT_ON that the caller gave. `attempting` is called before each attempt, `refused` after one that
        proves that nothing was bought. Gives the reply, and the seconds that are left for the rest of a plain answer. Raises
        UpstreamError.
        """
        clock = self._clock
        deadline = clock() + (self._limits.first_byte_s if stream else self._limits.total_s)
        attempt = 1
        while True:
            if not self._circuit.lets_through(clock()):
                raise UpstreamError(Failure("unreachable"))
            attempting()
            try:
                return await self._attempt(body, headers, deadline - clock()), deadline - clock()
            except UpstreamError as error:
                if error.failure.bought_nothing:
                    refused()
                pause = pause_before_retry(
                    error.failure,
                    attempt=attempt,
                    attempts_max=self._limits.attempts_max,
                    left_s=deadline - clock(),
                )
                UPSTREAM_FAILURES.labels(error.failure.kind, error.failure.status or "").inc()
                if pause is None or not wanted():
                    raise
                failed = error
            await asyncio.sleep(pause)
            if not wanted():
                raise failed
            UPSTREAM_RETRIES.inc()
            attempt += 1

    async def _attempt(self, body: bytes, headers: Mapping[str, str], within_s: float) -> UpstreamResponse:
        try:
            connection = self._pool.free()
            if connection is None:
                connection = await self._pool.connect()
                self._circuit.reached()  # that is what it is about; an answer may take its time
        except PoolExhausted:
            raise
        except UpstreamError:
            self._circuit.missed(self._clock())
            raise
        reply = await self._asked(connection, self._head(b"POST", "/chat/completions", headers, body), body, within_s)
        self._circuit.reached()
        if reply.status < 300:
            return reply
        # The status has come: whatever happens to the rest of the answer, it is an error.
        raise await _refused(reply)

    async def _asked(self, connection: UpstreamConnection, head: bytes, body: bytes, within_s: float) -> UpstreamResponse:
        try:
            await connection.ask(head, body, within_s)
        except BaseException:
            self._pool.give_back(connection)
            raise
        return UpstreamResponse(connection, self._pool.give_back, self._limits.idle_s, self._limits.end_s)

    def _head(self, method: bytes, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        fixed = _spelled({**self._headers, **headers}) if headers else self._fixed
        return b"%b %b%b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (method, self._target, path.encode(), fixed, len(body))

    async def generation(self, generation_id: str) -> Bill | None:
        """The bill of a finished generation, or None while OpenRouter does not know it. Raises UpstreamError."""
        document = await self._look_up(generation_id)
        try:
            record = msgspec.json.decode(document, type=_GenerationAnswer).data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        cost = parse_usd(bytes(record.total_cost))
        if cost is not None and record.is_byok is True:
            provider = parse_usd(bytes(record.upstream_inference_cost))
            cost = cost + provider if provider is not None else None
        if cost is None:
            return None
        return Bill(cost, record.tokens_prompt, record.tokens_completion, generation_id)

    async def _look_up(self, generation_id: str) -> bytes:
        """With today's key, and where that one does not know the generation, with those before it. Raises UpstreamError."""
        query = {"id": generation_id}
        try:
            return await self.get("/generation", query)
        except UpstreamError as error:
            if error.failure.status in ANOTHER_KEY_MAY_KNOW:
                for key in self._old_api_keys:
                    with contextlib.suppress(UpstreamError):
                        return await self.get("/generation", query, {"Authorization": f"Bearer {key}"})
            raise

    async def cost_of(self, generation_id: str) -> Decimal | None:
        """What a generation cost in dollars, or None while that cannot be learnt."""
        try:
            bill = await self.generation(generation_id)
        except UpstreamError as error:
            LOGGER.info("The generation %s cannot be looked up now: %s", generation_id, error)
            return None
        return bill.cost_usd if bill is not None else None

    async def models(self) -> bytes:
        """The model list, as OpenRouter wrote it. Raises UpstreamError."""
        return await self.get("/models", {"output_modalities": "all"})  # without it, only those that write text

    async def get(self, path: str, query: dict[str, str] | None = None, headers: Mapping[str, str] | None = None) -> bytes:
        """The body of an answer of 200. Raises UpstreamError."""
        if query:
            path += "?" + urlencode(query)
        connection = self._pool.free() or await self._pool.connect()
        reply = await self._asked(connection, self._head(b"GET", path, headers or {}), b"", GET_S)
        if reply.status != 200:
            raise await _refused(reply)
        try:
            if (date := connection.headers.get("date")) is not None:
                with contextlib.suppress(ValueError):
                    CLOCK_SKEW.set(time.time() - parsedate_to_datetime(date).timestamp())
            return await reply.read(GET_S)
        finally:
            reply.close()


def _spelled(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("utf-8", "surrogateescape")


async def _refused(reply: UpstreamResponse) -> UpstreamError:
    try:
        return error_from_response(reply.status, reply.all_headers, await reply.read_refusal())
    finally:
        reply.close()


class _Generation(msgspec.Struct):
    total_cost: msgspec.Raw = msgspec.Raw()
    upstream_inference_cost: msgspec.Raw = msgspec.Raw()
    is_byok: bool | None = None
    tokens_prompt: int | None = None
    tokens_completion: int | None = None


class _GenerationAnswer(msgspec.Struct):
    data: _Generation


@asynccontextmanager
async def connected(
    base_url: str,
    api_key: str,
    limits: UpstreamLimits,
    *,
    referer: str,
    title: str,
    connections_max: int,
    proxy: str = "",
    old_api_keys: Sequence[str] = (),
) -> AsyncIterator[OpenRouterService]:
    """A service with its pool of connections, which is closed at the end."""
    async with pooled(base_url, proxy, connections_max=connections_max, connect_s=limits.connect_s) as (pool, end):
        headers = {
            "Host": end.named,
            "Authorization": f"Bearer {api_key}",
            "Content-Type": "application/json",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # bytes are relayed as they come, and a scanner reads them
            "User-Agent": "GPTutor",
            **({"HTTP-Referer": referer} if referer else {}),
            **({"X-Title": title} if title else {}),
            **pool.headers,
        }
        yield OpenRouterService(pool, pool.target, headers, limits, old_api_keys)
