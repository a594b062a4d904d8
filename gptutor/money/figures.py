"""Figures that only PostgreSQL knows, for the metrics: open holds, holds that wait for evidence, the sum of all balances.

One process of a machine reads them, every EVERY_S: the one that has the lock. No scrape waits for the database. While PostgreSQL
does not answer, the figures are absent. A reading takes an index's few open holds, and the next ACCOUNTS_MAX accounts: with more
users, the sum of their balances is that of the latest complete round.
"""

import asyncio
import fcntl
import logging
import os
from decimal import Decimal
from pathlib import Path

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.amounts import NANO_PER_RUB
from gptutor.telemetry.metrics import (
    BALANCES_ROUBLES,
    DATABASE_UP,
    OPEN_HOLDS,
    WAITING_HOLDS,
    WAITING_OLDEST,
    WAITING_ROUBLES,
)

LOGGER = logging.getLogger("gptutor.figures")
EVERY_S = 15.0
ACCOUNTS_MAX = 5000
LOCK = "figures.lock"
GAUGES = (OPEN_HOLDS, WAITING_HOLDS, WAITING_ROUBLES, WAITING_OLDEST, BALANCES_ROUBLES)


class Figures:
    """`folder` is the processes' common one for metrics."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._last_account_id = 0
        self._positive = self._negative = Decimal(0)
        """Nano-roubles, of this round so far."""

    async def run(self) -> None:
        """Runs until cancelled; reads while it has the lock, which it keeps."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                if _is_mine(lock):
                    await self.read_once()
                await asyncio.sleep(EVERY_S)
        finally:
            os.close(lock)
            for gauge in (*GAUGES, DATABASE_UP):
                gauge.clear()

    async def read_once(self) -> None:
        try:
            await self._read_holds()
            await self._read_balances()
            DATABASE_UP.set(1)
        except DatabaseUnavailable as error:
            LOGGER.warning("The figures for the metrics cannot be read: %s", error)
            self._forget()
        except Exception:
            LOGGER.exception("The figures for the metrics cannot be read")
            self._forget()

    def _forget(self) -> None:
        """No figure is better than an old one."""
        DATABASE_UP.set(0)
        for gauge in GAUGES:
            gauge.clear()
        self._begin_round()

    def _begin_round(self) -> None:
        self._last_account_id, self._positive, self._negative = 0, Decimal(0), Decimal(0)

    async def _read_holds(self) -> None:
        (row,) = await self._database.fetch("sum_open_holds")
        OPEN_HOLDS.set(row["open_holds"])
        WAITING_HOLDS.set(row["waiting"])
        WAITING_ROUBLES.set(row["waiting_nano"] / NANO_PER_RUB)
        WAITING_OLDEST.set(row["oldest_s"])

    async def _read_balances(self) -> None:
        (row,) = await self._database.fetch("sum_balances", self._last_account_id, ACCOUNTS_MAX)
        self._positive += row["positive_nano"]
        self._negative += row["negative_nano"]
        if row["accounts"] == ACCOUNTS_MAX:
            self._last_account_id = row["last_account_id"]
            return
        BALANCES_ROUBLES.set(float(self._positive) / NANO_PER_RUB, ("positive",))
        BALANCES_ROUBLES.set(float(self._negative) / NANO_PER_RUB, ("negative",))
        self._begin_round()


def _is_mine(lock: int) -> bool:
    """Whether this process has the lock, or takes it now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
