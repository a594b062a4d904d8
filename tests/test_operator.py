"""What operators do, and what happens to them (rows operator-3, -5, -7, -8, -9, -10): versions side by side, a restored backup, a role without privileges, a
new OpenRouter key, a log at level debug, a wrong clock. The other rows are in test_config, test_journal, test_statements,
test_reconciliation and test_invariants."""

import asyncio
import datetime
import json
import logging
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import asyncpg
import msgspec
import pytest
from aiohttp import web

from gptutor.config.schema import SimulatorSettings as Place
from gptutor.config.schema import VkSettings
from gptutor.database.migrations import load_migrations
from gptutor.database.pool import Database, open_database
from gptutor.database.statements import SQL
from gptutor.integrations.vk import signature
from gptutor.money.administration import Administration
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.invariants import check
from gptutor.money.keyring import KeyRing
from gptutor.money.pending_payments import PendingPayments
from gptutor.money.reconciliation import reconcile
from gptutor.money.users import UserRepository
from gptutor.server.serve import simulated_openrouter
from gptutor.telemetry.log_writer import logging_to
from tests.support.gateway import VAULT, Gateway, config_for, gateway_on, make_client
from tests.support.ledger import hold, ledger_of, settlement

CANARY = "canary-7391"


# -- versions side by side


KEY_REORDERED = re.compile(r"ALTER TABLE (\w+) DROP CONSTRAINT \1_pkey, ADD PRIMARY KEY \(([^)]*)\)")
KEYS = {"holds": {"account_id", "hold_id"}, "ledger": {"account_id", "entry_id"}}


def without_a_constraint_that_stays(change: re.Match[str]) -> str:
    return "" if set(change[2].split(", ")) == KEYS[change[1]] else change[0]


def test_migrations_only_add() -> None:
    """Row operator-3: what a process of the previous release uses is never dropped, renamed or retyped. An index may be
    dropped: it holds nothing that its table lacks, and no statement names it. A unique index is a constraint, and stays. A primary
    key may list the same columns in another order."""
    taking = re.compile(
        r"\b(DROP\s+(?!DEFAULT|INDEX)\w+|RENAME|ALTER COLUMN \w+ (?:SET DATA )?TYPE|SET NOT NULL|DELETE FROM)\b", re.IGNORECASE
    )
    codes = {migration.name: re.sub(r"--.*", "", migration.text) for migration in load_migrations()}
    codes = {name: KEY_REORDERED.sub(without_a_constraint_that_stays, code) for name, code in codes.items()}
    constraints = re.findall(r"CREATE UNIQUE INDEX (\w+)", " ".join(codes.values()))
    assert constraints
    for name, code in codes.items():
        assert not taking.search(code), name
        assert not set(re.findall(r"DROP INDEX (\w+)", code)) & set(constraints), name
    assert taking.search("ALTER TABLE holds DROP COLUMN recovery_attempts")
    assert "DROP" in KEY_REORDERED.sub(
        without_a_constraint_that_stays, "ALTER TABLE ledger DROP CONSTRAINT ledger_pkey, ADD PRIMARY KEY (entry_id, created_at)"
    )


# -- a restored backup


async def test_charges_lost_by_a_restored_backup_show_in_the_comparison_with_openrouter(
    database: Database, database_url: str
) -> None:
    """Row operator-5: a backup agrees with itself, so no invariant is broken; OpenRouter's total of the day differs from ours."""
    client = await make_client(database, "100")
    ledger = ledger_of(database)
    await ledger.settle(settlement(await hold(database, client, "5"), "0.01"))
    backup = await asyncpg.connect(database_url)
    await backup.execute("SET session_replication_role = replica")
    tables = ("accounts", "holds", "usage_days", "ledger")
    for table in tables:
        await backup.execute(f"CREATE TEMP TABLE saved_{table} AS SELECT * FROM {table}")
    await ledger.settle(settlement(await hold(database, client, "5"), "0.02"))
    today = datetime.datetime.now(datetime.UTC).date()
    theirs = {today: Decimal("0.03")}
    assert (await reconcile(database, theirs)).days[0].difference_usd == 0

    for table in tables:  # the trigger that keeps the totals is disabled as well
        await backup.execute(f"DELETE FROM {table}")
        await backup.execute(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM saved_{table}")
    await backup.close()
    assert (await reconcile(database, theirs)).days[0].difference_usd == Decimal("0.02")
    assert [finding async for finding in check(database) if finding.rows] == []


# -- a role with few privileges


@pytest.fixture
async def app_role_url(database_url: str) -> str:
    """The service's own role, made as `sql/roles.sql` says."""
    owner = await asyncpg.connect(database_url)
    for _ in range(2):  # after every migration
        await owner.execute((SQL / "roles.sql").read_text(encoding="utf-8"))
    if not await owner.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'gptutor_test'"):
        await owner.execute("CREATE ROLE gptutor_test LOGIN PASSWORD 'pw' IN ROLE gptutor_app")
    await owner.close()
    return re.sub(r"//[^@/]*@", "//gptutor_test:pw@", database_url)


FORBIDDEN = [
    "UPDATE ledger SET amount_nano = 0",
    "DELETE FROM ledger",
    "TRUNCATE ledger",
    "DELETE FROM accounts",
    "DELETE FROM usage_days",
    "DELETE FROM holds",
    "DELETE FROM api_keys",
    "UPDATE schema_migrations SET checksum = ''",
    "UPDATE schema_functions SET checksum = ''",
    "UPDATE requests SET charge_nano = 0",
    "CREATE TABLE mine (id integer)",
    "ALTER TABLE ledger DISABLE TRIGGER ledger_is_append_only",
    "DROP TABLE ledger",
    "CREATE OR REPLACE FUNCTION reject_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "SET session_replication_role = replica",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_the_role_of_the_service_cannot_change_the_ledger(app_role_url: str, statement: str) -> None:
    """Row operator-7."""
    connection = await asyncpg.connect(app_role_url)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(statement)
    await connection.close()


async def test_the_role_of_the_service_can_do_all_that_the_service_does(
    app_role_url: str, simulator: Any, tmp_path: Path
) -> None:
    """Row operator-7: a whole request, keys, bookings, users by VK, and the check of the invariants."""
    async with simulated_openrouter(simulator, Place(port=0)) as base_url, open_database(app_role_url) as database:
        async with gateway_on(config_for(app_role_url, base_url, tmp_path), database, simulator) as gateway:
            client = await gateway.client()
            for text in ("Hello", "fault:no-usage"):
                response, _ = await gateway.chat(client, text)
                assert response.status == 200
            await gateway.recovered(client)
        await KeyRing(database, VAULT).renew(client.account_id, others_too=True)
        person, _ = await UserRepository(database).of_person("vk", "1", bonus=parse_roubles("1"))
        await UserRepository(database).set_active(client.account_id, False)
        await Administration(database, VAULT, "test").create_user("new", parse_roubles("1"))
        await Administration(database, VAULT, "test").erase_user(person.account_id, forfeit=True)
        pending = PendingPayments(database, interval_s=0.001, interval_max_s=1, give_up_s=1)
        await pending.remember(client.account_id, "p")
        await asyncio.sleep(0.01)
        assert await pending.claim() is not None
        await pending.forget("p")
        assert (await Bookings(database).entries(client.account_id, 10))[0].kind == "charge"
        assert [finding async for finding in check(database) if finding.rows] == []


# -- a new OpenRouter key


async def test_a_new_openrouter_key_serves_from_the_restart_on(
    database_url: str, database: Database, simulator: Any, aiohttp_server: Any, tmp_path: Path
) -> None:
    """Row operator-8: requests use the current key; the cost of a request made with the previous key is looked up with that one."""
    seen: list[tuple[str, str]] = []
    costs_known = False  # whether /generation answers yet

    async def completion(request: web.Request) -> web.Response:
        seen.append(("completion", request.headers["Authorization"]))
        return web.json_response(
            {"id": f"gen-{len(seen)}", "object": "chat.completion", "created": 1, "model": "openai/gpt-4o-mini", "choices": []},
            headers={"X-Generation-Id": f"gen-{len(seen)}"},
        )  # without `usage`, so without a cost

    async def generation(request: web.Request) -> web.Response:
        seen.append(("generation", request.headers["Authorization"]))
        known = {"gen-1": "Bearer sk-or-old"}.get(request.query["id"], "Bearer sk-or-new")
        if not costs_known or request.headers["Authorization"] != known:
            return web.json_response({"error": {"message": "not found yet", "code": 404}}, status=404)
        return web.json_response({"data": {"id": request.query["id"], "total_cost": 0.01}})

    async def models(request: web.Request) -> web.Response:
        return web.Response(body=simulator.model_list, content_type="application/json")

    upstream = web.Application()
    upstream.add_routes(
        [web.post("/chat/completions", completion), web.get("/generation", generation), web.get("/models", models)]
    )
    server = await aiohttp_server(upstream)
    client = await make_client(database, "100")
    for key, old in (("sk-or-old", ""), ("sk-or-new", "sk-or-older sk-or-old")):
        config = config_for(database_url, str(server.make_url("/")), tmp_path / "rotated")
        keys = msgspec.structs.replace(config.openrouter, api_key=key, old_api_keys=old)
        config = msgspec.structs.replace(config, openrouter=keys)
        async with gateway_on(config, database, simulator) as running:
            response, _ = await running.chat(client)
            assert response.status == 200
            if key == "sk-or-new":
                costs_known = True
                await running.recovered(client)
    assert [key for what, key in seen if what == "completion"] == ["Bearer sk-or-old", "Bearer sk-or-new"]
    assert await client.balance() == Decimal("98.2")
    assert await client.held() == 0


# -- a log at level debug


async def test_a_log_at_debug_has_no_text_no_key_and_no_signature(gateway: Gateway, tmp_path: Path) -> None:
    """Row operator-9: of requests that succeed, fail, are malformed, or carry VK launch parameters."""
    client = await gateway.client()
    signed = {"vk_user_id": "1", "vk_app_id": "1", "vk_ts": str(int(time.time()))}
    launch = urlencode({**signed, "sign": signature(signed, "wrong")})
    before = {name: logging.getLogger(name).level for name in ("", "asyncio", "aiohttp")}
    with logging_to(tmp_path / "chatty", level="debug", retention_days=1, stdout=False):
        for name in before:
            logging.getLogger(name).setLevel(logging.DEBUG)
        try:
            for text in (CANARY, f"{CANARY} fault:status=500", f"{CANARY} fault:status=402", f"{CANARY} fault:cut=2"):
                await gateway.chat(client, text, stream="cut" in text)
            for body, headers in (
                (f'{{"messages": "{CANARY}"}}', client.headers),
                (f'{{"{CANARY}"', client.headers),
                ("{}", {"Authorization": f"Bearer {client.key}x"}),
                (f'{{"amount": "{CANARY}"}}', {"Authorization": f"Bearer {launch}"}),
            ):
                for path in ("/v1/chat/completions", "/v1/payments"):
                    async with gateway.session.post(f"{gateway.url}{path}?q={CANARY}", data=body, headers=headers) as response:
                        await response.read()
            host, port = gateway.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /\x01{CANARY} HTTP/1.1\r\nAuthorization: Bearer {client.key}\r\n\r\n".encode())
            await reader.read(100)
            writer.close()
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
    (log,) = (tmp_path / "chatty").iterdir()
    text = log.read_text()
    assert len(text.splitlines()) > 12
    for secret in (CANARY, client.key, client.key[:-4], "sk-or-test", "vk_user_id", launch[-20:]):
        assert secret not in text, secret
    assert all(json.loads(line)["level"] for line in text.splitlines())


# -- a wrong clock


@pytest.mark.parametrize("off_s", [-3700, 3700])
async def test_with_a_clock_off_by_an_hour_vk_sign_in_is_rejected_and_keys_work(
    database_url: str, database: Database, simulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: int
) -> None:
    """Row operator-10: sign-in fails closed, in both directions, and the 401 is logged; keys and money do not depend on the clock."""
    config = msgspec.structs.replace(
        config_for(database_url, "http://127.0.0.1:9", tmp_path / "clock"), vk=VkSettings(app_id=5, secret_key="s")
    )
    config.paths.data.mkdir(parents=True)
    (config.paths.data / "models.json").write_bytes(simulator.model_list)  # so that the service is ready without OpenRouter
    now = time.time()
    signed = {"vk_user_id": "494075", "vk_app_id": "5", "vk_ts": str(int(now))}
    launch = urlencode({**signed, "sign": signature(signed, "s")})
    client = await make_client(database, "0")
    statuses = []
    async with gateway_on(config, database, simulator) as gateway:
        for clock in (now, now + off_s):
            monkeypatch.setattr("gptutor.api.auth.time.time", lambda clock=clock: clock)
            for token in (launch, client.key):
                async with gateway.session.post(
                    f"{gateway.url}/v1/payments", headers={"Authorization": f"Bearer {token}"}
                ) as response:
                    statuses.append(response.status)
        monkeypatch.undo()
    assert statuses == [404, 404, 401, 404]  # 404: authenticated, and payments are not set up
