"""Alerts: each is told once when it begins and once when it has ended, whatever the number of processes."""

import asyncio
import socket
from collections.abc import Iterator
from decimal import Decimal
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import orjson
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from gptutor.api import payments
from gptutor.config.schema import AlertSettings
from gptutor.database.alert_book import AlertBook
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.integrations import webhook
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.balance_auditor import BalanceAuditor
from gptutor.money.holds import HoldFacts
from gptutor.money.overruns import report_overrun
from gptutor.openrouter.account import Account
from gptutor.openrouter.clock import ClockSkew
from gptutor.telemetry import alerts as alerts_module
from gptutor.telemetry.alerts import ALERTS, CONDITIONS, EVENTS, Alert, Alerter, Alerts, Undelivered, deliver
from gptutor.telemetry.disk import GIGABYTE, free_bytes, report_room
from tests.support.gateway import make_client
from tests.support.ledger import hold
from tests.support.recovery import journals_in, mortal, process
from tests.support.service import RunningSimulator, Service, refused, run, start, start_simulator

TOKEN = "123456:AAsecretsecretsecret"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    ALERTS.clear()
    yield
    ALERTS.clear()


# -- who tells what


class Told:
    """A process of the service, as far as alerts are concerned: what it finds wrong, and what it tells."""

    def __init__(self, store: Any, *, poll_s: float = 10, told: list[tuple[str, str, int]] | None = None) -> None:
        self.alerts = Alerts()
        self.told = told if told is not None else []
        self.now = 1000.0
        self.alerter = Alerter(self.alerts, store, self.send, poll_s=poll_s, unavailable=(DatabaseUnavailable,))
        self.alerter._clock = lambda: self.now
        self.alerter._reached_at = self.now

    async def send(self, alert: Alert) -> None:
        self.told.append((alert.kind, alert.name, alert.count))

    async def check(self, after_s: float = 0) -> None:
        self.now += after_s
        await self.alerter.check()
        await self.alerter.close()


async def aged(database_url: str, seconds: float) -> None:
    """So much time has passed since what is in the database was written."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE alerts SET seen_at = seen_at - make_interval(secs => $1), since = since - interval '1 s'", seconds
    )
    await connection.execute(
        "UPDATE alert_events SET since = since - make_interval(secs => $1), told_at = told_at - make_interval(secs => $1)",
        seconds,
    )
    await connection.close()


async def test_two_processes_tell_a_condition_once_and_its_end_once(database: Database, database_url: str) -> None:
    told: list[tuple[str, str, int]] = []
    one, two = [Told(AlertBook(database), told=told) for _ in range(2)]
    for each in (one, two):
        each.alerts.report("account_refused", "refused")
    await asyncio.gather(one.check(), two.check())
    await one.check()
    assert told == [("begin", "account_refused", 1)]
    one.alerts.report("account_refused", None)
    await aged(database_url, 36)
    await two.check(100)  # it still finds it refused
    await one.check(100)
    await one.check(100)
    assert told == [("begin", "account_refused", 1)]
    two.alerts.report("account_refused", None)
    await aged(database_url, 36)
    await asyncio.gather(one.check(), two.check())
    assert told == [("begin", "account_refused", 1), ("end", "account_refused", 1)]
    await one.check(100)
    assert len(told) == 2


async def test_a_condition_that_comes_and_goes_is_one_alert(database: Database) -> None:
    one = Told(AlertBook(database))
    for text in ("refused", None, "refused again", None, "and again"):
        one.alerts.report("account_refused", text)
        await one.check(36)
    assert one.told == [("begin", "account_refused", 1)]
    (condition,) = await AlertBook(database).conditions()
    assert (condition.name, condition.text) == ("account_refused", "and again")


async def test_a_new_process_does_not_end_what_it_has_not_looked_at_yet(database: Database, database_url: str) -> None:
    before = Told(AlertBook(database))
    before.alerts.report("disk_nearly_full", "full")
    await before.check()
    await aged(database_url, 3600)
    after = Told(AlertBook(database), told=before.told)
    await after.check()
    await after.check(34)
    assert before.told == [("begin", "disk_nearly_full", 1)]
    await after.check(2)
    assert before.told == [("begin", "disk_nearly_full", 1), ("end", "disk_nearly_full", 1)]


async def test_broken_books_are_not_over_because_their_process_has_ended(database: Database, database_url: str) -> None:
    before = Told(AlertBook(database))
    before.alerts.report("books_broken", "1 account")
    await before.check()
    await aged(database_url, 3600)
    after = Told(AlertBook(database), told=before.told)
    await after.check()
    await after.check(100)
    assert before.told == [("begin", "books_broken", 1)]
    before.alerts.report("books_broken", None)
    await before.check()
    await after.check(100)
    assert before.told == [("begin", "books_broken", 1), ("end", "books_broken", 1)]


async def test_of_many_events_within_an_hour_the_first_is_told_and_then_their_number(
    database: Database, database_url: str
) -> None:
    one, two = [Told(AlertBook(database)) for _ in range(2)]
    one.alerts.count("charge_overrun", "first")
    await one.check()
    for _ in range(1000):
        one.alerts.count("charge_overrun", "another")
        two.alerts.count("charge_overrun", "another")
    await asyncio.gather(one.check(), two.check())
    await aged(database_url, 3000)
    two.alerts.count("charge_overrun", "late")
    await two.check()
    assert one.told + two.told == [("event", "charge_overrun", 1)]
    await aged(database_url, 700)
    await asyncio.gather(one.check(), two.check())
    assert one.told + two.told == [("event", "charge_overrun", 1), ("event", "charge_overrun", 2001)]


async def test_one_dead_process_is_no_alert_and_three_within_an_hour_are(database: Database, database_url: str) -> None:
    one = Told(AlertBook(database))
    for _ in range(2):
        one.alerts.count("process_died", "died")
        await one.check()
    await aged(database_url, 3601)
    for _ in range(2):
        one.alerts.count("process_died", "died")
        await one.check()
    assert one.told == []
    one.alerts.count("process_died", "died")
    await one.check()
    assert one.told == [("event", "process_died", 3)]


class Away:
    """A store that can be away."""

    def __init__(self, book: AlertBook) -> None:
        self.book = book
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.book, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            if self.is_away:
                raise DatabaseUnavailable("away")
            return await method(*arguments, **named)

        return call


async def test_without_the_database_memory_decides_and_nothing_is_told_again_when_it_is_back(
    database: Database, database_url: str
) -> None:
    store = Away(AlertBook(database))
    one = Told(store)
    one.alerts.report("credit_low", "low")
    await one.check()
    store.is_away = True
    one.alerts.report("clock_skew", "wrong")
    one.alerts.report("disk_nearly_full", "full")
    one.alerts.count("hold_given_up", "one")
    await one.check(1)
    assert one.told == [("begin", "credit_low", 1)], "a moment without the database changes nothing"
    await one.check(40)
    await one.check(10)
    alone = [("begin", "clock_skew", 1), ("begin", "disk_nearly_full", 1), ("event", "hold_given_up", 1)]
    assert one.told[1:] == alone
    one.alerts.report("disk_nearly_full", None)
    one.alerts.count("hold_given_up", "two")
    await one.check(36)
    assert one.told[4:] == [("end", "disk_nearly_full", 1)]
    store.is_away = False
    await one.check(10)
    assert {condition.name for condition in await AlertBook(database).conditions()} == {"clock_skew", "credit_low"}
    assert one.told[5:] == [("event", "hold_given_up", 1)]
    one.alerts.report("clock_skew", None)
    await one.check(1)
    await aged(database_url, 36)
    one.alerts.report("credit_low", "low")
    await one.check(36)
    assert one.told[6:] == [("end", "clock_skew", 1)]


def test_the_closed_lists_of_names() -> None:
    alerts = Alerts()
    with pytest.raises(KeyError):
        alerts.report("hold_given_up", "an event is no condition")
    with pytest.raises(KeyError):
        alerts.count("credit_low", "a condition is no event")
    assert not CONDITIONS.keys() & EVENTS.keys()


# -- sending


class Receiver:
    """Answers with `statuses` in their order, then with 200."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answers: list[tuple[int, Any]] = []

    @property
    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.receive)
        return app

    async def receive(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, dict(request.headers), orjson.loads(await request.read())))
        status, body = self.answers.pop(0) if self.answers else (200, {"ok": True})
        return web.json_response(body, status=status)


@pytest.fixture
async def receiver(aiohttp_server: Any) -> tuple[Receiver, str]:
    receiving = Receiver()
    server = await aiohttp_server(receiving.app)
    return receiving, str(server.make_url("/")).rstrip("/")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts_module, "BACKOFF_FIRST_S", 0.001)


async def send(settings: AlertSettings, alert: Alert) -> None:
    async with webhook.connected(settings) as connected:
        assert connected is not None
        await deliver(connected.send, alert)


async def test_the_plain_form_is_json_with_a_text_and_a_bearer_token(receiver: tuple[Receiver, str]) -> None:
    receiving, url = receiver
    await send(AlertSettings(url=f"{url}/hook", token="tok"), Alert("event", "hold_given_up", "The cost is unknown", 3))
    ((path, headers, document),) = receiving.requests
    assert (path, headers["Authorization"]) == ("/hook", "Bearer tok")
    assert (document["kind"], document["condition"], document["count"]) == ("event", "hold_given_up", 3)
    host = document["host"]
    assert document["text"] == f"ALERT: GPTutor on {host}: The cost is unknown (3 times within an hour) [hold_given_up]"


async def test_telegrams_form_is_sendmessage_of_its_bot_api(receiver: tuple[Receiver, str]) -> None:
    receiving, url = receiver
    settings = AlertSettings(url=url, form="telegram", token=TOKEN, chat_id="-100123")
    await send(settings, Alert("begin", "clock_skew", "x" * 5000))
    ((path, headers, document),) = receiving.requests
    assert path == f"/bot{TOKEN}/sendMessage"
    assert "Authorization" not in headers
    assert (document["chat_id"], len(document["text"])) == ("-100123", 4000)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answers", "attempts", "error"),
    [
        ([(500, {}), (502, {})], 3, None),
        ([(429, {"ok": False, "parameters": {"retry_after": 0}})], 2, None),
        ([(503, {})] * 9, 4, "status 503"),
        ([(401, {"ok": False, "description": f"Unauthorized {TOKEN}"})], 1, "status 401 Unauthorized …"),
        ([(400, {"ok": False, "description": "Bad Request: chat not found"})], 1, "status 400 Bad Request: chat not found"),
        ([(302, [])], 1, "status 302"),
    ],
)
async def test_what_can_pass_is_tried_again_and_what_cannot_is_not(
    receiver: tuple[Receiver, str], answers: list[tuple[int, Any]], attempts: int, error: str | None
) -> None:
    receiving, url = receiver
    receiving.answers = [*answers]
    settings = AlertSettings(url=url, form="telegram", token=TOKEN, chat_id="1")
    if error is None:
        await send(settings, Alert("test", "test", "text"))
    else:
        with pytest.raises(Undelivered) as raised:
            await send(settings, Alert("test", "test", "text"))
        assert str(raised.value) == error
    assert len(receiving.requests) == attempts


async def test_telegrams_wish_to_wait_is_obeyed(receiver: tuple[Receiver, str]) -> None:
    receiving, url = receiver
    receiving.answers = [(429, {"ok": False, "parameters": {"retry_after": 7}})]
    async with webhook.connected(AlertSettings(url=url)) as connected:
        assert connected is not None
        with pytest.raises(Undelivered) as raised:
            await connected.send(Alert("test", "test", "text"))
    assert (raised.value.retry_after_s, raised.value.is_final) == (7, False)


@pytest.mark.usefixtures("quick")
async def test_a_dead_receiver_slows_nobody_and_is_an_error_in_the_log_without_the_secret(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and never answers. What waits is bounded."""
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    settings = AlertSettings(url=f"http://127.0.0.1:{port}", form="telegram", token=TOKEN, chat_id="1", timeout_s=0.02)
    monkeypatch.setattr(alerts_module, "WAITING_MAX", 3)
    failed = REGISTRY.get_sample_value("gptutor_alerts_sent_total", {"outcome": "failed"}) or 0
    async with webhook.connected(settings) as connected:
        assert connected is not None
        one = Alerter(ALERTS, AlertBook(database), connected.send, poll_s=0.05, unavailable=(DatabaseUnavailable,))
        running = asyncio.create_task(one.run())
        for name in CONDITIONS:
            ALERTS.report(name, "wrong")  # not even a coroutine: nobody can wait for it
        async with asyncio.timeout(10):
            while (REGISTRY.get_sample_value("gptutor_alerts_sent_total", {"outcome": "failed"}) or 0) < failed + len(CONDITIONS):
                await asyncio.sleep(0.01)
        assert len(one._waiting) == 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    silent.close()
    assert "could not be sent: too many are waiting" in caplog.text
    assert "could not be sent: the receiver does not answer" in caplog.text
    assert TOKEN not in caplog.text


async def test_what_waits_at_the_stop_is_sent(database: Database) -> None:
    gone, told, first = asyncio.Event(), [], asyncio.Event()

    async def send(alert: Alert) -> None:
        if not gone.is_set():
            first.set()
            await asyncio.Event().wait()
        told.append(alert.name)

    one = Alerter(ALERTS, AlertBook(database), send, poll_s=0.05, unavailable=(DatabaseUnavailable,))
    running = asyncio.create_task(one.run())
    ALERTS.report("credit_low", "low")
    await asyncio.wait_for(first.wait(), 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    gone.set()
    await one.close()
    assert told == ["credit_low"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"form": "telegram", "token": TOKEN}, "alerts.token and alerts.chat_id must be set for Telegram"),
        ({"form": "telegram", "token": "../../x", "chat_id": "1"}, "alerts.token and alerts.chat_id must be set for Telegram"),
        ({"proxy": "socks://x"}, "alerts.proxy must be"),
        ({"url": "ftp://x"}, "address such as https://host/path|matching regex"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises((msgspec.ValidationError, ValueError), match=sentence):
        msgspec.convert(settings, AlertSettings)


# -- each source


def test_the_clock_is_told_above_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.openrouter.clock.time.time", lambda: 1e9)
    clock = ClockSkew()
    for skew_s, text in (
        (59, None),
        (-61, "61 s behind OpenRouter's"),
        (0, None),
        (3600, "3600 s ahead of OpenRouter's"),
        (0, None),
    ):
        clock.observe(formatdate(1e9 - skew_s, usegmt=True))
        assert ALERTS.conditions.get("clock_skew", "").endswith(text or "")
        assert ("clock_skew" in ALERTS.conditions) is (text is not None)


def test_little_room_on_the_disk_and_a_long_journal_are_told(tmp_path: Path) -> None:
    free = free_bytes([tmp_path, tmp_path / "absent"])
    assert [*free] == [tmp_path]
    report_room(free, free[tmp_path] + GIGABYTE, 0.81)
    assert "GB left" in ALERTS.conditions["disk_nearly_full"]
    assert "81% full" in ALERTS.conditions["journal_nearly_full"]
    report_room(free, 0, 0.79)
    assert ALERTS.conditions == {}


async def test_broken_books_are_told_until_they_are_right(database: Database, database_url: str) -> None:
    client = await make_client(database, "100")
    auditor = BalanceAuditor(database, 3600)
    await auditor.check_once()
    by_hand = await asyncpg.connect(database_url)
    await by_hand.execute("UPDATE accounts SET balance_nano = balance_nano + 1 WHERE account_id = $1", client.account_id)
    await auditor.check_once()
    assert ALERTS.conditions["books_broken"] == f"1 accounts do not match their ledger, such as {client.account_id}"
    await by_hand.execute("UPDATE accounts SET balance_nano = balance_nano - 1 WHERE account_id = $1", client.account_id)
    await by_hand.close()
    await auditor.check_once()
    assert ALERTS.conditions == {}


async def test_a_dead_process_and_a_hold_that_is_given_up_are_counted(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    client = await make_client(database, "100")
    dying = mortal(database, tmp_path)
    held = await hold(database, client, "5", ledger=dying)
    dying.journal.record_sent(held.account_id, held.hold_id)
    with process(database, tmp_path) as living:
        for each in journals_in(tmp_path):
            assert await living.recovery.replay(each)
        assert ALERTS.events["process_died"][1] == 1
        by_hand = await asyncpg.connect(database_url)
        await by_hand.execute("UPDATE holds SET due_at = now(), created_at = now() - interval '2 days', recovery_attempts = 11")
        await by_hand.close()
        assert await living.recovery.process_due_holds() == 1
    assert ALERTS.events["hold_given_up"] == ("The cost of the request r was not found out: its hold is released", 1)


def test_a_charge_above_its_hold_is_counted() -> None:
    facts = HoldFacts(Nano(1), Decimal(90), b"", "r-1", "a/b")
    report_overrun(AccountId(1), facts, Nano(2), overdraft_max=Nano(5))
    assert ALERTS.events == {"charge_overrun": ("The charge of the request r-1 (a/b) exceeds its hold", 1)}


async def test_a_request_that_is_too_dear_for_our_credit_is_counted() -> None:
    Account().record_trouble("too_dear")
    assert [*ALERTS.events] == ["request_too_dear"]


@pytest.mark.parametrize("reason", ["conflict", "not_found"])
def test_a_payment_that_is_not_credited_is_told_unless_it_was_made_up(reason: str) -> None:
    payments._refuse(reason, "The payment %s is not credited", "22e12f66")
    assert ALERTS.events == (
        {"payment_not_credited": ("The payment 22e12f66 is not credited", 1)} if reason == "conflict" else {}
    )


# -- real processes


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[RunningSimulator]:
    simulator = start_simulator(tmp_path)
    yield simulator
    simulator.stop()


async def test_two_real_processes_tell_once_that_our_key_is_refused_and_once_that_it_is_not(
    tmp_path: Path, upstream: RunningSimulator, unused_tcp_port: int, receiver: tuple[Receiver, str]
) -> None:
    account = upstream.base_url.replace("/api/v1", "/simulator/account")
    receiving, url = receiver

    async def told(expected: list[str]) -> None:
        async with asyncio.timeout(30):
            while len(receiving.requests) < len(expected):
                await asyncio.sleep(0.02)
        await asyncio.sleep(2.5)  # more than two polls of both processes: a process that would send it again has done so
        assert [document["kind"] for _, _, document in receiving.requests] == expected

    service: Service = await asyncio.to_thread(
        start,
        tmp_path,
        PORT=str(unused_tcp_port),
        GPTUTOR_WORKERS="2",
        OPENROUTER_API_KEY="sk-or-x",
        OPENROUTER_BASE_URL=upstream.base_url,
        GPTUTOR_OPENROUTER__ACCOUNT_POLL_S="0.1",
        GPTUTOR_OPENROUTER__ACCOUNT_PROBE_S="0.1",
        GPTUTOR_ALERTS__URL=f"{url}/hooks/secret-path",
        GPTUTOR_ALERTS__TOKEN="secret-token",
        GPTUTOR_ALERTS__POLL_S="1",
        GPTUTOR_ALERTS__DISK_FREE_BYTES_MIN="0",
        GPTUTOR_LOGS__LEVEL="debug",
        GPTUTOR_LOGS__STDOUT="false",
    )
    try:
        assert "the key has no limit" in service.banner
        async with aiohttp.ClientSession() as session:
            await session.post(account, json={"revoked": True})
            await told(["begin"])
            listed = await asyncio.to_thread(service.command, "alerts")
            assert [each["name"] for each in listed["conditions"]] == ["account_refused"]
            await session.post(account, json={})
            await told(["begin", "end"])
        assert (await asyncio.to_thread(service.command, "alerts"))["conditions"] == []
    finally:
        code = await asyncio.to_thread(service.stop)
    assert code == 0
    log = orjson.dumps(service.log())
    assert b"Completions are rejected until this has ended" in log
    assert b"secret-path" not in log
    assert b"secret-token" not in log


async def test_a_test_message_is_sent_by_the_command_line_or_the_reason_is_said(
    service: Service, receiver: tuple[Receiver, str]
) -> None:
    receiving, url = receiver
    assert "alerts.url is empty" in refused(service.environ, "alerts", "test")
    environ = {**service.environ, "GPTUTOR_ALERTS__URL": url}
    ended = await asyncio.to_thread(run, environ, "alerts", "test", "Hello")
    assert ended.stdout == "The message was sent.\n"
    assert [document["description"] for _, _, document in receiving.requests] == ["Hello"]
    assert "No condition is on." in run(service.environ, "alerts").stdout
