"""Clients without an account are limited by their address (contract A8; row auth-3 in part)."""

import time
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from gptutor.config.load import load
from gptutor.config.schema import ConfigError
from gptutor.http import address_limits
from gptutor.http.address_limits import RequestCounter, client_address, parse_networks
from gptutor.money.keys import make_key
from tests.support.gateway import Gateway


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, in a list of one: it stands still unless a test advances it."""
    now = [1_795_500_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


async def status(gateway: Gateway, path: str, key: str = "", **headers: str) -> tuple[int, Any]:
    if path.endswith("completions"):
        sent = gateway.session.post(
            gateway.url + path,
            json={"messages": [{"role": "user", "content": "x"}]},
            headers={"Authorization": f"Bearer {key}", **headers},
        )
    else:
        sent = gateway.session.get(gateway.url + path, headers=headers)
    async with sent as response:
        await response.read()
        return response.status, response


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unauthenticated_per_minute": 3}, "server": {"trusted_proxies": ""}}])
async def test_guessing_keys_is_limited_before_the_database_is_reached(gateway: Gateway, clock: list[float]) -> None:
    client = await gateway.client()
    for key in (make_key(client.account_id), "sk-user-nonsense", ""):
        assert (await status(gateway, "/v1/chat/completions", key))[0] == 401
    for key in (make_key(client.account_id), client.key):
        code, response = await status(gateway, "/v1/chat/completions", key)
        assert code == 429
        assert response.headers["X-Error-Code"] == "rate_limited"
        assert (response.headers["X-RateLimit-Limit"], response.headers["X-RateLimit-Remaining"]) == ("3", "0")
        assert 0 < int(response.headers["Retry-After"]) <= 60
        body = await response.json()
        assert set(body) == {"error", "message", "retryAfter"}
        assert (body["error"], body["retryAfter"]) == ("Too Many Requests", int(response.headers["Retry-After"]))
    clock[0] += 60
    assert (await status(gateway, "/v1/chat/completions", client.key))[0] == 200
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unauthenticated_per_minute": 2}, "server": {"trusted_proxies": ""}}])
async def test_valid_keys_and_other_errors_are_not_counted(gateway: Gateway) -> None:
    client, poor = await gateway.client(), await gateway.client("0")
    for _ in range(4):
        assert (await status(gateway, "/v1/chat/completions", client.key))[0] == 200
        assert (await status(gateway, "/v1/chat/completions", poor.key))[0] == 402
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"models_per_minute": 2}, "server": {"trusted_proxies": "127.0.0.0/8"}}])
async def test_each_address_has_its_own_count_behind_a_trusted_proxy(gateway: Gateway, clock: list[float]) -> None:
    for address in ("203.0.113.1", "203.0.113.2"):
        codes = [(await status(gateway, path, **{"X-Forwarded-For": address}))[0] for path in ["/v1/models"] * 3]
        assert codes == [200, 200, 429]
    assert (await status(gateway, "/health"))[0] == 200


@pytest.mark.parametrize("tuned", [{"rate_limit": {"models_per_minute": 2}, "server": {"trusted_proxies": ""}}])
async def test_a_client_cannot_choose_its_address(gateway: Gateway, clock: list[float]) -> None:
    codes = [(await status(gateway, "/v1/models", **{"X-Forwarded-For": f"203.0.113.{number}"}))[0] for number in range(3)]
    assert codes == [200, 200, 429]


@pytest.mark.parametrize(
    ("remote", "forwarded", "address"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["evil, 198.51.100.1, 10.0.0.7"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["unknown"], ""),
        ("10.0.0.1", [], ""),
        ("10.0.0.1", ["10.0.0.7"], ""),
        ("::ffff:10.0.0.1", ["2001:db8:1:2:3::4"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["198.51.100.1:5678"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1:5678, 10.0.0.7:80"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8:1:2:3::4]:80"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["198.51.100.1, [::1], [::1]:80"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1:"], ""),
        ("10.0.0.1", ["[198.51.100.1"], ""),
        ("10.0.0.1", ["198.51.100.1:x"], ""),
        ("", [], ""),
    ],
)
def test_the_address_is_the_last_that_no_trusted_proxy_has(remote: str, forwarded: list[str], address: str) -> None:
    request = make_mocked_request("GET", "/", headers=[("X-Forwarded-For", value) for value in forwarded])
    assert client_address(request.clone(remote=remote), parse_networks("10.0.0.0/8 ::1")) == address


def test_a_flood_of_addresses_fills_no_memory(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_limits, "ADDRESSES_MAX", 10)
    counter = RequestCounter(5)
    for number in range(100):
        counter.add(f"10.0.0.{number}")
    assert len(counter._counts) == 11
    assert counter.is_used_up("10.9.9.9")
    assert not counter.is_used_up("10.0.0.1")


def test_an_invalid_network_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="GPTUTOR_SERVER__TRUSTED_PROXIES must be addresses or networks"):
        load({"GPTUTOR_SERVER__TRUSTED_PROXIES": "10.0.0.1/8"})


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unauthenticated_per_minute": 2}, "server": {"trusted_proxies": ""}}])
async def test_a_used_up_address_does_not_limit_a_recently_accepted_key(gateway: Gateway, clock: list[float]) -> None:
    client = await gateway.client()
    assert (await status(gateway, "/v1/chat/completions", client.key))[0] == 200
    for _ in range(3):
        await status(gateway, "/v1/chat/completions", make_key(client.account_id))
    assert (await status(gateway, "/v1/chat/completions", make_key(client.account_id)))[0] == 429
    assert (await status(gateway, "/v1/chat/completions", client.key))[0] == 200
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unauthenticated_per_minute": 2, "models_per_minute": 2}}])
async def test_a_proxy_without_x_forwarded_for_is_not_limited(gateway: Gateway, clock: list[float]) -> None:
    client = await gateway.client()
    for _ in range(4):
        assert (await status(gateway, "/v1/chat/completions", "sk-user-nonsense"))[0] == 401
        assert (await status(gateway, "/v1/models"))[0] == 200
    assert (await status(gateway, "/v1/chat/completions", client.key))[0] == 200
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"rate_limit": {"account_pages_per_minute": 2}}])
async def test_account_requests_are_limited_per_account(gateway: Gateway, clock: list[float]) -> None:
    client, other = await gateway.client(), await gateway.client()
    codes = [(await status(gateway, "/v1/credits", Authorization=f"Bearer {client.key}"))[0] for _ in range(3)]
    assert codes == [200, 200, 429]
    assert (await status(gateway, "/v1/credits", Authorization=f"Bearer {other.key}"))[0] == 200
