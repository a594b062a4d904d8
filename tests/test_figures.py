"""What the metrics say of open holds and balances: read from PostgreSQL by one process, cheaply, and absent while it is away."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from gptutor.database.pool import Database, open_database
from gptutor.money.bookings import Bookings
from gptutor.money.figures import Figures
from gptutor.money.holds import HandOver
from gptutor.telemetry import metrics
from gptutor.telemetry.shared_metrics import own_text
from tests.support.gateway import make_client
from tests.support.ledger import hold, ledger_of


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    for gauge in (metrics.OPEN_HOLDS, metrics.WAITING_HOLDS, metrics.BALANCES_ROUBLES, metrics.DATABASE_UP):
        gauge.clear()


@pytest.fixture
async def away(unused_tcp_port: int) -> AsyncIterator[Database]:
    async with open_database(f"postgresql://x@127.0.0.1:{unused_tcp_port}/x", connections_min=0) as database:
        yield database


async def test_open_and_waiting_holds_are_counted(database: Database, tmp_path: Path) -> None:
    client, ledger = await make_client(database, "100"), ledger_of(database)
    waiting = await hold(database, client, "2", ledger=ledger)
    await hold(database, client, "3", ledger=ledger)
    await ledger.hand_over(HandOver(client.account_id, waiting.hold_id, None))
    await Figures(database, tmp_path).read_once()
    assert (value("gptutor_database_up"), value("gptutor_open_holds"), value("gptutor_waiting_holds")) == (1, 2, 1)
    assert value("gptutor_waiting_holds_roubles") == 2
    assert 0 < (value("gptutor_waiting_holds_oldest_seconds") or 0) < 100


async def test_balances_are_added_up_in_parts(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.money.figures.ACCOUNTS_MAX", 2)
    for balance in ("100", "50", "7"):
        client = await make_client(database, balance)
    await Bookings(database).book(client.account_id, "adjustment", -10 * 10**9, reason="x")  # type: ignore[arg-type]
    figures = Figures(database, tmp_path)
    for positive, negative in ((None, None), (150, -3), (150, -3), (150, -3)):  # two parts in each round
        await figures.read_once()
        assert value("gptutor_balances_roubles", sign="positive") == positive
        assert value("gptutor_balances_roubles", sign="negative") == negative


async def test_without_the_database_the_page_is_there_and_says_so(away: Database, tmp_path: Path) -> None:
    metrics.OPEN_HOLDS.set(5)
    await Figures(away, tmp_path).read_once()
    page = own_text().decode()
    assert "gptutor_database_up 0.0" in page.splitlines()
    assert not re.search(r"^gptutor_(open_holds|waiting\w+|balances\w+)[{ ]", page, re.MULTILINE)
    assert "# TYPE gptutor_open_holds gauge" in page


async def test_a_fault_does_not_end_the_job(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(database, "fetch", fail)
    await Figures(database, tmp_path).read_once()
    assert value("gptutor_database_up") == 0


async def test_one_process_reads_the_figures_and_another_takes_over(
    away: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptutor.money.figures.EVERY_S", 0)
    reads = {1: 0, 2: 0}

    class Counted(Figures):
        number: int

        async def read_once(self) -> None:
            reads[self.number] += 1

    first, second = Counted(away, tmp_path / "metrics"), Counted(away, tmp_path / "metrics")
    first.number, second.number = 1, 2
    async with asyncio.timeout(20):
        running = asyncio.create_task(first.run())
        while not reads[1]:
            await asyncio.sleep(0)
        next_running = asyncio.create_task(second.run())
        while reads[1] < 10:
            await asyncio.sleep(0)
        assert reads[2] == 0
        running.cancel()
        while not reads[2]:
            await asyncio.sleep(0)
        next_running.cancel()
        for task in (running, next_running):
            with contextlib.suppress(asyncio.CancelledError):
                await task
    assert value("gptutor_database_up") is None
