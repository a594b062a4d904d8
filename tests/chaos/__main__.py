"""`python -m tests.chaos`: a storm and its audit. Exits with 1 if any nano-rouble is not accounted for."""

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
from tests.chaos.clients import Account, Clients
from tests.chaos.processes import SECRET, Postgres, all_listening, free_port, postgres, simulator, workers
from tests.chaos.proxy import Proxy, proxied
from tests.chaos.storm import Storm, violated_invariants

RICH, POOR = 5, 2
PROGRESS_S = 5.0
STOP_S = 30.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Injects faults into real processes under load, then compares the ledger with OpenRouter's bills.",
    )
    parser.add_argument("--seconds", type=float, default=60, help="duration of the storm (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="random seed (default: a new one, which is printed)")
    parser.add_argument("--workers", type=int, default=2, help="gateway processes (default: 2)")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients (default: 32)")
    parser.add_argument("--kills-at-least", type=int, default=0, help="continue until at least this many workers were killed")
    parser.add_argument(
        "--crashes-at-least", type=int, default=0, help="continue until PostgreSQL has crashed at least this often"
    )
    parser.add_argument("--recovery-s", type=float, default=120, help="seconds that recovery may take afterwards (default: 120)")
    parser.add_argument(
        "--skip-slow-holds", action="store_true", help="do not wait for holds that recovery looks at only after a minute"
    )
    parser.add_argument("--list", action="store_true", help="list every hold that remains open, not only the reasons")
    parser.add_argument("--keep", action="store_true", help="keep the directory with logs and journals")
    return parser.parse_args()


async def make_accounts(url: str, rng: random.Random) -> list[Account]:
    await migrations.migrate(url)
    accounts = []
    async with pool.open_database(url) as database:
        users, bookings = UserRepository(database), Bookings(database)
        for number in range(RICH + POOR):
            user = await users.create(f"user {number}")
            await bookings.book(user.account_id, "topup", parse_roubles("10000" if number < RICH else "3"))
            key, _ = await KeyRing(database, Vault([SECRET])).issue(user.account_id)
            accounts.append(Account(key, user.account_id, is_poor=number >= RICH))
    rng.shuffle(accounts)
    return accounts


async def run(arguments: argparse.Namespace, directory: Path, server: Postgres) -> list[str]:
    """Returns descriptions of all errors that were found."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    rng = random.Random(arguments.seed)
    accounts = await make_accounts(server.url, rng)
    async with (
        proxied(server.socket, random.Random(rng.random())) as proxy,
        simulator(free_port(rng), directory / "simulator.out") as simulator_url,
        workers(arguments.workers, directory, proxy.url, simulator_url, rng) as running,
    ):
        clients = Clients(accounts, running, random.Random(rng.random()))
        storm = Storm(running, server, random.Random(rng.random()))
        started = time.monotonic()

        def is_over() -> bool:
            if storm.kills < arguments.kills_at_least or storm.crashes < arguments.crashes_at_least:
                return False
            return time.monotonic() - started >= float(arguments.seconds)

        progress = asyncio.create_task(_progress(started, clients, storm, proxy))
        try:
            await all_listening(running)
            async with asyncio.TaskGroup() as group:
                group.create_task(storm.run(is_over, [account for account in accounts if account.is_poor]))
                group.create_task(clients.run(arguments.clients, is_over))
        finally:
            progress.cancel()
        lasted = time.monotonic() - started
        proxy.is_calm = True
        print(f"{lasted:6.1f} s  storm over: waiting at most {arguments.recovery_s:.0f} s for recovery", flush=True)
        await all_listening(running)
        data = directory / "var"
        records = await audit.wait_for_recovery(
            server.url, simulator_url, data, len(running), arguments.recovery_s, skip_slow_holds=arguments.skip_slow_holds
        )
        for bill in records.bills.values():
            bill["description"] = clients.descriptions.get(bill["job_id"])
        found = audit.compare(records, clients.generation_ids, audit.running_owners(data))
        violations = storm.violations + await violated_invariants(server.url)
        codes = await asyncio.gather(*(worker.stop(STOP_S) for worker in running))
        found.errors += [f"a worker exited with {code} after SIGTERM" for code in codes if code != 0]
        found.errors += [exit_text for worker in running for exit_text in worker.unexpected_exits]
        found.errors += audit.leftovers(data) + _payment_errors(records, accounts, storm)

    _report(arguments, lasted, clients, storm, proxy, records, found)
    print(f"  exceptions in logs    {_summary(exceptions(directory / 'logs'))}")
    print(f"  invariants violated   {len(violations)}, in {storm.checks} checks during the storm and one at the end")
    return found.errors + violations


def _report(
    arguments: argparse.Namespace,
    lasted: float,
    clients: Clients,
    storm: Storm,
    proxy: Proxy,
    records: audit.Records,
    found: audit.Findings,
) -> None:
    print(
        f"\nseed {arguments.seed}: {lasted:.0f} s, {arguments.workers} workers, {clients.requests} requests for {clients.jobs} jobs"
    )
    print(f"  responses             {_summary(clients.outcomes)}")
    print(f"  workers killed        {storm.kills}, {storm.kills_while_starting} of them while starting")
    print(f"  database crashes      {storm.crashes}")
    print(f"  statements            {_summary(proxy.counts)}")
    print(f"  holds                 {_summary(found.states)}; {len(records.bills)} generations at OpenRouter")
    print(f"  charges compared      {found.compared}, together {found.charged_usd:f} dollars")
    print(f"  difference            {found.difference_usd.normalize():f} dollars")
    print(f"  unidentified bills    {found.unidentified_bills}, together {found.unidentified_usd:f} dollars")
    print(f"  … their holds         {roubles(found.unidentified_held_nano)} roubles, the most that can be lost")
    print(f"  holds still open      {sum(map(len, found.waiting.values()))}")
    for reason, holds in found.waiting.items():
        print(f"    {len(holds):>5}  {reason}; at most {_sum(holds)} roubles")
        print(f"           {_summary(Counter(_description(hold, clients).partition('=')[0] for hold in holds))}")
        for hold in holds if arguments.list else ():
            print(
                f"           {hold['created_at']:%H:%M:%S}  {hold['request_id']:<12} {_description(hold, clients):<24} {_sum([hold]):>12}"
            )


async def _progress(started: float, clients: Clients, storm: Storm, proxy: Proxy) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        print(
            f"{time.monotonic() - started:6.1f} s  {clients.requests} requests, {clients.outcomes['200']} complete responses, "
            f"{clients.outcomes['disconnected']} disconnected; {storm.kills} kills, {storm.crashes} crashes of the database, "
            f"{proxy.counts['reply lost']} commit replies lost, {len(storm.violations)} invariants violated",
            flush=True,
        )


def _payment_errors(records: audit.Records, accounts: list[Account], storm: Storm) -> list[str]:
    """Descriptions of accounts whose payments are not booked exactly once."""
    errors = []
    for account in accounts:
        due = (3 if account.is_poor else 10_000) + storm.paid.get(account.account_id, 0)
        if records.topups[account.account_id] != due * audit.NANO:
            errors.append(
                f"account {account.account_id} paid {due} roubles, but {records.topups[account.account_id]} nano-roubles are booked"
            )
    return errors


def exceptions(directory: Path) -> Counter[str]:
    """Exceptions in the workers' log, by message and last line. They are information, not errors of the test."""
    counts: Counter[str] = Counter()
    for path in directory.glob("combined-*.log"):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):  # a kill may tear a line
                record = orjson.loads(line)
                if "exc_info" in record:
                    counts[f"{record['message']}: {record['exc_info'].strip().splitlines()[-1]}"] += 1
    return counts


def _description(hold: asyncpg.Record, clients: Clients) -> str:
    return clients.descriptions[audit.job_of(hold)]


def _sum(holds: list[asyncpg.Record]) -> str:
    return roubles(sum(hold["amount_nano"] for hold in holds))


def _summary(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def main() -> int:
    arguments = parse_arguments()
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(10**6)
    print(f"chaos with seed {arguments.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            directory = Path(tempfile.mkdtemp(prefix="gptutor-chaos-"))
            print(f"kept in {directory}", flush=True)
        else:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="gptutor-chaos-", ignore_cleanup_errors=True))
            )
        server = stack.enter_context(postgres(directory / "postgres"))
        try:
            errors = asyncio.run(run(arguments, directory, server))
        except asyncio.CancelledError:
            print("Interrupted; all processes are stopped.")
            return 130
    for error in errors:
        print(f"ERROR {error}")
    if errors:
        print(
            f"{len(errors)} errors. Run with the same seed: python -m tests.chaos --seed {arguments.seed} --seconds {arguments.seconds:.0f}"
        )
        return 1
    print("Every nano-rouble is accounted for.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
