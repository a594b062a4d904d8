"""Comparison of the ledger with the simulator's bills, request by request.

The simulator's bills contain every generation, its cost, its job and the user's pseudonym. The database contains every charge and
every hold, and the request id of each hold contains the job. Every bill must be in one of two states:

    charged     one ledger entry with this generation, exactly this cost, this job and this account
    waiting     the hold of this job is still open: the request was sent, and the worker died before the generation id arrived;
                the hold covers the bill, is listed, and is the most that can be lost

Everything else is an error, and so is a charge without a bill.
"""

import asyncio
import hashlib
import hmac
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from gptutor.app import derived_key
from gptutor.money.journal import JOURNALS, read_journals
from tests.chaos.processes import SECRET

NANO = 10**9
STEADY_S = 2.0
EXCHANGE_S = 12.0
"""Every exchange with OpenRouter has ended by then."""
NOT_SETTLED = "generation id known, but not settled in time"
HOLDS = """
SELECT account_id, hold_id, owner, state::text, is_handed_over, recovery_attempts, request_id, generation_id, amount_nano, rub_per_usd, is_unresolved,
    created_at, extract(EPOCH FROM now() - created_at)::float AS age_s
FROM holds ORDER BY created_at
"""
CHARGES = "SELECT account_id, entry_id, generation_id, cost_usd, amount_nano FROM ledger WHERE kind = 'charge'"
TOPUPS = "SELECT account_id, sum(amount_nano)::bigint AS nano FROM ledger WHERE kind = 'topup' GROUP BY account_id"


@dataclass
class Records:
    """The simulator's bills by generation id, and the database's holds, charges and top-ups (account id → nano-roubles)."""

    bills: dict[str, dict[str, Any]]
    holds: list[asyncpg.Record]
    charges: list[asyncpg.Record]
    topups: dict[int, int]

    @property
    def open_holds(self) -> list[asyncpg.Record]:
        return [hold for hold in self.holds if hold["state"] == "open"]


@dataclass
class Findings:
    errors: list[str] = field(default_factory=list)
    waiting: dict[str, list[asyncpg.Record]] = field(default_factory=lambda: defaultdict(list))
    """Open holds, by the reason why they are still open."""
    compared: int = 0
    charged_usd: Decimal = Decimal(0)
    difference_usd: Decimal = Decimal(0)
    unidentified_bills: int = 0
    unidentified_usd: Decimal = Decimal(0)
    unidentified_held_nano: int = 0
    states: Counter[str] = field(default_factory=Counter)


async def read_records(url: str, simulator_url: str) -> Records:
    async with aiohttp.ClientSession() as session, session.get(f"{simulator_url}/simulator/bills") as response:
        bills = {bill["id"]: bill for bill in await response.json()}
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            holds, charges = await connection.fetch(HOLDS), await connection.fetch(CHARGES)
            topups = {row["account_id"]: row["nano"] for row in await connection.fetch(TOPUPS)}
    finally:
        await connection.close()
    return Records(bills, holds, charges, topups)


def job_of(hold: asyncpg.Record) -> str:
    """The job id: a request id is the job id and the number of the attempt."""
    job_id: str = hold["request_id"].partition(".")[0]
    return job_id


def orphaned_journals(data: Path, workers: int) -> int:
    """How many journals there are beside one for each running worker."""
    return max(0, len(running_owners(data)) - workers)


def running_owners(data: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (data / JOURNALS).glob("*/*.log")}


async def wait_for_recovery(
    url: str, simulator_url: str, data: Path, workers: int, timeout_s: float, *, skip_slow_holds: bool
) -> Records:
    """Waits until recovery has finished and nothing changes any more, or until the timeout. Returns the records.

    Recovery looks at a hold that was not handed over only when it expires, after more than a minute; with `skip_slow_holds` such holds
    are not waited for.
    """
    clock = asyncio.get_running_loop().time
    deadline, steady_since = clock() + timeout_s, clock()
    last: Any = None
    while True:
        records = await read_records(url, simulator_url)
        pending = (
            [hold["hold_id"] for hold in records.open_holds if hold["generation_id"]],
            [hold["hold_id"] for hold in records.open_holds if _may_still_change(hold, skip_slow_holds=skip_slow_holds)],
            [bill["id"] for bill in records.bills.values() if not bill["finished"]],
            orphaned_journals(data, workers),
        )
        if any(pending) or (pending, len(records.charges), len(records.open_holds)) != last:
            steady_since = clock()
        if clock() - steady_since >= STEADY_S or clock() > deadline:
            return records
        last = (pending, len(records.charges), len(records.open_holds))
        await asyncio.sleep(0.5)


def _may_still_change(hold: asyncpg.Record, *, skip_slow_holds: bool) -> bool:
    return not hold["is_handed_over"] and (hold["age_s"] < EXCHANGE_S if skip_slow_holds else hold["recovery_attempts"] < 3)


def compare(records: Records, received_ids: Iterable[str], owners: set[str]) -> Findings:
    """`received_ids` are the generation ids that reached a client; `owners` are the ids of the running processes."""
    found = Findings(states=Counter(hold["state"] for hold in records.holds))
    holds_of_job: dict[str, list[asyncpg.Record]] = defaultdict(list)
    for hold in records.holds:
        holds_of_job[job_of(hold)].append(hold)
    hold_by_id = {hold["hold_id"]: hold for hold in records.holds}

    for generation_id, count in Counter(charge["generation_id"] for charge in records.charges).items():
        if count > 1:
            found.errors.append(f"{generation_id} is charged {count} times")
    for charge in records.charges:
        _compare_charge(charge, records.bills.get(charge["generation_id"]), hold_by_id[charge["entry_id"]], found)

    bills_of_job = Counter(bill["job_id"] for bill in records.bills.values())
    found.errors += [f"{job_id} was billed {count} times" for job_id, count in bills_of_job.items() if count > 1]
    charged = {charge["generation_id"] for charge in records.charges}
    for bill in records.bills.values():
        if bill["id"] not in charged:
            _check_uncharged_bill(bill, holds_of_job[bill["job_id"]], found)
    found.errors += [
        f"{generation_id} reached a client, and is not charged" for generation_id in received_ids if generation_id not in charged
    ]

    for hold in records.open_holds:
        found.waiting[_why_open(hold, bills_of_job, owners)].append(hold)
    late = found.waiting.get(NOT_SETTLED, [])
    found.errors += [f"{hold['generation_id']} is known, and was not settled in time" for hold in late]
    for hold in records.holds:
        if hold["is_unresolved"]:
            found.errors.append(f"the hold of {hold['request_id']} was given up, long before its deadline")
    return found


def _compare_charge(charge: asyncpg.Record, bill: dict[str, Any] | None, hold: asyncpg.Record, found: Findings) -> None:
    if bill is None:
        found.errors.append(f"a charge without a bill: {dict(charge)}")
        return
    found.compared += 1
    found.charged_usd += charge["cost_usd"]
    found.difference_usd += abs(charge["cost_usd"] - Decimal(bill["cost_usd"]))
    if charge["cost_usd"] != Decimal(bill["cost_usd"]):
        found.errors.append(f"{bill['id']} costs {bill['cost_usd']}, and {charge['cost_usd']} is charged: {bill}")
    if job_of(hold) != bill["job_id"]:
        found.errors.append(f"{bill['id']} is charged to {hold['request_id']}, and was billed for {bill['job_id']}")
    if bill["user"] != _pseudonym(charge["account_id"]):
        found.errors.append(f"{bill['id']} is charged to account {charge['account_id']}, which did not request it")


def _check_uncharged_bill(bill: dict[str, Any], holds: list[asyncpg.Record], found: Findings) -> None:
    """A bill without a charge must have an open hold that covers it and has no generation id yet."""
    waiting = [hold for hold in holds if hold["state"] == "open" and hold["is_handed_over"] and hold["generation_id"] is None]
    if len(waiting) != 1:
        states = [(hold["request_id"], hold["state"], hold["is_handed_over"], hold["generation_id"]) for hold in holds]
        found.errors.append(f"no charge and no waiting hold for {bill}; its holds: {states or 'none'}")
        return
    (hold,) = waiting
    found.unidentified_bills += 1
    found.unidentified_usd += Decimal(bill["cost_usd"])
    found.unidentified_held_nano += hold["amount_nano"]
    if Decimal(bill["cost_usd"]) * hold["rub_per_usd"] * NANO > hold["amount_nano"]:
        found.errors.append(f"the hold of {hold['request_id']} does not cover its bill: {hold['amount_nano']} for {bill}")
    if bill["user"] != _pseudonym(hold["account_id"]):
        found.errors.append(f"{bill['id']} waits for account {hold['account_id']}, which did not request it")


def _why_open(hold: asyncpg.Record, bills_of_job: Counter[str], owners: set[str]) -> str:
    is_billed = bills_of_job[job_of(hold)] > 0
    if hold["generation_id"] is not None:
        return NOT_SETTLED
    if not hold["is_handed_over"]:
        owner = "a running worker" if str(hold["owner"]) in owners else "a dead worker, whose journal is gone"
        return f"not known to be sent; owned by {owner}"
    return "sent, but the generation id never arrived; " + ("billed by OpenRouter" if is_billed else "not billed by OpenRouter")


def _pseudonym(account_id: int) -> str:
    return hmac.new(derived_key(SECRET, b"pseudonym"), b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]


def leftovers(data: Path) -> list[str]:
    """Journals that remain after an orderly shutdown, which must leave none."""
    errors = []
    for slot in sorted((data / JOURNALS).iterdir()):
        for leftover in read_journals(slot):
            errors.append(f"the journal of {leftover.owner} remains, with {len(leftover.open_holds)} holds")
    return errors
