"""OpenRouter's account of the service: completions are rejected while it is refused, and only then."""

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import REGISTRY

from gptutor.database.errors import DatabaseUnavailable
from gptutor.http.app_keys import SERVICES
from gptutor.money.keyring import KeyRing
from gptutor.money.ledger import Ledger
from gptutor.openrouter.account_state import AccountGate, KeyReport, describe, read_credit, read_key, trouble_of
from gptutor.server.account_line import account_line
from gptutor.simulator.account import MANAGEMENT_KEY
from gptutor.telemetry.alerts import ALERTS
from tests.support.gateway import Client, Gateway, config_for

QUICK = {"openrouter": {"account_probe_s": 0.2, "account_poll_s": 3600, "attempts_max": 1, "credit_warning_usd": Decimal(0)}}
WATCHED = {
    "openrouter": {
        "account_probe_s": 0.05,
        "account_poll_s": 0.05,
        "management_key": MANAGEMENT_KEY,
        "credit_warning_usd": Decimal(5),
    }
}

# -- decisions


@pytest.mark.parametrize(
    ("status", "message", "more", "trouble"),
    [
        (401, "User not found.", {}, "invalid_key"),
        (401, None, {"is_own": False}, "other"),
        (401, "Invalid key", {"metadata": {"provider_name": "Azure"}}, "other"),
        (402, "Insufficient credits. Add more using https://openrouter.ai/settings/credits", {}, "no_credit"),
        (402, "Insufficient credits", {"has_retry_after": True}, "in_flight"),
        (402, "Insufficient credits", {"metadata": {"limit_source": "openrouter_in_flight_budget"}}, "in_flight"),
        (402, "This request requires more credits, or fewer max_tokens. You requested up to 9, but can only afford 3", {}, "too_dear"),
        (402, "Insufficient credits", {"metadata": {"limit_source": "openrouter_credits", "reason": "weight_exceeds_budget"}}, "too_dear"),
        (402, "No", {"metadata": {"limit_source": "openrouter_key_limit"}}, "key_limit"),
        (402, "Key limit exceeded", {}, "key_limit"),
        (402, "Words of another year", {}, "other"),
        (402, "Insufficient credits", {"is_own": False}, "other"),
        (403, "Key limit exceeded (total limit)", {}, "key_limit"),
        (403, "This model requires moderation: violence", {}, None),
        (429, "Key limit", {}, None),
        (500, "Insufficient credits", {}, None),
    ],
)  # fmt: skip
def test_what_an_error_says_of_our_account(status: int, message: str | None, more: dict[str, Any], trouble: str | None) -> None:
    given = {"metadata": {}, "has_retry_after": False, "is_own": True, **more}
    assert trouble_of(status, message, given.pop("metadata"), **given) == trouble


def test_without_credit_one_completion_at_a_time_is_let_through() -> None:
    gate = AccountGate(probe_s=10)
    assert gate.wait_s(100) is None
    assert not gate.begin_probe(100)
    gate.close("no_credit", 100)
    assert gate.wait_s(104) == 6
    assert gate.wait_s(110) is None
    assert gate.begin_probe(110)
    assert gate.wait_s(111) == 9
    gate.close("no_credit", 112)  # the probe was refused; nothing is put off by that
    assert gate.wait_s(120) is None


def test_a_refused_key_lets_nothing_through() -> None:
    gate = AccountGate(probe_s=10)
    gate.close("invalid_key", 100)
    assert gate.wait_s(1000) == 10
    gate.open()
    assert gate.wait_s(1000) is None


@pytest.mark.parametrize(
    ("document", "report"),
    [
        ('{"data":{"limit":null,"limit_remaining":null}}', KeyReport(None, None)),
        ('{"data":{}}', KeyReport(None, None)),
        ('{"data":{"limit":10,"limit_remaining":1.25,"label":"sk"}}', KeyReport(Decimal(10), Decimal("1.25"))),
        ('{"data":{"limit":10,"limit_remaining":-0.5}}', KeyReport(Decimal(10), Decimal("-0.5"))),
    ],
)
def test_the_report_about_the_key(document: str, report: KeyReport) -> None:
    assert read_key(document.encode()) == report
    assert report.is_used_up is (report.limit_left_usd is not None and report.limit_left_usd < 0)


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", '{"data":[]}', '{"data":{"limit":"ten"}}', '{"data":{"limit_remaining":1e999}}', "\xff"]
)
def test_a_report_that_is_not_as_documented_is_an_error(document: str) -> None:
    with pytest.raises(ValueError, match="not"):
        read_key(document.encode("latin-1"))


def test_the_credit_is_what_was_bought_minus_what_was_used() -> None:
    assert read_credit(b'{"data":{"total_credits":20.5,"total_usage":21}}') == Decimal("-0.5")
    with pytest.raises(ValueError, match="no total_credits"):
        read_credit(b'{"data":{"total_credits":20.5,"total_usage":null}}')
    assert describe(KeyReport(Decimal(50), Decimal("12.345")), Decimal(3)) == "key limit $50.00, $12.34 left; credit left $3.00"


# -- the service


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def until_served(gateway: Gateway, client: Client) -> None:
    async with asyncio.timeout(10):
        while (await gateway.chat(client))[0].status != 200:
            await asyncio.sleep(0.02)


async def ready(gateway: Gateway) -> tuple[int, str, str]:
    async with gateway.session.get(f"{gateway.url}/ready") as response:
        return response.status, response.headers.get("X-Error-Code", ""), await response.text()


async def assert_rejected_without_the_database(gateway: Gateway, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion gets 503 at once, and nothing is asked of the database for it."""
    asked: list[object] = []
    sent = len(gateway.simulator.billing.records)

    async def ask(*arguments: Any) -> Any:
        asked.append(arguments)
        raise DatabaseUnavailable("none")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "hold_funds", ask)
        patch.setattr(KeyRing, "opened_by", ask)
        response, document = await gateway.chat(client)
    assert (response.status, response.headers["X-Error-Code"]) == (503, "upstream_account_refused")
    assert int(response.headers["Retry-After"]) >= 1
    assert orjson.loads(document) == {"error": "Service temporarily unavailable"}
    assert asked == []
    assert len(gateway.simulator.billing.records) == sent
    assert await client.held() == 0


def gate(gateway: Gateway) -> AccountGate:
    return gateway.app[SERVICES].upstream.account.gate


async def revoke(gateway: Gateway) -> None:
    gateway.simulator.account.is_revoked = True


async def use_up_limit(gateway: Gateway) -> None:
    gateway.simulator.account.limit_usd = Decimal(0)


@pytest.mark.parametrize("tuned", [QUICK])
@pytest.mark.parametrize(
    ("refuse", "reason"), [(revoke, "does not accept the API key"), (use_up_limit, "spending limit")], ids=["revoked", "limit"]
)
async def test_while_our_key_is_refused_completions_get_503_and_afterwards_they_are_served(
    gateway: Gateway,
    refuse: Callable[[Gateway], Awaitable[None]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = await gateway.client()
    await refuse(gateway)
    response, _ = await gateway.chat(client)
    assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_account")
    await until(lambda: gate(gateway).refusal is not None)
    await assert_rejected_without_the_database(gateway, client, monkeypatch)
    status, code, text = await ready(gateway)
    assert (status, code) == (503, "upstream_account_refused")
    assert reason in text
    assert REGISTRY.get_sample_value("gptutor_openrouter_refuses") == 1
    assert reason in ALERTS.conditions["account_refused"]
    gateway.simulator.account.change({})
    await until_served(gateway, client)
    assert (await ready(gateway))[0] == 200
    assert REGISTRY.get_sample_value("gptutor_openrouter_refuses") == 0
    assert "account_refused" not in ALERTS.conditions
    messages = [record.getMessage() for record in caplog.records if record.name == "gptutor.account"]
    assert [message.partition(":")[0] for message in messages] == [
        "Completions are rejected until this has ended",
        "OpenRouter accepts our account again",
    ]


@pytest.mark.parametrize("tuned", [QUICK])
async def test_without_credit_a_completion_finds_out_when_there_is_some(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await gateway.client()
    account = gateway.app[SERVICES].upstream.account
    account.gate.probe_s = 60
    gateway.simulator.account.credit_usd = Decimal(0)
    response, _ = await gateway.chat(client)
    assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_account")
    await assert_rejected_without_the_database(gateway, client, monkeypatch)
    assert (await ready(gateway))[:2] == (503, "upstream_account_refused")
    gateway.simulator.account.credit_usd = None
    await assert_rejected_without_the_database(gateway, client, monkeypatch)
    account.gate.next_probe_at = 0
    assert (await ready(gateway))[0] == 200, "a proxy that asks /ready must send the completion that finds out"
    gateway.simulator.first_word_s = 0.3
    replies = await asyncio.gather(*(gateway.chat(client) for _ in range(5)))
    assert sorted(response.status for response, _ in replies) == [200, 503, 503, 503, 503]
    assert (await gateway.chat(client))[0].status == 200
    assert await client.held() == 0


@pytest.mark.parametrize("tuned", [QUICK])
async def test_a_completion_that_began_before_the_refusal_does_not_end_it(gateway: Gateway) -> None:
    gateway.app[SERVICES].upstream.account.gate.probe_s = 60
    client = await gateway.client()
    gateway.simulator.first_word_s = 0.5
    before = asyncio.create_task(gateway.chat(client))
    await until(lambda: len(gateway.simulator.billing.records) == 1)
    gateway.simulator.account.credit_usd = Decimal(0)
    assert (await gateway.chat(client))[0].status == 500
    assert (await before)[0].status == 200
    assert gate(gateway).refusal == "no_credit"


@pytest.mark.parametrize("tuned", [QUICK])
async def test_a_request_that_is_too_dear_is_refused_alone(gateway: Gateway) -> None:
    gateway.simulator.account.credit_usd = Decimal("0.001")
    client = await gateway.client()
    for _ in range(3):
        response, _ = await gateway.chat(client, max_tokens=50_000)
        assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_account")
        assert (await gateway.chat(client, max_tokens=16))[0].status == 200
    assert gate(gateway).refusal is None
    assert (await ready(gateway))[0] == 200


@pytest.mark.parametrize("tuned", [QUICK])
@pytest.mark.parametrize("fault", ["status=401", "status=402", "status=402:1"])
async def test_an_error_that_the_key_does_not_confirm_refuses_nobody_else(gateway: Gateway, fault: str) -> None:
    """Row upstream-5 would be a way to close the service for all, if one error were enough."""
    client = await gateway.client()
    upstream, looks = gateway.app[SERVICES].upstream, 0
    real = upstream.get

    async def counted(path: str, *arguments: Any, **named: Any) -> bytes:
        nonlocal looks
        document = await real(path, *arguments, **named)
        looks += path == "/key"
        return document

    upstream.get = counted  # type: ignore[method-assign]
    assert (await gateway.chat(client, f"fault:{fault}"))[0].status == 500
    if fault == "status=401":
        await until(lambda: looks > 0)
    assert (await gateway.chat(client))[0].status == 200
    assert gate(gateway).refusal is None


@pytest.mark.parametrize("tuned", [WATCHED])
async def test_little_credit_is_a_warning_a_gauge_and_an_alert(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    account = gateway.simulator.account
    account.credit_usd, account.limit_usd = Decimal(50), Decimal(40)
    await until(lambda: REGISTRY.get_sample_value("gptutor_openrouter_credit_left_dollars") == 50)
    await until(lambda: REGISTRY.get_sample_value("gptutor_openrouter_limit_dollars") == 40)  # it may be read a look later
    assert REGISTRY.get_sample_value("gptutor_openrouter_limit_left_dollars") == 40
    assert "credit_low" not in ALERTS.conditions
    account.credit_usd = Decimal(4)
    await until(lambda: "credit_low" in ALERTS.conditions)
    warning = "Little is left at OpenRouter: key limit $40.00, $40.00 left; credit left $4.00"
    assert ALERTS.conditions["credit_low"] == warning
    account.credit_usd = Decimal(6)
    await until(lambda: "credit_low" not in ALERTS.conditions)
    assert caplog.text.count(warning) == 1
    account.limit_usd = Decimal("4.99")
    await until(lambda: "credit_low" in ALERTS.conditions)


async def test_a_look_that_fails_refuses_nobody_and_is_said_once(scripted: Any, caplog: pytest.LogCaptureFixture) -> None:
    """OpenRouter's place may be taken by a server that has no /key."""
    _, gateway = scripted
    account = gateway.app[SERVICES].upstream.account
    for _ in range(3):
        assert not await account.look(lambda path, headers: gateway.app[SERVICES].upstream.get(path, headers=headers))
    assert account.obstacle is None
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert [record.name for record in records].count("gptutor.account") == 1


async def test_the_banner_says_what_is_left_or_what_is_wrong(gateway: Gateway, database_url: str, tmp_path: Path) -> None:
    base_url = f"http://{gateway.app[SERVICES].upstream._pool._origin.host_header}/api/v1"
    account = gateway.simulator.account

    async def line(**settings: Any) -> str:
        return await account_line(
            config_for(database_url, settings.pop("base_url", base_url), tmp_path, {"openrouter": settings})
        )

    assert await line() == "the key has no limit"
    account.limit_usd, account.credit_usd = Decimal(7), Decimal(9)
    assert await line(management_key=MANAGEMENT_KEY) == "key limit $7.00, $7.00 left; credit left $9.00"
    account.limit_usd = Decimal(0)
    assert (await line()).startswith("REFUSED: the spending limit")
    account.is_revoked = True
    assert await line() == "REFUSED: OpenRouter does not accept the API key of this service. Set OPENROUTER_API_KEY."
    assert await line(base_url="http://127.0.0.1:1/api/v1") == "cannot be read now: unreachable"


async def test_the_simulators_account_can_be_changed_while_it_runs(gateway: Gateway) -> None:
    base = f"http://{gateway.app[SERVICES].upstream._pool._origin.host_header}"
    post, get = gateway.session.post, gateway.session.get
    async with post(f"{base}/simulator/account", json={"revoked": True, "limit": 0.5}) as response:
        assert await response.json() == {"revoked": True, "limit": 0.5, "credit": None}
    async with get(f"{base}/api/v1/key") as response:
        assert (response.status, (await response.json())["error"]["message"]) == (401, "User not found.")
    async with get(f"{base}/api/v1/credits") as response:
        assert response.status == 403
    mistakes: list[Any] = [{"credits": 1}, {"limit": "much"}, []]
    for wrong in mistakes:
        async with post(f"{base}/simulator/account", json=wrong) as response:
            assert response.status == 400
    async with post(f"{base}/simulator/account", json={}) as response:
        assert await response.json() == {"revoked": False, "limit": None, "credit": None}
