"""Fail at every await: a request is run once for each point at which it waits, and fails there — by an exception, by a
cancellation, by the death of the process. Whatever is left open must recover to exactly the simulator's own bill (contract C3, C6, C8;
rows process-1 to process-6, process-8, process-12, process-13).

How: an exchange's coroutine is driven by hand, and its suspensions are counted. Death means that from that instant nothing which the
process does has an effect: its task stops without running any `finally`, its statements and its journal go nowhere, its upstream
connection breaks. What the database has committed stays committed. Then a new process starts on the same journal and the same database.
"""

import asyncio
import atexit
import gc
import json
import logging
import types
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gptutor.api.chat.event_stream import EventStream
from gptutor.app import build_app
from gptutor.config import schema
from gptutor.database.pool import Database
from gptutor.http.app_keys import DATABASE, JOURNAL, SERVICES
from gptutor.money.invariants import check
from gptutor.server.serve import listening, simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.logs import LoggerService
from tests.support.accounting import charged_usd
from tests.support.gateway import SECRET, Client, Gateway, config_for, gateway_on, make_client

GRAVEYARD: list[Any] = []
"""The coroutines of dead processes: kept, because collecting them would run their `finally`."""
atexit.register(logging.disable, logging.CRITICAL)  # at the interpreter's exit they are collected after all, and log errors


class Injected(Exception):
    """The exception that is injected."""


class Strike(BackgroundTasks):
    """Runs exchanges, and injects a failure into the next one at its `point`-th suspension."""

    def __init__(self) -> None:
        super().__init__()
        self.point = 0
        self.how = ""
        self.suspensions = 0
        self.died = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return super().start(self._drive(work))

    async def _drive(self, work: Coroutine[None, None, None]) -> None:
        await self._steps(work)

    @types.coroutine
    def _steps(self, work: Coroutine[None, None, None]) -> Generator[Any, Any, None]:
        self.suspensions = 0
        strike: BaseException | None = None
        while True:
            try:
                waits_for = work.throw(strike) if strike is not None else work.send(None)
            except StopIteration:
                return
            except asyncio.CancelledError:
                if strike is None:
                    raise
                return
            strike = None
            self.suspensions += 1
            if self.suspensions != self.point:
                yield waits_for
            elif self.how == "death":
                GRAVEYARD.append((work, waits_for))
                if waits_for is not None:
                    waits_for.add_done_callback(lambda future: future.cancelled() or future.exception())
                self.died.set()
                return
            else:
                if waits_for is not None:
                    GRAVEYARD.append(waits_for)
                    waits_for._asyncio_future_blocking = False
                strike = Injected("here") if self.how == "exception" else asyncio.CancelledError()


@asynccontextmanager
async def process(config: schema.Config, database: Database, simulator: Simulator) -> AsyncIterator[tuple[Gateway, Strike]]:
    """A gateway whose exchanges can be made to fail, or to die."""
    app = build_app(config, log=LoggerService(), secrets=[SECRET])
    async with listening(app, config) as url, aiohttp.ClientSession() as session:
        gateway = Gateway(url, app, simulator, database, session)
        await gateway.ready()
        strike = Strike()
        object.__setattr__(app[SERVICES], "in_flight", strike)
        yield gateway, strike


async def kill(gateway: Gateway) -> None:
    """From now on nothing that this process does takes effect."""

    async def nowhere(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    gateway.app[DATABASE].fetch = nowhere  # type: ignore[method-assign]
    gateway.app[DATABASE].fetchrow = nowhere  # type: ignore[method-assign]
    gateway.app[SERVICES].upstream._pool.close()
    for connection in (thing for thing in gc.get_objects() if isinstance(thing, aiohttp.connector.Connection)):
        connection._protocol = None  # a dead process does not warn about unclosed connections
    journal = gateway.app[JOURNAL]
    journal._append = lambda lines: None  # type: ignore[method-assign]
    journal.close = lambda: None  # type: ignore[method-assign]


async def send_request(gateway: Gateway, strike: Strike, client: Client, stream: bool) -> tuple[int, bytes]:
    """Sends one request, and returns the response, an error, or (0, b"") for a closed connection."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream, "max_tokens": 6}
    request = asyncio.create_task(gateway.session.post(gateway.chat_url, json=body, headers=client.headers))
    death = asyncio.create_task(strike.died.wait())
    try:
        await asyncio.wait({request, death}, return_when=asyncio.FIRST_COMPLETED)
        if strike.died.is_set():
            return 0, b""
        response = await request
        read = asyncio.create_task(response.read())
        await asyncio.wait({read, death}, return_when=asyncio.FIRST_COMPLETED)
        if strike.died.is_set():
            read.cancel()
            response.close()
            return 0, b""
        return response.status, await read
    except aiohttp.ClientError:
        return 0, b""
    finally:
        request.cancel()
        death.cancel()
        await asyncio.gather(request, death, return_exceptions=True)


async def assert_exact(gateway: Gateway, client: Client, database: Database, may_wait: bool) -> None:
    """What the simulator billed is charged exactly once, or its hold stays open for lack of a generation id."""
    async with asyncio.timeout(15):
        while True:
            rows = [row for row in await database.fetch("list_waiting_holds", 1000) if row["account_id"] == client.account_id]
            nameless = [row for row in rows if row["generation_id"] is None]
            if len(nameless) == len(rows) and (nameless or not await client.held()):
                break
            await asyncio.sleep(0.02)
    records = gateway.simulator.billing.records.values()
    billed = sum(record.cost_usd for record in records)
    charged = await charged_usd(gateway, client)
    if nameless:
        assert charged == 0
        assert may_wait, "a hold waits although its request was never sent"
    else:
        assert charged == billed
    assert [finding.invariant.name async for finding in check(database) if finding.rows] == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("how", ["exception", "cancellation", "death"])
async def test_a_request_that_fails_at_any_await_is_still_billed_exactly(
    database_url: str, database: Database, tmp_path: Path, how: str, stream: bool
) -> None:
    simulator = Simulator(word_s=0.002, first_word_s=0.002)  # so that a stream arrives in several chunks
    tuned = {"recovery": {"poll_s": 0.02}, "relay": {"disconnected_drain_s": 0.2}}
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        config = config_for(database_url, base_url, tmp_path, tuned)
        point, settled, refused = 0, 0, 0
        while True:
            point += 1
            simulator.billing.records.clear()
            client = await make_client(database, "100")
            async with process(config, database, simulator) as (gateway, strike):
                strike.point, strike.how = point, how
                status, answer = await send_request(gateway, strike, client, stream)
                if strike.died.is_set():
                    await kill(gateway)
                async with asyncio.timeout(10):
                    while len(strike):
                        await asyncio.sleep(0.005)
                survived = strike.suspensions < point
                if not strike.died.is_set():
                    await assert_exact(gateway, client, database, may_wait=point > 1)  # point 1 is the wait for the hold itself
            if strike.died.is_set():
                async with process(config, database, simulator) as (heir, _):
                    await assert_exact(heir, client, database, may_wait=point > 1)
            settled += await charged_usd(gateway, client) > 0
            refused += status >= 400
            await database.fetch("release_holds", *await waiting(database))
            if survived:
                assert status == 200
                assert answer.endswith(b"data: [DONE]\n\n") if stream else json.loads(answer)["usage"]
                break
        print(f"{how}, stream={stream}: {point - 1} points, {settled} settled, {refused} refused")
        assert point > (4 if stream else 3), "no failure was injected"
        assert settled >= 2


@pytest.mark.timeout(60)
async def test_a_stream_that_fails_at_a_chunk_is_still_billed_exactly(
    database_url: str, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are passed on in the socket's callback, without an await: each chunk is a point as well."""
    simulator = Simulator(word_s=0.002, first_word_s=0.002)
    tuned = {"recovery": {"poll_s": 0.02}, "relay": {"disconnected_drain_s": 0.2}}
    write, piece, point = EventStream.write, 0, 0

    def failing(stream: EventStream, chunk: bytes, *, is_last: bool = False) -> bool:
        nonlocal piece
        piece += 1
        if piece == point:
            raise Injected("here")
        return write(stream, chunk, is_last=is_last)

    monkeypatch.setattr(EventStream, "write", failing)
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url,
        gateway_on(config_for(database_url, base_url, tmp_path, tuned), database, simulator) as gateway,
    ):
        for point in (1, 2, 5):
            piece = 0
            simulator.billing.records.clear()
            client = await make_client(database, "100")
            await send_request(gateway, Strike(), client, stream=True)
            await gateway.idle()
            assert piece == point
            await assert_exact(gateway, client, database, may_wait=False)


async def waiting(database: Database) -> tuple[list[Any], list[Any], list[bool]]:
    """The open holds without a generation id, to be released before the next round."""
    rows = [row for row in await database.fetch("list_waiting_holds", 1000) if row["state"] != "unresolved"]
    return [row["account_id"] for row in rows], [row["hold_id"] for row in rows], [True] * len(rows)


def test_the_injection_works() -> None:
    async def work(log: list[str]) -> None:
        try:
            await asyncio.sleep(0)
            log.append("one")
            await asyncio.sleep(0)
            log.append("two")
        except Injected:
            log.append("struck")
        finally:
            log.append("finally")

    async def run(point: int, how: str) -> list[str]:
        strike, log = Strike(), list[str]()
        strike.point, strike.how = point, how
        strike.start(work(log))
        while len(strike):
            await asyncio.sleep(0)
        return log

    assert asyncio.run(run(0, "")) == ["one", "two", "finally"]
    assert asyncio.run(run(1, "exception")) == ["struck", "finally"]
    assert asyncio.run(run(2, "exception")) == ["one", "struck", "finally"]
    assert asyncio.run(run(2, "cancellation")) == ["one", "finally"]
    assert asyncio.run(run(2, "death")) == ["one"]
