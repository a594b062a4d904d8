"""Accounts, from the client's side: sign-in by VK, the main key, who is accepted and who is rejected (contract D1 to D4, D6, B3).

Rows auth-1 to -14: no header, wrong schemes and doubled headers, keys of a wrong form, unknown, revoked and foreign keys, SQL in
a key, inactive users; VK's signature, its odd parameters, its clock, other apps, replays; auth-14 is in `test_keys_limits.py`.
"""

import asyncio
import base64
import datetime
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import asyncpg
import psutil
import pytest

from gptutor.database.pool import Database
from gptutor.http.app_keys import DATABASE, READINESS
from gptutor.money.amounts import AccountId, parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import hash_key, make_key
from gptutor.money.users import NoSuchUser, UserRepository
from gptutor.money.vault import DecryptionFailed, EncryptedKey, Vault
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import SECRET, VAULT, Client, Gateway, make_client
from tests.support.late import LateImport
from tests.support.ledger import assert_invariants_hold
from tests.support.service import Service, start
from tests.support.statements import Statements
from tests.support.vk import APP_ID, VK, VK_SECRET, bearer, launch, send, sign_in, with_vk

if TYPE_CHECKING:
    import openai
else:
    openai = LateImport("openai")

GIFT = {"vk": {**VK["vk"], "bonus_rub": Decimal("10.5")}}
UNAUTHORIZED = (401, "invalid_key", {"error": "Invalid API key or inactive user"})

with_gift = pytest.mark.parametrize("tuned", [GIFT])


# -- the documented way


@with_gift
async def test_from_vk_sign_in_to_a_charged_completion(gateway: Gateway) -> None:
    """Contract D1, A6: VK → /vk-test → dbUser.apiKey → an OpenAI SDK → balance."""
    signed_in = await sign_in(gateway)
    assert set(signed_in) == {"message", "vkData", "dbUser", "timestamp"}
    assert signed_in["vkData"] == {
        "vk_user_id": "494075", "vk_app_id": str(APP_ID), "vk_is_app_user": "1", "vk_language": "ru", "vk_platform": "mobile_web",
        "vk_ts": signed_in["vkData"]["vk_ts"],
    }  # fmt: skip
    user = signed_in["dbUser"]
    assert set(user) == {"id", "vkId", "balance", "apiKey", "isActive", "createdAt", "updatedAt"}
    assert (user["vkId"], user["balance"], user["isActive"]) == ("494075", Decimal("10.5"), True)
    for moment in (signed_in["timestamp"], user["createdAt"], user["updatedAt"]):
        assert moment.endswith("Z")
        assert abs(datetime.datetime.fromisoformat(moment).timestamp() - time.time()) < 30

    async with openai.AsyncOpenAI(api_key=user["apiKey"], base_url=f"{gateway.url}/v1", max_retries=0) as client:
        completion = await client.chat.completions.create(
            model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Привет!"}]
        )
    assert "Привет" in str(completion.choices[0].message.content)
    await gateway.idle()
    after = (await sign_in(gateway))["dbUser"]
    assert after["balance"] == Decimal("10.5") - gateway.billed_usd() * 90 < Decimal("10.5")
    assert after["apiKey"] == user["apiKey"]
    await assert_charges_match_bills(gateway, Client(user["apiKey"], AccountId(user["id"]), gateway.database), "10.5")


@with_vk
async def test_the_balance_of_a_sign_in_is_an_exact_number(gateway: Gateway) -> None:
    user = (await sign_in(gateway))["dbUser"]
    await Bookings(gateway.database).book(AccountId(user["id"]), "topup", parse_roubles("123456789.000000001"))
    async with gateway.session.get(f"{gateway.url}/vk-test", headers=bearer(launch())) as response:
        assert b'"balance":123456789.000000001,' in await response.read()


@with_gift
async def test_twenty_concurrent_first_sign_ins_create_one_account_one_key_and_one_bonus(gateway: Gateway) -> None:
    answers = await asyncio.gather(*(sign_in(gateway) for _ in range(20)))
    assert len({answer["dbUser"]["id"] for answer in answers}) == 1
    (key,) = {answer["dbUser"]["apiKey"] for answer in answers}
    (user,) = [user async for user in UserRepository(gateway.database).all()]
    assert user.balance == parse_roubles("10.5")
    (entry,) = await Bookings(gateway.database).entries(user.account_id, 10)
    assert (entry.kind, entry.amount, entry.contra, entry.reason) == ("bonus", parse_roubles("10.5"), "goodwill", "sign-up")
    assert [one.revoked_at for one in await KeyRing(gateway.database, VAULT).list(user.account_id)] == [None]
    assert (await gateway.chat(Client(key, user.account_id, gateway.database)))[0].status == 200
    await assert_invariants_hold(gateway.database)


@with_vk
async def test_every_person_has_their_own_account(gateway: Gateway) -> None:
    first, second = [(await sign_in(gateway, launch(user_id)))["dbUser"] for user_id in (1, 2)]
    assert first["id"] != second["id"]
    assert first["apiKey"] != second["apiKey"]
    assert first["balance"] == 0  # no gift is set
    users = UserRepository(gateway.database)
    assert (await users.find_person("vk", "1")).account_id == first["id"]
    assert await users.identities(AccountId(second["id"])) == [("vk", "2")]
    with pytest.raises(NoSuchUser):
        await users.find_person("vk", "3")


@with_vk
async def test_signing_in_again_changes_nothing(gateway: Gateway) -> None:
    """Row auth-13: launch parameters may be reused for an hour."""
    token = launch()
    answers = [await sign_in(gateway, token) for _ in range(3)]
    assert [answer["dbUser"] for answer in answers] == [answers[0]["dbUser"]] * 3


@with_vk
async def test_update_token_invalidates_the_main_key_at_once_and_no_other(gateway: Gateway) -> None:
    """Contract D3."""
    user = (await sign_in(gateway))["dbUser"]
    account_id = AccountId(user["id"])
    await Bookings(gateway.database).book(account_id, "topup", parse_roubles("100"))
    other, _ = await KeyRing(gateway.database, VAULT).issue(account_id, "bot")

    async def status_of(key: str) -> int:
        return (await gateway.chat(Client(key, account_id, gateway.database)))[0].status

    assert [await status_of(key) for key in (user["apiKey"], other)] == [200, 200]
    status, _, document = await send(gateway, "POST", "/update-token", bearer(launch()))
    assert status == 200
    assert set(document) == {"message", "newApiKey", "user", "timestamp"}
    assert set(document["user"]) == set(user) - {"apiKey"}
    assert [await status_of(key) for key in (user["apiKey"], document["newApiKey"], other)] == [401, 200, 200]
    assert (await sign_in(gateway))["dbUser"]["apiKey"] == document["newApiKey"]


# -- who is rejected

FORMS: dict[str, Callable[[Client], Any]] = {
    "auth-1: no header": lambda client: {},
    "auth-2: another scheme": lambda client: {"Authorization": f"Basic {client.key}"},
    "auth-2: no scheme": lambda client: {"Authorization": client.key},
    "auth-2: no key": lambda client: {"Authorization": "Bearer "},
    "auth-2: two headers": lambda client: [("Authorization", f"Bearer {client.key}")] * 2,
    "auth-3: a letter is missing": lambda client: bearer(client.key[:-1]),
    "auth-3: another letter": lambda client: bearer(client.key[:-1] + ("a" if client.key[-1] != "a" else "b")),
    "auth-3: another alphabet": lambda client: bearer(client.key.upper()),
    "auth-3: not ASCII": lambda client: bearer("sk-user-ключ"),
    "auth-3: long": lambda client: bearer("sk-user-1-" + "a" * 7000),
    "auth-6: SQL": lambda client: bearer("sk-user-1-' OR pg_sleep(8)--"),
    "auth-6: SQL in another place": lambda client: bearer("sk-' OR pg_sleep(8)--"),
    "auth-7: another account is written into it": lambda client: bearer(client.key.replace("sk-user-1-", "sk-user-2-")),
    "auth-7: an account that no database has": lambda client: bearer(client.key.replace("sk-user-1-", f"sk-user-{10**18}-")),
}
LAUNCHES = {
    "auth-9: another signature": lambda: launch(sign="A" * 43),
    "auth-9: no signature": lambda: launch().rpartition("&")[0],
    "auth-9: an empty signature": lambda: launch(sign=""),
    "auth-9: a short signature": lambda: launch()[:-1],
    "auth-9: a padded signature": lambda: launch() + "=",
    "auth-9: by another secret": lambda: launch(secret="another"),
    "auth-11: old": lambda: launch(vk_ts=int(time.time()) - 3610),
    "auth-11: from the future": lambda: launch(vk_ts=int(time.time()) + 70),
    "auth-11: without a time": lambda: launch(vk_ts=None),
    "auth-11: no time": lambda: launch(vk_ts="now"),
    "auth-12: two users": lambda: launch() + "&vk_user_id=1",
    "auth-12: another app": lambda: launch(vk_app_id=1),
    "auth-12: no app": lambda: launch(vk_app_id=None),
    "auth-12: an array": lambda: launch().replace("vk_user_id=", "vk_user_id[]="),
    "auth-12: another app's own signature": lambda: launch(vk_app_id=1, secret="another"),
    "auth-12: no user": lambda: launch(user_id=None),
}
PLACES = [("POST", "/v1/chat/completions"), ("GET", "/v1/keys"), ("GET", "/vk-test"), ("POST", "/update-token")]


@with_vk
@pytest.mark.parametrize("form", FORMS)
async def test_malformed_keys_are_rejected_without_a_database_query(
    gateway: Gateway, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await gateway.client()
    assert client.key.startswith("sk-user-1-")
    statements = Statements(gateway.app[DATABASE], monkeypatch)
    for method, path in PLACES:
        started = time.monotonic()
        assert await send(gateway, method, path, FORMS[form](client)) == UNAUTHORIZED
        assert time.monotonic() - started < 1
    assert statements.of_requests == []


@with_vk
async def test_a_key_in_the_url_is_not_accepted(gateway: Gateway) -> None:
    """Row auth-2: URLs are logged."""
    client = await gateway.client()
    for method, path in PLACES:
        for name in ("key", "api_key", "access_token"):
            assert await send(gateway, method, f"{path}?{name}={client.key}", {}) == UNAUTHORIZED
        assert await send(gateway, method, f"{path}?{launch()}", {}) == UNAUTHORIZED


async def test_a_key_of_a_megabyte_is_malformed_http(gateway: Gateway) -> None:
    """Row auth-3: what is longer than any header may be is not HTTP to us."""
    async with gateway.session.get(f"{gateway.url}/v1/keys", headers=bearer("sk-user-1-" + "a" * 1_000_000)) as response:
        assert response.status == 400
        assert response.headers["X-Error-Code"] == "malformed_request"


@with_vk
@pytest.mark.parametrize("fault", LAUNCHES)
async def test_invalid_launch_parameters_are_rejected_without_a_database_query(
    gateway: Gateway, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements = Statements(gateway.app[DATABASE], monkeypatch)
    for method, path in PLACES:
        assert await send(gateway, method, path, bearer(LAUNCHES[fault]())) == UNAUTHORIZED
    assert statements.of_requests == []
    assert [user async for user in UserRepository(gateway.database).all()] == []


@with_vk
@pytest.mark.parametrize(
    "token",
    [
        lambda: launch(vk_access_token_settings="notify,menu", vk_ref="", vk_group_id=1),
        lambda: launch(unsigned="&utm_source=x&lang=ru"),
        lambda: "&".join(reversed(launch().split("&"))),
        lambda: f"https://app.example/index.html?{launch()}#home",
    ],
)
async def test_unusual_launch_parameters_with_a_valid_signature_are_accepted(gateway: Gateway, token: Callable[[], str]) -> None:
    """Row auth-10."""
    assert (await sign_in(gateway, token()))["dbUser"]["vkId"] == "494075"


async def test_without_a_secret_every_vk_sign_in_is_rejected(gateway: Gateway) -> None:
    """Also one that is signed with the empty secret."""
    for token in (launch(), launch(secret="", vk_app_id=0), launch(secret="")):
        assert await send(gateway, "GET", "/vk-test", bearer(token)) == UNAUTHORIZED


@with_vk
async def test_an_api_key_is_not_accepted_as_a_sign_in(gateway: Gateway) -> None:
    """Contract D1, D3: the finder of a key must not be able to lock its owner out."""
    client = await gateway.client()
    for method, path in (("GET", "/vk-test"), ("POST", "/update-token")):
        assert await send(gateway, method, path, client.headers) == UNAUTHORIZED
    assert (await gateway.chat(client))[0].status == 200


@with_vk
async def test_unknown_revoked_and_inactive_cost_the_same_statements(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows auth-4, auth-5, auth-7, auth-8: alike in what is answered and in what is done, and so in how long it takes."""
    keys, users = KeyRing(gateway.database, VAULT), UserRepository(gateway.database)
    revoked, inactive = await gateway.client(), await gateway.client()
    await keys.renew(revoked.account_id)
    await users.set_active(inactive.account_id, False)
    (entered,) = [make_key(revoked.account_id)]
    wrong = [entered, make_key(AccountId(10**12)), revoked.key, inactive.key]
    statements = Statements(gateway.app[DATABASE], monkeypatch)
    for method, path in PLACES[:2]:
        done = set()
        for key in wrong:
            statements.seen.clear()
            async with gateway.session.request(
                method, gateway.url + path, json={"messages": [{"role": "user", "content": "?"}]}, headers=bearer(key)
            ) as response:
                assert (response.status, response.headers["X-Error-Code"]) == (401, "invalid_key")
            done.add(tuple(statements.of_requests))
        assert len(done) == 1
        assert done <= {("settle_and_hold",), ("find_live_key",)}


@with_vk
async def test_an_inactive_user_is_rejected_everywhere(gateway: Gateway) -> None:
    """Row auth-8."""
    user = (await sign_in(gateway))["dbUser"]
    users, account_id = UserRepository(gateway.database), AccountId(user["id"])
    await users.set_active(account_id, False)
    for method, path in PLACES[1:]:
        assert await send(gateway, method, path, bearer(launch())) == UNAUTHORIZED
    assert await send(gateway, "GET", "/v1/keys", bearer(user["apiKey"])) == UNAUTHORIZED
    await users.set_active(account_id, True)
    assert (await sign_in(gateway))["dbUser"]["apiKey"] == user["apiKey"]


@with_vk
async def test_before_the_service_is_ready_sign_ins_are_503(gateway: Gateway) -> None:
    gateway.app[READINESS].obstacle = "a test"
    for method, path in PLACES[1:]:
        async with gateway.session.request(method, gateway.url + path, headers=bearer(launch())) as response:
            assert (response.status, response.headers["X-Error-Code"]) == (503, "not_ready")
            assert response.headers["Retry-After"]


# -- copies of keys


async def test_an_encrypted_copy_decrypts_only_in_its_row_and_with_its_secret() -> None:
    """Contract D4."""
    key = make_key(AccountId(1))
    key_hash = hash_key(key)
    sealed = VAULT.encrypt(AccountId(1), key_hash, key)
    assert VAULT.decrypt(AccountId(1), key_hash, sealed) == key
    assert key.encode() not in sealed.data
    assert VAULT.encrypt(AccountId(1), key_hash, key).data != sealed.data
    flipped = bytes([sealed.data[0] ^ 1]) + sealed.data[1:]
    for vault, account_id, own_hash, copy in [
        (VAULT, 2, key_hash, sealed),
        (VAULT, 1, hash_key("another"), sealed),
        (VAULT, 1, key_hash, EncryptedKey(flipped, sealed.secret_id)),
        (VAULT, 1, key_hash, EncryptedKey(sealed.data[:20], sealed.secret_id)),
        (VAULT, 1, key_hash, EncryptedKey(b"", sealed.secret_id)),
        (Vault([b"x" * 32]), 1, key_hash, sealed),
        (Vault([b"x" * 32]), 1, key_hash, EncryptedKey(sealed.data, Vault([b"x" * 32]).secret_id)),
    ]:
        with pytest.raises(DecryptionFailed):
            vault.decrypt(AccountId(account_id), own_hash, copy)
    assert Vault([b"x" * 32, SECRET]).decrypt(AccountId(1), key_hash, sealed) == key


async def test_an_encrypted_copy_moved_to_another_row_is_not_shown(database: Database, database_url: str) -> None:
    """Somebody who can write to the database still cannot read a key through their own account."""
    victim, thief = await make_client(database, "0"), await make_client(database, "0")
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE api_keys SET encrypted_key = (SELECT encrypted_key FROM api_keys WHERE account_id = $1) WHERE account_id = $2",
        victim.account_id,
        thief.account_id,
    )
    await connection.close()
    with pytest.raises(DecryptionFailed):
        await KeyRing(database, VAULT).main(thief.account_id)
    assert await KeyRing(database, VAULT).main(victim.account_id) == victim.key


@pytest.mark.parametrize(
    "spoiled",
    [
        "UPDATE api_keys SET encrypted_key = NULL, secret_id = NULL",  # issued by the previous release
        "UPDATE api_keys SET expires_at = now() - interval '1 second'",
        "UPDATE api_keys SET revoked_at = now()",
        "UPDATE api_keys SET is_main = FALSE",
    ],
)
async def test_a_main_key_without_a_copy_is_replaced_once_by_concurrent_sign_ins(
    database: Database, database_url: str, spoiled: str
) -> None:
    client, keys = await make_client(database, "0"), KeyRing(database, VAULT)
    connection = await asyncpg.connect(database_url)
    await connection.execute(spoiled)
    await connection.close()
    shown = set(await asyncio.gather(*(keys.main(client.account_id) for _ in range(20))))
    assert len(shown) == 1
    assert shown != {client.key}
    living = [key for key in await keys.list(client.account_id) if key.is_main and key.revoked_at is None]
    assert len(living) == 1
    assert shown == {await keys.main(client.account_id)}


async def test_a_wrong_secret_invalidates_no_key(gateway: Gateway) -> None:
    client = await gateway.client()
    for _ in range(2):
        with pytest.raises(DecryptionFailed):
            await KeyRing(gateway.database, Vault([b"w" * 32])).main(client.account_id)
    assert await KeyRing(gateway.database, VAULT).main(client.account_id) == client.key
    assert (await gateway.chat(client))[0].status == 200


async def test_rekey_encrypts_copies_with_the_current_secret(database: Database, database_url: str) -> None:
    clients = [await make_client(database, "0") for _ in range(3)]
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE api_keys SET secret_id = 'lost' WHERE account_id = $1", clients[2].account_id)
    await connection.close()
    both, new = Vault([b"n" * 32, SECRET]), Vault([b"n" * 32])
    assert [page async for page in KeyRing(database, both).rekey()] == [(2, 1)]
    assert [page async for page in KeyRing(database, both).rekey()] == [(0, 1)]
    for client in clients[:2]:
        assert await KeyRing(database, new).main(client.account_id) == client.key


# -- what is kept, and where

CANARY = "canary-7391-жёлтая"


def send_json(url: str, token: str, body: dict[str, Any] | None = None, path: str = "/v1/chat/completions") -> Any:
    request = Request(url + path, headers={**bearer(token), "Content-Type": "application/json"})
    request.data = None if body is None else json.dumps(body).encode()
    with urlopen(request, timeout=60) as response:
        text = response.read().decode()
    return json.loads(text) if text.startswith("{") else text


@pytest.fixture
def whole(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """The service with a database of its own, and VK."""
    service = start(
        tmp_path, DATABASE_URL=database_url, GPTUTOR_SECRET_KEY=base64.b64encode(SECRET).decode(),
        VK_APP_ID=str(APP_ID), VK_SECRET_KEY=VK_SECRET, GPTUTOR_VK__BONUS_RUB="50", GPTUTOR_LOGS__LEVEL="debug",
        GPTUTOR_LOGS__STDOUT="false",
    )  # fmt: skip
    try:
        for _ in range(200):
            with suppress(OSError), urlopen(f"{service.url}/ready", timeout=10):
                break
            time.sleep(0.05)
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()


async def dump_of(url: str) -> bytes:
    """Every table as `COPY` writes it, which is what pg_dump would (its version must be the server's), and what runs at the moment."""
    connection = await asyncpg.connect(url)
    tables = await connection.fetch("SELECT schemaname, tablename FROM pg_tables WHERE schemaname <> 'information_schema'")
    dump = io.BytesIO()
    for schema, table in tables:
        await connection.copy_from_query(f'SELECT * FROM "{schema}"."{table}"', output=dump)
    await connection.copy_from_query("SELECT query FROM pg_stat_activity", output=dump)
    await connection.close()
    return dump.getvalue()


def test_no_key_and_no_prompt_is_kept_in_database_logs_journal_or_command_lines(
    whole: Service, database_url: str, tmp_path: Path
) -> None:
    """Contract D4, F1: after a run, in the whole dump, in every file, and in the list of processes."""
    token = launch()
    signed_in = send_json(whole.url, token, path="/vk-test")
    keys = [signed_in["dbUser"]["apiKey"]]
    keys.append(send_json(whole.url, keys[0], {"name": "bot", "limit": 20}, "/v1/keys")["key"])
    for key in keys:
        for stream in (False, True):
            send_json(whole.url, key, {"messages": [{"role": "user", "content": CANARY}], "stream": stream, "max_tokens": 50})
    send_json(whole.url, token, path="/v1/keys")
    keys.append(send_json(whole.url, token, {}, "/update-token")["newApiKey"])
    for refused in (keys[0], token + "x"):
        with pytest.raises(OSError, match="401"):
            send_json(whole.url, refused, {"messages": [{"role": "user", "content": CANARY}]})
    send_json(whole.url, keys[2], {"messages": [{"role": "user", "content": CANARY}]})

    dump = asyncio.run(dump_of(database_url))
    lines = "\n".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])).encode()
    assert whole.stop() == 0
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("combined" in path.name and b"LLM Response" in content for path, content in files.items())
    assert signed_in["dbUser"]["vkId"].encode() in dump

    sign = token.rpartition("=")[2]
    secrets = [key.rpartition("-")[2] for key in keys] + [VK_SECRET, sign, base64.b64encode(SECRET).decode(), "canary", "жёлтая"]
    for secret in secrets:
        spellings = {
            secret.encode(),
            secret.encode().hex().encode(),
            base64.b64encode(secret.encode())[:-4],
            json.dumps(secret)[1:-1].encode(),
        }
        for spelling in spellings:
            assert spelling not in dump
            assert spelling not in lines
            assert [path for path, content in files.items() if spelling in content] == []
