"""What goes wrong from outside: workers are killed, PostgreSQL crashes, and money is paid in all the while."""

import asyncio
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from gptutor.database import pool
from gptutor.database.errors import DatabaseUnavailable
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.bookings import AlreadyBooked, Bookings
from gptutor.money.invariants import check
from tests.chaos.callers import Account
from tests.chaos.stage import Postgres, Worker

KILL_EVERY_S = (0.3, 1.5)
CRASH_EVERY_S = (4.0, 10.0)
DOWN_S = (0.0, 0.2, 2.0)
POLITE = 0.1
"""How often a kill is announced by SIGTERM, and comes in the middle of the orderly end."""
BOOTING = 0.1
"""How often it meets a worker that is still starting, replaying its predecessor's journal perhaps."""


@dataclass
class Storm:
    crew: list[Worker]
    postgres: Postgres
    dice: random.Random
    kills: int = 0
    kills_booting: int = 0
    crashes: int = 0
    checks: int = 0
    paid: dict[int, int] = field(default_factory=dict)
    """How many top-ups of one rouble each account got."""
    broken: list[str] = field(default_factory=list)
    """Invariants that did not hold in the middle of the storm."""

    async def rage(self, is_over: Callable[[], bool], poor: list[Account]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill(is_over))
            group.create_task(self._crash(is_over))
            group.create_task(self._pay(is_over, poor))
            group.create_task(self._check(is_over))

    async def _kill(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.sleep(self.dice.uniform(*KILL_EVERY_S))
            ready = [worker for worker in self.crew if worker.is_listening]
            if not ready or self.dice.random() < BOOTING:
                ready = self.crew
            victim = self.dice.choice(ready)
            if not victim.is_listening:
                self.kills_booting += 1
            if self.dice.random() < POLITE:
                victim.kill(signal.SIGTERM)
                await asyncio.sleep(self.dice.uniform(0.05, 1.0))
            victim.kill()
            victim.is_listening = False
            self.kills += 1

    async def _crash(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.sleep(self.dice.uniform(*CRASH_EVERY_S))
            await asyncio.to_thread(self.postgres.crash)
            await asyncio.sleep(self.dice.choice(DOWN_S))
            await asyncio.to_thread(self.postgres.start)
            self.crashes += 1

    async def _pay(self, is_over: Callable[[], bool], poor: list[Account]) -> None:
        """Each payment is booked until it is certain that it is: a repeated reference books nothing."""
        number = 0
        while not is_over():
            await asyncio.sleep(self.dice.uniform(0.2, 1.0))
            account = self.dice.choice(poor)
            number += 1
            while True:
                try:
                    async with pool.open_database(self.postgres.url, connections_min=0) as connected:
                        await Bookings(connected).book(
                            AccountId(account.account_id), "topup", Nano(10**9), reference=f"payment-{number}"
                        )
                except AlreadyBooked:
                    break
                except DatabaseUnavailable:
                    await asyncio.sleep(0.2)
            self.paid[account.account_id] = self.paid.get(account.account_id, 0) + 1

    async def _check(self, is_over: Callable[[], bool]) -> None:
        """All invariants, in the middle of it; while the database is away there is nothing to see."""
        while not is_over():
            await asyncio.sleep(5)
            try:
                self.broken += await broken_invariants(self.postgres.url)
                self.checks += 1
            except DatabaseUnavailable:
                continue


async def broken_invariants(url: str) -> list[str]:
    """Raises DatabaseUnavailable."""
    async with pool.open_database(url, connections_min=0) as connected:
        return [
            f"invariant {finding.invariant.name}: {finding.invariant.meaning} {finding.rows}"
            async for finding in check(connected)
            if finding.rows
        ]
