"""OpenRouter's API as a client sees it: `OpenRouterService`.

This is the rim at which aiohttp's client exceptions become ours. Bytes come through as they were sent: nothing is decompressed
(identity is asked for), re-framed or decoded. Redirects are not followed: our key must not travel.
"""

import asyncio
import contextlib
import io
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import aiohttp
import msgspec

from gptutor.metrics import UPSTREAM_FAILURES, UPSTREAM_RETRIES
from gptutor.openrouter.bill import Bill, parse_usd, sane_generation_id
from gptutor.openrouter.circuit import Circuit
from gptutor.openrouter.retry import Failure, pause_before_retry

LOGGER = logging.getLogger("gptutor.openrouter")

# Both lists are complete: what is not in them does not pass, hop-by-hop headers and cookies least of all.
# The headers of a request that reach OpenRouter beside our own: they change what the answer is, and say nothing of the caller.
SENT_ON = ("X-OpenRouter-Metadata", "x-anthropic-beta")
# The headers of an answer that reach the caller; all others are OpenRouter's and its edge's own affair. It is asked not to
# compress, but if it does, the bytes are passed as they are, and the caller must know.
PASSED_ON = ("Content-Type", "Content-Encoding", "X-Generation-Id")
ONE_WRITE_BYTES_MAX = 1024 * 1024
"""A larger request is sent in pieces: one write of it would hold up everybody else."""
GET_S = 30.0
LOOK_S = 1.0
"""How often a silent connection is looked at."""
ERROR_BYTES_MAX = 64 * 1024
ERROR_BODY_S = 5.0
MESSAGE_CHARACTERS_MAX = 1000


NEVER_SENT = (
    aiohttp.ClientConnectorError,  # refused, no such host, a certificate that is none, a proxy that is away
    aiohttp.ConnectionTimeoutError,
)


class UpstreamError(Exception):
    """OpenRouter gave no answer. `message` is its own text for the caller, where it has one."""

    def __init__(self, failure: Failure, message: str | None = None) -> None:
        super().__init__(f"{failure.kind} {failure.status or ''}".strip())
        self.failure = failure
        self.message = message


class Reply:
    """An answer whose headers have come: read its bytes by `read()` or by iterating `chunks()`, then `close()` it.

    A stream may be silent for `idle_s`, and for `end_s` once its end is expected.
    """

    def __init__(self, response: aiohttp.ClientResponse, idle_s: float, end_s: float) -> None:
        self._response = response
        self._idle_s = self._silence_s = idle_s
        self._end_s = end_s
        self.status = response.status
        self.headers = {name: response.headers[name] for name in PASSED_ON if name in response.headers}
        self.generation_id = _generation_id(response)
        self.is_event_stream = response.content_type == "text/event-stream"
        self.is_encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        """Compressed against our wish: nothing can be read in it, or added to it."""

    async def chunks(self, quiet_s: float) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, and `b""` after each `quiet_s` of silence.

        Raises UpstreamError if it ends before its end, or is silent for too long.
        """
        content = self._response.content
        clock = asyncio.get_running_loop().time
        heard = told = clock()
        with _translated(self.generation_id):
            while True:
                wait_s = min(LOOK_S, told + quiet_s - clock(), heard + self._silence_s - clock())
                try:
                    async with asyncio.timeout(wait_s):
                        chunk = await content.readany()
                except TimeoutError:
                    if content.is_eof() or content.exception() is not None:
                        continue  # it came in the very moment
                    if self._is_lost():
                        raise aiohttp.ClientPayloadError("bad framing") from None
                    if clock() - heard >= self._silence_s:
                        raise
                    if clock() - told >= quiet_s:
                        told = clock()
                        yield b""
                    continue
                except (aiohttp.ClientError, OSError):
                    if rest := _buffered(content):
                        yield rest
                    raise
                if not chunk:
                    return
                yield chunk
                heard = told = clock()

    async def read(self, within_s: float) -> bytes:
        """The whole body. Raises UpstreamError."""
        with _translated(self.generation_id):
            async with asyncio.timeout(within_s):
                return await self._response.read()

    def _is_lost(self) -> bool:
        """Whether nothing can come any more: aiohttp drops a connection whose framing is broken, and does not tell the reader."""
        connection = self._response.connection
        return connection is None or connection.transport is None or connection.transport.is_closing()

    def expect_end(self, expected: bool = True) -> None:
        """All that matters has been said, or (False) not yet: how long silence is worth waiting for."""
        self._silence_s = min(self._idle_s, self._end_s) if expected else self._idle_s

    def close(self) -> None:
        """Gives the connection back if the body was read to its end, and drops it otherwise."""
        self._response.release() if self._response.content.at_eof() else self._response.close()


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and counts for one request; the names are those of `config.yaml`, section `openrouter`."""

    connect_s: float
    total_s: float
    first_byte_s: float
    idle_s: float
    end_s: float
    attempts_max: int


class OpenRouterService:
    def __init__(self, session: aiohttp.ClientSession, base_url: str, limits: Limits) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._limits = limits
        self._circuit = Circuit()
        # `connect` counts the wait for a free connection too: whoever waited in vain has bought nothing.
        # All other times are kept here, by what they mean.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=limits.connect_s)

    async def complete(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        stream: bool,
        wanted: Callable[[], bool],
        attempting: Callable[[], None],
        refused: Callable[[], None],
    ) -> tuple[Reply, float]:
        """Sends a request for a completion, and again where that is harmless and still `wanted`.

        `headers` are those of SENT_ON that the caller gave. `attempting` is called before each attempt, `refused` after one that
        proves that nothing was bought. Gives the reply, and the seconds that are left for the rest of a plain answer. Raises
        UpstreamError.
        """
        clock = asyncio.get_running_loop().time
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

    async def _attempt(self, body: bytes, headers: Mapping[str, str], within_s: float) -> Reply:
        progress = _Progress()
        try:
            response = await self._post(body, headers, within_s, progress)
        except UpstreamError as error:
            if error.failure.kind == "unreachable" and not progress.has_queued:  # a full house of ours says nothing of OpenRouter
                self._circuit.missed(asyncio.get_running_loop().time())
            raise
        self._circuit.reached()
        if response.status < 300:
            return Reply(response, self._limits.idle_s, self._limits.end_s)
        # The status has come: whatever happens to the rest of the answer, it is one of refusal.
        async with response:
            raise await _refused(response)

    async def _post(
        self, body: bytes, headers: Mapping[str, str], within_s: float, progress: "_Progress"
    ) -> aiohttp.ClientResponse:
        with _translated(progress=progress):
            async with asyncio.timeout(within_s):
                return await self._session.post(
                    f"{self._base_url}/chat/completions",
                    data=body if len(body) <= ONE_WRITE_BYTES_MAX else io.BytesIO(body),
                    headers=headers,
                    allow_redirects=False,
                    timeout=self._timeout,
                    trace_request_ctx=progress,
                )

    async def generation(self, generation_id: str) -> Bill | None:
        """The bill of a finished generation, or None while OpenRouter does not know it. Raises UpstreamError."""
        document = await self.get("/generation", {"id": generation_id})
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

    async def get(self, path: str, query: dict[str, str] | None = None) -> bytes:
        with _translated():
            async with (
                asyncio.timeout(GET_S),
                self._session.get(self._base_url + path, params=query, allow_redirects=False, timeout=self._timeout) as response,
            ):
                if response.status != 200:
                    raise await _refused(response)
                return await response.read()


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
    base_url: str, api_key: str, limits: Limits, *, referer: str, title: str, connections_max: int, proxy: str = ""
) -> AsyncIterator[OpenRouterService]:
    """A service with its pool of connections, which is closed at the end."""
    headers = {
        "Authorization": f"Bearer {api_key}",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",  # bytes are relayed as they come, and a scanner reads them
        "User-Agent": "GPTutor",
        **({"HTTP-Referer": referer} if referer else {}),
        **({"X-Title": title} if title else {}),
    }
    # An idle connection is dropped well before OpenRouter's edge drops it: a request sent into a closing one is lost.
    # The certificates are read now, so that SSL_CERT_FILE is heard; aiohttp has read its own when it was imported.
    connector = aiohttp.TCPConnector(limit=connections_max, keepalive_timeout=15, ssl=ssl.create_default_context())
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        auto_decompress=False,
        trust_env=False,
        proxy=proxy or None,
        trace_configs=[_noting_progress()],
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield OpenRouterService(session, base_url, limits)


@dataclass(slots=True)
class _Progress:
    """How far an attempt has come: whoever has no connection yet has bought nothing, whatever the exception is."""

    has_queued: bool = False
    is_connected: bool = False


def _noting_progress() -> aiohttp.TraceConfig:
    async def queued(session: aiohttp.ClientSession, request: Any, event: Any) -> None:
        if request.trace_request_ctx is not None:
            request.trace_request_ctx.has_queued = True

    async def connected(session: aiohttp.ClientSession, request: Any, event: Any) -> None:
        if request.trace_request_ctx is not None:
            request.trace_request_ctx.is_connected = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_queued_start.append(queued)
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    return trace


def _buffered(content: aiohttp.StreamReader) -> bytes:
    """What arrived before a connection broke: aiohttp's reader raises first, and has no public way to what it still holds."""
    return content._read_nowait(-1) if content._buffer else b""


class _translated:  # noqa: N801 - reads as a statement
    """Turns aiohttp's exceptions into UpstreamError, by what they prove about the purchase.

    Those that quote the proxy's address, and its password with it, are not kept as the cause.
    """

    def __init__(self, generation_id: str | None = None, *, progress: _Progress | None = None) -> None:
        self._generation_id = generation_id
        self._progress = progress

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (aiohttp.ClientHttpProxyError, aiohttp.InvalidURL)):
            raise UpstreamError(Failure("unreachable")) from None
        never_connected = self._progress is not None and not self._progress.is_connected
        if isinstance(error, NEVER_SENT) or (never_connected and isinstance(error, (aiohttp.ClientError, OSError, ValueError))):
            raise UpstreamError(Failure("unreachable")) from error
        if isinstance(error, TimeoutError):
            raise UpstreamError(Failure("timeout", generation_id=self._generation_id)) from error
        if isinstance(error, (aiohttp.ClientError, OSError)):
            raise UpstreamError(Failure("broken", generation_id=self._generation_id)) from error


async def _refused(response: aiohttp.ClientResponse) -> UpstreamError:
    """The error that a status of refusal means, with OpenRouter's sentence if the body has one."""
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(ERROR_BODY_S):
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > ERROR_BYTES_MAX:
                    break
    is_ours, message = _read_error(body)
    from_the_edge = response.status >= 500 and not is_ours
    return UpstreamError(_failure(response, "broken" if from_the_edge else "status"), message)


def _failure(response: aiohttp.ClientResponse, kind: Literal["status", "broken"]) -> Failure:
    return Failure(
        kind,
        status=response.status,
        retry_after_s=_seconds(response.headers.get("Retry-After")),
        generation_id=_generation_id(response),
    )


def _generation_id(response: aiohttp.ClientResponse) -> str | None:
    return sane_generation_id(response.headers.get("X-Generation-Id"))


def _seconds(text: str | None) -> float | None:
    """Retry-After in its form of seconds; its form of a date is rare and read as no hint."""
    return float(text) if text is not None and text.isdecimal() and len(text) < 6 else None


class _Error(msgspec.Struct):
    message: str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _Error | str | None = None


def _read_error(document: bytes) -> tuple[bool, str | None]:
    """Whether a body is OpenRouter's word of an error, and not its edge's page; and its sentence about it, if it has one."""
    try:
        error = msgspec.json.decode(document, type=_ErrorAnswer).error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False, None
    message = error.message if isinstance(error, _Error) else error
    return error is not None, message[:MESSAGE_CHARACTERS_MAX] if message else None
