"""Our charges against OpenRouter's own totals (contract C9; rows operator-5, upstream-19): what was lost, or doubled, shows as a
difference, and what is not known yet is named with the most that it can be."""

import datetime
import json
from decimal import Decimal

import asyncpg
import orjson

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano, parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.holds import HandOver, HoldFacts, Release, new_id
from gptutor.money.journal_records import HoldRecord
from gptutor.money.pricing import Charge
from gptutor.money.reconciliation import reconcile
from gptutor.money.records import reconciliation_json, unbooked_json
from tests.support.gateway import make_client
from tests.support.ledger import hold, ledger_of, settlement

UTC = datetime.UTC
DAY = datetime.timedelta(days=1)


def today() -> datetime.date:
    return datetime.datetime.now(UTC).date()


async def test_a_days_charges_are_compared_to_the_last_digit(database: Database, database_url: str) -> None:
    """Contract C9: only charges count, in dollars, by UTC day; days come newest first."""
    client, other = await make_client(database, "100"), await make_client(database, "100")
    ledger = ledger_of(database)
    first = today()
    for who, cost in ((client, "0.01"), (client, "0.02"), (other, "0.003"), (client, "0")):
        await ledger.settle(settlement(await hold(database, who, "5"), cost))
    await Bookings(database).book(client.account_id, "bonus", parse_roubles("1"))
    await ledger.release(Release(client.account_id, (await hold(database, client, "5")).hold_id))

    yesterday = settlement(await hold(database, other, "5"), "0.5")
    await ledger.settle(yesterday)
    connection = await asyncpg.connect(database_url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(  # one tick before midnight
        "UPDATE ledger SET created_at = $2::date::timestamp AT TIME ZONE 'UTC' - interval '1 microsecond' WHERE entry_id = $1",
        yesterday.hold_id,
        first,
    )
    await connection.execute("DELETE FROM usage_days")  # the trigger, asleep, would have kept the totals with the ledger
    await connection.execute(
        "INSERT INTO usage_days SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, model, count(*), NULL, NULL, sum(cost_usd),"
        " -sum(amount_nano) FROM ledger WHERE kind = 'charge' GROUP BY 1, 2, 3"
    )
    await connection.close()

    theirs = {first - 2 * DAY: Decimal("0.7"), first: Decimal("0.0330000000000000001"), first - DAY: Decimal("0.4")}
    found = await reconcile(database, theirs)
    assert [(day.day, day.ours_usd, day.theirs_usd, day.difference_usd) for day in found.days] == [
        (first, Decimal("0.033"), Decimal("0.0330000000000000001"), Decimal("0.0000000000000000001")),
        (first - DAY, Decimal("0.5"), Decimal("0.4"), Decimal("-0.1")),  # we charged more than it did
        (first - 2 * DAY, 0, Decimal("0.7"), Decimal("0.7")),  # it charged what we know nothing of
    ]
    assert (found.waiting.oldest, found.waiting.count, found.waiting.at_most) == ([], 0, 0)
    days = orjson.loads(orjson.dumps(reconciliation_json(found, {})))["days"]
    assert days[0] == {
        "day": first.isoformat(),
        "ours_usd": "0.033",
        "openrouter_usd": "0.0330000000000000001",
        "difference_usd": "0.0000000000000000001",  # never 1E-19
        "is_too_different": True,
    }


async def test_what_waits_for_evidence_and_what_was_given_up_is_named_with_the_most_that_it_may_have_cost(
    database: Database,
) -> None:
    """Contract C6, C9; row upstream-19: a list, not a silence."""
    client = await make_client(database, "100")
    ledger = ledger_of(database)
    waiting, given_up, under_way, settled, released = [
        await hold(database, client, amount) for amount in ("1", "2.5", "4", "8", "16")
    ]
    await ledger.hand_over(HandOver(client.account_id, waiting.hold_id, "gen-1"))
    await ledger.release(Release(client.account_id, given_up.hold_id, unresolved=True))
    await ledger.settle(settlement(settled, "0.01"))
    await ledger.release(Release(client.account_id, released.hold_id))

    found = await reconcile(database, {})
    assert found.days == []
    assert [(one.state, one.amount, one.generation_id, one.account_id) for one in found.waiting.oldest] == [
        ("awaiting_evidence", parse_roubles("1"), "gen-1", client.account_id),
        ("unresolved", parse_roubles("2.5"), None, client.account_id),
    ]
    assert found.waiting.at_most == parse_roubles("3.5")
    document = json.loads(orjson.dumps(reconciliation_json(found, {})))
    assert (document["waiting_count"], document["waiting_at_most"]) == (2, "3.5")
    assert [(one["at_most"], one["model"], one["request_id"], one["generation_id"]) for one in document["waiting"]] == [
        ("1", "a/b", "r", "gen-1"),
        ("2.5", "a/b", "r", None),
    ]
    assert under_way.amount == parse_roubles("4")  # it is under way in a living process, and nobody misses it

    await ledger.settle(settlement(given_up, "0.01"))
    assert [one.generation_id for one in (await reconcile(database, {})).waiting.oldest] == ["gen-1"]


def test_a_request_that_cannot_be_charged_is_listed_with_what_is_known_of_it() -> None:
    facts = HoldFacts(Nano(5 * 10**9), Decimal(90), b"12345678", "request-1", "a/b")
    charged = unbooked_json(new_id(), HoldRecord(AccountId(7), "gen-1", Charge(Nano(9 * 10**8), Decimal("0.01")), facts))
    assert str(today().year) in charged.pop("created_at")
    assert charged == {
        "user_id": 7, "charge": "0.9", "cost_usd": "0.01", "at_most": "5", "model": "a/b", "request_id": "request-1",
        "generation_id": "gen-1",
    }  # fmt: skip
    unknown = unbooked_json(new_id(), HoldRecord(AccountId(7)))
    assert {name for name, value in unknown.items() if value is not None} == {"user_id", "created_at"}
