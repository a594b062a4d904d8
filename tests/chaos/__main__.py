"""`python -m tests.chaos`: a storm, and its audit. Exits with 1 if a single nano-rouble is not where it belongs."""

import argparse
import asyncio
import contextlib
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import asyncpg
import orjson

from gptutor.database import migrations, pool
from gptutor.money.amounts import parse_roubles, roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import UserRepository
from gptutor.money.vault import Vault
from tests.chaos import audit
from tests.chaos.callers import Account, Callers
from tests.chaos.proxy import Proxy, proxied
from tests.chaos.stage import SECRET, Postgres, all_listening, free_port, postgres, simulator, workers
from tests.chaos.storm import Storm, broken_invariants

RICH, POOR = 5, 2
PROGRESS_S = 5.0
STOP_S = 30.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="A storm over real processes, and an audit of the books."
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long the storm lasts (60)")
    parser.add_argument("--seed", type=int, default=None, help="the dice; without one they are new, and printed")
    parser.add_argument("--workers", type=int, default=2, help="gateway processes (2)")
    parser.add_argument("--callers", type=int, default=32, help="callers at once (32)")
    parser.add_argument("--kills-at-least", type=int, default=0, help="go on until so many workers were killed")
    parser.add_argument("--crashes-at-least", type=int, default=0, help="go on until PostgreSQL has crashed so often")
    parser.add_argument("--patience", type=float, default=120, help="seconds that recovery has afterwards (120)")
    parser.add_argument("--hurry", action="store_true", help="do not wait for holds that recovery looks at only in a minute")
    parser.add_argument("--list", action="store_true", help="list every hold that is left waiting, not only their reasons")
    parser.add_argument("--keep", action="store_true", help="keep the directory with logs and journals")
    return parser.parse_args()


async def make_accounts(url: str, dice: random.Random) -> list[Account]:
    await migrations.migrate(url)
    accounts = []
    async with pool.open_database(url) as connected:
        users, bookings = UserRepository(connected), Bookings(connected)
        for number in range(RICH + POOR):
            user = await users.create(f"user {number}")
            await bookings.book(user.account_id, "topup", parse_roubles("10000" if number < RICH else "3"))
            key, _ = await KeyRing(connected, Vault([SECRET])).issue(user.account_id)
            accounts.append(Account(key, user.account_id, is_poor=number >= RICH))
    dice.shuffle(accounts)
    return accounts


async def run(chosen: argparse.Namespace, directory: Path, server: Postgres) -> list[str]:
    """Gives the faults that were found."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    dice = random.Random(chosen.seed)
    accounts = await make_accounts(server.url, dice)
    async with (
        proxied(server.socket, random.Random(dice.random())) as proxy,
        simulator(free_port(dice), directory / "simulator.out") as oracle,
        workers(chosen.workers, directory, proxy.url, oracle, dice) as crew,
    ):
        callers = Callers(accounts, crew, random.Random(dice.random()))
        storm = Storm(crew, server, random.Random(dice.random()))
        began = time.monotonic()

        def is_over() -> bool:
            if storm.kills < chosen.kills_at_least or storm.crashes < chosen.crashes_at_least:
                return False
            return time.monotonic() - began >= float(chosen.seconds)

        progress = asyncio.create_task(_progress(began, callers, storm, proxy))
        try:
            await all_listening(crew)
            async with asyncio.TaskGroup() as group:
                group.create_task(storm.rage(is_over, [account for account in accounts if account.is_poor]))
                group.create_task(callers.call(chosen.callers, is_over))
        finally:
            progress.cancel()
        lasted = time.monotonic() - began
        proxy.calm = True
        print(f"{lasted:6.1f} s  calm: the callers have gone, recovery has at most {chosen.patience:.0f} s", flush=True)
        await all_listening(crew)
        data = directory / "var"
        books = await audit.settled(server.url, oracle, data, len(crew), chosen.patience, hurry=chosen.hurry)
        for bill in books.bills.values():
            bill["wish"] = callers.wishes.get(bill["ask"])
        found = audit.compare(books, callers.names, audit.owners_alive(data))
        broken = storm.broken + await broken_invariants(server.url)
        codes = await asyncio.gather(*(worker.stop(STOP_S) for worker in crew))
        found.faults += [f"a worker was asked to stop, and ended with {code}" for code in codes if code != 0]
        found.faults += [death for worker in crew for death in worker.deaths]
        found.faults += audit.leftovers(data) + _payments(books, accounts, storm)

    _report(chosen, lasted, callers, storm, proxy, books, found)
    print(f"  exceptions in logs    {_told(exceptions(directory / 'logs'))}")
    print(f"  invariants broken     {len(broken)}, in {storm.checks} checks meanwhile and one at the end")
    return found.faults + broken


def _report(
    chosen: argparse.Namespace,
    lasted: float,
    callers: Callers,
    storm: Storm,
    proxy: Proxy,
    books: audit.Books,
    found: audit.Findings,
) -> None:
    print(f"\nseed {chosen.seed}: {lasted:.0f} s, {chosen.workers} workers, {callers.requests} requests for {callers.asks} asks")
    print(f"  callers saw           {_told(callers.outcomes)}")
    print(f"  workers killed        {storm.kills}, {storm.kills_booting} of them while starting")
    print(f"  database crashes      {storm.crashes}")
    print(f"  statements            {_told(proxy.done)}")
    print(f"  holds                 {_told(found.states)}; {len(books.bills)} generations at OpenRouter")
    print(f"  charges compared      {found.compared}, together {found.charged_usd:f} dollars")
    print(f"  difference            {found.difference_usd.normalize():f} dollars")
    print(f"  bills without a name  {found.unnamed_bills}, together {found.unnamed_usd:f} dollars")
    print(f"  … at most lost        {roubles(found.unnamed_bound_nano)} roubles, which their holds cover")
    print(f"  holds left waiting    {sum(map(len, found.waiting.values()))}")
    for reason, holds in found.waiting.items():
        print(f"    {len(holds):>5}  {reason}; at most {_sum(holds)} roubles")
        print(f"           {_told(Counter(_wish(hold, callers).partition('=')[0] for hold in holds))}")
        for hold in holds if chosen.list else ():
            print(
                f"           {hold['created_at']:%H:%M:%S}  {hold['request_id']:<12} {_wish(hold, callers):<24} {_sum([hold]):>12}"
            )


async def _progress(began: float, callers: Callers, storm: Storm, proxy: Proxy) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        print(
            f"{time.monotonic() - began:6.1f} s  {callers.requests} requests, {callers.outcomes['200']} answers in full, "
            f"{callers.outcomes['left']} callers left; {storm.kills} kills, {storm.crashes} crashes of the database, "
            f"{proxy.done['reply lost']} commits unknown, {len(storm.broken)} invariants broken",
            flush=True,
        )


def _payments(books: audit.Books, accounts: list[Account], storm: Storm) -> list[str]:
    """Every payment is booked once, whatever happened while it was."""
    faults = []
    for account in accounts:
        due = (3 if account.is_poor else 10_000) + storm.paid.get(account.account_id, 0)
        if books.topups[account.account_id] != due * audit.NANO:
            faults.append(
                f"account {account.account_id} paid {due} roubles, and {books.topups[account.account_id]} nano are booked"
            )
    return faults


def exceptions(directory: Path) -> Counter[str]:
    """Tracebacks in the workers' log, by their last lines: material for a developer, not a verdict."""
    seen: Counter[str] = Counter()
    for path in directory.glob("combined-*.log"):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):  # a kill may tear a line
                record = orjson.loads(line)
                if "exc_info" in record:
                    seen[f"{record['message']}: {record['exc_info'].strip().splitlines()[-1]}"] += 1
    return seen


def _wish(hold: asyncpg.Record, callers: Callers) -> str:
    return callers.wishes[audit.ask_of(hold)]


def _sum(holds: list[asyncpg.Record]) -> str:
    return roubles(sum(hold["amount_nano"] for hold in holds))


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in sorted(counts.items())) or "none"


def main() -> int:
    chosen = options()
    if chosen.seed is None:
        chosen.seed = secrets.randbelow(10**6)
    print(f"chaos with seed {chosen.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        if chosen.keep:
            directory = Path(tempfile.mkdtemp(prefix="gptutor-chaos-"))
            print(f"kept in {directory}", flush=True)
        else:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="gptutor-chaos-", ignore_cleanup_errors=True))
            )
        server = stack.enter_context(postgres(directory / "postgres"))
        try:
            faults = asyncio.run(run(chosen, directory, server))
        except asyncio.CancelledError:
            print("Interrupted; everything is stopped.")
            return 130
    for fault in faults:
        print(f"FAULT {fault}")
    if faults:
        print(
            f"{len(faults)} faults. The same dice again: python -m tests.chaos --seed {chosen.seed} --seconds {chosen.seconds:.0f}"
        )
        return 1
    print("Every nano-rouble is where it belongs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
