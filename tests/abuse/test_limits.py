"""Limits before the hold, and of what one client can make the service keep (contract A8; rows sum-2 and sum-3)."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from gptutor.api.chat import completions
from gptutor.api.chat.large_bodies import LargeBodies
from gptutor.errors import ApiError
from gptutor.http.app_keys import SERVICES
from gptutor.http.byte_budget import BudgetExceeded, ByteBudget, ByteShare
from gptutor.http.connection_limits import DISCARD_PAUSE_S, DISCARDED_AT_FULL_SPEED, ConnectionLimits
from gptutor.money.amounts import AccountId
from gptutor.money.keys import make_key
from tests.support.gateway import Client, Gateway
from tests.support.wire import raw

ASK = {"messages": [{"role": "user", "content": "Hello"}]}
LARGE = {"messages": [{"role": "user", "content": "x" * 200_000}]}


async def send(gateway: Gateway, client: Client, body: Any = ASK, **headers: str) -> tuple[int, str]:
    async with gateway.session.post(gateway.chat_url, json=body, headers={**client.headers, **headers}) as response:
        await response.read()
        return response.status, response.headers.get("X-Error-Code", "")


def address_of(gateway: Gateway) -> tuple[str | None, int | None]:
    parts = urlsplit(gateway.url)
    return parts.hostname, parts.port


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day stands still, so that no new minute begins."""
    monkeypatch.setattr(time, "time", lambda: 1_795_500_000.0)


# -- counted before the body is read


@pytest.mark.parametrize("tuned", [{"rate_limit": {"refused_per_minute": 3}}])
async def test_refused_completions_are_limited_before_the_body_is_read(
    gateway: Gateway, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor, other = await gateway.client("0"), await gateway.client()
    statuses = [(await send(gateway, poor))[0] for _ in range(5)]
    assert statuses == [402, 402, 402, 402, 429]  # the first is counted for the key, which is not known yet to be the account's
    for _ in range(8):
        assert (await send(gateway, other))[0] == 200
    monkeypatch.setattr(completions, "read_body", None)
    assert await send(gateway, poor) == (429, "rate_limited")
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"refused_per_minute": 3, "unauthenticated_per_minute": 0}}])
async def test_made_up_keys_do_not_use_up_the_limit_of_the_account_that_they_name(gateway: Gateway, clock: None) -> None:
    client = await gateway.client()
    for _ in range(8):
        assert (await send(gateway, client, Authorization=f"Bearer {make_key(client.account_id)}"))[0] == 401
        assert (await send(gateway, client))[0] == 200
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"not_found_per_minute": 2}, "server": {"trusted_proxies": ""}}])
async def test_paths_that_do_not_exist_are_limited_per_address(gateway: Gateway, clock: None) -> None:
    seen = []
    for _ in range(3):
        async with gateway.session.get(f"{gateway.url}/nothing") as response:
            seen.append(response.status)
    assert seen == [404, 404, 429]


@pytest.mark.parametrize("tuned", [{"rate_limit": {"refused_per_minute": 2}}])
async def test_a_client_far_above_the_limit_is_answered_slowly(gateway: Gateway, clock: None) -> None:
    client = await gateway.client("0")
    for _ in range(5):
        await send(gateway, client)
    started = time.monotonic()
    assert (await send(gateway, client))[0] == 429
    assert time.monotonic() - started >= 1


async def test_a_rejected_key_takes_as_long_for_an_account_that_exists_as_for_another(gateway: Gateway) -> None:
    client = await gateway.client()
    for account_id in (client.account_id, AccountId(10**12)):
        for body in (ASK, LARGE):
            started = time.monotonic()
            assert (await send(gateway, client, body, Authorization=f"Bearer {make_key(account_id)}"))[0] == 401
            assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize("tuned", [{"rate_limit": {"free_models_per_minute": 2}}])
async def test_one_account_cannot_use_up_the_quota_of_the_free_models(gateway: Gateway, clock: None) -> None:
    greedy, other = await gateway.client(), await gateway.client()
    for client in (greedy, other):
        assert (await send(gateway, client))[0] == 200  # from now on the keys are known to be the accounts'
    free = {**ASK, "model": "openai/gpt-1-nano:free"}
    assert [(await send(gateway, greedy, free))[0] for _ in range(3)] == [200, 200, 429]
    assert (await send(gateway, greedy))[0] == 200
    assert (await send(gateway, other, free))[0] == 200
    assert (await send(gateway, other, {**ASK, "models": ["openai/gpt-1-nano:free"]}))[0] == 200
    assert (await send(gateway, other, {**ASK, "models": ["openai/gpt-1-nano:free"]}))[0] == 429
    await gateway.idle()


# -- large bodies


@pytest.mark.parametrize("body", [LARGE, {**ASK, "x": [1] * 6000}], ids=["bytes", "values"])
async def test_no_large_body_is_parsed_for_an_account_without_money(
    gateway: Gateway, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "parse_request", None)
    poor = await gateway.client("0")
    for _ in range(2):
        assert await send(gateway, poor, body) == (402, "insufficient_balance")


async def test_the_accounts_take_turns_in_the_parser_thread() -> None:
    may_run = threading.Event()
    order: list[str] = []

    def work(name: str) -> None:
        may_run.wait(5)
        order.append(name)

    async def run(bodies: LargeBodies, account: int, name: str) -> None:
        await bodies.run(AccountId(account), lambda: work(name))

    with ThreadPoolExecutor(1) as thread:
        bodies = LargeBodies(thread, 10)
        running = [
            asyncio.ensure_future(run(bodies, account, name))
            for account, name in [(1, "a"), (1, "b"), (1, "c"), (1, "d"), (2, "x"), (2, "y")]
        ]
        await asyncio.sleep(0.05)
        running[1].cancel()  # its client has disconnected
        may_run.set()
        await asyncio.gather(*running, return_exceptions=True)
    assert order == ["a", "x", "c", "y", "d"]
    assert not bodies._jobs


def test_an_account_has_so_many_places_and_no_more() -> None:
    with ThreadPoolExecutor(1) as thread:
        bodies = LargeBodies(thread, 1)
        with bodies.place(AccountId(1)):
            with pytest.raises(ApiError, match="At most 1"), bodies.place(AccountId(1)):
                pass
            with bodies.place(AccountId(2)):
                pass
        with bodies.place(AccountId(1)):
            pass
        assert not bodies._places


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ({"models": ["a/b"] * 11}, "models must be an array of at most 10 strings"),
        ({"stop": ["x"] * 17}, "stop must be a string or an array of at most 16 strings"),
        ({f"x{number}": 1 for number in range(250)}, "Request body must not have more than 200 members"),
    ],
    ids=["models", "stop", "members"],
)
async def test_lists_are_bounded(gateway: Gateway, field: dict[str, Any], error: str) -> None:
    client = await gateway.client()
    async with gateway.session.post(gateway.chat_url, json={**ASK, **field}, headers=client.headers) as response:
        assert (response.status, (await response.json(content_type=None))["error"]) == (400, error)


# -- one budget for the bytes in memory


@pytest.mark.parametrize("tuned", [{"server": {"bodies_bytes_max": 150_000, "body_bytes_max": 140_000}}])
async def test_a_body_beyond_the_budget_is_rejected(gateway: Gateway) -> None:
    client = await gateway.client()
    budget = gateway.app[SERVICES].body_budget
    taken = ByteShare(budget)
    taken.grow(50_000)
    body = {"messages": [{"role": "user", "content": "x" * 130_000}]}
    assert await send(gateway, client, body) == (503, "overloaded")
    assert budget.used == 50_000
    taken.release()
    assert (await send(gateway, client, body))[0] == 200
    await gateway.idle()
    assert budget.used == 0


def test_an_account_may_have_a_quarter_of_a_budget() -> None:
    budget = ByteBudget(400)
    first, second, other = ByteShare(budget), ByteShare(budget), ByteShare(budget)
    first.grow(60)
    first.charge_to("a")
    second.charge_to("a")
    with pytest.raises(BudgetExceeded):
        second.grow(41)
    second.grow(40)
    other.charge_to("b")
    other.grow(100)
    assert budget.used == 200
    del first
    for _ in range(2):
        second.release()
    other.release()
    assert (budget.used, budget._by_account) == (0, {})


@pytest.mark.parametrize("tuned", [{"openrouter": {"plain_bytes_max": 100_000}}])
@pytest.mark.parametrize("size", [50_000, 150_000])
async def test_a_plain_response_that_is_too_large_is_not_delivered_but_its_cost_is_looked_up(scripted: Any, size: int) -> None:
    plays, gateway = scripted

    async def play(_: web.Request) -> web.Response:
        document = {"id": "gen-1-x", "choices": [], "usage": {"cost": 0.01}, "x": "y" * size}
        return web.json_response(document, headers={"X-Generation-Id": "gen-1-x"})

    plays.append(play)
    client = await gateway.client()
    status, _ = await send(gateway, client)
    await gateway.idle()
    assert (status == 200) is (size < 100_000)
    assert (await client.held() > 0) is (size > 100_000)
    assert gateway.app[SERVICES].answer_budget.used == 0


@pytest.mark.parametrize("tuned", [{"relay": {"write_timeout_s": 0.5}}])
async def test_a_client_that_takes_no_plain_response_is_disconnected(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plays, gateway = scripted
    monkeypatch.setattr("gptutor.http.unbuffered_response.RATE_MIN", 10**9)

    async def play(_: web.Request) -> web.Response:
        return web.json_response({"id": "gen-1", "choices": [], "usage": {"cost": 0.00001}, "x": "y" * 20_000_000})

    plays.append(play)
    client = await gateway.client()
    body = json.dumps(ASK).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: {len(body)}\r\n"
    )
    loop, budget = asyncio.get_running_loop(), gateway.app[SERVICES].answer_budget
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", address_of(gateway)[1]))
        await loop.sock_sendall(connection, f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        async with asyncio.timeout(10):
            while not budget.used:
                await asyncio.sleep(0.01)
            while budget.used:
                await asyncio.sleep(0.01)
    await gateway.idle()


# -- connections


@pytest.mark.parametrize("tuned", [{"server": {"connections_per_address_max": 3, "trusted_proxies": ""}}])
async def test_an_address_has_so_many_connections_and_no_more(gateway: Gateway) -> None:
    connections = [await asyncio.open_connection(*address_of(gateway)) for _ in range(5)]
    await asyncio.sleep(0.2)
    assert [not (reader.at_eof() or reader.exception()) for reader, _ in connections].count(True) == 3
    for _, writer in connections:
        writer.transport.abort()
    await asyncio.sleep(0.1)
    async with gateway.session.get(f"{gateway.url}/health") as response:
        assert response.status == 200


async def test_headers_are_bounded_in_all(gateway: Gateway) -> None:
    lines = b"".join(b"X-%d: %b\r\n" % (number, b"x" * 8000) for number in range(20))
    with pytest.raises((ConnectionError, AssertionError)):  # closed, with what was not read
        assert await raw(gateway, b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines, until_close_s=3)


@pytest.mark.parametrize("tuned", [{"server": {"body_idle_s": 0.1, "linger_s": 0.3}}])
async def test_the_connection_of_a_body_that_never_ends_is_closed(gateway: Gateway) -> None:
    client = await gateway.client()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: 100\r\n\r\n"
    answer = await raw(gateway, head.encode() + b"{", until_close_s=3)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_rejected_bodies_are_discarded_at_a_speed_that_all_connections_share(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end, discards, pauses = ConnectionLimits.begin_discard, ConnectionLimits.end_discard, 0, []

    def begin_counted(limits: ConnectionLimits) -> float:
        nonlocal discards
        discards += 1
        pauses.append((discards, begin(limits)))
        return pauses[-1][1]

    def end_counted(limits: ConnectionLimits) -> None:
        nonlocal discards
        discards -= 1
        end(limits)

    monkeypatch.setattr(ConnectionLimits, "begin_discard", begin_counted)
    monkeypatch.setattr(ConnectionLimits, "end_discard", end_counted)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
    connections = [await asyncio.open_connection(*address_of(gateway)) for _ in range(8)]
    for _, writer in connections:
        writer.write(head + b" " * 8_000_000)
    for reader, _ in connections:
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    async with asyncio.timeout(10):
        while max((count for count, _ in pauses), default=0) < len(connections):
            await asyncio.sleep(0.01)
    for count, pause in pauses:
        assert pause / max(count, DISCARDED_AT_FULL_SPEED) == pytest.approx(DISCARD_PAUSE_S / DISCARDED_AT_FULL_SPEED)
    for _, writer in connections:
        writer.transport.abort()
    async with asyncio.timeout(10):
        while discards:
            await asyncio.sleep(0.01)
