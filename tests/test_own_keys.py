"""`/v1/keys`: an account's API keys, created, listed, limited and revoked by their owner (contract D4 to D6, B1, B2)."""

import asyncio
import datetime
import json
from decimal import Decimal
from typing import Any

import pytest

from gptutor.api.keys import BODY_LIMITS, KeyLimitsPatch, NewKey, limits_after
from gptutor.database.pool import Database
from gptutor.errors import ApiError
from gptutor.http.json_body import parse_json_body
from gptutor.money.amounts import nano_of, parse_roubles, roubles
from gptutor.money.keyring import KEYS_MAX, NO_LIMITS, KeyLimits, KeyRing, TooManyKeys
from gptutor.money.users import UserRepository
from gptutor.web import openapi
from tests.support.gateway import VAULT, Client, Gateway, make_client
from tests.support.ledger import assert_invariants_hold
from tests.support.vk import bearer, launch, sign_in, with_vk

NOON = datetime.datetime(2030, 1, 31, 12, tzinfo=datetime.UTC)


async def send(
    gateway: Gateway, method: str, key_id: int | None, client: Client, body: Any = None, **request: Any
) -> tuple[int, str, Any]:
    """Status, code, and body."""
    path = "/v1/keys" if key_id is None else f"/v1/keys/{key_id}"
    content = {} if body is None else {"json": body}
    async with gateway.session.request(method, gateway.url + path, headers=client.headers, **content, **request) as response:
        document = json.loads(await response.read(), parse_float=Decimal)
        return response.status, response.headers.get("X-Error-Code", ""), document


async def make(gateway: Gateway, client: Client, **form: Any) -> tuple[Client, dict[str, Any]]:
    """The new key as a client, and as it is shown."""
    status, _, document = await send(gateway, "POST", None, client, {"name": "bot", **form})
    assert status == 201
    assert set(document) == {"data", "key"}
    return Client(document["key"], client.account_id, gateway.database), document["data"]


async def shown(gateway: Gateway, client: Client, key_id: int) -> dict[str, Any]:
    _, _, document = await send(gateway, "GET", None, client)
    return next(key for key in document["data"] if key["id"] == key_id)


# -- the life of a key


async def test_a_key_is_shown_once_and_known_by_its_label(gateway: Gateway) -> None:
    client = await gateway.client()
    bot, key = await make(gateway, client, name="Бот № 1", limit=100)
    assert key == {
        "id": key["id"], "name": "Бот № 1", "label": bot.key.rpartition("-")[0] + "-" + bot.key.rpartition("-")[2][:4],
        "is_main": False, "disabled": False, "limit": "100", "limit_reset": None, "limit_remaining": "100", "usage": "0", "held": "0",
        "requests_per_minute": None, "created_at": key["created_at"], "expires_at": None,
    }  # fmt: skip
    assert (await gateway.chat(bot))[0].status == 200
    status, _, document = await send(gateway, "GET", None, client)
    assert status == 200
    assert [(one["id"], one["is_main"]) for one in document["data"]] == [(key["id"], False), (document["data"][1]["id"], True)]
    text = json.dumps(document, default=str)
    assert bot.key not in text
    assert client.key not in text
    spent = gateway.billed_usd() * 90
    assert document["data"][0] == {**key, "usage": roubles(nano_of(spent)), "limit_remaining": roubles(nano_of(100 - spent))}
    assert [document["data"][1][name] for name in ("limit", "limit_remaining", "usage", "held")] == [None] * 4

    assert await send(gateway, "DELETE", key["id"], client) == (200, "", {"deleted": True})
    assert (await gateway.chat(bot))[0].status == 401
    assert await send(gateway, "DELETE", key["id"], client) == (404, "not_found", {"error": "API key not found"})
    assert len((await send(gateway, "GET", None, client))[2]["data"]) == 1
    await assert_invariants_hold(gateway.database)


async def test_amounts_are_exact_strings(gateway: Gateway) -> None:
    client = await gateway.client()
    content = '{"name": "bot", "limit": 123456789.000000001}'
    headers = {**client.headers, "Content-Type": "application/json"}
    async with gateway.session.post(f"{gateway.url}/v1/keys", data=content, headers=headers) as response:
        assert response.headers["Cache-Control"] == "no-store"
        assert b'"limit":"123456789.000000001",' in await response.read()


async def test_limit_remaining_excludes_held_amounts(gateway: Gateway) -> None:
    gateway.simulator.first_word_s = 0.5
    client = await gateway.client()
    bot, key = await make(gateway, client, limit=50)
    running = asyncio.create_task(gateway.chat(bot))
    async with asyncio.timeout(5):
        while (now := await shown(gateway, client, key["id"]))["held"] == "0":
            await asyncio.sleep(0.01)
    assert (now["usage"], Decimal(now["limit_remaining"])) == ("0", 50 - Decimal(now["held"]))
    await running


async def test_limits_are_changed_one_by_one(gateway: Gateway) -> None:
    client = await gateway.client()
    _, key = await make(
        gateway, client, limit=10, limit_reset="daily", requests_per_minute=30, expires_at="2030-01-31T15:00:00+03:00"
    )
    names = ("limit", "limit_reset", "requests_per_minute", "expires_at")
    assert [key[name] for name in names] == ["10", "daily", 30, "2030-01-31T12:00:00.000Z"]
    for change, after in [
        ({}, ["10", "daily", 30, "2030-01-31T12:00:00.000Z"]),
        ({"limit": "1.000000001"}, ["1.000000001", "daily", 30, "2030-01-31T12:00:00.000Z"]),
        ({"requests_per_minute": None}, ["1.000000001", "daily", None, "2030-01-31T12:00:00.000Z"]),
        ({"limit_reset": None}, ["1.000000001", None, None, "2030-01-31T12:00:00.000Z"]),
        ({"expires_at": None, "requests_per_minute": 1}, ["1.000000001", None, 1, None]),
        ({"limit": None}, [None, None, 1, None]),
        ({"limit": 7, "limit_reset": "daily"}, ["7", "daily", 1, None]),
    ]:
        status, _, document = await send(gateway, "PATCH", key["id"], client, change)
        assert (status, [document["data"][name] for name in names]) == (200, after)
        assert document["data"] == await shown(gateway, client, key["id"])


async def test_an_expired_key_is_disabled_and_can_be_enabled_again(gateway: Gateway) -> None:
    client = await gateway.client()
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    bot, key = await make(gateway, client, expires_at=end.isoformat())
    assert not key["disabled"]
    await asyncio.sleep(1.1)
    assert (await shown(gateway, client, key["id"]))["disabled"]
    assert (await gateway.chat(bot))[0].status == 401
    await send(gateway, "PATCH", key["id"], client, {"expires_at": None})
    assert (await gateway.chat(bot))[0].status == 200


# -- whose keys


@with_vk
async def test_a_sign_in_manages_keys_and_none_of_them_becomes_the_main_key(gateway: Gateway) -> None:
    """The first request of a person may be this one."""
    person = Client(launch(), (await make_client(gateway.database, "0")).account_id, gateway.database)
    bot, key = await make(gateway, person, limit=1)
    assert not key["is_main"]
    user = (await sign_in(gateway, person.key))["dbUser"]
    assert user["apiKey"] != bot.key
    assert [one["is_main"] for one in (await send(gateway, "GET", None, person))[2]["data"]] == [True, False]
    assert (await send(gateway, "PATCH", key["id"], person, {"limit": 2}))[2]["data"]["limit"] == "2"
    assert (await send(gateway, "DELETE", key["id"], person))[0] == 200
    async with gateway.session.get(f"{gateway.url}/v1/keys", headers=bearer(bot.key)) as response:
        assert response.status == 401


async def test_only_the_main_key_changes_keys(gateway: Gateway) -> None:
    """The holder of a limited key must not lift its limit, create a key without one, or revoke other keys."""
    client = await gateway.client()
    bot, key = await make(gateway, client, limit=1)
    assert (await send(gateway, "GET", None, bot))[0] == 200
    for method, key_id, body in [
        ("POST", None, {"name": "free"}), ("PATCH", key["id"], {"limit": None}), ("DELETE", key["id"], None)
    ]:  # fmt: skip
        status, code, _ = await send(gateway, method, key_id, bot, body)
        assert (status, code) == (403, "main_key_required")
    assert await shown(gateway, client, key["id"]) == key


async def test_another_accounts_key_is_404(gateway: Gateway) -> None:
    owner, other_client = await gateway.client(), await gateway.client()
    bot, key = await make(gateway, owner, limit=50)
    for key_id in (key["id"], 10**17, 987_654_321_012_345_678):
        for method, body in (("PATCH", {"limit": None}), ("DELETE", None)):
            assert await send(gateway, method, key_id, other_client, body) == (404, "not_found", {"error": "API key not found"})
    assert await shown(gateway, owner, key["id"]) == key
    assert [one["id"] for one in (await send(gateway, "GET", None, other_client))[2]["data"]] != [key["id"]]
    assert (await gateway.chat(bot))[0].status == 200


@pytest.mark.parametrize("key_id", ["0", "-1", "x", "1.5", "9" * 30, "1/2"])
async def test_a_malformed_key_id_is_404(gateway: Gateway, key_id: str) -> None:
    client = await gateway.client()
    assert (await send(gateway, "DELETE", key_id, client))[:2] == (404, "not_found")  # type: ignore[arg-type]


async def test_concurrent_requests_create_at_most_a_hundred_keys(database: Database) -> None:
    client, keys = await make_client(database, "0"), KeyRing(database, VAULT)
    made = await asyncio.gather(*(keys.issue(client.account_id, str(n)) for n in range(120)), return_exceptions=True)
    assert sum(isinstance(one, TooManyKeys) for one in made) == 120 - (KEYS_MAX - 1)
    living = [key for key in await keys.list(client.account_id) if key.revoked_at is None]
    assert len(living) == KEYS_MAX
    await keys.revoke(client.account_id, living[0].key_id)
    await keys.issue(client.account_id, "in its place")


async def test_one_key_too_many_is_409(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.money.keyring.KEYS_MAX", 1)
    status, code, document = await send(gateway, "POST", None, await gateway.client(), {"name": "bot"})
    assert (status, code) == (409, "too_many_keys")
    assert document == {"error": "An account may have 100 keys; revoke one that is no longer needed"}


async def test_of_concurrent_first_keys_one_is_the_main_key(database: Database) -> None:
    user, keys = await UserRepository(database).create(), KeyRing(database, VAULT)
    limited = await keys.issue(user.account_id, "limited", KeyLimits(requests_per_minute=1))
    beside = await keys.issue(user.account_id, "beside", beside=True)
    made = await asyncio.gather(*(keys.issue(user.account_id) for _ in range(10)))
    assert [key.is_main for _, key in (limited, beside)] == [False, False]
    assert sum(key.is_main for _, key in made) == 1


# -- what is rejected

AMOUNT = "limit must be an amount from the minimum balance to 1000000000 roubles with at most nine decimal places, or null"
RANGE = (
    "limit must be from 1, which each request needs, to 1000000000 roubles, not %s; "
    "without a limit the key may spend the whole balance"
)
RESET = 'limit_reset must be "daily" if the key has a limit, or null'
END = "expires_at must be a future time before the year 3000, such as 2030-01-31T12:00:00Z, or null"
PER_MINUTE = "requests_per_minute must be an integer from 1 to 1000000, or null"
NAME = "name must be a string of 1 to 100 printable characters"


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("", "invalid_json", None),
        ("{", "invalid_json", None),
        ("[" * 5000, "invalid_json", None),
        (b'{"name": "\xff"}', "invalid_json", "Request body must be in UTF-8"),
        (r'{"name": "\ud800"}', "invalid_json", None),
        ('{"name": "x", "limit": NaN}', "invalid_json", None),
        ("[]", "invalid_request", "Request body must be a JSON object"),
        ("null", "invalid_request", "Request body must be a JSON object"),
        ('{"name": "x", "name": "y"}', "duplicate_field", "The field 'name' is duplicated in one object"),
        ("{}", "invalid_request", NAME),
        ('{"name": ""}', "invalid_request", NAME),
        ('{"name": null}', "invalid_request", NAME),
        (r'{"name": "a\u0000b"}', "invalid_request", NAME),
        ('{"name": "%s"}' % ("x" * 101), "invalid_request", NAME),
        ('{"name": "x", "limit": -1}', "invalid_request", RANGE % "-1"),
        ('{"name": "x", "limit": 0}', "invalid_request", RANGE % "0"),
        ('{"name": "x", "limit": "0.999999999"}', "invalid_request", RANGE % "0.999999999"),
        ('{"name": "x", "limit": 1e-999}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": 1e-99999999999999999999}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": 1e999}', "invalid_request", "Numbers must be finite, and at most 400 characters long"),
        ('{"name": "x", "limit": 1000000000.000000001}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": 0.0000000001}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": 1e300}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": "NaN"}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": "ten"}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": "1_0"}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": " 10"}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": true}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit": {}}', "invalid_request", AMOUNT),
        ('{"name": "x", "limit_reset": "daily"}', "invalid_request", RESET),
        ('{"name": "x", "limit": null, "limit_reset": "daily"}', "invalid_request", RESET),
        ('{"name": "x", "limit": 1, "limit_reset": "weekly"}', "invalid_request", RESET),
        ('{"name": "x", "expires_at": "2020-01-01T00:00:00Z"}', "invalid_request", END),
        ('{"name": "x", "expires_at": "2030-01-01T00:00:00"}', "invalid_request", END),
        ('{"name": "x", "expires_at": "2030-01-01"}', "invalid_request", END),
        ('{"name": "x", "expires_at": "9999-12-31T23:59:59-23:00"}', "invalid_request", END),
        ('{"name": "x", "expires_at": "0001-01-01T00:00:00+23:59"}', "invalid_request", END),
        ('{"name": "x", "expires_at": 1893456000}', "invalid_request", END),
        ('{"name": "x", "requests_per_minute": 0}', "invalid_request", PER_MINUTE),
        ('{"name": "x", "requests_per_minute": 1.5}', "invalid_request", PER_MINUTE),
        ('{"name": "x", "requests_per_minute": 1000001}', "invalid_request", PER_MINUTE),
        ('{"name": "x", "requests_per_minute": 99999999999999999999}', "invalid_request", PER_MINUTE),
        (
            '{"name": "x", "limits": 1}',
            "invalid_request",
            "'limits' is not a field of this request; known fields: limit, limit_reset, expires_at, requests_per_minute, name",
        ),
        ('{"name": "x", "%s": 1}' % ("y" * 5000), "invalid_request", None),
    ],
)  # fmt: skip
async def test_an_invalid_body_names_the_field_and_what_is_allowed(
    gateway: Gateway, body: str | bytes, code: str, text: str | None
) -> None:
    client = await gateway.client()
    async with gateway.session.post(
        f"{gateway.url}/v1/keys", data=body, headers={**client.headers, "Content-Type": "application/json"}
    ) as response:
        assert (response.status, response.headers["X-Error-Code"]) == (400, code)
        error = (await response.json())["error"]
        assert error == text or (text is None and len(error) < 300)
    assert len(await KeyRing(gateway.database, VAULT).list(client.account_id)) == 1


async def test_the_body_must_be_small_json(gateway: Gateway) -> None:
    client = await gateway.client()
    large = b'{"name": "%s"}' % (b"x" * BODY_LIMITS.bytes_max)

    async def pieces() -> Any:
        yield large

    for data, headers, refused in [
        (large, {"Content-Type": "application/json"}, (413, "body_too_large")),
        (pieces(), {"Content-Type": "application/json"}, (413, "body_too_large")),
        (b'{"name": "x"}', {"Content-Type": "text/plain"}, (415, "unsupported_media_type")),
        (b'{"name": "x"}', {"Content-Type": "application/json", "Expect": "200-ok"}, (417, "expectation_failed")),
    ]:
        async with gateway.session.post(f"{gateway.url}/v1/keys", data=data, headers={**client.headers, **headers}) as response:
            assert (response.status, response.headers["X-Error-Code"]) == refused
            assert list(await response.json()) == ["error"]
    async with gateway.session.post(
        f"{gateway.url}/v1/keys", json={"name": "x"}, headers=client.headers, expect100=True
    ) as response:
        assert response.status == 201


@pytest.mark.parametrize(
    ("before", "form", "after"),
    [
        (NO_LIMITS, {}, NO_LIMITS),
        (NO_LIMITS, {"limit": 5}, KeyLimits(limit=parse_roubles("5"))),
        (NO_LIMITS, {"limit": 5, "limit_reset": "daily"}, KeyLimits(limit=parse_roubles("5"), limit_reset="daily")),
        (NO_LIMITS, {"limit_reset": None}, NO_LIMITS),
        (KeyLimits(limit=parse_roubles("5"), limit_reset="daily"), {"limit": 6}, KeyLimits(limit=parse_roubles("6"), limit_reset="daily")),
        (KeyLimits(limit=parse_roubles("5"), limit_reset="daily"), {"limit_reset": None}, KeyLimits(limit=parse_roubles("5"))),
        (KeyLimits(limit=parse_roubles("5"), limit_reset="daily"), {"limit": None}, NO_LIMITS),
        (KeyLimits(NOON, requests_per_minute=4), {"limit": 1}, KeyLimits(NOON, parse_roubles("1"), None, 4)),
        (NO_LIMITS, {"limit": 1e0, "requests_per_minute": 5.0}, KeyLimits(limit=parse_roubles("1"), requests_per_minute=5)),
        (KeyLimits(NOON, requests_per_minute=4), {"expires_at": None, "requests_per_minute": None}, NO_LIMITS),
    ],
)  # fmt: skip
def test_limits_after_a_patch(before: KeyLimits, form: dict[str, Any], after: KeyLimits) -> None:
    assert limits_after(parse_json_body(json.dumps(form).encode(), KeyLimitsPatch), before, parse_roubles("1")) == after


def test_limit_reset_needs_a_limit_in_a_patch_too() -> None:
    with pytest.raises(ApiError, match="limit_reset must be"):
        limits_after(KeyLimitsPatch(limit_reset="daily"), NO_LIMITS, parse_roubles("1"))


def test_described_bodies_are_accepted() -> None:
    document = openapi.describe()
    for method, path, form in (("post", "/v1/keys", NewKey), ("patch", "/v1/keys/{key_id}", KeyLimitsPatch)):
        content = document["paths"][path][method]["requestBody"]["content"]["application/json"]
        assert parse_json_body(json.dumps(content["example"]).encode(), form)
        described = document["components"]["schemas"][form.__name__]
        assert set(described["properties"]) == set(form.__struct_fields__)
        assert described["additionalProperties"] is False
        assert described["properties"]["limit"]["anyOf"][0]["type"] == ["number", "string"]
