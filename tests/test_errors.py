"""Errors over HTTP: exact texts, codes and headers (contract A7, A8, B1 to B6, C8; rows input-7 to -10, -12, -21, auth-1 to -8, money-1,
upstream-2 to -5, db-2, process-12)."""

import asyncio
import io
import json
import math
import time
from typing import Any

import aiohttp
import asyncpg
import pytest

from gptutor.api.chat.exchange import TRUNCATED_EVENT
from gptutor.database.errors import DatabaseUnavailable
from gptutor.errors import ERRORS
from gptutor.http.app_keys import DATABASE, SERVICES
from gptutor.money.amounts import AccountId
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import make_key
from gptutor.money.users import UserRepository
from tests.support.gateway import VAULT, Gateway

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


async def send(
    gateway: Gateway, method: str = "POST", path: str = "/v1/chat/completions", **request: Any
) -> tuple[int, str, Any]:
    async with gateway.session.request(method, gateway.url + path, **request) as response:
        document = json.loads(await response.read())
        assert response.headers["X-Request-ID"]
        if response.status >= 400:
            assert list(document) == ["error"]
            assert isinstance(document["error"], str)
            assert ERRORS[response.headers["X-Error-Code"]].status == response.status
        send.headers = response.headers  # type: ignore[attr-defined]
        return response.status, response.headers.get("X-Error-Code", ""), document.get("error")


async def assert_nothing_happened(gateway: Gateway) -> None:
    await gateway.idle()
    assert not gateway.simulator.billing.records
    assert [(user.held, user.balance % 10**9) async for user in UserRepository(gateway.database).all() if user.held] == []


UNAUTHORIZED = (401, "invalid_key", "Invalid API key or inactive user")


async def test_the_four_ways_to_be_unauthorized_look_the_same(gateway: Gateway) -> None:
    client = await gateway.client()
    seen = set()
    for headers in (
        {},
        {"Authorization": client.key},
        {"Authorization": f"Basic {client.key}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer ключ"},
        {"Authorization": "Bearer sk-user-1-' OR pg_sleep(8)--"},
        {"Authorization": f"Bearer {client.key[:-1]}"},
        {"Authorization": f"Bearer {make_key(client.account_id)}"},
        {"Authorization": f"Bearer {make_key(AccountId(10**12))}"},
        [("Authorization", f"Bearer {client.key}"), ("Authorization", f"Bearer {client.key}")],
    ):
        assert await send(gateway, json=BODY, headers=headers) == UNAUTHORIZED
        shown = {name: value for name, value in send.headers.items() if name not in ("Date", "X-Request-ID")}  # type: ignore[attr-defined]
        seen.add(json.dumps(shown))
    await UserRepository(gateway.database).set_active(client.account_id, False)
    assert await send(gateway, json=BODY, headers=client.headers) == UNAUTHORIZED
    assert len(seen) == 1
    assert send.headers["WWW-Authenticate"] == "Bearer"  # type: ignore[attr-defined]
    await assert_nothing_happened(gateway)


async def test_a_key_in_the_query_string_is_not_accepted(gateway: Gateway) -> None:
    client = await gateway.client()
    assert await send(gateway, path=f"/v1/chat/completions?key={client.key}", json=BODY) == UNAUTHORIZED


async def test_deactivation_and_rotation_take_effect_with_the_next_request(gateway: Gateway) -> None:
    client = await gateway.client()
    users = UserRepository(gateway.database)
    assert (await send(gateway, json=BODY, headers=client.headers))[0] == 200
    await users.set_active(client.account_id, False)
    assert (await send(gateway, json=BODY, headers=client.headers))[0] == 401
    await users.set_active(client.account_id, True)
    assert (await send(gateway, json=BODY, headers=client.headers))[0] == 200
    await KeyRing(gateway.database, VAULT).renew(client.account_id)
    assert (await send(gateway, json=BODY, headers=client.headers))[0] == 401


@pytest.mark.parametrize("balance", ["0", "0.999999999"])
async def test_a_balance_under_the_minimum_is_402(gateway: Gateway, balance: str) -> None:
    client = await gateway.client(balance)
    assert await send(gateway, json=BODY, headers=client.headers) == (402, "insufficient_balance", "Insufficient balance")
    assert send.headers["x-should-retry"] == "false"  # type: ignore[attr-defined]
    await assert_nothing_happened(gateway)


async def test_an_estimate_above_the_balance_is_402(gateway: Gateway) -> None:
    client = await gateway.client("2")
    body = {**BODY, "max_tokens": 65_000}  # × 0.0000004 × 90 × 1.1 ≈ 2.57 roubles
    assert await send(gateway, json=body, headers=client.headers) == (402, "insufficient_balance", "Insufficient balance")
    await assert_nothing_happened(gateway)


async def test_the_request_is_validated_before_any_money_moves(gateway: Gateway) -> None:
    client = await gateway.client()
    assert await send(gateway, json={}, headers=client.headers) == (400, "invalid_request", "messages array is required")
    assert await send(gateway, json={**BODY, "temperature": 3}, headers=client.headers) == (
        400, "invalid_request", "temperature must be a number from 0 to 2",
    )  # fmt: skip
    headers = {**client.headers, "Content-Type": "application/json"}
    assert (await send(gateway, data=b"{", headers=headers))[:2] == (400, "invalid_json")
    await assert_nothing_happened(gateway)


async def test_the_body_size_limit_holds_with_and_without_a_declared_length(gateway: Gateway) -> None:
    client = await gateway.client()
    headers = {**client.headers, "Content-Type": "application/json"}
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"x" * 10_485_760)

    async def in_pieces() -> Any:
        for start in range(0, len(body), 1_000_000):
            yield body[start : start + 1_000_000]

    assert (await send(gateway, data=io.BytesIO(body), headers=headers))[:2] == (413, "body_too_large")
    assert (await send(gateway, data=in_pieces(), headers=headers))[:2] == (413, "body_too_large")
    await assert_nothing_happened(gateway)
    assert (await send(gateway, data=io.BytesIO(body[:4_000_000] + b'"}]}'), headers=headers))[0] == 200
    status, code, text = await send(gateway, data=io.BytesIO(body[:9_000_000] + b'"}]}'), headers=headers)
    assert (status, code) == (400, "upstream_rejected")
    assert "maximum context length" in text


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_rejected_without_decompressing_it(gateway: Gateway, encoding: str) -> None:
    client = await gateway.client()
    headers = {**client.headers, "Content-Type": "application/json", "Content-Encoding": encoding}
    status = (await send(gateway, data=b"\x1f\x8b" * 100, headers=headers))[:2]
    assert status == (415, "unsupported_encoding")


@pytest.mark.parametrize(
    ("encodings", "status"),
    [([""], 200), (["identity"], 200), ([" Identity "], 200), (["", "gzip"], 415), (["identity, gzip"], 415)],
)
async def test_an_empty_content_encoding_is_none(gateway: Gateway, encodings: list[str], status: int) -> None:
    client = await gateway.client()
    headers = [*client.headers.items(), ("Content-Type", "application/json"), *(("Content-Encoding", each) for each in encodings)]
    assert (await send(gateway, data=json.dumps(BODY).encode(), headers=headers))[0] == status


async def test_a_body_of_a_windows_console_is_told_its_encoding(gateway: Gateway) -> None:
    client = await gateway.client()
    headers = {**client.headers, "Content-Type": "application/json"}
    text = '{"messages":[{"role":"user","content":"Привет"}]}'
    assert await send(gateway, data=text.encode("cp1251"), headers=headers) == (
        400,
        "invalid_json",
        "Request body must be in UTF-8",
    )
    assert (await send(gateway, data=b"\xef\xbb\xbf" + text.encode(), headers=headers))[0] == 200
    await gateway.idle()


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        (None, 200),
        ("text/plain", 415),
        ("multipart/form-data", 415),
    ],
)
async def test_the_content_type(gateway: Gateway, content_type: str | None, status: int) -> None:
    client = await gateway.client()
    headers = {**client.headers, **({"Content-Type": content_type} if content_type else {})}
    skip = [] if content_type else [aiohttp.hdrs.CONTENT_TYPE]
    assert (await send(gateway, data=json.dumps(BODY).encode(), headers=headers, skip_auto_headers=skip))[0] == status


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET,HEAD"),
        ("GET", "/", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("POST", "//v1/chat/completions", 404, None),
        ("POST", "/v1/%2e%2e/admin", 404, None),
        ("GET", "/v1/models/no/such", 404, None),
    ],
)
async def test_wrong_paths_and_methods(gateway: Gateway, method: str, path: str, status: int, allow: str | None) -> None:
    assert (await send(gateway, method, path))[0] == status
    assert (send.headers.get("Allow") or "").replace(" ", "") == (allow or "")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_Z", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("ключ", False)]
)
async def test_a_harmless_request_id_is_kept(gateway: Gateway, given: str, kept: bool) -> None:
    await send(gateway, "GET", "/health", headers={"X-Request-ID": given})
    assert (send.headers["X-Request-ID"] == given) is kept  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    # upstream → our status and code, and whether the client is shown OpenRouter's text
    ("upstream", "status", "code", "is_shown"),
    [
        (400, 400, "upstream_rejected", True),
        (404, 400, "upstream_rejected", True),
        (413, 400, "upstream_rejected", True),
        (422, 400, "upstream_rejected", True),
        (401, 500, "upstream_account", False),
        (402, 500, "upstream_account", False),
        (403, 403, "moderated", True),
        (500, 500, "upstream_error", False),
        (504, 504, "upstream_timeout", False),
        (302, 500, "upstream_error", False),
    ],
)
async def test_upstream_statuses_become_the_documented_errors(
    gateway: Gateway, upstream: int, status: int, code: str, is_shown: bool
) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": f"fault:status={upstream}"}]}
    text = f"Simulated error {upstream}" if is_shown else ERRORS[code].text
    assert await send(gateway, json=body, headers=client.headers) == (status, code, text)
    await assert_nothing_happened(gateway)
    assert await client.balance() == 100


async def test_an_upstream_rate_limit_keeps_its_retry_after(gateway: Gateway) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "fault:status=429:120"}]}
    assert (await send(gateway, json=body, headers=client.headers))[:2] == (429, "rate_limited_upstream")
    assert send.headers["Retry-After"] == "120"  # type: ignore[attr-defined]


async def test_an_html_error_page_of_a_proxy_is_not_passed_on(gateway: Gateway) -> None:
    client = await gateway.client()
    body = {"messages": [{"role": "user", "content": "fault:html=524"}]}
    refused = await send(gateway, json=body, headers=client.headers)
    assert refused == (500, "upstream_outcome_unknown", "Internal server error")  # behind the edge it may still be running
    assert send.headers["x-should-retry"] == "false"  # type: ignore[attr-defined]
    await gateway.idle()
    assert await client.held() > 0


async def test_an_unknown_model_is_rejected_by_the_gateway_while_the_list_is_fresh(gateway: Gateway) -> None:
    client = await gateway.client()
    status, code, text = await send(gateway, json={**BODY, "model": "no/such"}, headers=client.headers)
    assert (status, code) == (400, "model_not_found")
    assert text.startswith("no/such is not a model")
    assert (await send(gateway, json={**BODY, "models": ["no/such"]}, headers=client.headers))[:2] == (400, "model_not_found")
    await assert_nothing_happened(gateway)
    gateway.app[SERVICES].catalogue.fetched_at = -math.inf  # the list is old by now: who knows
    status, code, text = await send(gateway, json={**BODY, "model": "no/such"}, headers=client.headers)
    assert (status, code) == (400, "upstream_rejected")
    assert "no/such" in text
    await assert_nothing_happened(gateway)


@pytest.mark.parametrize("tuned", [{"openrouter": {"total_s": 0.2, "first_byte_s": 0.2, "idle_s": 0.2}}])
@pytest.mark.parametrize("stream", [False, True])
async def test_silence_upstream_is_a_timeout_whose_outcome_is_not_guessed(gateway: Gateway, stream: bool) -> None:
    gateway.simulator.first_word_s = 0.6
    client = await gateway.client()
    if stream:
        body = {**BODY, "stream": True, "model": "openai/gpt-4o-mini"}
        gateway.simulator.first_word_s = 0.0
        body["messages"] = [{"role": "user", "content": "fault:stall=2"}]
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            assert response.status == 200  # the headers came: what follows is silence in mid-stream
            assert (await response.read()).endswith(TRUNCATED_EVENT)
    else:
        assert (await send(gateway, json=BODY, headers=client.headers))[:2] == (504, "upstream_timeout")
        assert send.headers["x-should-retry"] == "false"  # type: ignore[attr-defined]
        await gateway.idle()
        assert await client.held() > 0


async def test_without_the_database_nothing_is_bought(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await gateway.client()

    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable("ConnectionRefusedError")

    monkeypatch.setattr(gateway.app[DATABASE], "fetch", away)
    assert (await send(gateway, json=BODY, headers=client.headers))[:2] == (503, "database_unavailable")
    assert send.headers["Retry-After"] == "1"  # type: ignore[attr-defined]
    await assert_nothing_happened(gateway)


async def test_a_bug_is_a_plain_500_and_leaves_no_hold(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await gateway.client()
    monkeypatch.setattr(gateway.app[SERVICES].catalogue, "models", None)
    assert await send(gateway, json=BODY, headers=client.headers) == (500, "internal_error", "Internal server error")
    await assert_nothing_happened(gateway)


async def test_health_ready_and_models_need_no_key(gateway: Gateway) -> None:
    for path in ("/health", "/ready", "/v1/models"):
        assert (await send(gateway, "GET", path))[0] == 200
    async with gateway.session.get(f"{gateway.url}/v1/models") as response:
        listed = await response.json()
    assert listed["object"] == "list"
    assert len(listed["data"]) == 326
    by_id = {model["id"]: model for model in listed["data"]}
    model = by_id["google/gemini-2.5-flash-lite"]
    assert (model["object"], model["owned_by"], model["context_length"]) == ("model", "google", 1_048_576)
    assert model["created"] > 0
    assert (model["pricing"]["prompt"], model["pricing_rub"]["prompt"]) == ("0.0000001", "0.0000090")
    assert by_id["openrouter/auto"]["pricing"]["prompt"] == "-1"
    assert "prompt" not in by_id["openrouter/auto"]["pricing_rub"]
    async with gateway.session.get(f"{gateway.url}/v1/models/google/gemini-2.5-flash-lite") as response:
        assert await response.json() == model


async def test_a_router_model_without_a_price_holds_the_default(gateway: Gateway) -> None:
    rich, poor = await gateway.client("100"), await gateway.client("24.99")
    assert (await send(gateway, json={**BODY, "model": "openrouter/auto"}, headers=rich.headers))[0] == 200
    assert (await send(gateway, json={**BODY, "model": "openrouter/auto"}, headers=poor.headers))[0] == 402


@pytest.mark.parametrize("tuned", [{"rate_limit": {"chat_per_minute": 3}}])
async def test_the_limit_per_minute_is_exact_however_many_ask_at_once(gateway: Gateway, database_url: str) -> None:
    client, other = await gateway.client(), await gateway.client()
    while time.time() % 60 > 50:  # all of it must happen in one minute
        await asyncio.sleep(1)
    replies = await asyncio.gather(*(gateway.chat(client) for _ in range(10)))
    assert sorted(response.status for response, _ in replies) == [200] * 3 + [429] * 7
    refused = next(response for response, _ in replies if response.status == 429)
    assert refused.headers["X-Error-Code"] == "rate_limited"
    assert 0 <= int(refused.headers["Retry-After"]) <= 60
    assert (await gateway.chat(other))[0].status == 200
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE accounts SET minute = minute - interval '1 minute'")
    await connection.close()
    assert (await gateway.chat(client))[0].status == 200
