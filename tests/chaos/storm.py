"""Faults from outside: workers are killed and PostgreSQL crashes, while payments are booked and invariants checked."""

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
from tests.chaos.clients import Account
from tests.chaos.processes import Postgres, Worker

KILL_EVERY_S = (0.3, 1.5)
CRASH_EVERY_S = (4.0, 10.0)
DOWN_S = (0.0, 0.2, 2.0)
SIGTERM_PROBABILITY = 0.1
"""How often SIGTERM precedes a kill, which then interrupts the orderly shutdown."""
STARTING_PROBABILITY = 0.1
"""How often a kill may hit a worker that is still starting, and perhaps replaying its predecessor's journal."""


@dataclass
class Storm:
    workers: list[Worker]
    postgres: Postgres
    rng: random.Random
    kills: int = 0
    kills_while_starting: int = 0
    crashes: int = 0
    checks: int = 0
    paid: dict[int, int] = field(default_factory=dict)
    """Account id → number of its top-ups of one rouble."""
    violations: list[str] = field(default_factory=list)
    """Invariants that were violated during the storm."""

    async def run(self, is_over: Callable[[], bool], poor: list[Account]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill(is_over))
            group.create_task(self._crash(is_over))
            group.create_task(self._pay(is_over, poor))
            group.create_task(self._check(is_over))

    async def _kill(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.sleep(self.rng.uniform(*KILL_EVERY_S))
            candidates = [worker for worker in self.workers if worker.is_listening]
            if not candidates or self.rng.random() < STARTING_PROBABILITY:
                candidates = self.workers
            victim = self.rng.choice(candidates)
            if not victim.is_listening:
                self.kills_while_starting += 1
            if self.rng.random() < SIGTERM_PROBABILITY:
                victim.kill(signal.SIGTERM)
                await asyncio.sleep(self.rng.uniform(0.05, 1.0))
            victim.kill()
            victim.is_listening = False
            self.kills += 1

    async def _crash(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.sleep(self.rng.uniform(*CRASH_EVERY_S))
            await asyncio.to_thread(self.postgres.crash)
            await asyncio.sleep(self.rng.choice(DOWN_S))
            await asyncio.to_thread(self.postgres.start)
            self.crashes += 1

    async def _pay(self, is_over: Callable[[], bool], poor: list[Account]) -> None:
        """Repeats each booking until it is certain: a repeated reference is not booked again."""
        number = 0
        while not is_over():
            await asyncio.sleep(self.rng.uniform(0.2, 1.0))
            account = self.rng.choice(poor)
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
        """Checks all invariants every few seconds, whenever the database is available."""
        while not is_over():
            await asyncio.sleep(5)
            try:
                self.violations += await violated_invariants(self.postgres.url)
                self.checks += 1
            except DatabaseUnavailable:
                continue


async def violated_invariants(url: str) -> list[str]:
    """Descriptions of the invariants that are violated now. Raises DatabaseUnavailable."""
    async with pool.open_database(url, connections_min=0) as connected:
        return [
            f"invariant {finding.invariant.name}: {finding.invariant.meaning} {finding.rows}"
            async for finding in check(connected)
            if finding.rows
        ]
