"""Our books against the simulator's, request by request.

The simulator knows every generation, its cost, the text that was asked and the pseudonym it was asked under. We know every charge
and every hold, and each hold carries the number of the ask. So for every bill there is one of two answers:

    charged     one entry in the ledger: this generation, this cost to the last digit, this ask, this account
    waiting     the hold of this ask is still open: it was sent, and the worker died before OpenRouter's name for it arrived;
                it covers the bill, is listed, and is the most that can be lost

Anything else is a fault, and so is a charge that no bill stands behind.
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

from gptutor.app import JOURNALS, derived_key
from gptutor.money.journal import read_slot
from tests.chaos.stage import SECRET

NANO = 10**9
STEADY_S = 2.0
EXCHANGE_S = 12.0
"""An exchange is over by then, whatever happened to it."""
NOT_SETTLED = "named, and not settled in time"
HOLDS = """
SELECT account_id, hold_id, owner, state::text, is_handed_over, recovery_attempts, request_id, generation_id, amount_nano, rub_per_usd, is_unresolved,
    created_at, extract(EPOCH FROM now() - created_at)::float AS age_s
FROM holds ORDER BY created_at
"""
CHARGES = "SELECT account_id, entry_id, generation_id, cost_usd, amount_nano FROM ledger WHERE kind = 'charge'"
TOPUPS = "SELECT account_id, sum(amount_nano)::bigint AS nano FROM ledger WHERE kind = 'topup' GROUP BY account_id"


@dataclass
class Books:
    """Both sides, read when nothing moves any more."""

    bills: dict[str, dict[str, Any]]
    holds: list[asyncpg.Record]
    charges: list[asyncpg.Record]
    topups: dict[int, int]

    @property
    def open_holds(self) -> list[asyncpg.Record]:
        return [hold for hold in self.holds if hold["state"] == "open"]


@dataclass
class Findings:
    faults: list[str] = field(default_factory=list)
    waiting: dict[str, list[asyncpg.Record]] = field(default_factory=lambda: defaultdict(list))
    """Open holds by the reason why they are still open."""
    compared: int = 0
    charged_usd: Decimal = Decimal(0)
    difference_usd: Decimal = Decimal(0)
    unnamed_bills: int = 0
    unnamed_usd: Decimal = Decimal(0)
    unnamed_bound_nano: int = 0
    states: Counter[str] = field(default_factory=Counter)


async def read_books(url: str, oracle: str) -> Books:
    async with aiohttp.ClientSession() as session, session.get(f"{oracle}/simulator/bills") as response:
        bills = {bill["id"]: bill for bill in await response.json()}
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            holds, charges = await connection.fetch(HOLDS), await connection.fetch(CHARGES)
            topups = {row["account_id"]: row["nano"] for row in await connection.fetch(TOPUPS)}
    finally:
        await connection.close()
    return Books(bills, holds, charges, topups)


def ask_of(hold: asyncpg.Record) -> str:
    """A request id is the ask's name and the number of the attempt."""
    ask: str = hold["request_id"].partition(".")[0]
    return ask


def journals_of_the_dead(data: Path, living: int) -> int:
    """How many journals more than one for each living worker there are."""
    return max(0, len(list((data / JOURNALS).glob("*/*.log"))) - living)


def owners_alive(data: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (data / JOURNALS).glob("*/*.log")}


async def settled(url: str, oracle: str, data: Path, living: int, within_s: float, *, hurry: bool) -> Books:
    """Waits, in calm weather, until recovery has done all that it can: then the books stand still. Gives them at any rate.

    A hold that nobody has handed over is looked at when its time is up, which is more than a minute: not waited for in a `hurry`.
    """
    clock = asyncio.get_running_loop().time
    deadline, quiet_since = clock() + within_s, clock()
    last: Any = None
    while True:
        books = await read_books(url, oracle)
        moving = (
            [hold["hold_id"] for hold in books.open_holds if hold["generation_id"]],
            [hold["hold_id"] for hold in books.open_holds if _may_be_handed_over(hold, hurry=hurry)],
            [bill["id"] for bill in books.bills.values() if not bill["finished"]],
            journals_of_the_dead(data, living),
        )
        if any(moving) or (moving, len(books.charges), len(books.open_holds)) != last:
            quiet_since = clock()
        if clock() - quiet_since >= STEADY_S or clock() > deadline:
            return books
        last = (moving, len(books.charges), len(books.open_holds))
        await asyncio.sleep(0.5)


def _may_be_handed_over(hold: asyncpg.Record, *, hurry: bool) -> bool:
    return not hold["is_handed_over"] and (hold["age_s"] < EXCHANGE_S if hurry else hold["recovery_attempts"] < 3)


def compare(books: Books, names_heard: Iterable[str], owners: set[str]) -> Findings:
    """`names_heard` are generations whose name reached a caller; `owners` are the processes that live."""
    found = Findings(states=Counter(hold["state"] for hold in books.holds))
    holds_of_ask: dict[str, list[asyncpg.Record]] = defaultdict(list)
    for hold in books.holds:
        holds_of_ask[ask_of(hold)].append(hold)
    hold_by_id = {hold["hold_id"]: hold for hold in books.holds}

    for name, count in Counter(charge["generation_id"] for charge in books.charges).items():
        if count > 1:
            found.faults.append(f"{name} is charged {count} times")
    for charge in books.charges:
        _compare_charge(charge, books.bills.get(charge["generation_id"]), hold_by_id[charge["entry_id"]], found)

    asked = Counter(bill["ask"] for bill in books.bills.values())
    found.faults += [f"{ask} was bought {count} times" for ask, count in asked.items() if count > 1]
    charged = {charge["generation_id"] for charge in books.charges}
    for bill in books.bills.values():
        if bill["id"] not in charged:
            _explain(bill, holds_of_ask[bill["ask"]], found)
    found.faults += [f"{name} reached a caller, and is not charged" for name in names_heard if name not in charged]

    for hold in books.open_holds:
        found.waiting[_reason(hold, asked, owners)].append(hold)
    late = found.waiting.get(NOT_SETTLED, [])
    found.faults += [f"{hold['generation_id']} is known by name, and was not settled in time" for hold in late]
    for hold in books.holds:
        if hold["is_unresolved"]:
            found.faults.append(f"the hold of {hold['request_id']} was given up, long before its day was over")
    return found


def _compare_charge(charge: asyncpg.Record, bill: dict[str, Any] | None, hold: asyncpg.Record, found: Findings) -> None:
    if bill is None:
        found.faults.append(f"a charge without a bill: {dict(charge)}")
        return
    found.compared += 1
    found.charged_usd += charge["cost_usd"]
    found.difference_usd += abs(charge["cost_usd"] - Decimal(bill["cost_usd"]))
    if charge["cost_usd"] != Decimal(bill["cost_usd"]):
        found.faults.append(f"{bill['id']} costs {bill['cost_usd']}, and {charge['cost_usd']} is charged: {bill}")
    if ask_of(hold) != bill["ask"]:
        found.faults.append(f"{bill['id']} is charged to {hold['request_id']}, and was bought by {bill['ask']}")
    if bill["user"] != _pseudonym(charge["account_id"]):
        found.faults.append(f"{bill['id']} is charged to account {charge['account_id']}, who did not ask for it")


def _explain(bill: dict[str, Any], holds: list[asyncpg.Record], found: Findings) -> None:
    """A bill that nobody is charged for must have its hold open, large enough, and without a name."""
    waiting = [hold for hold in holds if hold["state"] == "open" and hold["is_handed_over"] and hold["generation_id"] is None]
    if len(waiting) != 1:
        seen = [(hold["request_id"], hold["state"], hold["is_handed_over"], hold["generation_id"]) for hold in holds]
        found.faults.append(f"nobody is charged for {bill}, and no hold waits for it; its holds: {seen or 'none'}")
        return
    (hold,) = waiting
    found.unnamed_bills += 1
    found.unnamed_usd += Decimal(bill["cost_usd"])
    found.unnamed_bound_nano += hold["amount_nano"]
    if Decimal(bill["cost_usd"]) * hold["rub_per_usd"] * NANO > hold["amount_nano"]:
        found.faults.append(f"the hold of {hold['request_id']} does not cover its bill: {hold['amount_nano']} for {bill}")
    if bill["user"] != _pseudonym(hold["account_id"]):
        found.faults.append(f"{bill['id']} waits for account {hold['account_id']}, who did not ask for it")


def _reason(hold: asyncpg.Record, asked: Counter[str], owners: set[str]) -> str:
    is_billed = asked[ask_of(hold)] > 0
    if hold["generation_id"] is not None:
        return NOT_SETTLED
    if not hold["is_handed_over"]:
        owner = "a living worker" if str(hold["owner"]) in owners else "a dead worker, whose journal is gone"
        return f"never sent, as far as is known; it belongs to {owner}"
    return "sent, and its name never came; " + ("OpenRouter has billed it" if is_billed else "OpenRouter has no bill")


def _pseudonym(account_id: int) -> str:
    return hmac.new(derived_key(SECRET, b"pseudonym"), b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]


def leftovers(data: Path) -> list[str]:
    """What an orderly end leaves in the journals: nothing, but for locks."""
    left = []
    for slot in sorted((data / JOURNALS).iterdir()):
        for leftover in read_slot(slot):
            left.append(f"the journal of {leftover.owner} was left behind, with {len(leftover.known)} holds")
    return left
