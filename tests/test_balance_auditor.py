"""The balance auditor of a running service (row operator-6)."""

import asyncio
import logging

import asyncpg
import pytest
from prometheus_client import REGISTRY

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.balance_auditor import BalanceAuditor
from tests.support.gateway import Gateway, make_client
from tests.support.ledger import hold, ledger_of, release, settlement

FORGERIES = [
    "UPDATE accounts SET balance_nano = balance_nano + 1 WHERE account_id = $1",
    "UPDATE accounts SET held_nano = held_nano + 1 WHERE account_id = $1",
    "UPDATE accounts SET balance_nano = balance_nano - 1, held_nano = 0 WHERE account_id = $1",
]


@pytest.fixture
async def auditor(database: Database) -> BalanceAuditor:
    auditor = BalanceAuditor(database, 3600)
    assert await auditor.check_once() == set()
    return auditor


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_change_past_the_ledger_is_logged_once_and_counted_until_it_is_corrected(
    database: Database, database_url: str, auditor: BalanceAuditor, forgery: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, other = [await make_client(database, "100") for _ in range(2)]
    ledger = ledger_of(database)
    await ledger.settle(settlement(await hold(database, client, "5"), "0.01"))
    await ledger.release(release(await hold(database, client, "5")))
    await hold(database, client, "5")
    assert await auditor.check_once() == set()
    by_hand = await asyncpg.connect(database_url)
    await by_hand.execute(forgery, client.account_id)
    for _ in range(2):
        assert await auditor.check_once() == {client.account_id}
    assert REGISTRY.get_sample_value("gptutor_inconsistent_accounts") == 1
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [vars(record)["userId"] for record in errors] == [str(client.account_id)]
    await by_hand.execute(
        "UPDATE accounts SET (balance_nano, held_nano) = (SELECT sum(amount_nano), 5000000000 FROM ledger WHERE account_id = $1)"
        " WHERE account_id = $1",
        client.account_id,
    )
    await by_hand.close()
    assert await auditor.check_once() == set()
    assert REGISTRY.get_sample_value("gptutor_inconsistent_accounts") == 0
    assert other.account_id != client.account_id


async def test_a_long_transaction_is_seen_when_it_ends(database: Database, database_url: str, auditor: BalanceAuditor) -> None:
    """Its transaction id is older than checks that could not see it yet."""
    client = await make_client(database, "100")
    by_hand = await asyncpg.connect(database_url)
    transaction = by_hand.transaction()
    await transaction.start()
    await by_hand.execute("UPDATE accounts SET balance_nano = 0 WHERE account_id = $1", client.account_id)
    for _ in range(3):
        await make_client(database, "1")
        assert await auditor.check_once() == set()
    await transaction.commit()
    await by_hand.close()
    assert await auditor.check_once() == {client.account_id}


@pytest.mark.parametrize("tuned", [{"recovery": {"audit_interval_s": 0.05}}])
async def test_the_service_audits_balances_while_it_serves(
    gateway: Gateway, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await gateway.client()
    await gateway.chat(client)
    await asyncio.sleep(0.2)
    assert "An account does not match its ledger" not in caplog.text
    by_hand = await asyncpg.connect(database_url)
    await by_hand.execute("UPDATE accounts SET balance_nano = balance_nano + 1")
    await by_hand.close()
    async with asyncio.timeout(10):
        while "An account does not match its ledger" not in caplog.text:
            await asyncio.sleep(0.02)


async def test_the_auditor_waits_for_a_database_that_is_away(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    auditor, checked = BalanceAuditor(database, 0.001), asyncio.Event()
    errors: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("a bug")]

    async def check_once() -> set[int]:
        if errors:
            raise errors.pop(0)
        checked.set()
        return set()

    monkeypatch.setattr(auditor, "check_once", check_once)
    caplog.set_level(logging.WARNING, "gptutor.balance_auditor")  # whatever level an earlier test has set
    running = asyncio.create_task(auditor.run())
    async with asyncio.timeout(10):
        await checked.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [record.getMessage() for record in caplog.records if record.name == "gptutor.balance_auditor"] == [
        "The balance auditor waits: away",
        "The balance auditor failed, and continues",
    ]
