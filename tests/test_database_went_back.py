"""A database that is older than the journal, because it was restored or a server that lagged behind was promoted: what the journal
knows is charged once, and the rest is listed (contract C3, C6, C8; rows sum-6, operator-5, db-8)."""

import asyncio
import logging
import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gptutor.config import schema
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.migrations import migrate
from gptutor.database.pool import Database, open_database
from gptutor.http.app_keys import SERVICES
from gptutor.money import journal, rollback
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HandOver, Hold, HoldId, new_id
from gptutor.money.journal_records import HoldRecord
from gptutor.money.pricing import Charge
from gptutor.money.rollback import Position, lost_action, may_have_gone_back, read_position, write_position
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.telemetry.alerts import ALERTS
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Client, Gateway, config_for, gateway_on, make_client
from tests.support.ledger import assert_invariants_hold, hold, settlement
from tests.support.recovery import Generations, Process, journals_in, mortal, process
from tests.support.replica import Replica, replicated_postgres
from tests.support.restorable import RestorableDatabase, restorable

CHARGE = Charge(Nano(9 * 10**8), Decimal("0.01"))  # 0.01 dollars × 90 = 0.9 roubles
WENT_BACK = "The database has gone back"


@pytest.fixture
async def live(postgres: str) -> AsyncIterator[RestorableDatabase]:
    async with restorable(postgres) as database:
        yield database


@pytest.fixture
async def database(live: RestorableDatabase) -> AsyncIterator[Database]:
    async with open_database(live.url, connections_max=8, connections_min=0) as connected:
        yield connected


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Connections were ended: a statement may fail, and the next one has a new connection."""
    async with asyncio.timeout(20):
        while True:
            try:
                if await condition():
                    return
            except DatabaseUnavailable:
                pass
            await asyncio.sleep(0.02)


async def reconnected(database: Database) -> None:
    async def responds() -> bool:
        for _ in range(8):  # the pool has so many connections
            await database.check()
        return True

    await eventually(responds)


async def checked(which: Process, caplog: pytest.LogCaptureFixture) -> list[str]:
    """One round of recovery's check: what it told the operator."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        await which.recovery.check_for_rollback()
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# -- the whole service


@asynccontextmanager
async def service(live: RestorableDatabase, database: Database, simulator: Simulator, directory: Path) -> AsyncIterator[Gateway]:
    async with (
        simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url,
        gateway_on(config_for(live.url, base_url, directory), database, simulator) as running,
    ):
        yield running
        await running.idle()


async def charged(gateway: Gateway, client: Client) -> bool:
    await assert_invariants_hold(gateway.database)
    return await client.balance() == 100 - gateway.billed_usd() * 90 and await client.held() == 0


async def test_a_running_service_charges_again_what_a_restored_database_has_lost(
    live: RestorableDatabase, database: Database, simulator: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some holds are lost with all that happened to them, some are open again, and some requests are running meanwhile."""
    async with service(live, database, simulator, tmp_path) as gateway:
        client = await gateway.client()
        await gateway.chat(client)
        simulator.first_word_s = 0.5
        running = [asyncio.create_task(gateway.chat(client, stream=True)) for _ in range(3)]
        while await client.held() == 0 or len(gateway.app[SERVICES].in_flight) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await live.back_up()
        await asyncio.gather(*running)
        await reconnected(database)
        simulator.first_word_s = 0
        for _ in range(5):
            await gateway.chat(client)
        simulator.first_word_s = 0.5
        running = [asyncio.create_task(gateway.chat(client)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await live.restore()
        await asyncio.gather(*running)
        await reconnected(database)
        await eventually(lambda: charged(gateway, client))
        simulator.first_word_s = 0
        await gateway.chat(client)
        await assert_charges_match_bills(gateway, client)
        assert len(simulator.billing.records) == 13
    (line,) = [record for record in caplog.records if record.getMessage().startswith(WENT_BACK)]
    assert line.levelno == logging.ERROR


async def test_a_service_that_starts_on_a_restored_database_charges_again_what_it_has_lost(
    live: RestorableDatabase, database: Database, simulator: Simulator, tmp_path: Path
) -> None:
    """Its previous process ended in good order, with nothing open: the evidence is kept nevertheless."""
    async with service(live, database, simulator, tmp_path) as gateway:
        client = await gateway.client()
        await gateway.chat(client)
        await live.back_up()
        await reconnected(database)
        for _ in range(5):
            await gateway.chat(client)
    await live.restore()
    await reconnected(database)
    async with service(live, database, simulator, tmp_path) as gateway:
        await eventually(lambda: charged(gateway, client))
        assert len(simulator.billing.records) == 6


# -- one process and its recovery


def record_bill(which: Process, held: Hold) -> None:
    which.journal.record_sent(held.account_id, held.hold_id, held.facts)
    which.journal.record_charge(held.hold_id, CHARGE, f"gen-{held.hold_id}")


async def buy(database: Database, client: Client, which: Process) -> Hold:
    """A request that was charged 0.9 roubles."""
    held = await hold(database, client, "5", ledger=which.ledger)
    record_bill(which, held)
    assert await which.ledger.settle(settlement(held, "0.01")) == "settled"
    which.ledger.deactivate(held.hold_id)
    return held


async def test_a_charge_whose_hold_is_lost_is_booked_late_with_all_it_had(
    live: RestorableDatabase, database: Database, directory: Path
) -> None:
    """At the moment of the settlement itself, before any check."""
    client = await make_client(database, "100")
    await live.back_up()
    await reconnected(database)
    with process(database, directory) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        record_bill(living, held)
        before = dict((await database.fetch("find_hold_states", [held.account_id], [held.hold_id]))[0])
        await live.restore()
        await reconnected(database)
        (record,) = living.journal.open_holds.values()
        assert record.facts == held.facts
        await living.recovery._settle_or_hand_over(living.journal.open_holds)
        assert living.journal.open_holds == {}
    assert before["state"] == "open"
    async with database.snapshot() as connection:
        row = await connection.fetchrow("SELECT * FROM holds")
        assert row["key_id"] == await connection.fetchval("SELECT key_id FROM api_keys")
    assert (row["state"], row["is_late"], row["amount_nano"], row["model"], row["request_id"]) == (
        "settled",
        True,
        5 * 10**9,
        "a/b",
        "r",
    )
    assert row["rub_per_usd"] == 90
    assert await client.balance() == Decimal("99.1")
    await assert_invariants_hold(database)


async def test_what_is_lost_is_charged_again_once_and_told_once(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "100")
    with process(database, directory) as living:
        reopened = await hold(database, client, "5", ledger=living.ledger)
        record_bill(living, reopened)
        assert await checked(living, caplog) == []
        ALERTS.clear()
        await live.back_up()
        await reconnected(database)
        await living.ledger.settle(settlement(reopened, "0.01"))
        living.ledger.deactivate(reopened.hold_id)
        for _ in range(10):
            await buy(database, client, living)
        await live.restore()
        await reconnected(database)
        (told,) = await checked(living, caplog)
        assert told.startswith(f"{WENT_BACK}: 11 holds")
        assert ALERTS.events["commits_lost"][1] == 11
        assert (await client.balance(), await client.held()) == (Decimal("90.1"), 0)
        assert await checked(living, caplog) == []
        await buy(database, client, living)
        assert await checked(living, caplog) == []
    assert await client.balance() == Decimal("89.2")
    await assert_invariants_hold(database)


async def test_after_a_plain_restart_only_the_latest_evidence_is_read(
    live: RestorableDatabase,
    database: Database,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss is of what came last. A process that has not seen for itself that the rest was there reads everything."""
    read: list[str] = []
    read_closed = rollback.read_closed

    def noted(path: Path, **options: Any) -> Any:
        read.append(path.name.split(".")[1])
        return read_closed(path, **options)

    monkeypatch.setattr(rollback, "read_closed", noted)
    client = await make_client(database, "100")
    with process(database, directory) as living:
        for _ in range(3):
            await buy(database, client, living)
            living.journal._begin_segment()
        assert await checked(living, caplog) == []
        assert read == ["000004", "000003", "000002", "000001"]
        read.clear()
        await buy(database, client, living)
        assert await checked(living, caplog) == []
        await live.back_up()
        await live.restore()
        await reconnected(database)
        assert await checked(living, caplog) == []
        assert read == ["000004"]
        read.clear()
        await live.back_up()
        await live.restore()
        await reconnected(database)
        await buy(database, client, living)  # on the restored database already, so that it proves nothing
        assert await checked(living, caplog) == []
        assert read == ["000004", "000003"]


async def test_a_check_that_is_interrupted_begins_anew(
    live: RestorableDatabase,
    database: Database,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row db-7: the database goes away after the latest evidence was used, and before the rest was."""
    client = await make_client(database, "100")
    with process(database, directory) as living:
        await live.back_up()
        await reconnected(database)
        for _ in range(3):
            await buy(database, client, living)
            living.journal._begin_segment()
        assert await checked(living, caplog) == []
        await live.restore()
        await reconnected(database)
        fetch, looks = database.fetch, 0

        async def interrupted(statement: str, *arguments: Any) -> Any:
            nonlocal looks
            looks += statement == "find_hold_states"
            if looks == 2:
                looks += 1
                raise DatabaseUnavailable("away")
            return await fetch(statement, *arguments)

        monkeypatch.setattr(database, "fetch", interrupted)
        with pytest.raises(DatabaseUnavailable):
            await checked(living, caplog)
        assert await client.balance() == Decimal("99.1")
        assert len(await checked(living, caplog)) == 1
    assert await client.balance() == Decimal("97.3")
    await assert_invariants_hold(database)


async def test_a_plain_reconnection_a_new_process_and_a_failover_without_loss_alarm_nobody(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "100")
    with process(database, directory) as living:
        assert await checked(living, caplog) == []
        await buy(database, client, living)
        await live.disconnect()
        await reconnected(database)
        assert await checked(living, caplog) == []
    with process(database, directory) as respawned:
        assert await checked(respawned, caplog) == []
        await buy(database, client, respawned)
        await live.back_up()
        before = read_position(respawned.journal.slot)
        await live.restore()
        await reconnected(database)
        assert await checked(respawned, caplog) == []
        after = read_position(respawned.journal.slot)
        assert before is not None
        assert after is not None
        assert before.history != after.history  # it was recognised as another database
    assert await client.balance() == Decimal("98.2")


async def test_a_settled_hold_that_is_open_again_is_not_released_as_never_sent(
    live: RestorableDatabase, database: Database, directory: Path
) -> None:
    """Neither by the process that settled it, nor by the one that replays its journal."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    with process(database, directory) as living:
        own = await hold(database, client, "5", ledger=living.ledger)
        theirs = await hold(database, client, "5", ledger=dead)
        await live.back_up()
        await reconnected(database)
        for ledger, held in ((living.ledger, own), (dead, theirs)):
            ledger.journal.record_sent(held.account_id, held.hold_id, held.facts)
            ledger.journal.record_charge(held.hold_id, CHARGE, None)
            await ledger.settle(settlement(held, "0.01"))
            ledger.deactivate(held.hold_id)
        await live.restore()
        await reconnected(database)
        assert (await client.balance(), await client.held()) == (100, 10)
        connection = await asyncpg.connect(live.url)
        await connection.execute("UPDATE holds SET due_at = now() WHERE hold_id = $1", own.hold_id)
        await connection.close()
        await living.recovery.process_due_holds()
        assert (await client.balance(), await client.held()) == (Decimal("99.1"), 5)
        await living.recovery.replay(*journals_in(directory))
    assert (await client.balance(), await client.held()) == (Decimal("98.2"), 0)
    await assert_invariants_hold(database)


async def test_a_hold_that_the_journal_has_forgotten_is_not_released_as_never_sent(
    live: RestorableDatabase, database: Database, directory: Path
) -> None:
    """The evidence was bounded: the hold waits, and is listed. A hold that was placed since is known never to have been sent."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    forgotten = await hold(database, client, "5", ledger=dead)
    await live.back_up()
    await reconnected(database)
    dead.journal.record_sent(forgotten.account_id, forgotten.hold_id, forgotten.facts)
    dead.journal.record_charge(forgotten.hold_id, CHARGE, None)
    await dead.settle(settlement(forgotten, "0.01"))
    dead.journal._begin_segment()
    journal.expire_kept(dead.journal.slot, None, 0, of_closed=dead.journal.files[:-1])
    await live.restore()
    await reconnected(database)
    await asyncio.sleep(0.002)
    never_sent = await hold(database, client, "5", ledger=dead)
    with process(database, directory) as survivor:
        await survivor.recovery.replay(*journals_in(directory))
        async with database.snapshot() as connection:
            states = dict(await connection.fetch("SELECT hold_id, state::text FROM holds"))
        assert states == {forgotten.hold_id: "open", never_sent.hold_id: "released"}
        await survivor.recovery.process_due_holds()
    (waiting,) = await database.fetch("list_waiting_holds", 10)
    assert (waiting["hold_id"], waiting["state"]) == (forgotten.hold_id, "awaiting_evidence")


async def test_a_lost_hold_whose_cost_is_not_known_is_placed_again_and_looked_up(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "100")
    await live.back_up()
    await reconnected(database)
    with process(database, directory, generations=Generations({"gen-1": Decimal("0.01")})) as living:
        assert await checked(living, caplog) == []
        before, after = [await hold(database, client, "5", ledger=living.ledger) for _ in range(2)]
        for held in (before, after):
            living.journal.record_sent(held.account_id, held.hold_id, held.facts)
            living.ledger.deactivate(held.hold_id)
        living.journal.record_generation_id(before.hold_id, "gen-1")
        await living.ledger.hand_over(HandOver(before.account_id, before.hold_id, "gen-1", before.facts))
        await live.restore()
        await reconnected(database)
        assert len(await checked(living, caplog)) == 1
        await living.ledger.hand_over(HandOver(after.account_id, after.hold_id, None, after.facts))
        assert await client.held() == 10
        await assert_invariants_hold(database)
        await living.recovery.process_due_holds()
        assert (await client.balance(), await client.held()) == (Decimal("99.1"), 5)  # the other one waits for evidence
        assert living.generations.lookups == ["gen-1"]
    await assert_invariants_hold(database)


async def test_a_hold_that_is_placed_again_takes_no_more_than_is_available(
    live: RestorableDatabase, database: Database, directory: Path
) -> None:
    """The backup is from before the top-up, which is lost too."""
    client = await make_client(database, "1")
    await live.back_up()
    await reconnected(database)
    connection = await asyncpg.connect(live.url)
    await connection.execute(
        "SELECT book_entry($1, gen_random_uuid(), 'bonus', 100000000000, 'goodwill', '', NULL, NULL, FALSE)", client.account_id
    )
    await connection.close()
    with process(database, directory) as living:
        held, billed = [await hold(database, client, "5", ledger=living.ledger) for _ in range(2)]
        await live.restore()
        await reconnected(database)
        await living.ledger.hand_over(HandOver(held.account_id, held.hold_id, None, held.facts))
        assert await client.held() == 1
        await assert_invariants_hold(database)
        record_bill(living, billed)
        await living.recovery._settle_or_hand_over(living.journal.open_holds)
    assert await client.balance() == Decimal("0.1")
    await assert_invariants_hold(database)


async def test_what_was_released_and_is_open_again_is_released_again(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        living.journal.record_sent(held.account_id, held.hold_id, held.facts)
        assert await checked(living, caplog) == []
        await live.back_up()
        await reconnected(database)
        living.journal.record_closed([held.hold_id])  # the attempt bought nothing
        living.ledger.deactivate(held.hold_id)
        await live.restore()
        await reconnected(database)
        await checked(living, caplog)
    assert (await client.balance(), await client.held()) == (100, 0)


@pytest.mark.parametrize("is_number_used_again", [False, True])
async def test_what_cannot_be_booked_is_listed_and_charged_to_nobody_else(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture, is_number_used_again: bool
) -> None:
    """The account is younger than the backup; after the restore, the next new user gets its number."""
    await live.back_up()
    await reconnected(database)
    lost = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, lost, "5", ledger=living.ledger)
        record_bill(living, held)
        living.ledger.deactivate(held.hold_id)
        await live.restore()
        await reconnected(database)
        if is_number_used_again:
            other = await make_client(database, "100")
            assert other.account_id == lost.account_id
        (living.journal.slot / "unbooked").mkdir()  # it cannot be written down for the operator: it stays in the journal
        await living.recovery.process_due_holds()
        assert set(living.journal.open_holds) == set(journals_in(directory, 0)[0].open_holds) == {held.hold_id}
        (living.journal.slot / "unbooked").rmdir()
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            await living.recovery.process_due_holds()
        assert [record.getMessage() for record in caplog.records if record.name.startswith("gptutor")] == [
            "A request cannot be charged: the database has lost its hold and its account. gptutor reconcile lists it"
        ]
        assert living.journal.open_holds == {}
        assert journal.read_unbooked(directory) == {
            held.hold_id: HoldRecord(held.account_id, f"gen-{held.hold_id}", CHARGE, held.facts)
        }
    if is_number_used_again:
        assert await other.balance() == 100
        await assert_invariants_hold(database)


async def test_what_cannot_be_booked_is_told_once_however_often_the_server_restarts(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await live.back_up()
    await reconnected(database)
    lost = await make_client(database, "100")
    with process(database, directory) as living:
        await buy(database, lost, living)
        await live.restore()
        await reconnected(database)
        assert any("cannot be charged" in line for line in await checked(living, caplog))
        for _ in range(3):
            (living.journal.slot / "position").unlink(missing_ok=True)
            living.recovery._rollback_check._remembered = None
            assert await checked(living, caplog) == []
        assert len(journal.read_unbooked(directory)) == 1


async def test_what_cannot_be_closed_again_yet_stays_suspect_and_its_evidence_is_kept(
    live: RestorableDatabase,
    database: Database,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row db-11: the account's row is locked by hand when the database has gone back."""
    monkeypatch.setattr("gptutor.money.closings.CLOSE_TIMEOUT_S", 0.3)
    client = await make_client(database, "100")
    await live.back_up()
    await reconnected(database)
    with process(database, directory) as living:
        await buy(database, client, living)
        living.journal._begin_segment()
        os.utime(living.journal.files[0], (0, 0))
        await live.restore()
        await reconnected(database)
        hand = await asyncpg.connect(live.url)
        async with hand.transaction():
            await hand.execute("SELECT FROM accounts FOR UPDATE")
            await checked(living, caplog)
            assert read_position(living.journal.slot) is None
            assert len(living.journal.files) == 2
        await hand.close()
        assert len(await checked(living, caplog)) == 1
        assert read_position(living.journal.slot) is not None
        assert len(living.journal.files) == 1
    assert await client.balance() == Decimal("99.1")
    await assert_invariants_hold(database)


@pytest.mark.parametrize("is_in_use", [False, True])
async def test_the_evidence_in_a_slot_that_no_process_has_is_used_as_well(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture, is_in_use: bool
) -> None:
    """There are fewer processes now than before the restore. A dead one's open holds were closed by the replay of its journal."""
    client, dead = await make_client(database, "100"), mortal(database, directory)
    await live.back_up()
    await reconnected(database)
    billed, sent = [await hold(database, client, "5", ledger=dead) for _ in range(2)]
    for held in (billed, sent):
        dead.journal.record_sent(held.account_id, held.hold_id, held.facts)
    dead.journal.record_charge(billed.hold_id, CHARGE, None)
    with process(database, directory) as survivor:
        assert await survivor.recovery.replay(*journals_in(directory))
        assert (await client.balance(), await client.held()) == (Decimal("99.1"), 5)
        assert await checked(survivor, caplog) == []
        await live.restore()
        await reconnected(database)
        lock = journal._lock(directory / "50") if is_in_use else None
        assert len(await checked(survivor, caplog)) == int(not is_in_use)
        if lock is not None:
            os.close(lock)
    assert await client.balance() == (100 if is_in_use else Decimal("99.1"))
    assert await client.held() == (0 if is_in_use else 5)
    await assert_invariants_hold(database)


async def test_another_attempt_that_is_running_is_left_alone(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(database, "100")
    with process(database, directory) as living:
        held = await hold(database, client, "5", ledger=living.ledger)
        living.journal.record_sent(held.account_id, held.hold_id, held.facts)
        living.journal.record_closed([held.hold_id])  # the first attempt bought nothing, and the second begins
        assert await checked(living, caplog) == []
    assert await client.held() == 5


@pytest.mark.parametrize("content", [b"", b"garbage", b"00000000 position"])
def test_a_position_that_is_damaged_is_none(tmp_path: Path, content: bytes) -> None:
    assert read_position(tmp_path) is None
    (tmp_path / "position").write_bytes(content)
    assert read_position(tmp_path) is None


@pytest.mark.parametrize("position", [Position("a/b", 5, (AccountId(1), new_id())), Position("-/1", None, None)])
def test_a_position_is_remembered_across_processes(tmp_path: Path, position: Position) -> None:
    write_position(tmp_path, position)
    assert read_position(tmp_path) == position
    with pytest.raises(journal.JournalError, match="cannot be written: No such file or directory"):
        write_position(tmp_path / "none", position)


async def test_a_server_that_tells_no_position_is_found_out_by_its_witness(
    live: RestorableDatabase, database: Database, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tables that were restored in place, too: neither the server nor the database is another one."""
    client = await make_client(database, "100")
    connection = await asyncpg.connect(live.url)
    await connection.execute(
        "CREATE OR REPLACE FUNCTION find_position() RETURNS TABLE (history text, wal_bytes bigint) LANGUAGE SQL "
        "AS $$ SELECT '-', NULL::bigint $$"
    )
    with process(database, directory) as living:
        assert await checked(living, caplog) == []
        reopened = await buy(database, client, living)
        assert await checked(living, caplog) == []
        await connection.execute("SET session_replication_role = replica")
        await connection.execute("DELETE FROM holds")
        await connection.execute("DELETE FROM ledger WHERE kind = 'charge'")
        await connection.execute("DELETE FROM usage_days")
        await connection.execute("UPDATE accounts SET balance_nano = 100000000000, charge_count = 0")
        await connection.close()
        await buy(database, client, living)  # before the check
        (told,) = await checked(living, caplog)
        assert told.startswith(f"{WENT_BACK}: 1 holds")
        assert await checked(living, caplog) == []
    assert await database.fetch("find_hold_states", [client.account_id], [reopened.hold_id]) != []
    assert await client.balance() == Decimal("98.2")
    await assert_invariants_hold(database)


async def test_a_role_with_few_privileges_learns_at_least_when_the_server_started(live: RestorableDatabase) -> None:
    connection = await asyncpg.connect(live.url)
    row = await connection.fetchrow("SELECT * FROM find_position()")
    assert row is not None
    server, timeline, number, started = row["history"].split("/")
    assert int(server) > 0
    assert (int(timeline, 16), row["wal_bytes"] > 0) == (1, True)
    async with connection.transaction():
        await connection.execute("CREATE ROLE few_privileges")
        await connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_system(), pg_current_wal_lsn() FROM public")
        await connection.execute("SET ROLE few_privileges")
        row = await connection.fetchrow("SELECT * FROM find_position()")
        assert row is not None
        assert (row["history"], row["wal_bytes"]) == (f"-/-/{number}/{started}", None)
        await connection.execute("RESET ROLE")
        await connection.execute("GRANT EXECUTE ON FUNCTION pg_control_system(), pg_current_wal_lsn() TO public")
        await connection.execute("DROP ROLE few_privileges")
    await connection.close()


def has_postgres_user() -> bool:
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return False
    return True


@pytest.mark.timeout(180)
@pytest.mark.skipif(os.geteuid() == 0 and not has_postgres_user(), reason="root needs a user postgres to run servers")
@pytest.mark.parametrize("lost", [0, 4])
async def test_a_replica_is_recognised_by_its_timeline_and_what_it_lacks_is_charged_again(
    directory: Path, caplog: pytest.LogCaptureFixture, lost: int
) -> None:
    """Row db-8: a real promotion. Of a replica that has everything, nobody is alarmed."""
    with replicated_postgres() as replica:
        await migrate(replica.primary_url)
        async with open_database(replica.primary_url) as primary:
            client = await make_client(primary, "100")
            with process(primary, directory) as living:
                assert await checked(living, caplog) == []
                for _ in range(3):
                    await buy(primary, client, living)
                await until_replayed(replica)
                if lost:
                    replica.stop()
                    for _ in range(lost):
                        await buy(primary, client, living)
                assert await checked(living, caplog) == []
        replica.promote()
        before = read_position(directory / "0")
        async with open_database(replica.url) as promoted:
            client.database = promoted
            assert await client.balance() == Decimal("97.3")
            with process(promoted, directory) as next_process:
                told = await checked(next_process, caplog)
                assert [line.partition(" holds")[0] for line in told] == [f"{WENT_BACK}: {lost}"] * bool(lost)
            after = read_position(directory / "0")
            assert await client.balance() == Decimal("97.3") - lost * Decimal("0.9")
            await assert_invariants_hold(promoted)
    assert before is not None
    assert after is not None
    (server, timeline, *_), (other_server, other_timeline, *_) = before.history.split("/"), after.history.split("/")
    assert (other_server, int(timeline, 16), int(other_timeline, 16)) == (server, 1, 2)


async def until_replayed(replica: Replica) -> None:
    primary, standby = await asyncpg.connect(replica.primary_url), await asyncpg.connect(replica.url)
    async with asyncio.timeout(20):
        while await primary.fetchval("SELECT pg_current_wal_lsn()::text") != await standby.fetchval(
            "SELECT pg_last_wal_replay_lsn()::text"
        ):
            await asyncio.sleep(0.05)
    await primary.close()
    await standby.close()


# -- the decisions

WITNESS = (AccountId(1), HoldId(new_id()))


@pytest.mark.parametrize(
    # what is remembered, what the server tells, whether the witness is settled → whether it may have gone back
    ("remembered", "history", "wal_bytes", "is_settled", "suspect"),
    [
        (None, "a", 5, False, True),
        (Position("a", 5, None), "a", 5, False, False),
        (Position("a", 5, WITNESS), "a", 5, True, False),
        (Position("a", 5, WITNESS), "a", 6, True, False),
        (Position("a", 5, WITNESS), "a", 4, True, True),
        (Position("a", 5, WITNESS), "b", 6, True, True),
        (Position("a", 5, WITNESS), "a", 6, False, True),
        (Position("a", None, WITNESS), "a", 6, True, False),
        (Position("a", 5, WITNESS), "a", None, True, False),
    ],
)
def test_when_a_server_may_have_gone_back(
    remembered: Position | None, history: str, wal_bytes: int | None, is_settled: bool, suspect: bool
) -> None:
    assert may_have_gone_back(remembered, history, wal_bytes, witness_is_settled=is_settled) is suspect


SETTLED = HoldRecord(AccountId(1), "gen-1", CHARGE)
HANDED_OVER = HoldRecord(AccountId(1), "gen-1", is_handed_over=True)
RELEASED = HoldRecord(AccountId(1))


@pytest.mark.parametrize(
    # what the journal says, the row (state, whether it is handed over) → the action
    ("record", "row", "action"),
    [
        (SETTLED, None, "settle"),
        (SETTLED, ("open", False), "settle"),
        (SETTLED, ("open", True), "settle"),
        (SETTLED, ("released", False), "settle"),
        (SETTLED, ("settled", False), None),
        (HANDED_OVER, None, "hand_over"),
        (HANDED_OVER, ("open", False), "hand_over"),
        (HANDED_OVER, ("open", True), None),
        (HANDED_OVER, ("settled", True), None),
        (HANDED_OVER, ("released", True), None),
        (RELEASED, None, None),
        (RELEASED, ("open", False), "release"),
        (RELEASED, ("open", True), None),
        (RELEASED, ("released", False), None),
        (RELEASED, ("settled", False), None),
    ],
)
def test_what_is_done_with_a_hold_that_the_journal_has_closed(record: HoldRecord, row: Any, action: str | None) -> None:
    found: Any = None if row is None else {"state": row[0], "is_handed_over": row[1]}
    assert lost_action(record, found) == action
