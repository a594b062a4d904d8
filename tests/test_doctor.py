"""`gptutor doctor`: what is wrong is found, each by a sentence that says what to do; nothing hides anything, and no secret is told."""

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import asyncpg
import msgspec
import orjson
import pytest
import trustme
from aiohttp import web

from gptutor.config.schema import AdminSettings, Config, VkSettings, YookassaSettings
from gptutor.database import migrations
from gptutor.diagnosis import database as checks_of
from gptutor.diagnosis import files, listeners, partners
from gptutor.diagnosis.checks import CHECKS
from gptutor.diagnosis.findings import Check, Finding, Installation, examine, ok
from gptutor.simulator.account import MANAGEMENT_KEY, SimulatedAccount
from gptutor.simulator.server import Simulator
from tests.support.gateway import SECRET, config_for, make_client
from tests.support.service import Service, environment, run
from tests.support.vk import APP_ID, VK_SECRET
from tests.support.yookassa import SECRET_KEY, SHOP_ID, YooKassaStandIn

KEY = "sk-or-v1-do-not-print-me"


def installation(tmp_path: Path, url: str = "", base_url: str = "https://openrouter.ai/api/v1", **sections: Any) -> Installation:
    config = config_for(url, base_url, tmp_path)
    return Installation(msgspec.structs.replace(config, **sections), url)


def with_openrouter(found: Installation, **changed: Any) -> Installation:
    config = msgspec.structs.replace(found.config, openrouter=msgspec.structs.replace(found.config.openrouter, **changed))
    return Installation(config, found.database_url)


def levels(findings: Sequence[Finding]) -> list[str]:
    return [finding.level for finding in findings]


@asynccontextmanager
async def serving(app: web.Application, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0, ssl_context=context).start()
    try:
        yield f"http{'s' if context else ''}://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# -- the whole


def test_a_running_service_is_well(service: Service) -> None:
    port = service.url.rpartition(":")[2]
    environ = {**service.environ, "PORT": port}
    found = orjson.loads(run(environ, "doctor", "--json").stdout)
    assert [each for each in found if each["level"] == "error"] == []
    assert {each["check"] for each in found} == {check.name for check in CHECKS}
    sentences = {each["check"]: each["sentence"] for each in found}
    assert sentences["service"] == f"The service runs at http://127.0.0.1:{port}, and is ready."
    assert sentences["secret"] == "GPTUTOR_SECRET_KEY decrypts the stored copies of keys."
    told = run(environ, "doctor").stdout
    assert "Errors: 0, warnings: " in told
    assert "warning settings:    A simulator answers" in told


def test_a_broken_installation_is_told_whole_and_without_secrets(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
        environ = environment(
            tmp_path,
            PORT=str(silent.getsockname()[1]),
            DATABASE_URL=f"postgresql://gptutor:do-not-print-me@127.0.0.1:{closed}/gptutor",
            OPENROUTER_API_KEY=KEY,
            OPENROUTER_BASE_URL=f"http://127.0.0.1:{closed}/api/v1",
            GPTUTOR_OPENROUTER__PROXY=f"http://ivan:do-not-print-me@127.0.0.1:{closed}",
            GPTUTOR_SECRET_KEY="do-not-print-me",
        )
        ended = run(environ, "doctor", "--json", check=False)
    assert ended.returncode == 1
    errors = {each["check"]: each["sentence"] for each in orjson.loads(ended.stdout) if each["level"] == "error"}
    assert errors.keys() == {"database", "migrations", "secret", "OpenRouter", "service"}
    assert "PostgreSQL does not answer at DATABASE_URL (ConnectionRefusedError)" in errors["database"]
    assert f"cannot be reached at 127.0.0.1 by the proxy 127.0.0.1:{closed}" in errors["OpenRouter"]
    assert "GPTUTOR_SECRET_KEY must be 32 bytes" in errors["secret"]
    assert "does not answer: restart the service" in errors["service"]
    assert "do-not-print-me" not in ended.stdout + ended.stderr


def test_invalid_settings_are_told(tmp_path: Path) -> None:
    ended = run(environment(tmp_path, GPTUTOR_SERVER__WORKERS="0"), "doctor", "--json", check=False)
    (finding,) = orjson.loads(ended.stdout)
    assert (ended.returncode, finding["level"]) == (1, "error")
    assert "GPTUTOR_SERVER__WORKERS is wrong" in finding["sentence"]


async def test_no_check_hides_another(tmp_path: Path) -> None:
    async def fails(_: Installation) -> list[Finding]:
        raise ValueError(KEY)

    async def hangs(_: Installation) -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def passes(_: Installation) -> list[Finding]:
        return [ok("It is well.")]

    checks = [Check("a", fails), Check("b", hangs, timeout_s=0.01), Check("c", passes)]
    examined = await examine(checks, installation(tmp_path))
    assert [[each.name, *levels(each.findings)] for each in examined] == [["a", "error"], ["b", "error"], ["c", "ok"]]
    assert KEY not in str(examined)


# -- files


def test_files_that_others_may_read_or_that_belong_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTUTOR_CONFIG", raising=False)
    found = installation(tmp_path)
    var, logs = tmp_path / "var", tmp_path / "logs"
    for folder in (var, logs, var / "journal" / "0"):
        folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "gptutor.env").touch(mode=0o600)
    assert levels(files.files(found)) == ["ok"]
    (tmp_path / "gptutor.env").chmod(0o640)
    var.chmod(0o777)
    told = [finding.sentence for finding in files.files(found)]
    assert told == [
        "Other users of this machine may read or change gptutor.env: chmod 600 gptutor.env",
        f"Other users of this machine may write into {var}: chmod o-w {var}",
    ]
    (tmp_path / "gptutor.env").chmod(0o600)
    var.chmod(0o700)
    if os.geteuid() == 0:
        (logs / "combined.log").touch()
        os.chown(logs / "combined.log", 1, -1)
        (finding,) = files.files(found)
        assert (finding.level, f"chown root {logs / 'combined.log'}" in finding.sentence) == ("error", True)


def test_credentials_that_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "gptutor.env").touch(mode=0o400)
    assert levels(files.credentials(installation(tmp_path))) == ["ok"]
    (tmp_path / "gptutor.env").chmod(0o644)
    assert levels(files.credentials(installation(tmp_path))) == ["error"]


@pytest.mark.parametrize(("free", "level"), [(100 << 20, "error"), (1 << 30, "warning"), (100 << 30, "ok")])
def test_a_disk_that_is_nearly_full(free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 200 << 30, "free": free})
    monkeypatch.setattr("gptutor.diagnosis.files.shutil.disk_usage", lambda path: usage)
    assert levels(files.disk(installation(tmp_path))) == [level]


# -- PostgreSQL

SERVER = {
    "version": "17.2", "version_number": 170_002, "encoding": "UTF8", "has_fsync": True, "has_full_page_writes": True,
    "synchronous_commit": "on", "is_read_only": False, "connections_max": 97, "connections_max_of_role": None, "connections": 5,
    "is_superuser": False, "bytes": 10_000_000, "is_archiving_failing": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "word", "level"),
    [
        ({}, "accepts the login", "ok"),
        ({"version_number": 140_009}, "too old", "error"),
        ({"encoding": "SQL_ASCII"}, "UTF8", "error"),
        ({"is_read_only": True}, "read-only", "error"),
        ({"has_fsync": False}, "fsync is off", "error"),
        ({"has_full_page_writes": False}, "full_page_writes is off", "error"),
        ({"synchronous_commit": "off"}, "synchronous_commit is off", "warning"),
        ({"is_archiving_failing": True}, "archive_command", "error"),
        ({"is_superuser": True}, "superuser", "warning"),
        ({"connections_max": 15}, "PostgreSQL gives 15: lower database.connections_max", "error"),
        ({"connections_max_of_role": 10}, "PostgreSQL gives 10: lower database.connections_max", "error"),
        ({"connections_max": 16}, "PostgreSQL gives 16; 5 are open now", "ok"),
    ],
)
def test_what_is_said_of_a_server(changed: dict[str, Any], word: str, level: str) -> None:
    findings = checks_of.server_findings(cast("Any", SERVER | changed), Config(), is_embedded=False)
    assert [finding.level for finding in findings if word in finding.sentence] == [level]
    assert len([finding for finding in findings if finding.level != "ok"]) == (level != "ok")


def test_the_administrators_pool_counts_as_well() -> None:
    config = Config(admin=AdminSettings(port=3010, token="x" * 32))
    findings = checks_of.server_findings(cast("Any", SERVER | {"connections_max": 21}), config, is_embedded=False)
    assert ["take up to 22 connections" in finding.sentence for finding in findings if finding.level == "error"] == [True]


async def test_a_migrated_database_whose_keys_the_secret_decrypts(
    database_url: str, database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_client(database, "0")
    encoded = {"secret_key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}
    assert bytes(range(32)) == SECRET
    found = installation(tmp_path, database_url)
    security = found.config.security
    right = installation(tmp_path, database_url, security=msgspec.structs.replace(security, **encoded))
    other = "A" * 43 + "="
    wrong = installation(tmp_path, database_url, security=msgspec.structs.replace(security, secret_key=other))
    old = {"secret_key": other, "old_secret_keys": encoded["secret_key"]}
    replaced = installation(tmp_path, database_url, security=msgspec.structs.replace(security, **old))
    assert [levels(await each(right)) for each in (checks_of.schema, checks_of.secret)] == [["ok"], ["ok"]]
    assert levels(await checks_of.secret(wrong)) == ["error"]
    assert levels(await checks_of.secret(replaced)) == ["warning"]
    told = await checks_of.server(right)
    assert [finding.sentence for finding in told if finding.level == "error"] == [
        f"{name} is off: a power cut destroys the books. Set it to on in postgresql.conf."
        for name in ("fsync", "full_page_writes")
    ]
    known = [*migrations.load_migrations(), migrations.Migration("9999_next", "SELECT 1")]
    monkeypatch.setattr(migrations, "load_migrations", lambda: known)
    (pending,) = await checks_of.schema(right)
    assert (pending.level, pending.sentence) == ("error", "The database lacks 9999_next: run gptutor migrate.")


async def test_a_role_without_the_privileges_of_roles_sql(database_url: str, tmp_path: Path) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute("CREATE ROLE few LOGIN")
    await connection.execute("GRANT SELECT ON accounts, api_keys, ledger TO few")
    try:
        url = database_url.replace("postgres:@", "few:@")
        told = [finding.sentence for finding in await checks_of.server(installation(tmp_path, url)) if finding.level == "error"]
        (lacking,) = (sentence for sentence in told if "lacks" in sentence)
        assert "INSERT on ledger" in lacking
        assert "SELECT on ledger" not in lacking
    finally:
        await connection.execute("DROP OWNED BY few")
        await connection.execute("DROP ROLE few")
        await connection.close()


# -- OpenRouter, VK, YooKassa


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        (200, {"data": {"limit_remaining": 50, "is_free_tier": False}}, ["ok", "ok"]),
        (200, {"data": {"limit_remaining": None}}, ["ok", "warning"]),
        (200, {"data": {"limit_remaining": 4.5}}, ["ok", "warning"]),
        (200, {"data": {"limit_remaining": 0}}, ["ok", "error"]),
        (200, {"data": {"limit_remaining": -0.25}}, ["ok", "error"]),
        (200, {"data": {"limit_remaining": 50, "is_free_tier": True}}, ["ok", "ok", "warning"]),
        (200, {"data": {"limit_remaining": 50, "expires_at": "2020-01-01T00:00:00Z"}}, ["ok", "ok", "error"]),
        (200, {"data": {"limit_remaining": 50, "expires_at": "2999-01-01T00:00:00Z"}}, ["ok", "ok"]),
        (200, {"page": "a captive portal"}, ["error"]),
        (401, {"error": {"message": KEY}}, ["error"]),
        (403, {"error": {"message": KEY}}, ["error"]),
        (500, {"error": {"message": KEY}}, ["error"]),
    ],
)
async def test_what_openrouter_says_of_the_key(status: int, document: Any, expected: list[str], tmp_path: Path) -> None:
    async def key(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        return web.json_response(document, status=status)

    app = web.Application()
    app.add_routes([web.get("/api/v1/key", key)])
    async with serving(app) as url:
        findings = await partners.openrouter(with_openrouter(installation(tmp_path, base_url=f"{url}/api/v1"), api_key=KEY))
    assert levels(findings) == expected
    assert KEY not in str(findings)


@pytest.mark.parametrize(
    ("bought", "used", "level"), [(100, 20, "ok"), (20, 18, "warning"), (20, 20, "error"), (20, 21, "error")]
)
async def test_the_credit_of_the_account(
    bought: int, used: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credit = {"total_credits": bought, "total_usage": used}
    monkeypatch.setattr(SimulatedAccount, "credits", lambda account, used_usd: credit)
    async with serving(Simulator().app()) as url:
        found = with_openrouter(installation(tmp_path, base_url=f"{url}/api/v1"), management_key=MANAGEMENT_KEY)
        assert levels(await partners.openrouter(found)) == ["ok", "warning", level]  # the simulator's key has no limit


@pytest.mark.parametrize(
    ("ahead_s", "level"), [(0, "ok"), (4, "ok"), (-20, "warning"), (20, "warning"), (90, "error"), (-90, "error")]
)
async def test_the_clock_is_compared_with_openrouters(ahead_s: int, level: str, tmp_path: Path) -> None:
    async def key(request: web.Request) -> web.Response:
        date = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ahead_s)
        return web.json_response({"data": {}}, headers={"Date": date.strftime("%a, %d %b %Y %H:%M:%S GMT")})

    app = web.Application()
    app.add_routes([web.get("/api/v1/key", key)])
    async with serving(app) as url:
        findings = await partners.clock(installation(tmp_path, base_url=f"{url}/api/v1"))
    assert levels(findings) == ["ok", level]


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, "ok"),
        ({"app_id": APP_ID, "secret_key": VK_SECRET}, "ok"),
        ({"app_id": APP_ID, "secret_key": "c0ffee" * 12}, "warning"),
    ],
)
async def test_the_secret_of_vk(settings: dict[str, Any], level: str, tmp_path: Path) -> None:
    assert levels(await partners.vk_secret(installation(tmp_path, vk=VkSettings(**settings)))) == [level]


@pytest.mark.parametrize(
    ("secret", "fault", "word"),
    [(SECRET_KEY, None, "accepts"), ("wrong", None, "rejects"), (SECRET_KEY, 500, "does not answer as it should (status 500")],
)
async def test_yookassa_is_asked_for_a_payment_that_nobody_made(
    secret: str, fault: int | None, word: str, tmp_path: Path
) -> None:
    shop = YooKassaStandIn()
    shop.fault = fault
    async with serving(shop.app()) as url:
        settings = YookassaSettings(shop_id=SHOP_ID, secret_key=secret, return_url="https://a.example/", base_url=f"{url}/v3")
        (finding,) = await partners.payments(installation(tmp_path, yookassa=settings))
    assert finding.sentence.startswith(f"YooKassa {word}")
    assert shop.payments == {}


# -- listeners


async def test_another_program_on_the_port(tmp_path: Path) -> None:
    async with serving(web.Application()) as url:
        found = installation(tmp_path)
        server = msgspec.structs.replace(found.config.server, host="localhost", port=int(url.rpartition(":")[2]))
        (finding,) = await listeners.service(installation(tmp_path, server=server))
    assert finding.sentence.startswith("Another program answers at")


async def test_a_service_that_is_not_ready_says_why(tmp_path: Path) -> None:
    async def ready(request: web.Request) -> web.Response:
        return web.json_response({"error": "The account is refused"}, status=503, headers={"X-Request-ID": "1"})

    async with public(ready=ready) as (url, _):
        server = msgspec.structs.replace(installation(tmp_path).config.server, host="localhost", port=int(url.rpartition(":")[2]))
        (finding,) = await listeners.service(installation(tmp_path, server=server))
    assert (finding.level, "is not ready (The account is refused)" in finding.sentence) == ("error", True)


async def test_a_metrics_port_that_another_program_has(tmp_path: Path) -> None:
    async with serving(web.Application()) as url:
        metrics = msgspec.structs.replace(
            installation(tmp_path).config.metrics, host="localhost", port=int(url.rpartition(":")[2])
        )
        (finding,) = await listeners.ports(installation(tmp_path, metrics=metrics))
    assert (finding.level, "GPTUTOR_METRICS__PORT" in finding.sentence) == ("error", True)


async def test_a_process_that_may_open_too_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(web.Application()) as url:
        port = int(url.rpartition(":")[2])
        for most, level in ((10_000_000, "error"), (10, "ok")):
            server = msgspec.structs.replace(installation(tmp_path).config.server, port=port, connections_max=most)
            (finding,) = await listeners.limits(installation(tmp_path, server=server))
            assert finding.level == level
            assert "The service may open" in finding.sentence


# -- TLS in front

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def public(
    context: ssl.SSLContext | None = None, *, hides_errors: bool = False, ready: Handler | None = None
) -> AsyncIterator[tuple[str, web.Application]]:
    """A service at a public address; its proxy may replace the service's errors."""

    @web.middleware
    async def named(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPNotFound as error:
            return web.Response(status=404, headers={} if hides_errors else {"X-Request-ID": "1"}, text=error.reason)
        response.headers.setdefault("X-Request-ID", "1")
        return response

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application(middlewares=[named])
    app.add_routes([web.get("/health", health), web.get("/ready", ready or health)])
    async with serving(app, context) as url:
        yield url, app


@pytest.mark.parametrize(
    ("days", "hides_errors", "expected"),
    [
        (60, False, ["ok", "ok"]),
        (15, False, ["warning", "ok"]),
        (3, False, ["error", "ok"]),
        (-3, False, ["error", "error"]),
        (60, True, ["ok", "error"]),
    ],
)
async def test_the_certificate_and_the_proxy_in_front(
    days: int, hides_errors: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1)
    authority.issue_cert("localhost", not_after=until).configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    monkeypatch.setattr("gptutor.diagnosis.listeners.ssl.create_default_context", lambda: trusting)
    async with public(context, hides_errors=hides_errors) as (url, _):
        findings = await listeners.public_address(Installation(installation(tmp_path).config, "", url))
    assert levels(findings) == expected


@pytest.mark.parametrize(
    ("status", "location", "level"), [(301, "https://localhost/", "ok"), (301, "http://localhost/", "error"), (200, "", "error")]
)
async def test_http_must_redirect_to_https(status: int, location: str, level: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": location} if location else {})

    app = web.Application()
    app.add_routes([web.get("/", answer)])
    async with serving(app) as url:
        assert levels(await listeners._redirect(f"{url}/")) == [level]
