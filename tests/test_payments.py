"""Payments by YooKassa, against a stand-in of its API (contract C11; rows money-12 to money-15): nothing in a notification is
believed but an id to look up, and what is paid is credited once."""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import pytest
from prometheus_client import REGISTRY

from gptutor.api.payment_lookups import PaymentLookups
from gptutor.api.payments import PENDING_MAX
from gptutor.config import schema
from gptutor.config.load import load
from gptutor.config.schema import ConfigError
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano, parse_roubles
from gptutor.money.bookings import AlreadyBooked, Bookings
from gptutor.money.holds import new_id
from gptutor.money.invariants import check
from gptutor.money.pending_payments import DuePayment, PendingPayments
from gptutor.server.serve import with_simulator
from gptutor.simulator.server import Simulator
from gptutor.telemetry.log_writer import logging_to
from tests.support.gateway import Client, Gateway, config_for, gateway_on, make_client
from tests.support.yookassa import SECRET_KEY, SHOP_ID, YooKassaStandIn, notification


@dataclass
class Shop:
    """A gateway with the stand-in in YooKassa's place."""

    gateway: Gateway
    yookassa: YooKassaStandIn

    async def notify(self, event: str, name: Any, headers: dict[str, str] | None = None, **claimed: Any) -> int:
        async with self.gateway.session.post(
            f"{self.gateway.url}/yookassa/webhook", json=notification(event, name, **claimed), headers=headers
        ) as response:
            assert response.headers["X-Request-ID"]
            if response.status == 200:
                assert await response.json() == {"status": "ok"}
            return response.status

    async def order(self, client: Client, amount: Any, **headers: str) -> tuple[int, dict[str, Any], str | None]:
        async with self.gateway.session.post(
            f"{self.gateway.url}/v1/payments", json={"amount": amount}, headers={**client.headers, **headers}
        ) as response:
            return response.status, await response.json(), response.headers.get("X-Error-Code")

    async def lookups(self) -> int:
        return len(self.yookassa.calls)

    async def pending(self) -> list[str]:
        """The payments that the job asks about."""
        async with self.gateway.database.snapshot() as connection:
            return [row["payment_id"] for row in await connection.fetch("SELECT payment_id FROM pending_payments")]

    async def nothing_pending(self) -> None:
        async with asyncio.timeout(10):
            while await self.pending():
                await asyncio.sleep(0.02)


def not_credited(reason: str) -> float:
    return REGISTRY.get_sample_value("gptutor_payments_not_credited_total", {"reason": reason}) or 0.0


@pytest.fixture
async def shop(
    database_url: str, database: Database, simulator: Simulator, aiohttp_server: Any, tmp_path: Path, tuned: dict[str, Any]
) -> AsyncIterator[Shop]:
    yookassa = YooKassaStandIn()
    server = await aiohttp_server(yookassa.app())
    config = schema.Config(
        **{name: getattr(config_for(database_url, "http://127.0.0.1:9", tmp_path / "shop", tuned), name)
           for name in schema.Config.__struct_fields__ if name != "yookassa"},
        yookassa=schema.YookassaSettings(
            shop_id=SHOP_ID, secret_key=SECRET_KEY, return_url="https://example.com/paid",
            base_url=str(server.make_url("/v3")), concurrent_max=3,
            **{"timeout_s": 0.5, **tuned.get("yookassa", {})},
        ),
    )  # fmt: skip
    config.paths.data.mkdir(parents=True)
    (config.paths.data / "models.json").write_bytes(simulator.model_list)  # it is ready without its OpenRouter
    with logging_to(tmp_path / "lines", level="debug", retention_days=1, stdout=False):
        async with gateway_on(config, database, simulator) as running:
            yield Shop(running, yookassa)
    text = "".join(path.read_text() for path in (tmp_path / "lines").iterdir())
    assert SECRET_KEY not in text
    assert "Basic " not in text
    assert not re.search(r"sk-user-[0-9]+-[a-z2-7]{5}", text)  # the public part of a key may be there
    assert [finding async for finding in check(database) if finding.rows] == []


async def test_a_payment_is_created_paid_and_credited(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    status, body, _ = await shop.order(client, "150.50")
    payment = body["data"]
    assert (status, payment["status"], payment["amount"]) == (200, "pending", "150.50")
    assert payment["confirmation_url"].startswith("https://")
    created = (await client.user()).created_at.isoformat(timespec="microseconds")
    metadata = {"gptutor_account_id": str(client.account_id), "gptutor_account_created_at": created}
    assert shop.yookassa.payments[payment["id"]]["metadata"] == metadata
    assert await shop.notify("payment.waiting_for_capture", payment["id"]) == 200
    assert await client.balance() == 0
    shop.yookassa.pay(payment["id"])
    assert await shop.notify("payment.succeeded", payment["id"]) == 200
    assert await client.balance() == Decimal("150.5")
    (entry,) = await Bookings(shop.gateway.database).entries(client.account_id, 10)
    assert (entry.kind, entry.reference, entry.contra) == ("topup", f"yookassa:{payment['id']}", "payments")


async def test_a_notification_is_booked_once_however_often_and_whenever_it_comes(shop: Shop, database_url: str) -> None:
    """Row money-12: twice, at once, and after a year: 200 each time, credited once."""
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id)
    statuses = await asyncio.gather(*(shop.notify("payment.succeeded", name) for _ in range(20)))
    assert set(statuses) <= {200, 503}  # those beyond the bound come again
    assert 200 in statuses
    assert await client.balance() == 100
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE ledger SET created_at = created_at - interval '1 year'")
    await connection.close()
    calls = await shop.lookups()
    assert await shop.notify("payment.succeeded", name) == 200
    assert await client.balance() == 100
    assert await shop.lookups() == calls  # it is booked: no look-up is needed


@pytest.mark.parametrize(
    ("changed", "event"),
    [
        ({"status": "pending", "paid": False}, "payment.canceled"),
        ({"status": "canceled", "paid": False}, "payment.succeeded"),
        ({"status": "waiting_for_capture"}, "payment.waiting_for_capture"),
        ({"amount": {"value": "100.00", "currency": "USD"}}, "payment.succeeded"),
        ({"metadata": {}}, "payment.succeeded"),
        ({"metadata": {"gptutor_account_id": "1 "}}, "payment.succeeded"),
        ({"metadata": {"gptutor_account_id": 1}}, "payment.succeeded"),
        ({"metadata": None}, "payment.succeeded"),
        ({}, "deal.closed"),
        ({}, "refund.succeeded"),
    ],
)
async def test_what_yookassa_does_not_call_paid_for_an_account_changes_nothing(
    shop: Shop, changed: dict[str, Any], event: str
) -> None:
    """Row money-13: a forged notification claims that it has succeeded."""
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id, **changed)
    assert await shop.notify(event, name, amount={"value": "999.00", "currency": "RUB"}) == 200
    assert await client.balance() == 0


@pytest.mark.parametrize(
    "name", ["22e12f66-000f-5000-8000-18db351245c7", "", "../payments", "a" * 65, "x\u0000y", "%2e%2e", "ёж"]
)
async def test_an_unknown_id_changes_nothing(shop: Shop, name: str) -> None:
    """Row money-13."""
    client = await shop.gateway.client("0")
    assert await shop.notify("payment.succeeded", name, metadata={"gptutor_account_id": str(client.account_id)}) == 200
    assert await shop.notify("refund.succeeded", name) == 200
    assert await client.balance() == 0
    assert {path for _, path in shop.yookassa.calls} <= {f"/v3/{kind}/{name}" for kind in ("payments", "refunds")}


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b'{"event": "payment.succeeded"}', b'{"event": 1, "object": {"id": 5}}']
)
async def test_a_malformed_notification_is_rejected(shop: Shop, body: bytes) -> None:
    async with shop.gateway.session.post(f"{shop.gateway.url}/yookassa/webhook", data=body) as response:
        assert response.status == 400
    assert shop.yookassa.calls == []


async def test_the_amount_is_the_one_that_yookassas_api_says(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id, "10.01")
    assert await shop.notify("payment.succeeded", name, amount={"value": "9999.00", "currency": "RUB"}) == 200
    assert await client.balance() == Decimal("10.01")


async def test_a_payment_for_an_unknown_account_is_an_error_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    name = shop.yookassa.add_payment(10**12)
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        assert await shop.notify("payment.succeeded", name) == 200
    assert f"The payment yookassa:{name} cannot be booked: NoSuchUser" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"status": "pending", "paid": False},
        {"status": "waiting_for_capture"},
        {"paid": False},
        {"paid": "true"},
        {"status": "new"},
    ],
)
async def test_a_notification_of_a_success_that_the_api_does_not_say_yet_is_repeated(shop: Shop, changed: dict[str, Any]) -> None:
    """With 200 YooKassa would never send it again, and a paid payment would never be credited."""
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id, **changed)
    assert await shop.notify("payment.succeeded", name) == 503
    assert await client.balance() == 0
    assert await shop.pending() == [name]
    shop.yookassa.pay(name)
    assert await shop.notify("payment.succeeded", name) == 200
    assert await client.balance() == 100
    assert await shop.pending() == []


@pytest.mark.parametrize(
    ("changed", "reason", "words"),
    [
        ({"amount": {"value": "100.00", "currency": "USD"}}, "currency", "is not in roubles"),
        ({"test": True}, "test", "yookassa.test_mode is off"),
        ({"created_at": "2020-01-01T00:00:00.000Z"}, "account", "was made for an earlier user"),
        ({"created_at": "2020-01-01T00:00:00.000"}, "account", "was made for an earlier user"),
        ({"created_at": None}, "account", "was made for an earlier user"),
    ],
)
async def test_a_paid_payment_that_is_not_credited_is_an_error_log_and_a_metric(
    shop: Shop, changed: dict[str, Any], reason: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id, **changed)
    before = not_credited(reason)
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        assert await shop.notify("payment.succeeded", name) == 200
    assert words in caplog.text
    assert name in caplog.text
    assert not_credited(reason) == before + 1
    assert await client.balance() == 0


async def test_an_unknown_payment_or_refund_is_an_error_log_and_a_metric(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    before = not_credited("not_found")
    name = "22e12f66-000f-5000-8000-18db351245c7"
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        assert await shop.notify("payment.succeeded", name) == 200
        assert await shop.notify("refund.succeeded", name) == 200
    assert f"YooKassa has no payment {name}" in caplog.text
    assert f"YooKassa has no refund {name}" in caplog.text
    assert not_credited("not_found") == before + 2


@pytest.mark.parametrize("tuned", [{"yookassa": {"test_mode": True}}])
async def test_test_mode_credits_payments_of_a_test_shop(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    assert await shop.notify("payment.succeeded", shop.yookassa.add_payment(client.account_id, test=True)) == 200
    assert await client.balance() == 100


def test_the_simulator_is_test_mode() -> None:
    assert not schema.Config().yookassa.test_mode
    assert with_simulator(schema.Config(), "http://127.0.0.1:9/api/v1").yookassa.test_mode


async def test_a_payment_of_a_user_whom_a_restore_has_lost_is_not_credited_to_the_next_user(
    shop: Shop, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = await shop.gateway.client("0")
    _, body, _ = await shop.order(lost, "100")
    name = body["data"]["id"]
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    for table in ("pending_payments", "api_keys", "accounts"):
        await connection.execute(f"DELETE FROM {table} WHERE account_id = $1", lost.account_id)
    await connection.execute(f"ALTER TABLE accounts ALTER COLUMN account_id RESTART WITH {lost.account_id}")
    await connection.close()
    next_user = await shop.gateway.client("0")
    assert next_user.account_id == lost.account_id
    shop.yookassa.pay(name)
    before = not_credited("account")
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        assert await shop.notify("payment.succeeded", name) == 200
        assert await shop.notify("refund.succeeded", shop.yookassa.add_refund(name, "100.00")) == 200
    assert await next_user.balance() == 0
    assert f"gptutor user topup ID ROUBLES --reference yookassa:{name}" in caplog.text
    assert not_credited("account") == before + 2
    payer = await shop.gateway.client("0")
    await Bookings(shop.gateway.database).book(payer.account_id, "topup", parse_roubles("100"), reference=f"yookassa:{name}")
    assert await shop.notify("payment.succeeded", name) == 200
    assert not_credited("account") == before + 2


QUICK = {"yookassa": {"poll_s": 0.05, "lookup_interval_s": 0.05, "lookup_interval_max_s": 0.2}}


@pytest.mark.parametrize("tuned", [QUICK])
async def test_a_payment_whose_notification_never_arrives_is_credited_by_the_job(shop: Shop) -> None:
    """Row sum-8."""
    client = await shop.gateway.client("0")
    _, body, _ = await shop.order(client, "100")
    _, canceled, _ = await shop.order(client, "200")
    await asyncio.sleep(0.3)
    assert sorted(await shop.pending()) == sorted([body["data"]["id"], canceled["data"]["id"]])
    assert await client.balance() == 0
    shop.yookassa.fault = 500
    await asyncio.sleep(0.3)
    shop.yookassa.fault = None
    shop.yookassa.pay(body["data"]["id"])
    shop.yookassa.cancel(canceled["data"]["id"])
    await shop.nothing_pending()
    assert await client.balance() == 100
    calls = await shop.lookups()
    await asyncio.sleep(0.3)
    assert await shop.lookups() == calls
    assert await shop.notify("payment.succeeded", body["data"]["id"]) == 200
    assert await client.balance() == 100


@pytest.mark.parametrize("tuned", [{"yookassa": {**QUICK["yookassa"], "give_up_s": 0.5}}])
@pytest.mark.parametrize("is_known", [True, False])
async def test_a_payment_that_does_not_end_is_given_up_with_an_error_log(
    shop: Shop, is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = await shop.gateway.client("0")
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        _, body, _ = await shop.order(client, "100")
        if not is_known:
            shop.yookassa.payments.clear()
        await shop.nothing_pending()
    assert f"The payment {body['data']['id']} has not ended at YooKassa" in caplog.text
    assert await client.balance() == 0


async def test_a_due_payment_is_claimed_once_and_the_intervals_double(database: Database, database_url: str) -> None:
    client = await make_client(database, "0")
    pending = PendingPayments(database, interval_s=100, interval_max_s=350, give_up_s=60)
    await pending.remember(client.account_id, "p")
    await pending.remember(client.account_id, "p")
    await pending.remember(AccountId(10**9), "q")
    assert (await pending.count(client.account_id), await pending.contains("p"), await pending.contains("q")) == (1, True, False)
    assert await pending.claim() is None
    connection = await asyncpg.connect(database_url)
    for seconds in (100, 200, 350, 350):
        await connection.execute("UPDATE pending_payments SET next_lookup_at = now() - interval '1 second'")
        claims = await asyncio.gather(*(pending.claim() for _ in range(5)))
        assert [due for due in claims if due] == [DuePayment("p", client.account_id, False)]
        left = await connection.fetchval("SELECT extract(epoch FROM next_lookup_at - now()) FROM pending_payments")
        assert 0 < seconds - left < 5
    await connection.execute("UPDATE pending_payments SET next_lookup_at = now(), created_at = now() - interval '61 seconds'")
    await connection.close()
    assert await pending.claim() == DuePayment("p", client.account_id, True)
    await pending.forget("p")
    assert await pending.count(client.account_id) == 0


async def test_the_job_is_quiet_while_the_database_is_away_and_continues(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    claimed = asyncio.Event()

    class Away(PendingPayments):
        failures: ClassVar[list[Exception]] = [
            DatabaseUnavailable("away"),
            DatabaseUnavailable("away"),
            RuntimeError("a mistake"),
        ]

        async def claim(self) -> DuePayment | None:
            if self.failures:
                raise self.failures.pop(0)
            claimed.set()
            return None

    pending = Away(database, interval_s=1, interval_max_s=1, give_up_s=1)
    caplog.set_level(logging.DEBUG, "gptutor.payments")
    running = asyncio.create_task(PaymentLookups(None, pending, 0.001).run())  # type: ignore[arg-type]
    await asyncio.wait_for(claimed.wait(), 5)
    running.cancel()
    messages = [record.getMessage() for record in caplog.records if record.name == "gptutor.payments"]
    assert messages == ["The look-up of payments failed, and continues"]


async def test_an_account_has_a_limited_number_of_unpaid_payments(shop: Shop) -> None:
    client, other = await shop.gateway.client("0"), await shop.gateway.client("0")
    for number in range(PENDING_MAX):
        await PendingPayments(shop.gateway.database, interval_s=60, interval_max_s=60, give_up_s=60).remember(
            client.account_id, f"p{number}"
        )
    status, _, code = await shop.order(client, 100)
    assert (status, code) == (429, "rate_limited")
    assert (await shop.order(other, 100))[0] == 200


async def flooded(shop: Shop, event: str) -> list[asyncio.Task[int]]:
    """Twelve notifications of made-up ids at once: three are looked up by a slow YooKassa, and the others are refused."""
    shop.yookassa.pause_s = 3
    tasks = [asyncio.create_task(shop.notify(event, str(uuid.uuid4()))) for _ in range(12)]
    async with asyncio.timeout(20):
        while shop.yookassa.in_flight < 3 or sum(task.done() for task in tasks) < 9:
            await asyncio.sleep(0.005)
    shop.yookassa.pause_s = 0
    return tasks


@pytest.mark.parametrize("tuned", [{"yookassa": {"timeout_s": 20}}])
async def test_made_up_ids_take_no_place_from_true_notifications(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    names = []
    for amount in (100, 200, 300):
        _, body, _ = await shop.order(client, amount)
        names.append(body["data"]["id"])
        shop.yookassa.pay(names[-1])
    flood = await flooded(shop, "payment.succeeded")
    assert await asyncio.gather(*(shop.notify("payment.succeeded", name) for name in names)) == [200] * 3
    assert sorted(await asyncio.gather(*flood)) == [200] * 3 + [503] * 9
    assert await client.balance() == 600
    refund = shop.yookassa.add_refund(names[0], "30.00")
    flood = await flooded(shop, "refund.succeeded")
    assert await shop.notify("refund.succeeded", refund, payment_id=names[0]) == 200
    await asyncio.gather(*flood)
    assert await client.balance() == 570


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unknown_payments_per_minute": 4}}])
async def test_an_address_may_name_few_unknown_payments(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    _, body, _ = await shop.order(client, 100)
    shop.yookassa.pay(body["data"]["id"])
    forwarded = {"X-Forwarded-For": "203.0.113.7"}
    statuses = [await shop.notify("payment.succeeded", str(uuid.uuid4()), forwarded) for _ in range(6)]
    assert statuses == [200] * 4 + [429] * 2
    assert await shop.notify("payment.succeeded", body["data"]["id"], forwarded) == 200
    assert await client.balance() == 100
    assert await shop.notify("payment.succeeded", str(uuid.uuid4()), {"X-Forwarded-For": "203.0.113.8"}) == 200


@pytest.mark.parametrize("fault", [500, 429, 401, 302, "silence", "garbage"])
async def test_while_yookassa_is_unavailable_notifications_get_503(shop: Shop, fault: int | str) -> None:
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id)
    shop.yookassa.fault = fault
    assert await shop.notify("payment.succeeded", name) == 503
    assert await client.balance() == 0
    status, body, code = await shop.order(client, 100)
    assert (status, code) == (503, "payments_unavailable")
    assert set(body) == {"error"}
    shop.yookassa.fault = None
    assert await shop.notify("payment.succeeded", name) == 200
    assert await client.balance() == 100


async def test_concurrent_calls_to_yookassa_are_limited(shop: Shop) -> None:
    shop.yookassa.pause_s = 0.2
    client = await shop.gateway.client("0")
    names = [shop.yookassa.add_payment(client.account_id) for _ in range(12)]
    statuses = await asyncio.gather(*(shop.notify("payment.succeeded", name) for name in names))
    assert sorted(statuses) == [200] * 3 + [503] * 9
    assert shop.yookassa.in_flight_max == 3
    shop.yookassa.pause_s = 0
    for name in names:
        assert await shop.notify("payment.succeeded", name) == 200
    assert await client.balance() == 1200


async def test_a_refund_is_debited_once(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    payment = shop.yookassa.add_payment(client.account_id)
    await shop.notify("payment.succeeded", payment)
    refund = shop.yookassa.add_refund(payment, "30.00")
    pending = shop.yookassa.add_refund(payment, "5.00", status="pending")
    foreign = shop.yookassa.add_refund(payment, "5.00", amount={"value": "5.00", "currency": "USD"})
    canceled = shop.yookassa.add_refund(payment, "5.00", status="canceled")
    for name, status in ((refund, 200), (refund, 200), (pending, 503), (foreign, 200), (canceled, 200)):
        assert await shop.notify("refund.succeeded", name) == status
    statuses = await asyncio.gather(*(shop.notify("refund.succeeded", refund) for _ in range(3)))
    assert statuses == [200] * 3
    assert await client.balance() == 70
    entry = (await Bookings(shop.gateway.database).entries(client.account_id, 1))[0]
    assert (entry.kind, entry.amount, entry.reference) == ("refund", parse_roubles("-30"), f"yookassa-refund:{refund}")


async def test_a_refund_without_a_notification_of_its_payment_books_both(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    payment = shop.yookassa.add_payment(client.account_id)
    assert await shop.notify("refund.succeeded", shop.yookassa.add_refund(payment, "30.00")) == 200
    assert await client.balance() == 70
    unknown = shop.yookassa.add_payment(None)
    assert await shop.notify("refund.succeeded", shop.yookassa.add_refund(unknown, "30.00")) == 200
    assert await client.balance() == 70


async def test_a_refund_of_money_that_is_spent_takes_the_balance_below_zero(shop: Shop) -> None:
    """The provider has already paid it out, so it must be booked."""
    client = await shop.gateway.client("0")
    payment = shop.yookassa.add_payment(client.account_id)
    await shop.notify("payment.succeeded", payment)
    await Bookings(shop.gateway.database).book(client.account_id, "adjustment", parse_roubles("-90"), reason="spent")
    await shop.notify("refund.succeeded", shop.yookassa.add_refund(payment, "100.00"))
    assert await client.balance() == -90


@pytest.mark.parametrize("amount", ["9.99", 100_000.01, "10.001", -50, 0, "NaN", "1e9", "1_0", "５０", "ten", None, [1], True])
async def test_an_amount_that_cannot_be_paid_is_rejected(shop: Shop, amount: Any) -> None:
    """Row money-15."""
    client = await shop.gateway.client("0")
    status, body, code = await shop.order(client, amount)
    assert (status, code) == (400, "invalid_request")
    assert "amount" in body["error"]
    assert shop.yookassa.calls == []


async def test_the_same_order_twice_is_one_payment(shop: Shop) -> None:
    client, other = await shop.gateway.client("0"), await shop.gateway.client("0")
    headers = {"Idempotency-Key": "order-1"}
    orders = [await shop.order(who, amount, **headers) for who, amount in ((client, 50), (client, 50), (client, 60), (other, 50))]
    assert [status for status, _, _ in orders] == [200] * 4
    first, again, dearer, others = [body["data"]["id"] for _, body, _ in orders]
    assert first == again
    assert len({first, dearer, others}) == 3


async def test_payments_need_a_key_and_a_setting(shop: Shop, gateway: Gateway) -> None:
    """Row money-13: without settings the endpoints are 404."""
    async with shop.gateway.session.post(f"{shop.gateway.url}/v1/payments", json={"amount": 100}) as response:
        assert (response.status, response.headers["X-Error-Code"]) == (401, "invalid_key")
    assert shop.yookassa.calls == []
    client = await gateway.client("0")
    for path in ("/v1/payments", "/yookassa/webhook"):
        async with gateway.session.post(gateway.url + path, json={"amount": 100}, headers=client.headers) as response:
            assert (response.status, await response.json()) == (404, {"error": "Payments are not set up here"})


@pytest.mark.parametrize("missing", ["SHOP_ID", "SECRET_KEY", "RETURN_URL"])
def test_half_a_configuration_stops_the_start(missing: str) -> None:
    """Rows money-13, operator-1: an empty secret is not a secret; and it is not printed."""
    environ = {
        "GPTUTOR_YOOKASSA__SHOP_ID": SHOP_ID,
        "GPTUTOR_YOOKASSA__SECRET_KEY": SECRET_KEY,
        "GPTUTOR_YOOKASSA__RETURN_URL": "https://example.com/",
    }
    assert load(environ).yookassa.is_set
    for value in ("", " "):
        with pytest.raises(ConfigError, match=r"(?i)yookassa") as caught:
            load({**environ, f"GPTUTOR_YOOKASSA__{missing}": value})
        assert SECRET_KEY not in str(caught.value)


async def test_topups_while_requests_run_add_up(gateway: Gateway, database: Database) -> None:
    """Row money-14: fifty requests, fifty top-ups, and the sum is exact."""
    client = await gateway.client("100")
    bookings = Bookings(database)

    async def send(number: int) -> int:
        response, _ = await gateway.chat(client, f"Hello {number}", model="openai/gpt-4o-mini", max_tokens=64)
        return response.status

    statuses: list[int]
    statuses, *_ = await asyncio.gather(  # type: ignore[assignment]
        asyncio.gather(*(send(number) for number in range(50))),
        *(bookings.book(client.account_id, "topup", Nano(10**9 + number), reference=f"pay-{number}") for number in range(50)),
    )
    assert set(statuses) == {200}
    spent = gateway.billed_usd() * 90
    assert await client.balance() == 150 + Decimal(sum(range(50))) / 10**9 - spent
    assert await client.held() == 0


async def test_one_reference_is_one_payment_across_accounts_and_at_once(gateway: Gateway, database: Database) -> None:
    """Row money-12: two accounts claim the same payment in the same moment; one gets it."""
    clients = [await gateway.client("0") for _ in range(4)]
    results = await asyncio.gather(
        *(Bookings(database).book(clients[n % 4].account_id, "topup", Nano(5 * 10**9), reference="pay") for n in range(24)),
        return_exceptions=True,
    )
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert sum([await client.balance() for client in clients]) == 5
    assert {type(result).__name__ for result in results} == {"Booking", "AlreadyBooked"}


async def test_a_balance_out_of_range_is_rejected(database: Database, gateway: Gateway) -> None:
    """Row money-15: the bound is far inside BIGINT, so no sum overflows."""
    client = await gateway.client("0")
    for _ in range(4):
        await Bookings(database).book(client.account_id, "topup", Nano(10**18))
    with pytest.raises(ValueError, match="larger than any"):
        await Bookings(database).book(client.account_id, "topup", Nano(1))
    assert await client.balance() == 4 * 10**9


async def test_a_reference_that_is_being_booked_by_other_means_is_booked_once(database: Database, database_url: str) -> None:
    """Rows money-12, operator-3: an INSERT does not lock the reference; the unique index decides."""
    client = await make_client(database, "0")
    old = await asyncpg.connect(database_url)
    transaction = old.transaction()
    await transaction.start()
    await old.execute(
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reference) VALUES ($1, $2, 'topup', 5, 'payments', 'pay')",
        client.account_id,
        new_id(),
    )
    booking = asyncio.create_task(Bookings(database).book(client.account_id, "topup", Nano(5), reference="pay"))
    await asyncio.sleep(0.3)
    assert not booking.done()
    await old.execute("UPDATE accounts SET balance_nano = balance_nano + 5 WHERE account_id = $1", client.account_id)
    await transaction.commit()
    await old.close()
    with pytest.raises(AlreadyBooked):
        await booking
    assert (await client.user()).balance == 5
    assert [finding async for finding in check(database) if finding.rows] == []


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "another"}, {"id": None}, {"status": None}, {"amount": None}, {"amount": {"value": 100, "currency": "RUB"}},
        {"amount": {"value": "ten", "currency": "RUB"}}, {"amount": {"value": "-5.00", "currency": "RUB"}},
        {"amount": {"value": "NaN", "currency": "RUB"}}, {"amount": {"value": "0", "currency": "RUB"}},
    ],
)  # fmt: skip
async def test_a_malformed_response_of_yookassa_is_an_error(shop: Shop, changed: dict[str, Any]) -> None:
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id)
    kept = dict(shop.yookassa.payments[name])
    shop.yookassa.payments[name] |= changed
    assert await shop.notify("payment.succeeded", name) == 503
    assert await client.balance() == 0
    shop.yookassa.payments[name] = kept
    assert await shop.notify("payment.succeeded", name) == 200
    assert await client.balance() == 100


@pytest.mark.parametrize("value", ["0.0000000001", "99999999999.00"])
async def test_an_amount_that_no_balance_can_hold_is_an_error_log(
    shop: Shop, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Row money-15: YooKassa would repeat it for ever otherwise."""
    client = await shop.gateway.client("0")
    with caplog.at_level(logging.ERROR, "gptutor.payments"):
        assert await shop.notify("payment.succeeded", shop.yookassa.add_payment(client.account_id, value)) == 200
    assert "cannot be booked: InvalidAmount" in caplog.text
    assert await client.balance() == 0


async def test_a_payment_without_a_confirmation_url_is_an_error(shop: Shop) -> None:
    client = await shop.gateway.client("0")
    headers = {"Idempotency-Key": "order-2"}
    await shop.order(client, 50, **headers)
    for _, answer in shop.yookassa.idempotent_responses.values():
        answer["confirmation"] = None
    assert (await shop.order(client, 50, **headers))[0] == 503
    assert (await shop.order(client, 50, **{"Idempotency-Key": "x" * 256}))[0] == 400


async def test_a_disconnect_after_a_notification_does_not_cancel_the_booking(shop: Shop) -> None:
    shop.yookassa.pause_s = 0.3
    client = await shop.gateway.client("0")
    name = shop.yookassa.add_payment(client.account_id)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await shop.notify("payment.succeeded", name)
    for _ in range(100):
        if await client.balance():
            break
        await asyncio.sleep(0.02)
    assert await client.balance() == 100
