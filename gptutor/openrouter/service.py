"""A client of OpenRouter's API: `OpenRouterService`.

Bodies are not decompressed (identity is requested), re-framed or decoded. Redirects are not followed: our API key must not be
sent to another host.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from urllib.parse import urlencode

import msgspec

from gptutor.openrouter.account import Account
from gptutor.openrouter.bill import Bill, parse_usd
from gptutor.openrouter.circuit import CircuitBreaker
from gptutor.openrouter.clock import ClockSkew
from gptutor.openrouter.connection import ERROR_STATUS_MIN, UpstreamConnection
from gptutor.openrouter.connection_pool import ConnectionPool, pooled
from gptutor.openrouter.errors import PoolExhausted, UpstreamError, error_from_response
from gptutor.openrouter.response import UpstreamResponse
from gptutor.openrouter.retry import Failure, retry_delay_s
from gptutor.telemetry.metrics import UPSTREAM_FAILURES, UPSTREAM_RETRIES, status_label

LOGGER = logging.getLogger("gptutor.openrouter")

GET_TIMEOUT_S = 30.0
OLD_KEY_STATUSES = frozenset({401, 403, 404})
"""OpenRouter's statuses for a generation that was made with an old API key."""


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
    """`headers` are sent with every request; `target_prefix` precedes the path in every request line."""

    def __init__(
        self,
        pool: ConnectionPool,
        target_prefix: str,
        headers: Mapping[str, str],
        limits: UpstreamLimits,
        account: Account,
        old_api_keys: Sequence[str] = (),
    ) -> None:
        self.account = account
        self._pool = pool
        self._target_prefix = target_prefix.encode()
        self._headers = headers
        self._encoded_headers = _encode_headers(headers)
        self._old_api_keys = old_api_keys
        self._limits = limits
        self._circuit = CircuitBreaker()
        self._clock_skew = ClockSkew()
        self._clock = asyncio.get_running_loop().time

    async def complete(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        stream: bool,
        is_wanted: Callable[[], bool],
        before_attempt: Callable[[], None],
        nothing_bought: Callable[[], None],
    ) -> tuple[UpstreamResponse, float]:
        """Requests a completion, and retries while nothing can have been bought and `is_wanted()`.

        `headers` are the client's, of FORWARDED_HEADERS. `before_attempt` is called before each attempt, `nothing_bought` after a
        failure that proves just that. Returns the response, and the seconds left for the rest of a plain one. Raises
        UpstreamError.
        """
        clock = self._clock
        deadline = clock() + (self._limits.first_byte_s if stream else self._limits.total_s)
        is_probe = self.account.begin_completion()
        attempt = 1
        while True:
            if not self._circuit.allows_request(clock()):
                raise UpstreamError(Failure("unreachable"))
            before_attempt()
            try:
                response = await self._attempt(body, headers, deadline - clock())
                if is_probe:
                    self.account.record_success()
                return response, deadline - clock()
            except UpstreamError as error:
                if error.trouble is not None:
                    self.account.record_trouble(error.trouble)
                if error.failure.bought_nothing:
                    nothing_bought()
                delay_s = retry_delay_s(
                    error.failure,
                    attempt=attempt,
                    attempts_max=self._limits.attempts_max,
                    left_s=deadline - clock(),
                )
                UPSTREAM_FAILURES.add((error.failure.kind, status_label(error.failure.status)))
                if delay_s is None or not is_wanted():
                    raise
                failed = error
            await asyncio.sleep(delay_s)
            if not is_wanted():
                raise failed
            UPSTREAM_RETRIES.inc()
            attempt += 1

    async def _attempt(self, body: bytes, headers: Mapping[str, str], timeout_s: float) -> UpstreamResponse:
        try:
            connection = self._pool.acquire_idle()
            if connection is None:
                connection = await self._pool.acquire()
                self._circuit.record_success()  # the circuit is about connecting: a response may be slow
        except PoolExhausted:
            raise
        except UpstreamError:
            self._circuit.record_failure(self._clock())
            raise
        response = await self._send(
            connection, self._request_headers(b"POST", "/chat/completions", headers, body), body, timeout_s
        )
        self._circuit.record_success()
        if response.status < ERROR_STATUS_MIN:
            return response
        # By its status the response is an error, whatever happens to the rest of it.
        raise await _read_error(response)

    async def _send(self, connection: UpstreamConnection, headers: bytes, body: bytes, timeout_s: float) -> UpstreamResponse:
        try:
            await connection.send_request(headers, body, timeout_s)
        except BaseException:
            self._pool.release(connection)
            raise
        return UpstreamResponse(connection, self._pool.release, self._limits.idle_s, self._limits.end_s)

    def _request_headers(self, method: bytes, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        encoded = _encode_headers({**self._headers, **headers}) if headers else self._encoded_headers
        return b"%b %b%b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (
            method,
            self._target_prefix,
            path.encode(),
            encoded,
            len(body),
        )

    async def generation(self, generation_id: str) -> Bill | None:
        """The bill of a finished generation, or None while OpenRouter does not know it. Raises UpstreamError."""
        document = await self._fetch_generation(generation_id)
        try:
            record = msgspec.json.decode(document, type=_GenerationResponse).data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        cost = parse_usd(bytes(record.total_cost))
        if cost is not None and record.is_byok is True:
            provider_cost = parse_usd(bytes(record.upstream_inference_cost))
            cost = cost + provider_cost if provider_cost is not None else None
        if cost is None:
            return None
        return Bill(cost, record.tokens_prompt, record.tokens_completion, generation_id)

    async def _fetch_generation(self, generation_id: str) -> bytes:
        """Tries the current API key, and where that one does not know the generation, the old ones. Raises UpstreamError."""
        query = {"id": generation_id}
        try:
            return await self.get("/generation", query)
        except UpstreamError as error:
            if error.failure.status in OLD_KEY_STATUSES:
                for key in self._old_api_keys:
                    with contextlib.suppress(UpstreamError):
                        return await self.get("/generation", query, {"Authorization": f"Bearer {key}"})
            raise

    async def cost_of(self, generation_id: str) -> Decimal | None:
        """What a generation cost in dollars, or None while its cost cannot be looked up."""
        try:
            bill = await self.generation(generation_id)
        except UpstreamError as error:
            LOGGER.info("The generation %s cannot be looked up now: %s", generation_id, error)
            return None
        return bill.cost_usd if bill is not None else None

    async def models(self) -> bytes:
        """The model list, as OpenRouter encoded it. Raises UpstreamError."""
        return await self.get("/models", {"output_modalities": "all"})  # by default only models with text output are listed

    async def get(self, path: str, query: dict[str, str] | None = None, headers: Mapping[str, str] | None = None) -> bytes:
        """The body of a response with status 200. Raises UpstreamError."""
        if query:
            path += "?" + urlencode(query)
        connection = self._pool.acquire_idle() or await self._pool.acquire()
        response = await self._send(connection, self._request_headers(b"GET", path, headers or {}), b"", GET_TIMEOUT_S)
        if response.status != 200:
            raise await _read_error(response)
        try:
            self._clock_skew.observe(connection.headers.get("date"))
            return await response.read_body(GET_TIMEOUT_S)
        finally:
            response.close()


def _encode_headers(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("utf-8", "surrogateescape")


async def _read_error(response: UpstreamResponse) -> UpstreamError:
    try:
        return error_from_response(response.status, response.headers, await response.read_error_body())
    finally:
        response.close()


class _Generation(msgspec.Struct):
    total_cost: msgspec.Raw = msgspec.Raw()
    upstream_inference_cost: msgspec.Raw = msgspec.Raw()
    is_byok: bool | None = None
    tokens_prompt: int | None = None
    tokens_completion: int | None = None


class _GenerationResponse(msgspec.Struct):
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
    account: Account | None = None,
) -> AsyncIterator[OpenRouterService]:
    """A service with a connection pool of its own, which is closed on exit. `account` is not watched here."""
    async with pooled(base_url, proxy, connections_max=connections_max, connect_s=limits.connect_s) as (pool, origin):
        headers = {
            "Host": origin.host_header,
            "Authorization": f"Bearer {api_key}",
            "Content-Type": "application/json",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # the bytes are relayed unchanged, and a scanner reads them
            "User-Agent": "GPTutor",
            **({"HTTP-Referer": referer} if referer else {}),
            **({"X-Title": title} if title else {}),
            **pool.headers,
        }
        yield OpenRouterService(pool, pool.target_prefix, headers, limits, account or Account(), old_api_keys)
