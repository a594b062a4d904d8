"""What users of other gateways complain of, each complaint as a test that those gateways fail (`design/peers.md`; the docstrings give
its numbers; contract C2 to C9, B4, B8). OpenRouter is the simulator, or a scripted server where the response must be unusual."""

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from gptutor.api.chat.request import ParsedRequest
from gptutor.config import schema
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.http.app_keys import DATABASE, JOURNAL
from gptutor.money.administration import Bookkeeper
from gptutor.money.amounts import Nano
from gptutor.money.bookings import AlreadyBooked, Bookings
from gptutor.money.invariants import check
from gptutor.money.journal import Journal
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.openrouter.service import OpenRouterService
from gptutor.server.serve import listening, simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Client, Gateway, config_for, gateway_on, make_client
from tests.support.late import LateImport
from tests.support.ledger import assert_invariants_hold, hold, ledger_of, release, settlement
from tests.support.statements import Statements

if TYPE_CHECKING:
    import openai
else:
    openai = LateImport("openai")

ROUTER = "openrouter/auto"
SMALL = "openai/gpt-4o-mini"


async def charges(client: Client) -> list[Decimal]:
    """The charges of the user, in roubles, the newest first."""
    entries = await Bookings(client.database).entries(client.account_id, 1000)
    return [Decimal(-entry.amount) / 10**9 for entry in entries if entry.kind == "charge"]


# -- parallel overdraft


async def test_parallel_requests_never_overdraw(gateway: Gateway) -> None:
    """Complaints 1, 24 (LiteLLM #34732, one-api #505, sub2api #3384): parallel requests read the same balance, and all were accepted."""
    gateway.simulator.first_word_s = 1.0  # on a busy machine all requests have come before the first one is settled
    client = await gateway.client("5")
    # 16,384 tokens × 0.0000006 dollars × 90 roubles × 1.1 ≈ 0.973 roubles: five such holds fit into five roubles.
    replies = await asyncio.gather(*(gateway.chat(client, model=SMALL, max_tokens=16_384) for _ in range(40)))
    statuses = [response.status for response, _ in replies]
    assert sorted(set(statuses)) == [200, 402]
    assert statuses.count(200) == 5
    assert (await client.user()).available >= 0
    await assert_charges_match_bills(gateway, client, "5")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/responses", "/chat/completions", "/v1/messages"])
async def test_no_route_bypasses_billing(gateway: Gateway, path: str) -> None:
    """Complaint 23 (Bifrost #2873): a pass-through route skipped the budget."""
    client = await gateway.client()
    body = {"model": SMALL, "messages": [{"role": "user", "content": "Hello"}]}
    async with gateway.session.post(gateway.url + path, json=body, headers=client.headers) as response:
        assert response.status == 404
    assert not gateway.simulator.billing.records


async def test_a_large_balance_is_held_like_a_small_one(gateway: Gateway) -> None:
    """Complaint 24 (new-api and one-api's trust threshold): users with a large balance had no holds, and their parallel requests were free."""
    gateway.simulator.first_word_s = 0.2
    client = await gateway.client("1000000")
    waiting = asyncio.create_task(gateway.chat(client, model=SMALL, max_tokens=16_384))
    async with asyncio.timeout(5):
        while not gateway.simulator.billing.records:
            await asyncio.sleep(0.005)
    assert await client.held() > Decimal("0.9")
    await waiting


async def test_without_database_requests_are_rejected(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 2 (LiteLLM #26672): if the budget could not be read, the request was accepted."""
    client = await gateway.client()
    database = gateway.app[DATABASE]
    Statements(database, monkeypatch).lost_requests.append("settle_and_hold")
    response, _ = await gateway.chat(client)
    assert response.status == 503
    assert not gateway.simulator.billing.records
    await assert_charges_match_bills(gateway, client)


# -- leaked holds

FAILURES = [
    "fault:status=400",
    "fault:status=401",
    "fault:status=402",
    "fault:status=403",
    "fault:status=404",
    "fault:status=500",
    "fault:status=502:0",
    "fault:html=524",
    "fault:cut=0",
    "fault:cut=2",
    "fault:cut-inside=0",
    "fault:error=1",
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAILURES)
async def test_no_upstream_failure_leaks_a_hold(gateway: Gateway, fault: str, stream: bool) -> None:
    """Complaints 3, 16 (LiteLLM #27639, new-api #4429, one-api): the hold of a failed request was never released."""
    client = await gateway.client()
    response, _ = await gateway.chat(client, fault, stream=stream)
    await gateway.idle()
    if fault == "fault:html=524":  # it may still be running behind the edge proxy: the hold waits for evidence, and is listed
        assert response.status == 500
        (waiting,) = await gateway.database.fetch("list_waiting_holds", 1000)
        assert (waiting["account_id"], waiting["state"]) == (client.account_id, "awaiting_evidence")
        assert await charges(client) == []
    else:
        await assert_charges_match_bills(gateway, client)


BROKEN_METHODS: dict[str, tuple[type, str]] = {
    "the ceiling": (LLMCostEvaluate, "ceiling"),
    "the body for upstream": (ParsedRequest, "upstream_body"),
    "the first journal record": (Journal, "record_sent"),
    "the client for OpenRouter": (OpenRouterService, "complete"),
    "the upstream call": (OpenRouterService, "_attempt"),
}


@pytest.mark.parametrize("place", BROKEN_METHODS)
async def test_no_internal_exception_leaks_a_hold(gateway: Gateway, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 16 (new-api #4429): six of eight holds were neither settled nor released after a panic."""
    client = await gateway.client()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"a bug in {place}")

    with monkeypatch.context() as patch:
        patch.setattr(*BROKEN_METHODS[place], broken)
        response, document = await gateway.chat(client)
    assert (response.status, json.loads(document)) == (500, {"error": "Internal server error"})
    assert not gateway.simulator.billing.records
    assert await charges(client) == []
    await gateway.idle()
    if place == "the upstream call":  # something may have been sent: the hold waits for evidence, and is listed
        assert [row["state"] for row in await gateway.database.fetch("list_waiting_holds", 1000)] == ["awaiting_evidence"]
    else:
        await assert_charges_match_bills(gateway, client)


async def test_one_request_has_one_hold_for_all_its_attempts(gateway: Gateway) -> None:
    """Complaint 3 (one-api's retry loop): each attempt made a new hold, and only one was released."""
    client = await gateway.client()
    response, _ = await gateway.chat(client, "fault:status=503:0")
    assert response.status == 500
    assert await gateway.database.fetch("list_waiting_holds", 1000) == []
    async with gateway.database.snapshot() as connection:
        assert await connection.fetchval("SELECT count(*) FROM holds") == 1
    await assert_charges_match_bills(gateway, client)


# -- double refund


@pytest.mark.parametrize("steps", [("release", "release"), ("release", "settle"), ("settle", "release"), ("settle", "settle")])
@pytest.mark.parametrize("at_once", [False, True])
async def test_nothing_is_refunded_or_charged_twice(database: Database, steps: tuple[str, str], at_once: bool) -> None:
    """Complaint 17 (new-api #5556): amount and state were not changed in one transaction, so a repeated refund was paid twice."""
    client = await make_client(database, "100")
    ledgers = ledger_of(database), ledger_of(database)  # two processes
    held, other = await hold(database, client, "5"), await hold(database, client, "5")
    operations: list[Awaitable[Any]] = [
        ledger.release(release(held)) if step == "release" else ledger.settle(settlement(held, "0.01"))
        for step, ledger in zip(steps, ledgers, strict=True)
    ]
    if at_once:
        await asyncio.gather(*operations)
    else:
        for operation in operations:
            await operation
    assert await client.balance() == (Decimal("99.1") if "settle" in steps else 100)
    assert await client.held() == 5  # the other hold is unchanged
    assert other.amount == 5 * 10**9
    await assert_invariants_hold(database)


async def test_a_top_up_that_is_reported_twice_is_credited_once(database: Database) -> None:
    """Complaint 17, and every payment webhook: a repeated notification is not a second payment."""
    client = await make_client(database, "0")
    await asyncio.gather(
        *(Bookings(database).book(client.account_id, "topup", Nano(10**9), reference="pay") for _ in range(5)),
        return_exceptions=True,
    )
    with pytest.raises(AlreadyBooked):
        await Bookings(database).book(client.account_id, "topup", Nano(10**9), reference="pay")
    with pytest.raises(AlreadyBooked):  # nor to another account
        await Bookings(database).book((await make_client(database, "0")).account_id, "topup", Nano(10**9), reference="pay")
    assert await client.balance() == 1
    await assert_invariants_hold(database)


# -- responses without charge


def reset_on_close(response: aiohttp.ClientResponse) -> None:
    """The connection will be closed with a reset (RST) instead of an orderly FIN."""
    assert response.connection is not None
    assert response.connection.transport is not None
    sock = response.connection.transport.get_extra_info("socket")
    sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("model", [SMALL, "google/gemini-2.5-flash-lite"])
@pytest.mark.parametrize(
    "moment", ["before the first byte", "after the first byte", "in the middle of the stream", "right before the usage"]
)
async def test_a_client_that_disconnects_pays_what_openrouter_charges(
    gateway: Gateway, moment: str, model: str, with_reset: bool
) -> None:
    """Complaints 5, 6, 19, 20 (LiteLLM #14457, new-api #7062): clients that disconnected before the usage chunk paid nothing."""
    gateway.simulator.word_s = 0.005
    gateway.simulator.first_word_s = 0.1
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "model": model}
    if moment == "before the first byte":
        request = asyncio.create_task(gateway.session.post(gateway.chat_url, json=body, headers=client.headers))
        async with asyncio.timeout(5):
            while not gateway.simulator.billing.records:
                await asyncio.sleep(0.001)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    else:
        marker = {
            "after the first byte": b":",
            "in the middle of the stream": b"simulator",
            "right before the usage": b'"finish_reason":"stop"',
        }
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            received = b""
            while marker[moment] not in received:
                received += await response.content.readany()
            if with_reset and response.connection is not None:
                reset_on_close(response)
            response.close()
    await gateway.idle()
    await gateway.recovered(client)
    assert gateway.billed_usd() > 0
    assert len(await charges(client)) == 1
    await assert_charges_match_bills(gateway, client)


async def test_disconnecting_repeatedly_before_the_usage_is_charged_each_time(gateway: Gateway) -> None:
    """Complaint 20 (new-api #4186): read the useful part of the stream, disconnect before the usage, repeat."""
    gateway.simulator.word_s = 0.002
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}

    async def read_and_disconnect() -> None:
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            while b"simulator" not in await response.content.readany():
                pass
            response.close()

    await asyncio.gather(*(read_and_disconnect() for _ in range(10)))
    await assert_charges_match_bills(gateway, client)
    assert len(await charges(client)) == 10


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["no-usage", "cost=null", "cost=-1"])
async def test_a_missing_cost_is_not_a_refund(gateway: Gateway, fault: str, stream: bool) -> None:
    """Complaints 19, 7 (new-api #7062, LiteLLM #16021): a response without usage was charged 0, while upstream charged for it."""
    gateway.simulator.generation_delay_s = 0.3  # as with OpenRouter, GET /generation returns it only later
    client = await gateway.client()
    response, _ = await gateway.chat(client, f"fault:{fault}", stream=stream)
    assert response.status == 200
    assert await charges(client) == []
    assert await client.held() > 0  # neither free nor estimated: the hold waits for evidence, and is listed
    await gateway.recovered(client)
    assert len(await charges(client)) == 1
    await assert_charges_match_bills(gateway, client)


# -- OpenRouter, scripted


@pytest.fixture
async def scripted(
    database_url: str, database: Database, simulator: Simulator, tmp_path: Path
) -> AsyncIterator[Callable[[bytes], Gateway]]:
    """A gateway whose OpenRouter sends the given body as its response."""
    bodies: list[bytes] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        await request.read()
        stream = bodies[-1].startswith(b"data:")
        return web.Response(body=bodies[-1], headers={"Content-Type": "text/event-stream" if stream else "application/json"})

    async def models(request: web.Request) -> web.Response:
        return web.Response(body=simulator.model_list, content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/chat/completions", respond), web.get("/models", models)])
    async with (
        listening(app, schema.Config(server=schema.ServerSettings(port=0, shutdown_s=1))) as base_url,
        gateway_on(config_for(database_url, base_url, tmp_path / "scripted"), database, simulator) as running,
    ):

        def responding_with(document: bytes) -> Gateway:
            bodies.append(document)
            return running

        yield responding_with


def as_response(document: dict[str, Any], stream: bool) -> bytes:
    text = json.dumps(document).encode()
    return b"data: " + text + b"\n\ndata: [DONE]\n\n" if stream else text


@pytest.mark.parametrize("stream", [False, True])
async def test_with_byok_the_charge_includes_the_providers_price(scripted: Callable[[bytes], Gateway], stream: bool) -> None:
    """Complaints 7, 19 (LiteLLM #16021 and all who read `usage.cost` alone): with BYOK, `usage.cost` is OpenRouter's fee, 5 % of the price."""
    usage = {"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}
    gateway = scripted(as_response({"id": "gen-byok", "choices": [], "usage": usage}, stream))
    client = await gateway.client()
    await gateway.chat(client, stream=stream)
    assert await charges(client) == [Decimal("1.89")]  # 0.021 dollars × 90
    await assert_invariants_hold(gateway.database)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_text_of_a_response_does_not_change_its_charge(scripted: Callable[[bytes], Gateway], stream: bool) -> None:
    """Complaint 18 (new-api #5287): the charge depended on the text of the response, which the client can dictate."""
    fake_usage = '"usage":{"cost":0} \n\ndata: {"usage":{"cost":0}}\n\n'
    choice = {"message": {"content": fake_usage}, "usage": {"cost": 0}, "delta": {"content": fake_usage}}
    gateway = scripted(as_response({"id": "gen-fake-usage", "choices": [choice], "usage": {"cost": 0.01}}, stream))
    client = await gateway.client()
    await gateway.chat(client, stream=stream)
    assert await charges(client) == [Decimal("0.9")]


async def test_an_empty_response_is_charged_as_openrouter_charges_it(scripted: Callable[[bytes], Gateway]) -> None:
    """Complaint 21 (new-api #3275): an empty response was charged. A cost of 0 from OpenRouter is a ledger entry of 0."""
    gateway = scripted(as_response({"id": "gen-empty", "choices": [], "usage": {"cost": 0}}, stream=False))
    client = await gateway.client()
    await gateway.chat(client)
    assert await charges(client) == [0]
    assert (await client.balance(), await client.held()) == (100, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_price_of_minus_one_is_not_a_credit(gateway: Gateway, stream: bool) -> None:
    """Complaint 7 (price tables that drift): the list price "-1" of a router was used in arithmetic, and made negative holds or charges."""
    client = await gateway.client("100")
    gateway.simulator.first_word_s = 0.1
    waiting = asyncio.create_task(gateway.chat(client, model=ROUTER, stream=stream))
    async with asyncio.timeout(5):
        while not gateway.simulator.billing.records:
            await asyncio.sleep(0.005)
    assert await client.held() > schema.BillingSettings().hold_default_rub
    response, _ = await waiting
    assert response.status == 200
    assert [charge > 0 for charge in await charges(client)] == [True]
    await assert_charges_match_bills(gateway, client)
    poor = await gateway.client("24.99")
    assert (await gateway.chat(poor, model=ROUTER))[0].status == 402


# -- retry storms


async def test_insufficient_balance_is_a_402_that_no_sdk_retries(gateway: Gateway) -> None:
    """Complaint 14 (LightRAG #3736: 93 % of all traffic): an exhausted budget was a 429, which every SDK retries."""
    client = await gateway.client("0")
    response, document = await gateway.chat(client)
    assert (response.status, document) == (402, b'{"error": "Insufficient balance"}')
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["X-Error-Code"] == "insufficient_balance"
    assert "Retry-After" not in response.headers

    statements = 0
    gateway_database, fetch = gateway.app[DATABASE], gateway.app[DATABASE].fetch

    async def counted(statement: str, *arguments: Any) -> Any:
        nonlocal statements
        statements += statement == "settle_and_hold"
        return await fetch(statement, *arguments)

    gateway_database.fetch = counted  # type: ignore[method-assign]
    async with openai.AsyncOpenAI(api_key=client.key, base_url=f"{gateway.url}/v1", max_retries=5) as sdk:
        with pytest.raises(openai.APIStatusError, match="402"):
            await sdk.chat.completions.create(model=SMALL, messages=[{"role": "user", "content": "Hello"}])
    assert statements == 1


async def test_a_request_that_may_have_been_billed_is_not_retried_by_an_sdk(gateway: Gateway) -> None:
    """Complaint 25 (ComfyUI #16204): a failure after sixty seconds and the SDK's retries made four charges and no result."""
    client = await gateway.client()
    async with openai.AsyncOpenAI(api_key=client.key, base_url=f"{gateway.url}/v1", max_retries=5) as sdk:
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model=SMALL, messages=[{"role": "user", "content": "fault:cut-inside=0"}])
    assert len(gateway.simulator.billing.records) == 1
    await assert_charges_match_bills(gateway, client)
    assert len(await charges(client)) == 1


# -- restarts


def kill(gateway: Gateway) -> None:
    """Simulates a kill: from now on nothing the gateway does reaches the database or the journal."""

    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    gateway.app[DATABASE].fetch = never  # type: ignore[method-assign]
    gateway.app[DATABASE].fetchrow = never  # type: ignore[method-assign]
    journal = gateway.app[JOURNAL]
    journal._append = lambda lines: None  # type: ignore[method-assign]
    journal.close = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("clients", [1, 12])
async def test_an_unsettled_charge_survives_the_end_of_the_process(
    database_url: str, database: Database, tmp_path: Path, stream: bool, clients: int
) -> None:
    """Complaints 4, 12 (LiteLLM #34805, #35531, Bifrost's ten seconds, one-api's goroutine): charges that were only in memory were lost with the process."""
    simulator = Simulator()
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        config = config_for(database_url, base_url, tmp_path, {"relay": {"disconnected_drain_s": 0.1}})
        config = msgspec.structs.replace(config, server=schema.ServerSettings(port=0, shutdown_s=0.2, drain_s=0.05))
        people = [await make_client(database, "100") for _ in range(clients)]
        async with gateway_on(config, database, simulator) as dying:
            fetch = dying.app[DATABASE].fetch

            async def fetch_without_settling(statement: str, *arguments: Any) -> Any:
                if statement != "settle_and_hold" or not arguments[1]:
                    return await fetch(statement, *arguments)
                waits, holds = arguments[0], arguments[2]
                if waits:
                    raise DatabaseUnavailable("temporarily unavailable")
                rows = await fetch(statement, waits, *([] for _ in range(7)), *arguments[8:])
                return [*rows, *({"hold_id": hold_id, "outcome": "locked"} for hold_id in holds)]

            dying.app[DATABASE].fetch = fetch_without_settling  # type: ignore[method-assign]
            body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}

            async def post(client: Client) -> int:
                async with dying.session.post(dying.chat_url, json=body, headers=client.headers) as response:
                    await response.read()
                    return response.status

            requests = [asyncio.create_task(post(client)) for client in people]
            async with asyncio.timeout(10):
                while sum(record.charge is not None for record in dying.app[JOURNAL].open_holds.values()) < clients:
                    await asyncio.sleep(0.005)
            assert [await charges(client) for client in people] == [[]] * clients
            kill(dying)
            with contextlib.suppress(aiohttp.ClientError):
                await asyncio.gather(*requests)
        assert simulator.billing.total_usd() > 0
        async with gateway_on(config, database, simulator) as successor:
            for client in people:
                await successor.recovered(client)
        async with gateway_on(config, database, simulator):  # another restart changes nothing
            pass
    charged = [await charges(client) for client in people]
    assert [len(each) for each in charged] == [1] * clients
    assert sum(sum(each) for each in charged) == simulator.billing.total_usd() * 90
    assert [await client.balance() for client in people] == [100 - each[0] for each in charged]
    assert [finding.invariant.name async for finding in check(database) if finding.rows] == []


async def test_an_orderly_shutdown_settles_the_requests_in_flight(database_url: str, database: Database, tmp_path: Path) -> None:
    """Complaints 4, 12 (LiteLLM #14334): a deployment cut running streams, and their charges were lost."""
    simulator = Simulator(word_s=0.005, first_word_s=0.05)
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        config = config_for(database_url, base_url, tmp_path)
        client = await make_client(database, "100")
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
        async with aiohttp.ClientSession() as session:
            async with gateway_on(config, database, simulator) as ending:
                response = await session.post(ending.chat_url, json=body, headers=client.headers)
                await response.content.readany()
            received = await response.read()
        assert received.endswith(b"data: [DONE]\n\n")
        assert await charges(client) == [simulator.billing.total_usd() * 90]
        assert list((tmp_path / "var" / "journal").glob("*/*.log")) == []
        await assert_invariants_hold(database)


async def test_a_refund_whose_reply_is_lost_is_not_checked_against_the_balance_after_itself(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await make_client(database, "60")
    Statements(database, monkeypatch).lost_responses.append("book_entry")
    await Bookings(database).book(client.account_id, "refund", Nano(-50 * 10**9), covered=True)
    assert await client.balance() == 10
    await assert_invariants_hold(database)


async def test_a_booking_that_failed_is_reported_as_failed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.money.bookings.PAUSES_S", (0, 0))
    client = await make_client(database, "0")
    Statements(database, monkeypatch).lost_requests.extend(["book_entry"] * 3)
    with pytest.raises(DatabaseUnavailable):
        await Bookings(database).book(client.account_id, "topup", Nano(10**9))
    assert await client.balance() == 0


async def test_a_booking_has_its_audit_line_and_is_not_reported_as_failed(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "0")
    Statements(database, monkeypatch).lost_requests.append("find_account")
    with caplog.at_level("INFO", "gptutor.audit"):
        user = await Bookkeeper(database, "cli:me").book(client.account_id, "topup", Nano(10**9))
    assert user.balance == 10**9
    assert [record.getMessage() for record in caplog.records if record.name == "gptutor.audit"] == ["Audit: topup"]


@pytest.mark.parametrize("reference", [None, "pay-1"])
async def test_a_booking_whose_reply_is_lost_is_made_once_and_reported_as_made(
    database: Database, monkeypatch: pytest.MonkeyPatch, reference: str | None
) -> None:
    client = await make_client(database, "0")
    Statements(database, monkeypatch).lost_responses.append("book_entry")
    booking = await Bookings(database).book(client.account_id, "topup", Nano(10**9), reference=reference)
    assert booking.amount == 10**9
    assert (await Bookings(database).user(client.account_id)).balance == 10**9
    assert [entry.amount for entry in await Bookings(database).entries(client.account_id, 10)] == [10**9]
