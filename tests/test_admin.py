"""The administrators' API (contract F10, F11, C11; rows money-12, money-15): what the command line does, over HTTP, with a token,
and never on the public listener."""

import asyncio
import csv
import datetime
import errno
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from aiohttp import web

from gptutor.admin.app import build_admin
from gptutor.config import schema
from gptutor.config.load import load
from gptutor.config.schema import ConfigError
from gptutor.database.pool import Database
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.holds import HandOver
from gptutor.money.users import UserRepository
from gptutor.server.listener import StartError
from gptutor.server.serve import admin_listening
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import LoggerService
from tests.support.gateway import SECRET, Gateway, config_for, make_client
from tests.support.ledger import hold, ledger_of, settlement
from tests.support.service import start

TOKEN = "a-token-of-thirty-two-characters-or-more"
ANNAS = "annas-token-of-thirty-two-characters-or-more"


@dataclass
class Admin:
    session: aiohttp.ClientSession
    database: Database
    logs: Path

    async def request(self, method: str, path: str, body: Any = None, *, token: str = ANNAS) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(method, f"http://admin{path}", json=body, headers=headers) as response:
            assert response.headers["X-Request-ID"]
            document = await response.json(content_type=None)
            if response.status >= 400:
                assert list(document) == ["error"]
                return response.status, response.headers["X-Error-Code"]
            return response.status, document["data"]

    async def document(self, path: str) -> Any:
        """The whole of a successful response, with what stands beside `data`."""
        async with self.session.get(f"http://admin{path}", headers={"Authorization": f"Bearer {ANNAS}"}) as response:
            assert response.status == 200
            return await response.json()

    def audit(self) -> list[dict[str, Any]]:
        (path,) = self.logs.glob("combined-*.log")
        return [line for line in map(json.loads, path.read_text().splitlines()) if line.get("type") == "audit"]

    async def audited(self, count: int) -> list[dict[str, Any]]:
        for _ in range(100):
            if len(lines := self.audit()) >= count:
                break
            await asyncio.sleep(0.02)
        return lines


@pytest.fixture
async def admin(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Admin]:
    socket = tmp_path / "admin.socket"
    plain = config_for(database_url, "http://127.0.0.1:9", tmp_path)
    config = msgspec.structs.replace(plain, admin=schema.AdminSettings(socket=str(socket), token=f"{TOKEN} anna:{ANNAS}"))
    config.paths.logs.mkdir()
    with logging_to(tmp_path / "lines", level="error", retention_days=1, stdout=False):
        async with (
            admin_listening(build_admin(config, log=LoggerService(), secrets=[SECRET]), config),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
        ):
            assert socket.stat().st_mode & 0o777 == 0o660
            yield Admin(session, database, tmp_path / "lines")
    assert not socket.exists()
    text = "".join(path.read_text() for path in (tmp_path / "lines").iterdir())
    assert TOKEN not in text
    assert ANNAS not in text
    assert not re.search(r"sk-user-\d+-\w{5}", text)


async def test_nothing_is_changed_while_audit_lines_cannot_be_written(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    _, user = await admin.request("POST", "/admin/users", {"balance": "1"})
    path = f"/admin/users/{user['id']}"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptutor.telemetry.log_writer.os.fsync", full)
        status, error = await admin.request("POST", f"{path}/bookings", {"kind": "topup", "amount": "5"})
        assert (status, error) == (503, "audit_log_unavailable")
        assert (await admin.request("GET", path))[1]["balance"] == "1"
    status, user = await admin.request("POST", f"{path}/bookings", {"kind": "topup", "amount": "5"})
    assert (status, user["balance"]) == (201, "6")


async def test_administrators_get_errors_as_a_text_whatever_their_client(admin: Admin) -> None:
    headers = {"User-Agent": "OpenAI/Python 3.57.0", "X-Stainless-Lang": "python"}
    async with admin.session.get("http://admin/admin/users", headers=headers) as response:
        assert (response.status, await response.json()) == (401, {"error": "Invalid administrator token"})


async def test_the_life_of_a_user(admin: Admin) -> None:
    status, user = await admin.request("POST", "/admin/users", {"name": "Иван", "balance": "100.000000001"})
    assert (status, user["balance"], user["name"]) == (201, "100.000000001", "Иван")
    path = f"/admin/users/{user['id']}"
    assert user["apiKey"].startswith(f"sk-user-{user['id']}-")
    bookings = [
        {"kind": "topup", "amount": 0.1, "reference": "p-1"},
        {"kind": "bonus", "amount": "5"},
        {"kind": "refund", "amount": "50", "reason": "asked for"},
        {"kind": "adjustment", "amount": "-1.5", "reason": "a mistake of ours"},
    ]
    for booking in bookings:
        status, after = await admin.request("POST", f"{path}/bookings", booking)
        assert status == 201
    assert after["balance"] == "53.600000001"
    assert (await admin.request("POST", f"{path}/deactivate"))[1]["is_active"] is False
    assert (await admin.request("POST", f"{path}/activate"))[1]["is_active"] is True
    limits = {"name": "bot", "limit": "10", "limit_reset": "daily", "requests_per_minute": 3, "expires_at": "2999-12-31"}
    status, key = await admin.request("POST", f"{path}/keys", limits)
    assert (status, key["limit"], key["limit_reset"], key["requests_per_minute"]) == (201, "10", "daily", 3)
    assert key["expires_at"] == "3000-01-01T00:00:00.000Z"
    status, key = await admin.request("PATCH", f"{path}/keys/{key['id']}", {"limit": 20, "expires_at": None})
    assert (key["limit"], key["limit_reset"], key["requests_per_minute"], key["expires_at"]) == ("20", "daily", 3, None)
    _, key = await admin.request("PATCH", f"{path}/keys/{key['id']}", {"limit_reset": None})
    assert (key["limit"], key["limit_reset"], key["usage"], key["held"]) == ("20", None, "0", "0")
    status, key = await admin.request("DELETE", f"{path}/keys/{key['id']}")
    assert (status, bool(key["revoked_at"])) == (200, True)
    _, person = await admin.request("GET", path)
    assert [bool(one["revoked_at"]) for one in person["keys"]] == [True, False]
    assert [one["name"] for one in (await admin.request("GET", f"{path}/keys"))[1]] == ["bot", ""]

    lines = await admin.audited(13)
    assert [(line["what"], line["amount"]) for line in lines] == [
        ("create user", None), ("topup", "100.000000001"), ("issue key", None), ("topup", "0.1"), ("bonus", "5"), ("refund", "-50"),
        ("adjustment", "-1.5"), ("deactivate", None), ("activate", None), ("issue key", None), ("limit key", None),
        ("limit key", None), ("revoke key", None),
    ]  # fmt: skip
    assert {(line["who"], line["userId"]) for line in lines} == {("admin:anna", str(user["id"]))}
    assert (lines[3]["reference"], lines[5]["reason"]) == ("p-1", "asked for")
    assert lines[10]["limits"] == {"limit": "20", "limit_reset": "daily", "requests_per_minute": 3, "expires_at": None}


async def test_a_database_without_the_schema_is_503(admin: Admin, database_url: str) -> None:
    server = await asyncpg.connect(database_url)
    await server.execute("ALTER TABLE accounts RENAME TO elsewhere")
    try:
        assert await admin.request("GET", "/admin/users/1") == (503, "database_unavailable")
    finally:
        await server.execute("ALTER TABLE elsewhere RENAME TO accounts")
        await server.close()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"kind": "topup", "amount": "-5"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "0"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "NaN"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "0.0000000001"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": 1e300}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1000000001"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "ten"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1_0"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "١٠"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": True}, 400, "invalid_request"),
        ({"kind": "topup"}, 400, "invalid_request"),
        ({"kind": "charge", "amount": "1"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1", "reason": "a\u0000b"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1", "reason": "x" * 501}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1", "reference": ""}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1", "note": "x"}, 400, "invalid_request"),
        ({"kind": "adjustment", "amount": "1", "reason": " "}, 400, "invalid_request"),
        ({"kind": "refund", "amount": "-5"}, 400, "invalid_request"),
        ({"kind": "refund", "amount": "11"}, 400, "invalid_request"),
        ({"kind": "topup", "amount": "1", "reference": "used"}, 409, "already_booked"),
        ({"kind": "topup", "amount": "1", "reason": "x" * 70_000}, 413, "body_too_large"),
        ([], 400, "invalid_request"),
    ],
)
async def test_an_invalid_booking_is_rejected(admin: Admin, body: Any, status: int, code: str) -> None:
    """Row money-15."""
    client = await make_client(admin.database, "0")
    await Bookings(admin.database).book(client.account_id, "topup", parse_roubles("10"), reference="used")
    assert await admin.request("POST", f"/admin/users/{client.account_id}/bookings", body) == (status, code)
    assert await client.balance() == 10
    assert admin.audit() == []


async def test_a_payment_is_credited_once_with_the_same_response(admin: Admin, database_url: str) -> None:
    """Row money-12: twice, concurrently, and after a year; another payment with its reference is rejected."""
    user, _ = await UserRepository(admin.database).of_person("vk", "494075")
    payment = {"vk_id": 494075, "amount": "99.90", "reference": "17", "provider": "bank"}
    answers = await asyncio.gather(*(admin.request("POST", "/admin/payments", payment) for _ in range(16)))
    assert all(answer == answers[0] for answer in answers)
    status, first = answers[0]
    assert (status, first["amount"], first["user_id"], first["reference"]) == (200, "99.9", user.account_id, "bank:17")
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE ledger SET created_at = created_at - interval '1 year'")
    await connection.close()
    status, later = await admin.request("POST", "/admin/payments", {**payment, "vk_id": None, "user_id": user.account_id})
    assert (status, later["entry_id"]) == (200, first["entry_id"])
    assert await admin.request("POST", "/admin/payments", {**payment, "amount": "1"}) == (409, "already_booked")
    other = await make_client(admin.database, "0")
    elsewhere = {**payment, "vk_id": None, "user_id": other.account_id}
    assert await admin.request("POST", "/admin/payments", elsewhere) == (409, "already_booked")
    assert await admin.request("POST", "/admin/payments", {**payment, "vk_id": "494075"}) == (200, later)
    for number in (1, "1"):
        assert await admin.request("POST", "/admin/payments", {**payment, "vk_id": number}) == (404, "not_found")
    for invalid in (0, "0", "0494075", "", "x", "49407٥", " 494075", "1" * 19, 1.5, True):
        assert await admin.request("POST", "/admin/payments", {**payment, "vk_id": invalid}) == (400, "invalid_request")
    assert await admin.request("POST", "/admin/payments", {**payment, "user_id": 1}) == (400, "invalid_request")
    assert (await UserRepository(admin.database).find(user.account_id)).balance == parse_roubles("99.9")
    assert [line["reference"] for line in admin.audit()] == ["bank:17"]


async def test_users_are_found_by_id_by_vks_id_and_by_the_beginning_of_a_key(admin: Admin) -> None:
    client = await make_client(admin.database, "1")
    other, _ = await UserRepository(admin.database).of_person("vk", "494075")
    start_of_key = client.key.rpartition("-")[2][:2]

    async def found(query: str) -> list[int]:
        return [user["id"] for user in (await admin.request("GET", f"/admin/users?query={query}"))[1]]

    number = str(client.account_id)
    assert await found(number) == [client.account_id]
    assert await found("494075") == [other.account_id]
    for query in (f"sk-user-{number}-{start_of_key}", f"sk-user-{number}", client.key, f"sk-user-{number}-{start_of_key}…"):
        assert await found(query) == [client.account_id]
    for query in ("sk-user-%", "_", "nobody", "9" * 30, "sk-user-1-'"):
        assert await found(query) == []
    assert {user["id"] for user in (await admin.request("GET", "/admin/users"))[1]} == {client.account_id, other.account_id}
    first = await admin.document("/admin/users?limit=1")
    assert ([user["id"] for user in first["data"]], first["next_cursor"]) == ([client.account_id], str(client.account_id))
    second = await admin.document(f"/admin/users?limit=1&cursor={first['next_cursor']}")
    assert ([user["id"] for user in second["data"]], second["next_cursor"]) == ([other.account_id], None)
    assert (await admin.request("GET", f"/admin/users?cursor={10**18 - 1}"))[1] == []
    for query in ("limit=0", "limit=x", "cursor=-1", f"cursor={10**18}", "search=1", "query=1&query=2", "after=1"):
        assert await admin.request("GET", f"/admin/users?{query}") == (400, "invalid_request")


async def test_a_ledger_is_read_in_pages(admin: Admin) -> None:
    client = await make_client(admin.database, "0")
    for number in range(1, 8):
        await Bookings(admin.database).book(client.account_id, "topup", parse_roubles(str(number)))
    path = f"/admin/users/{client.account_id}/ledger"
    amounts, cursor = [], ""
    while cursor is not None:
        document = await admin.document(f"{path}?limit=3{cursor}")
        amounts.append([entry["amount"] for entry in document["data"]])
        cursor = f"&cursor={document['next_cursor']}" if document["next_cursor"] else None  # type: ignore[assignment]
    assert amounts == [["7", "6", "5"], ["4", "3", "2"], ["1"]]
    for query in ("limit=0", "limit=1001", "limit=x", "cursor=x", "cursor=", "limit=1&limit=2", "before=5"):
        assert await admin.request("GET", f"{path}?{query}") == (400, "invalid_request")
    assert await admin.request("GET", "/admin/users/999/ledger") == (404, "not_found")


async def test_the_export_is_the_whole_ledger_and_has_no_formulas(admin: Admin) -> None:
    client, other = await make_client(admin.database, "10"), await make_client(admin.database, "20")
    await Bookings(admin.database).book(
        client.account_id, "bonus", parse_roubles("0.1"), reason='=cmd|"x"!A1', reference='+1, "2"'
    )
    await ledger_of(admin.database).settle(settlement(await hold(admin.database, client, "5"), "0.01"))

    async def rows(query: str = "") -> list[dict[str, str]]:
        async with admin.session.get(
            f"http://admin/admin/export/ledger{query}", headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            assert (response.status, response.content_type) == (200, "text/csv")
            return list(csv.DictReader(io.StringIO(await response.text())))

    whole = await rows()
    assert [(row["user_id"], row["kind"], row["amount_rub"]) for row in whole] == [
        (str(client.account_id), "topup", "10"),
        (str(client.account_id), "bonus", "0.1"),
        (str(client.account_id), "charge", "-0.9"),
        (str(other.account_id), "topup", "20"),
    ]
    assert (whole[1]["reason"], whole[1]["reference"]) == ('\'=cmd|"x"!A1', '\'+1, "2"')
    assert (whole[2]["cost_usd"], whole[2]["rub_per_usd"], whole[2]["model"]) == ("0.01", "90", "a/b")
    today = datetime.datetime.now(datetime.UTC).date()
    yesterday = today - datetime.timedelta(days=1)
    assert await rows(f"?from={today}&to={today}") == whole
    assert await rows(f"?to={yesterday}") == []
    assert await rows(f"?user={other.account_id}") == whole[3:]
    assert await rows(f"?from={yesterday}&user={other.account_id}") == whole[3:]
    assert await admin.request("GET", f"/admin/export/ledger?from={today}&to={yesterday}") == (400, "invalid_request")
    assert await admin.request("GET", f"/admin/export/ledger?user={'9' * 18}") == (404, "not_found")
    for query in ("user=0", "user=x", "users=1", "from=20260131"):
        assert await admin.request("GET", f"/admin/export/ledger?{query}") == (400, "invalid_request")
    assert await admin.request("GET", "/admin/export/ledger?from=yesterday") == (400, "invalid_request")


async def test_a_failed_export_does_not_look_complete(admin: Admin, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await make_client(admin.database, "10")
    real = Bookings.export

    async def broken(self: Bookings, *arguments: Any) -> AsyncIterator[Any]:
        async for page in real(self, *arguments):
            yield page
        raise ConnectionError("the database went away")

    monkeypatch.setattr(Bookings, "export", broken)
    with pytest.raises(aiohttp.ClientError):
        async with admin.session.get(
            "http://admin/admin/export/ledger", headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            await response.read()


async def test_holds_of_unknown_cost_are_listed(admin: Admin) -> None:
    client = await make_client(admin.database, "10")
    waiting = await hold(admin.database, client, "2.5")
    await ledger_of(admin.database).hand_over(HandOver(client.account_id, waiting.hold_id, "gen-1"))
    status, holds = await admin.request("GET", "/admin/holds")
    assert (status, [(one["user_id"], one["at_most"], one["generation_id"]) for one in holds]) == (
        200, [(client.account_id, "2.5", "gen-1")],
    )  # fmt: skip
    assert await admin.request("GET", "/admin/holds?user=1") == (400, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "ID/bookings", {"kind": "charge", "amount": "1"}, "kind must be one of topup, refund, adjustment, bonus"),
        ("POST", "ID/bookings", {"amount": "1"}, "kind must be one of topup, refund, adjustment, bonus"),
        ("POST", "ID/keys", {"limit": "1", "limit_reset": "weekly"}, 'limit_reset must be "daily", or null for never'),
        (
            "POST",
            "ID/keys",
            {"cap": "1"},
            "'cap' is not a field of this request; known fields: limit, limit_reset, requests_per_minute, expires_at, name",
        ),
        (
            "POST",
            "ID/keys",
            {"limit": "0.5"},
            "limit must be from 1, which each request needs, to 1000000000 roubles, not 0.5",
        ),
        (
            "POST",
            "ID/keys",
            {"requests_per_minute": 2e6},
            "requests_per_minute must be a whole number from 1 to 1000000, or null",
        ),
        (
            "POST",
            "/admin/payments",
            {"amount": 1, "reference": "1", "provider": "x", "user_id": 10**18},
            "user_id must be a user's id, from 1 to 999999999999999999",
        ),
        (
            "POST",
            "/admin/payments",
            {"amount": 1, "reference": "1", "provider": "x", "vk_id": "x"},
            "vk_id must be the user's VK id",
        ),
        (
            "GET",
            "/admin/export/ledger?from=2026-02-01&to=2026-01-31",
            None,
            "from must not be later than to: 2026-02-01 is later",
        ),
        ("GET", "/admin/export/ledger?user=999", None, "There is no user with this id"),
        ("GET", "/admin/users?search=1", None, "'search' is not a parameter here; known parameters: query, cursor, limit"),
        ("GET", "/admin/holds?user=1", None, "'user' is not a parameter here; there are none"),
        ("GET", "/admin/users/1?keys=1", None, "'keys' is not a parameter here; there are none"),
        ("GET", "/admin/users/1/keys?all=1", None, "'all' is not a parameter here; there are none"),
    ],
)
async def test_errors_name_the_fault_and_what_is_allowed(admin: Admin, method: str, path: str, body: Any, words: str) -> None:
    client = await make_client(admin.database, "0")
    address = "http://admin" + path.replace("ID", f"/admin/users/{client.account_id}")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with admin.session.request(method, address, json=body, headers=headers) as response:
        assert (await response.json())["error"].startswith(words)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/admin/users/999", 404, "not_found"),
        ("GET", "/admin/users/0", 404, "not_found"),
        ("POST", "/admin/users/999/activate", 404, "not_found"),
        ("POST", "/admin/users/999/keys", 404, "not_found"),
        ("DELETE", "/admin/users/999/keys/1", 404, "not_found"),
        ("PATCH", "/admin/users/999/keys/1", 404, "not_found"),
        ("PUT", "/admin/users", 405, "method_not_allowed"),
        ("GET", "/admin", 404, "not_found"),
        ("GET", "/v1/models", 404, "not_found"),
    ],
)
async def test_unknown_users_keys_and_paths_are_404(admin: Admin, method: str, path: str, status: int, code: str) -> None:
    assert await admin.request(method, path, {}) == (status, code)


@pytest.mark.parametrize(
    "body",
    [{"limit": "-1"}, {"limit": -1}, {"limit": 0.5}, {"limit": 1e-99}, {"limit": "x"}, {"limit": True}, {"limit_reset": "daily"}, {"limit": "1", "limit_reset": "weekly"},
     {"expires_at": "2020-01-01"}, {"expires_at": "soon"}, {"expires_at": "2999-01-01T00:00:00"}, {"requests_per_minute": 0},
     {"requests_per_minute": "5"}, {"cap": 5}, {"name": "x" * 101}, {"name": "a\nb"}],
)  # fmt: skip
async def test_an_invalid_limit_is_rejected(admin: Admin, body: dict[str, Any]) -> None:
    client = await make_client(admin.database, "0")
    assert await admin.request("POST", f"/admin/users/{client.account_id}/keys", body) == (400, "invalid_request")


@pytest.mark.parametrize("path", ["/admin/users", "/admin/nowhere", "/metrics"])
async def test_requests_without_the_token_are_rejected(admin: Admin, path: str) -> None:
    for header in (None, "", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ключ"):
        async with admin.session.get(
            f"http://admin{path}", headers={} if header is None else {"Authorization": header}
        ) as response:
            assert (response.status, response.headers["X-Error-Code"]) == (401, "invalid_key")
            assert await response.json() == {"error": "Invalid administrator token"}
    async with admin.session.get("http://admin/metrics", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
        assert "gptutor_in_flight_requests" in await response.text()


async def test_no_path_of_it_is_on_the_public_listener(gateway: Gateway) -> None:
    app = build_admin(schema.Config(), log=LoggerService(), secrets=[SECRET])
    paths = {route.resource.canonical for route in app.router.routes() if route.resource is not None}
    assert len(paths) >= 12
    for path in paths:
        address = path.replace("{user_id}", "1").replace("{key_id}", "1")
        for method in ("GET", "POST", "PATCH", "DELETE"):
            async with gateway.session.request(
                method, gateway.url + address, headers={"Authorization": f"Bearer {TOKEN}"}
            ) as response:
                assert response.status == 404, address


@pytest.mark.parametrize(
    "environ",
    [
        {"PORT": "3010"},
        {"PORT": "3010", "TOKEN": "short"},
        {"SOCKET": "/tmp/x", "TOKEN": ""},
        {"SOCKET": "/tmp/x", "TOKEN": "x" * 31},
        {"SOCKET": "/tmp/x", "TOKEN": "   "},
        {"SOCKET": "/tmp/x", "PORT": "3010", "TOKEN": TOKEN},
        {"PORT": "3010", "TOKEN": f"{TOKEN} {ANNAS}"},
        {"PORT": "3010", "TOKEN": f"anna:{TOKEN} anna:{ANNAS}"},
        {"PORT": "3010", "TOKEN": f"Анна:{TOKEN}"},
    ],
)
def test_a_listener_without_a_sound_token_stops_the_start(environ: dict[str, str]) -> None:
    """Row operator-1: a sentence, and the token is not in it."""
    with pytest.raises(ConfigError, match=r"admin\.|ADMIN") as error:
        load({f"GPTUTOR_ADMIN__{name}": value for name, value in environ.items()})
    assert not {TOKEN, ANNAS, "short", "x" * 31} & set(str(error.value).replace("'", " ").split())


def test_it_is_off_by_default() -> None:
    assert not load({"GPTUTOR_ADMIN__TOKEN": TOKEN}).admin.is_enabled
    assert load({"GPTUTOR_ADMIN__PORT": "3010", "GPTUTOR_ADMIN__TOKEN": f"a:{TOKEN}"}).admin.tokens == {"a": TOKEN}


async def test_an_impossible_socket_path_is_reported_in_a_sentence(tmp_path: Path) -> None:
    config = schema.Config(admin=schema.AdminSettings(socket=str(tmp_path / "no" / "where"), token=TOKEN))
    with pytest.raises(StartError, match="Cannot listen on the socket"):
        async with admin_listening(web.Application(), config):
            pass


async def test_the_service_listens_for_administrators_beside_its_public_port(tmp_path: Path, unused_tcp_port: int) -> None:
    service = start(tmp_path, GPTUTOR_ADMIN__PORT=str(unused_tcp_port), GPTUTOR_ADMIN__TOKEN=f"boris:{TOKEN}")
    address = f"http://127.0.0.1:{unused_tcp_port}/admin/users"
    assert f"Administration     http://localhost:{unused_tcp_port}" in service.banner
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession() as session:
        async with session.post(address, json={"balance": 5}, headers=headers) as response:
            user = (await response.json())["data"]
        async with session.get(f"{service.url}/v1/models", headers={"Authorization": f"Bearer {user['apiKey']}"}) as response:
            assert response.status == 200
    assert service.command("user", "show", str(user["id"]))["balance"] == "5"
    assert service.stop() == 0
    assert [line["who"] for line in service.log() if line.get("type") == "audit"] == ["admin:boris"] * 3
    assert TOKEN not in (service.banner + json.dumps(service.log()))
